"""ragged_max_pool against one dense pooling per subnetwork, in every instruction set of this processor."""

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
    kernel_sizes,
    limits,
    one_kernel_for_all_examples,
    poisoned_activations,
    random_activations,
    widths,
)
from torch import Tensor
from torch.nn import functional

import kernels
from kernels.layout import output_image

OP = "ragged_max_pool"


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(
    data=st.data(),
    image=images(),
    limit=limits,
    window=kernel_sizes,
    stride=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_each_subnetwork_equals_its_own_dense_pooling(
    data: st.DataObject,
    image: tuple[int, int, int],
    limit: int,
    window: int,
    stride: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    channels = data.draw(widths(data.draw(st.integers(1, 4)), limit))
    source = data.draw(st.lists(st.integers(0, len(channels) - 1), min_size=1, max_size=5))
    inputs = [-1 - t.abs() for t in random_activations(channels, image, dtype)]
    kept = [channels[slot] for slot in source]
    y = kernels.ragged_max_pool(
        poisoned_activations(inputs, limit),
        int32(kept),
        int32(source),
        image=image,
        max_channels=limit,
        kernel=window,
        stride=stride,
    )
    outputs = kernels.unpack_activations(y, kept, output_image(image, window, stride))
    for slot, actual in zip(source, outputs, strict=True):
        assert torch.equal(actual, functional.max_pool2d(inputs[slot], window, stride, padding=window // 2))


@pytest.mark.usefixtures("kernel")
def test_a_nan_is_the_maximum_of_every_window_it_is_in() -> None:
    dense = torch.zeros(1, 17, 6, 6)
    dense[0, 8, 3, 3] = NAN
    one = int32([17])
    x = kernels.pack_activations([dense], 17)
    y = kernels.ragged_max_pool(x, one, int32([0]), image=(1, 6, 6), max_channels=17)
    expected = functional.max_pool2d(dense, 3, 2, padding=1)
    assert torch.equal(kernels.unpack_activations(y, one, (1, 3, 3))[0].isnan(), expected.isnan())


def arguments(dtype: torch.dtype, channels: list[int]) -> list[Any]:
    torch.manual_seed(0)
    x = kernels.pack_activations(random_activations(channels, (2, 4, 3), dtype), max(channels))
    return [x.requires_grad_(), int32(channels), int32([0, 1]), [2, 4, 3], 3, 2, max(channels)]


def test_gradients_are_exact() -> None:
    x, *rest = arguments(torch.float64, [3, 9])

    def outputs(x: Tensor) -> list[Tensor]:
        y = torch.ops.metaprune_reference.ragged_max_pool(x, *rest)
        return kernels.unpack_activations(y, rest[0], (2, 2, 2))

    assert torch.autograd.gradcheck(outputs, (x,), fast_mode=True)


def test_the_op_is_registered_correctly() -> None:
    args = arguments(torch.float32, [16, 16])
    torch.library.opcheck(torch.ops.metaprune.ragged_max_pool.default, tuple(args))


def test_bad_input_is_refused_with_the_argument_named() -> None:
    x, channels, source, *_ = arguments(torch.float32, [16, 16])
    with pytest.raises(RuntimeError, match="x must be"):
        kernels.ragged_max_pool(x, channels, source, image=(2, 4, 4), max_channels=16)
