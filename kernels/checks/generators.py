"""The ops of weight generators.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, H hidden size.
"""

from collections.abc import Sequence
from math import isfinite, isqrt

import torch
from torch import Tensor

from kernels.checks.arguments import FLOATS, check, count_of, expect, expect_buffer, expect_indices
from kernels.layout import weight_slot


def generate_weights(basis: Tensor, bias: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, depthwise: bool) -> None:
    _generator(basis, bias, depthwise)
    _subnetworks(basis, codes, cin, cout)


def _generator(basis: Tensor, bias: Tensor, depthwise: bool) -> None:
    check(basis.dim() == 4, lambda: f"basis must be [O, I, K, H], got {list(basis.shape)}")
    o, i, taps, _ = basis.shape
    expect("basis", basis, basis.shape, FLOATS, basis, "= [O, I, K, H] ")
    check(
        min(o, i, taps) >= 1 and isqrt(taps) ** 2 == taps,
        lambda: f"basis {list(basis.shape)} = [O, I, K, H] must not be empty, but for H, and K must be a square",
    )
    check(not depthwise or i == 1, lambda: f"a depthwise basis must be [C, 1, K, H], got {list(basis.shape)}")
    expect("bias", bias, (o, i, taps), (basis.dtype,), basis, "= [O, I, K] ")


def _subnetworks(basis: Tensor, codes: Tensor, cin: Tensor, cout: Tensor) -> int:
    """Codes and widths of S subnetworks. Returns S."""
    s = count_of(cout, "cout")
    expect("codes", codes, (s, basis.shape[-1]), (basis.dtype,), basis, "= [S, H] ")
    expect_indices(basis, s, cin=cin, cout=cout)
    return s


def generate_weights_backward(
    grad: Tensor, basis: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, depthwise: bool
) -> None:
    o, i, taps, _ = basis.shape
    expect_buffer("grad", grad, weight_slot(i, o, isqrt(taps), basis.dtype, depthwise, basis.device), basis)
    generate_weights(basis, basis.new_empty(o, i, taps), codes, cin, cout, depthwise)


def _state(basis: Tensor, bias: Tensor, basis_momentum: Tensor, bias_momentum: Tensor, depthwise: bool) -> None:
    """A generator that is trained, and its momentum."""
    trainable = (torch.float32, torch.float64)
    check(basis.dtype in trainable, lambda: f"basis must be {trainable[0]} or {trainable[1]}, got {basis.dtype}")
    _generator(basis, bias, depthwise)
    # A bfloat16 momentum is an option of float32 alone.
    dtypes = (basis.dtype, torch.bfloat16) if basis.dtype == torch.float32 else (basis.dtype,)
    expect("basis_momentum", basis_momentum, basis.shape, dtypes, basis, "= [O, I, K, H] ")
    expect("bias_momentum", bias_momentum, basis.shape[:3], (basis.dtype,), basis, "= [O, I, K] ")


def _factors(basis: Tensor, names: tuple[str, ...], factors: Sequence[Sequence[Tensor]], depthwise: bool) -> None:
    """The codes, gradients, cin and cout of every step."""
    lengths = [len(values) for values in factors]
    check(len(set(lengths)) == 1, lambda: f"every factor has {', '.join(names)}; got lists of {lengths}")
    largest = _largest_slot(basis, depthwise)
    for j, (codes, grad, cin, cout) in enumerate(zip(*factors, strict=True)):
        _packed(f"{names[1]}[{j}]", basis, grad, _subnetworks(basis, codes, cin, cout), largest)


def _largest_slot(basis: Tensor, depthwise: bool) -> int:
    o, i, taps, _ = basis.shape
    return weight_slot(i, o, isqrt(taps), basis.dtype, depthwise)


def _packed(name: str, basis: Tensor, grad: Tensor, count: int, largest: int) -> None:
    # A slot may be as small as its largest crop.
    expect(name, grad, (count, min(grad.shape[-1], largest)), (basis.dtype,), basis, "= [S, slot] ")


def _coefficients(name: str, values: Sequence[float], factors: int) -> None:
    check(
        len(values) == 2 + factors and all(map(isfinite, values)),
        lambda: f"{name} must be 2 + {factors} finite numbers, got {list(values)}",
    )


def generate_delayed(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    factor_codes: Sequence[Tensor],
    factor_grads: Sequence[Tensor],
    factor_cin: Sequence[Tensor],
    factor_cout: Sequence[Tensor],
    depthwise: bool,
    coefficients: Sequence[float],
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
) -> None:
    _state(basis, bias, basis_momentum, bias_momentum, depthwise)
    _subnetworks(basis, codes, cin, cout)
    factors = (factor_codes, factor_grads, factor_cin, factor_cout)
    _factors(basis, ("factor_codes", "factor_grads", "factor_cin", "factor_cout"), factors, depthwise)
    _coefficients("coefficients", coefficients, len(factor_codes))


def code_gradients(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    factor_codes: Sequence[Tensor],
    factor_grads: Sequence[Tensor],
    factor_cin: Sequence[Tensor],
    factor_cout: Sequence[Tensor],
    depthwise: bool,
    coefficients: Sequence[float],
    grad: Tensor,
    cin: Tensor,
    cout: Tensor,
) -> None:
    codes = basis.new_empty(count_of(cout, "cout"), basis.shape[-1])
    state = (basis, bias, basis_momentum, bias_momentum, factor_codes, factor_grads, factor_cin, factor_cout)
    generate_delayed(*state, depthwise, coefficients, codes, cin, cout)
    _packed("grad", basis, grad, len(codes), _largest_slot(basis, depthwise))


def update_generators_(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    codes: Sequence[Tensor],
    grads: Sequence[Tensor],
    cin: Sequence[Tensor],
    cout: Sequence[Tensor],
    depthwise: bool,
    before: Sequence[float],
    weights: Sequence[float],
    momentum: Sequence[float],
) -> None:
    _state(basis, bias, basis_momentum, bias_momentum, depthwise)
    check(len(codes) >= 1, lambda: "there must be at least one factor")
    _factors(basis, ("codes", "grads", "cin", "cout"), (codes, grads, cin, cout), depthwise)
    if before:
        _coefficients("before", before, len(grads) - 1)
    _coefficients("weights", weights, len(grads))
    _coefficients("momentum", momentum, len(grads))
