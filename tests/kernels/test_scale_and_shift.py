"""scale_and_shift: the definition against PyTorch's BatchNorm, the kernel against the definition, bit for bit."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import backends
from kernels.registration import NAMESPACE, REFERENCE_NAMESPACE, overload

OP, BACKWARD = "scale_and_shift", "scale_and_shift_backward"
EPSILON, PIXELS = 1e-5, 60
NAMESPACES = (NAMESPACE, REFERENCE_NAMESPACE)


def activations(structures: int, channels: int) -> Tensor:
    return 3 * torch.randn(structures, channels, PIXELS, generator=torch.Generator().manual_seed(0)).double() + 1


def sums_of(x_SCP: Tensor) -> Tensor:
    return torch.stack([x_SCP.sum(2), x_SCP.square().sum(2)], dim=1)


def odd_sums() -> Tensor:
    """Random ones, and those of constant channels, of which rounding makes negative variances, and of a NaN."""
    sums = sums_of(activations(3, 37))
    constant = torch.linspace(-7, 7, 12, dtype=torch.float64)
    sums[0, :, :12] = torch.stack([constant * PIXELS, constant.square() * PIXELS - 1e-9])
    sums[1, :, 5:9] = 0
    sums[2, 0, 3] = sums[2, 1, 4] = torch.nan
    return sums


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_scaled_and_shifted_channels_are_what_batch_norm_makes_of_them(namespace: str) -> None:
    x = activations(2, 19)
    scale, shift = overload(namespace, OP)(sums_of(x), PIXELS, EPSILON)
    for s in range(2):
        expected = F.batch_norm(x[s].T, None, None, training=True, eps=EPSILON).T
        torch.testing.assert_close(x[s] * scale[s, :, None] + shift[s, :, None], expected, rtol=1e-5, atol=1e-6)


def test_the_kernel_has_the_bits_of_the_definition() -> None:
    sums = odd_sums()
    grads = [torch.randn(3, 37) for _ in range(2)]
    for op, args in ((OP, (sums, PIXELS, EPSILON)), (BACKWARD, (*grads, sums, PIXELS, EPSILON))):
        found, expected = (overload(namespace, op)(*args) for namespace in NAMESPACES)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_the_gradient_is_that_of_batch_norm(namespace: str, used: tuple[int, ...]) -> None:
    x = activations(2, 19)
    grads = torch.randn(2, 2, 19, generator=torch.Generator().manual_seed(1))

    def gradient(outputs: tuple[Tensor, ...], leaf: Tensor) -> Tensor:
        return torch.autograd.grad([outputs[i] for i in used], leaf, [grads[i].to(outputs[i]) for i in used])[0]

    found_leaf, exact_leaf = (sums_of(x).requires_grad_() for _ in range(2))
    mean, square = (exact_leaf / PIXELS).unbind(1)
    scale = (square - mean.square() + EPSILON).rsqrt()
    exact = gradient((scale, -mean * scale), exact_leaf)
    torch.testing.assert_close(gradient(overload(namespace, OP)(found_leaf, PIXELS, EPSILON), found_leaf), exact)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_ops_are_registered_correctly(namespace: str) -> None:
    sums = sums_of(activations(2, 5))
    torch.library.opcheck(overload(namespace, OP), (sums.requires_grad_(), PIXELS, EPSILON))
    grads = torch.randn(2, 5), torch.randn(2, 5)
    torch.library.opcheck(overload(namespace, BACKWARD), (*grads, sums.detach(), PIXELS, EPSILON))


BAD: list[tuple[Any, ...]] = [
    (torch.zeros(2, 3, 4).double(), PIXELS, EPSILON, "sums must be"),
    (torch.zeros(2, 2, 4), PIXELS, EPSILON, "sums must be"),
    (torch.zeros(2, 4, 2).double().mT, PIXELS, EPSILON, "sums must be"),
    (torch.zeros(2, 2, 4).double(), 0, EPSILON, "count and epsilon must be positive"),
    (torch.zeros(2, 2, 4).double(), PIXELS, 0.0, "count and epsilon must be positive"),
]


@pytest.mark.parametrize(("sums", "count", "epsilon", "message"), BAD)
def test_bad_input_is_refused_with_the_argument_named(sums: Tensor, count: int, epsilon: float, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels.scale_and_shift(sums, count, epsilon)


def test_the_kernel_itself_refuses_what_it_would_read_out_of_bounds() -> None:
    if reason := backends.why_not("ragged_conv", "cpu"):
        pytest.skip(reason)
    sums, grad = torch.zeros(2, 2, 4).double(), torch.zeros(2, 4)
    for wrong in (sums.float(), sums[:, :1], sums[0], sums.mT):
        with pytest.raises(RuntimeError, match="sums"):
            overload(NAMESPACE, OP)(wrong, PIXELS, EPSILON)
    for grads, name in (((grad[:, :3], grad), "grad_scale"), ((grad, grad.double()), "grad_shift")):
        with pytest.raises(RuntimeError, match=name):
            overload(NAMESPACE, BACKWARD)(*grads, sums, PIXELS, EPSILON)
