"""score_logits against one dense classifier per subnetwork, in every instruction set of this processor."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import (
    DTYPES,
    NAN,
    images,
    int32,
    limits,
    one_kernel_for_all_examples,
    poisoned_activations,
    random_activations,
    widths,
)
from torch.nn import functional

import kernels

OP = "score_logits"


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(data=st.data(), image=images(), limit=limits, classes=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_each_image_is_scored_as_by_its_own_dense_classifier(
    data: st.DataObject, image: tuple[int, int, int], limit: int, classes: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    channels = data.draw(widths(data.draw(st.integers(1, 4)), limit))
    source = data.draw(st.lists(st.integers(0, len(channels) - 1), min_size=1, max_size=5))
    inputs = random_activations(channels, image, dtype)
    weight, bias = torch.randn(classes, limit), torch.randn(classes)
    weight[:, max(channels[slot] for slot in source) :] = NAN
    if data.draw(st.booleans()):
        weight, bias = weight.to(dtype), bias.to(dtype)
    labels = torch.randint(classes, (image[0],))
    correct, loss = kernels.score_logits(
        poisoned_activations(inputs, limit),
        weight,
        bias,
        labels,
        int32([channels[slot] for slot in source]),
        int32(source),
        image=image,
    )
    assert correct.shape == loss.shape == (len(source), image[0])
    assert (correct.dtype, loss.dtype) == (torch.bool, torch.float64)
    for s, slot in enumerate(source):
        features = inputs[slot].double().mean((2, 3))
        logits = features @ weight[:, : channels[slot]].double().T + bias.double()
        torch.testing.assert_close(
            loss[s], functional.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-5
        )
        # Where two logits are equal but for rounding, either may be the largest.
        largest = logits.topk(min(2, classes)).values
        clear = largest[:, 0] - largest[:, -1] > 1e-4 if classes > 1 else torch.ones(len(labels), dtype=torch.bool)
        assert torch.equal(correct[s][clear], (logits.argmax(1) == labels)[clear])


@pytest.mark.usefixtures("kernel")
def test_the_answer_is_found_among_many_classes() -> None:
    torch.manual_seed(0)
    features, weight, bias = torch.randn(40, 8, 1, 1), torch.randn(100, 8), torch.randn(100)
    logits = features.flatten(1) @ weight.T + bias
    x, own = kernels.pack_activations([features], 8), int32([0])
    for labels, right in ((logits.argmax(1), True), (logits.argmin(1), False)):
        correct, loss = kernels.score_logits(x, weight, bias, labels, int32([8]), own, image=(40, 1, 1))
        assert torch.equal(correct[0], torch.full((40,), right))
        expected = functional.cross_entropy(logits.double(), labels, reduction="none")
        torch.testing.assert_close(loss[0], expected, rtol=1e-5, atol=1e-5)


def arguments() -> list[Any]:
    torch.manual_seed(0)
    x = kernels.pack_activations(random_activations([8, 8], (3, 2, 2), torch.float32), 8)
    labels = torch.tensor([0, 1, 2])
    return [x, torch.randn(4, 8), torch.randn(4), labels, int32([8, 8]), int32([1, 0]), [3, 2, 2]]


@pytest.mark.usefixtures("kernel")
def test_an_image_with_a_nan_logit_is_never_correct() -> None:
    x, weight, bias, *rest = arguments()
    for label in range(4):
        spoilt = bias.clone()
        spoilt[label] = NAN
        args = [x, weight, spoilt, torch.full((3,), label), *rest[1:-1]]
        correct, loss = kernels.score_logits(*args, image=(3, 2, 2))
        assert not correct.any()
        assert loss.isnan().all()


@pytest.mark.usefixtures("kernel")
def test_one_diverged_image_leaves_the_others_their_scores() -> None:
    x, weight, bias, _, channels, source, _ = arguments()
    features = kernels.unpack_activations(x, channels, (3, 2, 2))[1].mean((2, 3))
    labels = (features @ weight.T + bias).argmax(1)
    kernels.unpack_activations(x, channels, (3, 2, 2))[1][1, 0, 0, 0] = NAN
    correct, loss = kernels.score_logits(x, weight, bias, labels, channels, source, image=(3, 2, 2))
    assert correct[0].tolist() == [True, False, True]
    assert loss[0].isnan().tolist() == [False, True, False]
    assert not loss[1].isnan().any()


def test_the_op_is_registered_correctly() -> None:
    torch.library.opcheck(torch.ops.metaprune.score_logits.default, tuple(arguments()))


@pytest.mark.usefixtures("kernel")
def test_bad_input_is_refused_with_the_argument_named() -> None:
    x, weight, bias, labels, channels, source, _ = arguments()
    with pytest.raises(RuntimeError, match=r"labels must be torch\.int64"):
        kernels.score_logits(x, weight, bias, labels.int(), channels, source, image=(3, 2, 2))
    with pytest.raises(RuntimeError, match=r"channels\[1\] is 9; legal values are 1..8"):
        kernels.score_logits(x, weight, bias, labels, int32([8, 9]), source, image=(3, 2, 2))
    with pytest.raises(RuntimeError, match="bias must be"):
        kernels.score_logits(x, weight, bias[:3], labels, channels, source, image=(3, 2, 2))
