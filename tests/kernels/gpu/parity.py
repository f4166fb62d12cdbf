"""The kernels of a GPU against what every kernel is held to: the tests of the ops themselves.

Run by test_parity.py in a process of its own, for the kernels that GPU_KERNELS names: triton or cuda. Without a GPU
they run on CPU tensors that have the layout of a GPU's: Triton's under its interpreter, which must have been chosen
before Triton is imported, those in CUDA under emulation (emulated.py).
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import emulated
import pytest
import ragged
import test_fused_block
import test_generate_delayed
import test_generate_weights
import test_generated_conv
import test_ragged_conv
import test_ragged_conv_backward
import test_ragged_depthwise
import test_ragged_depthwise_backward
import test_ragged_max_pool
import test_ragged_max_pool_backward
import test_ragged_normalise
import test_ragged_normalise_backward
import test_score_logits
import test_update_generators
import torch
import triton.runtime.interpreter
from convolutions import SEPARABLE, Case, Form, blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_generators import Generator, late_generators

import kernels
from kernels import backends, layout
from kernels.fused_block.separable import is_separable
from kernels.registration import CUDA_NAMESPACE, REFERENCE_NAMESPACE, overload

TRITON_OPS = (
    "fused_block",
    "generate_delayed",
    "generate_weights",
    "generated_conv",
    "ragged_conv",
    "ragged_conv_backward",
    "ragged_depthwise",
    "ragged_depthwise_backward",
    "ragged_max_pool",
    "ragged_max_pool_backward",
    "ragged_normalise",
    "ragged_normalise_backward",
    "score_logits",
    "update_generators_",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def launchers() -> dict[str, Callable[..., Any]]:
    """By op, the kernel under test."""
    if ragged.GPU_KERNELS == "triton":
        modules = {op: importlib.import_module(backends._module(op, "triton")) for op in TRITON_OPS}
        return {op: getattr(module, f"{op.rstrip('_')}_triton") for op, module in modules.items()}
    if DEVICE == "cpu":
        emulated.load()
    return {op: overload(CUDA_NAMESPACE, op) for op in emulated.CUDA_OPS}


LAUNCHERS = launchers()


patch_tensors = triton.runtime.interpreter._patch_lang_tensor


def patch_tensors_and_index(tensor: Any, scope: Any) -> None:
    """As Triton 3.7 does it: in 3.6, a number of one dimension ends no loop where NumPy is 2.4 or later."""
    patch_tensors(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


triton.runtime.interpreter._patch_lang_tensor = patch_tensors_and_index


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Every op is its kernel under test, on a GPU if there is one, but where the reference is asked for."""
    op = getattr(sys.modules[request.function.__module__], "OP", None)
    if op is not None and op not in LAUNCHERS:
        pytest.skip(f"{op} has no {ragged.GPU_KERNELS} kernel")

    def implementation(op: str, like: torch.Tensor) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            there = ragged.moved(args, DEVICE)
            result = ragged.moved(LAUNCHERS[op](*there), "cpu")
            if op.endswith("_"):
                for here, changed in zip(args[:5], there, strict=False):
                    here.copy_(changed)
            return result

        return overload(REFERENCE_NAMESPACE, op) if backends._choice == "reference" else call

    monkeypatch.setattr(backends, "implementation", implementation)
    monkeypatch.setattr(layout, "channels_per_word", lambda dtype, device: 1)
    return ragged.GPU_KERNELS


only_cuda = pytest.mark.skipif(ragged.GPU_KERNELS != "cuda", reason="it is about the CUDA kernels")
needs_every_op = pytest.mark.skipif(ragged.GPU_KERNELS != "triton", reason="Triton has a kernel for every op")


