"""score_logits against one dense classifier per subnetwork."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import NAN, images, int32, poisoned_activations, random_activations, widths
from torch.nn import functional

import kernels


@given(data=st.data(), image=images(), limit=st.integers(1, 19), classes=st.integers(1, 7))
def test_each_subnetwork_equals_its_own_dense_classifier(
    data: st.DataObject, image: tuple[int, int, int], limit: int, classes: int
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    channels = data.draw(widths(data.draw(st.integers(1, 4)), limit))
    source = data.draw(st.lists(st.integers(0, len(channels) - 1), min_size=1, max_size=5))
    inputs = random_activations(channels, image, torch.float64)
    weight, bias = torch.randn(classes, limit).double(), torch.randn(classes).double()
    labels = torch.randint(classes, (image[0],))
    correct, loss_sum = kernels.score_logits(
        poisoned_activations(inputs, limit),
        weight,
        bias,
        labels,
        int32([channels[slot] for slot in source]),
        int32(source),
        image=image,
    )
    for s, slot in enumerate(source):
        logits = inputs[slot].mean((2, 3)) @ weight[:, : channels[slot]].T + bias
        assert correct[s] == (logits.argmax(1) == labels).sum()
        torch.testing.assert_close(loss_sum[s], functional.cross_entropy(logits, labels, reduction="sum"))


def arguments() -> list[Any]:
    torch.manual_seed(0)
    x = kernels.pack_activations(random_activations([8, 8], (3, 2, 2), torch.float32), 8)
    labels = torch.tensor([0, 1, 2])
    return [x, torch.randn(4, 8), torch.randn(4), labels, int32([8, 8]), int32([1, 0]), [3, 2, 2]]


def test_an_image_with_a_nan_logit_is_never_correct() -> None:
    x, weight, bias, *rest = arguments()
    for label in range(4):
        spoilt = bias.clone()
        spoilt[label] = NAN
        args = [x, weight, spoilt, torch.full((3,), label), *rest[1:-1]]
        correct, loss_sum = kernels.score_logits(*args, image=(3, 2, 2))
        assert correct.tolist() == [0, 0]
        assert loss_sum.isnan().all()


def test_the_op_is_registered_correctly() -> None:
    torch.library.opcheck(torch.ops.metaprune.score_logits.default, tuple(arguments()))


def test_bad_input_is_refused_with_the_argument_named() -> None:
    x, weight, bias, labels, channels, source, _ = arguments()
    with pytest.raises(RuntimeError, match=r"labels must be torch\.int64"):
        kernels.score_logits(x, weight, bias, labels.int(), channels, source, image=(3, 2, 2))
    with pytest.raises(RuntimeError, match="bias must be"):
        kernels.score_logits(x, weight, bias[:3], labels, channels, source, image=(3, 2, 2))
