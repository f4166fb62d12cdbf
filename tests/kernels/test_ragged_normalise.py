"""ragged_normalise against one dense affine map per subnetwork, in every instruction set of this processor."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import (
    ACTIVATIONS,
    DTYPES,
    activate,
    assert_as_exact_as_torch,
    images,
    int32,
    limits,
    one_kernel_for_all_examples,
    poisoned_activations,
    poisoned_channels,
    random_activations,
    widths,
)
from torch import Tensor

import kernels

OP = "ragged_normalise"


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(
    data=st.data(),
    image=images(),
    limit=limits,
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    with_shortcut=st.booleans(),
)
def test_each_subnetwork_equals_its_own_dense_normalisation(
    data: st.DataObject,
    image: tuple[int, int, int],
    limit: int,
    dtype: torch.dtype,
    activation: str,
    with_shortcut: bool,
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    order = data.draw(st.permutations(range(data.draw(st.integers(1, 4)))))
    channels = data.draw(widths(len(order), limit))
    inputs, shortcuts = (random_activations(channels, image, dtype) for _ in range(2))
    per_channel = data.draw(st.sampled_from([dtype, torch.float32]))
    scale, shift = (poisoned_channels(channels, limit).to(per_channel) for _ in range(2))
    slot_of = int32([order.index(s) for s in range(len(order))])
    extra: dict[str, Any] = {}
    if with_shortcut:
        extra = {
            "shortcut": poisoned_activations([shortcuts[s] for s in order], limit),
            "shortcut_source_S": slot_of,
        }
    y = kernels.ragged_normalise(
        poisoned_activations([inputs[s] for s in order], limit),
        scale,
        shift,
        int32(channels),
        slot_of,
        image=image,
        max_channels=limit,
        activation=activation,
        **extra,
    )

    def dense(s: int, precision: torch.dtype) -> Tensor:
        c = channels[s]
        scale_C, shift_C = (t[s, :c, None, None].to(precision) for t in (scale, shift))
        out = inputs[s].to(precision) * scale_C + shift_C
        return activate(out + shortcuts[s].to(precision) if with_shortcut else out, activation)

    for s, actual in enumerate(kernels.unpack_activations(y, channels, image)):
        assert_as_exact_as_torch(actual, dense(s, dtype), dense(s, torch.float64))


def arguments(dtype: torch.dtype, channels: list[int]) -> list[Any]:
    torch.manual_seed(0)
    image, limit = (2, 2, 3), max(channels)
    x, shortcut = (
        kernels.pack_activations(random_activations(channels, image, dtype), limit).requires_grad_() for _ in range(2)
    )
    scale, shift = (torch.randn(2, limit, dtype=dtype, requires_grad=True) for _ in range(2))
    own = int32([0, 1])
    return [x, scale, shift, int32(channels), own, list(image), limit, "relu", shortcut, own]


def test_gradients_are_exact() -> None:
    x, scale, shift, *rest = arguments(torch.float64, [3, 9])

    def outputs(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor) -> list[Tensor]:
        y = torch.ops.metaprune_reference.ragged_normalise(x, scale, shift, *rest[:5], shortcut, rest[6])
        return kernels.unpack_activations(y, rest[0], (2, 2, 3))

    assert torch.autograd.gradcheck(outputs, (x, scale, shift, rest[5]), fast_mode=True)


def test_the_op_is_registered_correctly() -> None:
    args = arguments(torch.float32, [16, 16])
    torch.library.opcheck(torch.ops.metaprune.ragged_normalise.default, tuple(args))


@pytest.mark.usefixtures("kernel")
def test_bad_input_is_refused_with_the_argument_named() -> None:
    x, scale, shift, channels, source, *_ = arguments(torch.float32, [16, 16])
    with pytest.raises(RuntimeError, match="scale must be"):
        kernels.ragged_normalise(x, scale[:1], shift, channels, source, image=(2, 2, 3), max_channels=16)
    with pytest.raises(RuntimeError, match=r"source\[0\] is -1; legal values are 0..1"):
        kernels.ragged_normalise(x, scale, shift, channels, int32([-1, 0]), image=(2, 2, 3), max_channels=16)
