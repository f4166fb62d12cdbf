"""The gradient of ragged_normalise against its formula per subnetwork, in every instruction set of this processor."""

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
from kernels import backends, checks

OP = "ragged_normalise_backward"


def call(args: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    getattr(checks, OP)(*args)
    return backends.implementation(OP, args[2])(*args)


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
def test_gradients_equal_the_formula_summed_over_the_readers_of_a_slot(
    data: st.DataObject,
    image: tuple[int, int, int],
    limit: int,
    dtype: torch.dtype,
    activation: str,
    with_shortcut: bool,
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    slots = data.draw(st.integers(1, 3))
    channels = data.draw(widths(slots, limit))
    source, shortcut_source = ([], [])
    for slot in data.draw(st.lists(st.integers(0, slots - 1), min_size=1, max_size=4)):
        source.append(slot)
        shortcut_source.append(data.draw(st.sampled_from([t for t in range(slots) if channels[t] == channels[slot]])))
    kept = [channels[slot] for slot in source]
    inputs, shortcuts = (random_activations(channels, image, dtype) for _ in range(2))
    per_channel = data.draw(st.sampled_from([dtype, torch.float32]))
    scale, shift = (poisoned_channels(kept, limit).to(per_channel) for _ in range(2))
    outputs = [activate(3 * t, activation) for t in random_activations(kept, image, dtype)]
    grads = random_activations(kept, image, dtype)
    found = call(
        [
            poisoned_activations(grads, limit),
            poisoned_activations(outputs, limit),
            poisoned_activations(inputs, limit),
            scale,
            shift,
            int32(kept),
            int32(source),
            list(image),
            limit,
            activation,
            poisoned_activations(shortcuts, limit) if with_shortcut else None,
            int32(shortcut_source) if with_shortcut else None,
        ]
    )

    def formula(precision: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
        d_x, d_shortcut = ([torch.zeros_like(t, dtype=precision) for t in inputs] for _ in range(2))
        d_scale, d_shift = (torch.zeros_like(scale, dtype=precision) for _ in range(2))
        for s, (slot, c) in enumerate(zip(source, kept, strict=True)):
            bound = {"none": float("inf"), "relu": float("inf"), "relu6": 6}[activation]
            passed = (outputs[s] > (-bound if activation == "none" else 0)) & (outputs[s] < bound)
            d = (grads[s] * passed).to(precision)
            d_x[slot] += d * scale[s, :c, None, None].to(precision)
            d_scale[s, :c] = (d * inputs[slot].to(precision)).sum((0, 2, 3))
            d_shift[s, :c] = d.sum((0, 2, 3))
            d_shortcut[shortcut_source[s]] += d
        return d_x, d_scale, d_shift, d_shortcut

    in_torch, exact = formula(dtype), formula(torch.float64)
    unpacked = [kernels.unpack_activations(found[0], channels, image), [found[1]], [found[2]]]
    if with_shortcut:
        unpacked.append(kernels.unpack_activations(found[3], channels, image))
    else:
        assert found[3].shape == (0,)
    for actual, theirs, true in zip(unpacked, in_torch, exact, strict=False):
        for triple in zip(
            actual,
            theirs if isinstance(theirs, list) else [theirs],
            true if isinstance(true, list) else [true],
            strict=True,
        ):
            assert_as_exact_as_torch(*triple)


def arguments(dtype: torch.dtype, channels: list[int], image: tuple[int, int, int]) -> list[Any]:
    """Positional arguments of the op; the last subnetwork shares its input and its shortcut with the one before it."""
    torch.manual_seed(0)
    limit, source = max(channels), [*range(len(channels)), len(channels) - 1]
    kept = [channels[slot] for slot in source]
    grad, y = (kernels.pack_activations(random_activations(kept, image, dtype), limit) for _ in range(2))
    x, shortcut = (kernels.pack_activations(random_activations(channels, image, dtype), limit) for _ in range(2))
    scale, shift = (torch.randn(len(kept), limit, dtype=dtype) for _ in range(2))
    return [grad, y, x, scale, shift, int32(kept), int32(source), list(image), limit, "relu", shortcut, int32(source)]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    # Several chunks of work, and the last one is not whole.
    args = arguments(dtype, [300, 290], (2, 9, 13))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            d_x, d_scale, d_shift, d_shortcut = call(args)
            fronts = [t for d in (d_x, d_shortcut) for t in kernels.unpack_activations(d, [300, 290], (2, 9, 13))]
            results.append([*fronts, d_scale, d_shift])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("kernel")
def test_gradients_of_more_pixels_than_one_item_of_work_takes_equal_the_reference() -> None:
    args = arguments(torch.float32, [300, 290], (2, 9, 13))
    with backends.use("reference"):
        expected = call(args)
    found = call(args)
    for actual, wanted in zip((found[0], found[3]), (expected[0], expected[3]), strict=True):
        fronts = (kernels.unpack_activations(d, [300, 290], (2, 9, 13)) for d in (actual, wanted))
        for pair in zip(*fronts, strict=True):
            torch.testing.assert_close(*pair)
    torch.testing.assert_close(found[1:3], expected[1:3], rtol=1e-5, atol=1e-4)


def test_the_op_is_registered_correctly() -> None:
    if reason := backends.why_not(OP, "cpu"):
        pytest.skip(reason)  # the reference asks autograd, which opcheck keeps out of an op
    args = arguments(torch.float32, [16, 16], (2, 2, 3))
    torch.library.opcheck(torch.ops.metaprune.ragged_normalise_backward.default, tuple(args))


@pytest.mark.usefixtures("kernel")
def test_bad_input_is_refused_with_the_argument_named() -> None:
    args = arguments(torch.float32, [16, 16], (2, 2, 3))
    for position, name in ((0, "grad"), (1, "y"), (3, "scale")):
        wrong = [*args]
        wrong[position] = args[position][:1]
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            call(wrong)
