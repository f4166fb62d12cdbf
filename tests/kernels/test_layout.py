"""The layout of activations and weights in a ragged batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import images, random_activations, widths
from torch.nn import functional

import kernels


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 8), (8, 8), (9, 16)])
def test_round_up_gives_the_next_multiple(n: int, expected: int) -> None:
    assert kernels.round_up(n) == expected


@given(size=st.integers(1, 40), kernel=st.sampled_from([1, 3, 5, 7]), stride=st.integers(1, 4))
def test_output_size_is_that_of_a_padded_convolution(size: int, kernel: int, stride: int) -> None:
    out = functional.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding=kernel // 2)
    assert kernels.output_size(size, kernel, stride) == out.shape[-1]


@given(data=st.data(), image=images(), limit=st.integers(1, 19))
def test_activations_survive_packing(data: st.DataObject, image: tuple[int, int, int], limit: int) -> None:
    channels = data.draw(widths(3, limit))
    dense = random_activations(channels, image, torch.float32)
    x = kernels.pack_activations(dense, limit)
    assert x.shape == (3, kernels.activation_slot(image, limit))
    for expected, actual in zip(dense, kernels.unpack_activations(x, channels, image), strict=True):
        assert torch.equal(actual, expected)


@given(data=st.data(), limit=st.integers(1, 19), kernel=st.sampled_from([1, 3]), depthwise=st.booleans())
def test_weights_survive_packing(data: st.DataObject, limit: int, kernel: int, depthwise: bool) -> None:
    cout = data.draw(widths(3, limit))
    cin = [1, 1, 1] if depthwise else data.draw(widths(3, limit))
    dense = [torch.randn(o, i, kernel, kernel) for o, i in zip(cout, cin, strict=True)]
    weight = kernels.pack_weights(dense, limit, limit, depthwise)
    assert weight.shape == (3, kernels.weight_slot(limit, limit, kernel, depthwise))
    actual = kernels.unpack_weights(weight, torch.tensor(cin), torch.tensor(cout), kernel=kernel, depthwise=depthwise)
    assert all(torch.equal(a, d) for a, d in zip(actual, dense, strict=True))


def test_a_slot_is_channels_last_with_its_channels_padded_to_eight() -> None:
    dense = torch.arange(12.0).view(1, 3, 2, 2)
    x = kernels.pack_activations([dense], 9)
    assert x.shape == (1, 2 * 2 * 16)
    assert torch.equal(x[0, :32].view(2, 2, 8)[..., :3], dense[0].permute(1, 2, 0))


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 2, 4, 4\].* got \[1, 3, 4, 4\]"):
        kernels.pack_activations([torch.zeros(1, 3, 4, 4)], 2)


def test_gradients_flow_through_unpacking() -> None:
    x = torch.zeros(2, kernels.activation_slot((1, 2, 2), 8), requires_grad=True)
    sum(t.sum() for t in kernels.unpack_activations(x, [3, 5], (1, 2, 2))).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert x.grad.sum(1).tolist() == [12, 20]