@needs_every_op
@pytest.mark.parametrize("activation", ragged.ACTIVATIONS)
def test_a_nan_is_no_number_after_any_activation(activation: str) -> None:
    dense = torch.ones(1, 3, 2, 2)
    dense[0, 1, 0, 1] = ragged.NAN
    ones, first = torch.ones(1, 3), ragged.int32([0])
    y = kernels.ragged_normalise(
        kernels.pack_activations([dense], 3), ones, ones, ragged.int32([3]), first, image=(1, 2, 2), max_channels=3,
        activation=activation,
    )  # fmt: skip
    assert torch.equal(kernels.unpack_activations(y, [3], (1, 2, 2))[0].isnan(), dense.isnan())


def test_convolutions_of_several_tiles_in_every_direction_equal_their_references() -> None:
    image, out_image = (2, 13, 12), (2, 7, 6)
    conv = test_ragged_conv.arguments(torch.float32, [70, 33], [70, 40], image)
    depthwise = test_ragged_depthwise.arguments(torch.float32, [70, 33], image)
    for op, arguments, cout in (("ragged_conv", conv, conv[3]), ("ragged_depthwise", depthwise, depthwise[2])):
        if op not in LAUNCHERS:
            continue
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        y, sums = backends.implementation(op, arguments[0])(*arguments)
        expected_y, expected_sums = overload(REFERENCE_NAMESPACE, op)(*arguments)
        for dense in zip(*(kernels.unpack_activations(t, cout, out_image) for t in (y, expected_y)), strict=True):
            torch.testing.assert_close(*dense, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-2)


@pytest.mark.skipif(ragged.GPU_KERNELS != "cuda", reason="Triton's interpreter is too slow for it")
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (5, 1), (3, 3)])
def test_depthwise_tiles_of_large_images_meet(kernel_size: int, stride: int) -> None:
    image, widths = (3, 41, 37), [70, 3]
    arguments = test_ragged_depthwise.arguments(torch.float32, widths, image)
    taps = [torch.randn(c, 1, kernel_size, kernel_size) for c in widths]
    arguments[1], arguments[6:8] = kernels.pack_weights(taps, 1, max(widths), depthwise=True), [kernel_size, stride]
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    y, sums = backends.implementation("ragged_depthwise", arguments[0])(*arguments)
    expected_y, expected_sums = overload(REFERENCE_NAMESPACE, "ragged_depthwise")(*arguments)
    out_image = layout.output_image(image, kernel_size, stride)
    for dense in zip(*(kernels.unpack_activations(t, arguments[2], out_image) for t in (y, expected_y)), strict=True):
        torch.testing.assert_close(*dense, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-1)


@needs_every_op
@pytest.mark.parametrize("depthwise", [False, True])
def test_gradients_of_several_tiles_and_parts_equal_the_reference_and_those_of_a_subnetwork_alone(
    depthwise: bool,
) -> None:
    image, widths = (2, 13, 12), [70, 33]
    if depthwise:
        op, of_subnetworks = "ragged_depthwise_backward", [0, 1, 2, 5, 6, 7]
        case = test_ragged_depthwise_backward.fixed_case(widths, image, 3, 2, torch.float32)
        arguments = test_ragged_depthwise_backward.fixed_arguments(case)
    else:
        op, of_subnetworks = "ragged_conv_backward", [0, 1, 2, 5, 6, 7, 8]
        arguments = test_ragged_conv_backward.arguments(torch.float32, widths, [70, 40], image)
        arguments = test_ragged_conv_backward.with_outputs(arguments)
    backward = backends.implementation(op, arguments[3])
    found, expected = backward(*arguments), overload(REFERENCE_NAMESPACE, op)(*arguments)
    for pair in zip(*(kernels.unpack_activations(d_x, widths, image) for d_x, *_ in (found, expected)), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-4, atol=1e-3)

    alone = [a[:1].contiguous() if i in of_subnetworks else a for i, a in enumerate(arguments)]
    by_itself = backward(*alone)
    fronts = (kernels.unpack_activations(d_x[:1], widths[:1], image)[0] for d_x, *_ in (by_itself, found))
    assert torch.equal(*fronts)
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(by_itself[1:], found[1:], strict=True))


