"""The Triton kernels against what every kernel is held to: the tests of the ops themselves.

Run by test_parity.py in a process of its own. Without a GPU the kernels run on CPU tensors under Triton's
interpreter, which must have been chosen before Triton is imported, and the tensors have the layout of a GPU's.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import test_fused_block
import test_generate_weights
import test_ragged_conv
import test_ragged_depthwise
import test_ragged_max_pool
import test_ragged_normalise
import test_score_logits
import torch
from ragged import moved

from kernels import backends, layout

OPS = (
    "fused_block",
    "generate_weights",
    "ragged_conv",
    "ragged_depthwise",
    "ragged_max_pool",
    "ragged_normalise",
    "score_logits",
)
LAUNCHERS: dict[str, Callable[..., Any]] = {
    op: getattr(importlib.import_module(f"kernels.{op}.triton"), f"{op}_triton") for op in OPS
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    """Every op is its Triton kernel, on a GPU if there is one."""

    def implementation(op: str, like: torch.Tensor) -> Callable[..., Any]:
        return lambda *args: moved(LAUNCHERS[op](*moved(args, DEVICE)), "cpu")

    monkeypatch.setattr(backends, "implementation", implementation)
    monkeypatch.setattr(layout, "channels_per_word", lambda dtype, device: 1)
    return "triton"


test_conv_dense = test_ragged_conv.test_each_subnetwork_equals_its_own_dense_convolution
test_conv_sums = test_ragged_conv.test_sums_are_those_of_the_bare_convolution
test_conv_alone = test_ragged_conv.test_a_subnetwork_computes_the_same_alone_and_in_a_batch
test_conv_padding = test_ragged_conv.test_the_padding_is_zero_after_the_input_is_normalised
test_conv_poison = test_ragged_conv.test_a_slot_of_weights_that_nobody_reads_may_hold_anything
test_depthwise_dense = test_ragged_depthwise.test_each_subnetwork_equals_its_own_dense_convolution
test_depthwise_sums = test_ragged_depthwise.test_sums_are_those_of_the_bare_convolution
test_depthwise_alone = test_ragged_depthwise.test_a_subnetwork_computes_the_same_alone_and_in_a_batch
test_generate_dense = test_generate_weights.test_each_subnetwork_equals_its_own_dense_product
test_generate_pads = test_generate_weights.test_pad_channels_are_zero
test_normalise_dense = test_ragged_normalise.test_each_subnetwork_equals_its_own_dense_normalisation
test_pool_dense = test_ragged_max_pool.test_each_subnetwork_equals_its_own_dense_pooling
test_score_dense = test_score_logits.test_each_image_is_scored_as_by_its_own_dense_classifier
test_score_nan = test_score_logits.test_an_image_with_a_nan_logit_is_never_correct
test_score_diverged = test_score_logits.test_one_diverged_image_leaves_the_others_their_scores
test_block_dense = test_fused_block.test_a_block_equals_its_dense_convolutions_one_after_another
