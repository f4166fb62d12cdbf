"""The gradient of ragged_max_pool against PyTorch's of one dense pooling per subnetwork, in every instruction set."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import (
    DTYPES,
    assert_as_exact_as_torch,
    images,
    int32,
    limits,
    one_kernel_for_all_examples,
    poisoned_activations,
    random_activations,
    widths,
)
from torch import Tensor
from torch.nn import functional

import kernels
from kernels import backends, checks
from kernels.layout import output_image

OP = "ragged_max_pool_backward"


def call(args: list[Any]) -> Tensor:
    getattr(checks, OP)(*args)
    return backends.implementation(OP, args[1])(*args)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(
    data=st.data(),
    image=images(),
    limit=limits,
    window=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
)
def test_gradients_equal_those_of_dense_poolings(
    data: st.DataObject,
    image: tuple[int, int, int],
    limit: int,
    window: int,
    stride: int,
    dtype: torch.dtype,
    ties: bool,
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    channels = data.draw(widths(data.draw(st.integers(1, 3)), limit))
    source = data.draw(st.lists(st.integers(0, len(channels) - 1), min_size=1, max_size=4))
    # Below zero, so that padding with zeros would win; rounded, many are equal.
    inputs = [-1 - (t.abs().round() if ties else t.abs()) for t in random_activations(channels, image, dtype)]
    kept = [channels[slot] for slot in source]
    grads = random_activations(kept, output_image(image, window, stride), dtype)
    x = poisoned_activations(inputs, limit)
    place = [int32(kept), int32(source), list(image), window, stride, limit]
    found = kernels.unpack_activations(call([poisoned_activations(grads, limit), x, *place]), channels, image)

    def by_torch(precision: torch.dtype) -> list[Tensor]:
        leaves = [t.to(precision).requires_grad_() for t in inputs]
        total = torch.zeros((), dtype=precision)
        for slot, grad in zip(source, grads, strict=True):
            pooled = functional.max_pool2d(leaves[slot], window, stride, padding=window // 2)
            total = total + (pooled * grad.to(precision)).sum()
        return list(torch.autograd.grad(total, leaves, materialize_grads=True))

    for triple in zip(found, by_torch(dtype), by_torch(torch.float64), strict=True):
        assert_as_exact_as_torch(*triple)


@pytest.mark.usefixtures("kernel")
def test_a_window_with_nan_gives_its_gradient_where_pytorch_does() -> None:
    torch.manual_seed(0)
    dense = torch.randn(2, 9, 7, 8)
    dense[dense > 1] = float("nan")
    leaf = dense.clone().requires_grad_()
    pooled = functional.max_pool2d(leaf, 3, 2, padding=1)
    grad = torch.randn_like(pooled)
    [expected] = torch.autograd.grad(pooled, leaf, grad)
    args = [poisoned_activations([grad], 9), poisoned_activations([dense], 9), int32([9]), int32([0]), [2, 7, 8]]
    [found] = kernels.unpack_activations(call([*args, 3, 2, 9]), [9], (2, 7, 8))
    torch.testing.assert_close(found, expected)


def arguments(dtype: torch.dtype, channels: list[int], image: tuple[int, int, int]) -> list[Any]:
    """Positional arguments of the op; the last subnetwork shares its input with the one before it."""
    torch.manual_seed(0)
    limit, source = max(channels), [*range(len(channels)), len(channels) - 1]
    kept = [channels[slot] for slot in source]
    grad = kernels.pack_activations(random_activations(kept, output_image(image, 3, 2), dtype), limit)
    x = kernels.pack_activations(random_activations(channels, image, dtype), limit)
    return [grad, x, int32(kept), int32(source), list(image), 3, 2, limit]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    args = arguments(dtype, [40, 37], (5, 9, 10))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kernels.unpack_activations(call(args), [40, 37], (5, 9, 10)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_op_is_registered_correctly() -> None:
    if reason := backends.why_not(OP, "cpu"):
        pytest.skip(reason)  # the reference asks autograd, which opcheck keeps out of an op
    args = arguments(torch.float32, [16, 16], (2, 4, 3))
    torch.library.opcheck(torch.ops.metaprune.ragged_max_pool_backward.default, tuple(args))


def test_bad_input_is_refused_with_the_argument_named() -> None:
    grad, *rest = arguments(torch.float32, [16, 16], (2, 4, 3))
    with pytest.raises(RuntimeError, match="grad must be"):
        call([grad[:, :8].contiguous(), *rest])