@needs_every_op
@settings(max_examples=10)
@given(late_generators(), st.data())
def test_a_momentum_in_bfloat16_changes_nothing_but_what_is_kept_of_it(generator: Generator, data: Any) -> None:
    found, expected = test_update_generators.with_and_without_half_momentum(generator, data)
    *results, (basis, bias, basis_momentum, bias_momentum) = found
    *wanted, (wanted_basis, wanted_bias, wanted_momentum, wanted_bias_momentum) = expected
    exact = [*results, basis, bias, bias_momentum], [*wanted, wanted_basis, wanted_bias, wanted_bias_momentum]
    torch.testing.assert_close(*exact, rtol=0, atol=0)
    # The interpreter cuts off what a GPU rounds.
    assert basis_momentum.dtype == torch.bfloat16
    torch.testing.assert_close(basis_momentum.float(), wanted_momentum, rtol=2.0**-7, atol=0)


@needs_every_op
def test_weights_are_generated_for_more_subnetworks_than_a_tile_takes() -> None:
    count, widths = 40, [1 + s % 5 for s in range(40)]
    case = {
        "basis_OIKH": torch.randn(20, 5, 1, 3),
        "bias_OIK": torch.randn(20, 5, 1),
        "codes_SH": torch.randn(count, 3),
        "cin_S": ragged.int32(widths),
        "cout_S": ragged.int32([4 * w for w in widths]),
        "depthwise": False,
    }
    for s, actual in enumerate(test_generate_weights.unpack(case, kernels.generate_weights(**case))):  # type: ignore[arg-type]
        torch.testing.assert_close(actual, test_generate_weights.dense(case, s))


# What tiles are cut from: several of them each way and a last one that is smaller; several slices of inner channels;
# more images than a tile takes; channels out for two tiles; the widest expansion.
SEVERAL_TILES = [
    (SEPARABLE[2], (20, 70, 24), (1, 33, 37)),
    (SEPARABLE[3], (40, 50, 140), (1, 30, 29)),
    (SEPARABLE[0], (70, 600), (2, 8, 9)),
    (SEPARABLE[1], (33, 17), (1, 50, 41)),
    (SEPARABLE[2], (9, 40, 70), (70, 2, 2)),
    (SEPARABLE[3], (256, 20, 300), (1, 5, 5)),
]


@only_cuda
@settings(max_examples=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "maxima", "image"), SEVERAL_TILES)
@given(data=st.data())
def test_a_block_of_several_tiles_is_computed_as_exactly(
    form: Form, maxima: tuple[int, ...], image: layout.Image, dtype: torch.dtype, data: st.DataObject
) -> None:
    cases = data.draw(blocks(st.just(form), maxima, image))
    test_fused_block.assert_block_is_exact(cases, dtype, wide=True)


@only_cuda
@settings(max_examples=30)
@given(blocks())
def test_the_kernel_refuses_every_block_that_is_not_separable(cases: list[Case]) -> None:
    forms = zip(*((case.depthwise, case.kernel, case.stride) for case in cases), strict=True)
    if is_separable(cases[0].max_cin, *forms):
        test_fused_block.fused(cases)
    else:
        with pytest.raises(RuntimeError, match="a fused block is"):
            test_fused_block.fused(cases)


