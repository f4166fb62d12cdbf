"""The layout of activations and weights in a ragged batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import DTYPES, NAN, images, limits, random_activations, widths
from torch.nn import functional

import kernels
from kernels.layout import read_weights, write_weights


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


@given(
    data=st.data(),
    max_cin=limits,
    max_cout=limits,
    kernel=st.sampled_from([1, 3]),
    depthwise=st.booleans(),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_weights_survive_packing(
    data: st.DataObject, max_cin: int, max_cout: int, kernel: int, depthwise: bool, dtype: torch.dtype
) -> None:
    cout = data.draw(widths(3, max_cout))
    cin = [1, 1, 1] if depthwise else data.draw(widths(3, max_cin))
    dense = [torch.randn(o, i, kernel, kernel).to(dtype) for o, i in zip(cout, cin, strict=True)]
    weight = kernels.pack_weights(dense, max_cin, max_cout, depthwise)
    assert weight.shape == (3, kernels.weight_slot(max_cin, max_cout, kernel, dtype, depthwise))
    actual = kernels.unpack_weights(weight, torch.tensor(cin), torch.tensor(cout), kernel=kernel, depthwise=depthwise)
    assert all(torch.equal(a, d) for a, d in zip(actual, dense, strict=True))


@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float64, 1)])
def test_a_dense_weight_lies_in_the_panel_of_its_output_channel(dtype: torch.dtype, p: int) -> None:
    cout, cin, taps, rows = 21, 5, 9, (5 + p - 1) // p
    dense = torch.randn(cout, cin, 3, 3).to(dtype)
    front = 2 * taps * rows * 16 * p
    assert kernels.weight_slot(cin, cout, 3, dtype) == front
    slot = torch.full((front + 7,), NAN, dtype=dtype)
    write_weights(slot, dense)
    panels = slot[:front].view(2, taps, rows, 16, p)
    for o in range(cout):
        for i in range(cin):
            assert torch.equal(panels[o // 16, :, i // p, o % 16, i % p], dense[o, i].flatten())
    assert panels.count_nonzero() == dense.numel()
    assert slot[front:].isnan().all()


def test_a_word_of_weights_on_a_gpu_is_one_channel() -> None:
    slot = torch.empty(2 * 9 * 5 * 16, dtype=torch.bfloat16, device="meta")
    assert kernels.weight_slot(5, 21, 3, slot.dtype, device=slot.device) == len(slot)
    assert read_weights(slot, 5, 21, 3).shape == (21, 5, 3, 3)


def test_a_depthwise_weight_lies_in_the_row_of_its_tap() -> None:
    dense = torch.randn(11, 1, 3, 3)
    slot = torch.full((9 * 16,), NAN)
    write_weights(slot, dense, depthwise=True)
    rows = slot.view(9, 16)
    assert torch.equal(rows[:, :11], dense.flatten(1).T)
    assert not rows[:, 11:].any()


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


def test_the_gradient_of_reading_weights_reaches_them_and_nothing_else() -> None:
    slot = kernels.pack_weights([torch.ones(17, 3, 3, 3)], 8, 40)[0].requires_grad_()
    read_weights(slot, 3, 17, 3).sum().backward()
    assert slot.grad is not None
    assert torch.equal(slot.grad, slot.detach())
