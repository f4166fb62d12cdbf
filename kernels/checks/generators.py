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
    check(
        basis.dim() == 4 and codes.dim() == 2,
        lambda: f"basis must be [O, I, K, H] and codes [S, H], got {list(basis.shape)} and {list(codes.shape)}",
    )
    o, i, taps, hidden = basis.shape
    expect("basis", basis, basis.shape, FLOATS, basis, "= [O, I, K, H] ")
    check(
        min(o, i, taps) >= 1 and isqrt(taps) ** 2 == taps,
        lambda: f"basis {list(basis.shape)} = [O, I, K, H] must not be empty, but for H, and K must be a square",
    )
    check(not depthwise or i == 1, lambda: f"a depthwise basis must be [C, 1, K, H], got {list(basis.shape)}")
    s = count_of(cout, "cout")
    expect("bias", bias, (o, i, taps), (basis.dtype,), basis, "= [O, I, K] ")
    expect("codes", codes, (s, hidden), (basis.dtype,), basis, "= [S, H] ")
    expect_indices(basis, s, cin=cin, cout=cout)


def generate_weights_backward(
    grad: Tensor, basis: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, depthwise: bool
) -> None:
    o, i, taps, _ = basis.shape
    expect_buffer("grad", grad, weight_slot(i, o, isqrt(taps), basis.dtype, depthwise, basis.device), basis)
    generate_weights(basis, basis.new_empty(o, i, taps), codes, cin, cout, depthwise)


def _trainable(basis: Tensor) -> None:
    dtypes = (torch.float32, torch.float64)
    check(basis.dtype in dtypes, lambda: f"basis must be {dtypes[0]} or {dtypes[1]}, got {basis.dtype}")


def _momentum(basis: Tensor, basis_momentum: Tensor, bias_momentum: Tensor) -> None:
    # A bfloat16 momentum is an option of float32 alone.
    dtypes = (basis.dtype, torch.bfloat16) if basis.dtype == torch.float32 else (basis.dtype,)
    expect("basis_momentum", basis_momentum, basis.shape, dtypes, basis, "= [O, I, K, H] ")
    expect("bias_momentum", bias_momentum, basis.shape[:3], (basis.dtype,), basis, "= [O, I, K] ")


def _factors(
    basis: Tensor, bias: Tensor, names: tuple[str, ...], factors: Sequence[Sequence[Tensor]], depthwise: bool
) -> None:
    """The codes, gradients, cin and cout of every step."""
    lengths = [len(values) for values in factors]
    check(len(set(lengths)) == 1, lambda: f"every factor has {', '.join(names)}; got lists of {lengths}")
    for j, (codes, grad, cin, cout) in enumerate(zip(*factors, strict=True)):
        generate_weights(basis, bias, codes, cin, cout, depthwise)
        _packed(f"{names[1]}[{j}]", basis, grad, len(codes), depthwise)


def _packed(name: str, basis: Tensor, grad: Tensor, count: int, depthwise: bool) -> None:
    o, i, taps, _ = basis.shape
    # A slot may be as small as its largest crop.
    slot = min(grad.shape[-1], weight_slot(i, o, isqrt(taps), basis.dtype, depthwise))
    expect(name, grad, (count, slot), (basis.dtype,), basis, "= [S, slot] ")


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
    _trainable(basis)
    generate_weights(basis, bias, codes, cin, cout, depthwise)
    _momentum(basis, basis_momentum, bias_momentum)
    names = ("factor_codes", "factor_grads", "factor_cin", "factor_cout")
    _factors(basis, bias, names, (factor_codes, factor_grads, factor_cin, factor_cout), depthwise)
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
    _packed("grad", basis, grad, len(codes), depthwise)


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
    _trainable(basis)
    check(len(codes) >= 1, lambda: "there must be at least one factor")
    _factors(basis, bias, ("codes", "grads", "cin", "cout"), (codes, grads, cin, cout), depthwise)
    _momentum(basis, basis_momentum, bias_momentum)
    if before:
        _coefficients("before", before, len(grads) - 1)
    _coefficients("weights", weights, len(grads))
    _coefficients("momentum", momentum, len(grads))