test_conv_dense = test_ragged_conv.test_each_subnetwork_equals_its_own_dense_convolution
test_conv_sums = test_ragged_conv.test_sums_are_those_of_the_bare_convolution
test_conv_alone = test_ragged_conv.test_a_subnetwork_computes_the_same_alone_and_in_a_batch
test_conv_padding = test_ragged_conv.test_the_padding_is_zero_after_the_input_is_normalised
test_conv_poison = test_ragged_conv.test_a_slot_of_weights_that_nobody_reads_may_hold_anything
test_conv_gradients = test_ragged_conv_backward.test_gradients_are_as_exact_as_those_of_torch
test_conv_gradient_unread = test_ragged_conv_backward.test_what_nobody_reads_has_no_gradient
test_depthwise_gradients = test_ragged_depthwise_backward.test_gradients_equal_those_of_dense_convolutions
test_depthwise_gradient_alone = (
    test_ragged_depthwise_backward.test_only_the_weights_get_a_gradient_if_nothing_else_needs_one
)
test_depthwise_gradient_unread = test_ragged_depthwise_backward.test_an_input_that_nobody_reads_has_no_gradient
test_depthwise_gradient_bounds = test_ragged_depthwise_backward.test_the_bounds_of_an_activation_let_no_gradient_through
test_normalise_gradients = (
    test_ragged_normalise_backward.test_gradients_equal_the_formula_summed_over_the_readers_of_a_slot
)
test_normalise_gradients_of_tiles = (
    test_ragged_normalise_backward.test_gradients_of_more_pixels_than_one_item_of_work_takes_equal_the_reference
)
test_pool_gradients = test_ragged_max_pool_backward.test_gradients_equal_those_of_dense_poolings
test_pool_gradient_nan = test_ragged_max_pool_backward.test_a_window_with_nan_gives_its_gradient_where_pytorch_does
test_depthwise_dense = test_ragged_depthwise.test_each_subnetwork_equals_its_own_dense_convolution
test_depthwise_sums = test_ragged_depthwise.test_sums_are_those_of_the_bare_convolution
test_depthwise_alone = test_ragged_depthwise.test_a_subnetwork_computes_the_same_alone_and_in_a_batch
test_generate_dense = test_generate_weights.test_each_subnetwork_equals_its_own_dense_product
test_generate_pads = test_generate_weights.test_pad_channels_are_zero
test_normalise_dense = test_ragged_normalise.test_each_subnetwork_equals_its_own_dense_normalisation
test_pool_dense = test_ragged_max_pool.test_each_subnetwork_equals_its_own_dense_pooling
test_pool_nan = test_ragged_max_pool.test_a_nan_is_the_maximum_of_every_window_it_is_in
test_score_many = test_score_logits.test_the_answer_is_found_among_many_classes
test_score_dense = test_score_logits.test_each_image_is_scored_as_by_its_own_dense_classifier
test_score_nan = test_score_logits.test_an_image_with_a_nan_logit_is_never_correct
test_score_diverged = test_score_logits.test_one_diverged_image_leaves_the_others_their_scores
test_update_exact = test_update_generators.test_a_step_is_as_exact_as_autograd_and_torch_sgd
test_update_outside = test_update_generators.test_outside_all_crops_momentum_and_weights_still_decay
test_update_guarded = test_update_generators.test_only_what_is_given_is_written
test_delayed_exact = test_generate_delayed.test_kernels_are_as_exact_as_the_reference_and_read_no_more_than_they_need
test_delayed_at_rest = (
    test_generate_delayed.test_at_rest_it_generates_what_generate_weights_does_with_pad_channels_of_zero
)
test_generated_dense = test_generated_conv.test_each_subnetwork_equals_a_dense_convolution_by_its_generated_weights
test_generated_sums = test_generated_conv.test_sums_are_those_of_the_convolution
test_generated_alone = test_generated_conv.test_a_subnetwork_computes_the_same_alone_and_in_a_batch
test_separable_dense = test_fused_block.test_a_separable_block_equals_its_dense_convolutions_one_after_another
test_separable_alone = test_fused_block.test_a_separable_subnetwork_computes_the_same_alone_and_in_a_batch
if ragged.GPU_KERNELS == "triton":  # the CUDA kernel is of separable blocks
    test_block_dense = test_fused_block.test_a_block_equals_its_dense_convolutions_one_after_another
