"""The ops of weight generators.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, H hidden size.
"""

from math import isfinite, isqrt

import torch
from torch import Tensor

from kernels.checks.arguments import FLOATS, check, count_of, expect, expect_buffer, expect_indices
from kernels.layout import weight_slot
from kernels.update_generators.recurrence import DRIFTS


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


def _subnetworks(basis: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, least: int = 1) -> int:
    """Codes and widths of S subnetworks, S at least that. Returns S."""
    s = count_of(cout, "cout", least)
    expect("codes", codes, (s, basis.shape[-1]), (basis.dtype,), basis, "= [S, H] ")
    expect_indices(basis, s, cin=cin, cout=cout)
    return s


def generate_weights_backward(
    grad: Tensor, basis: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, depthwise: bool
) -> None:
    o, i, taps, _ = basis.shape
    expect_buffer("grad", grad, weight_slot(i, o, isqrt(taps), basis.dtype, depthwise, basis.device), basis)
    generate_weights(basis, basis.new_empty(o, i, taps), codes, cin, cout, depthwise)


def _state(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    written: Tensor,
    drift: Tensor,
    depthwise: bool,
) -> None:
    """A generator that is trained, its momentum, and what has become of both."""
    trainable = (torch.float32, torch.float64)
    check(basis.dtype in trainable, lambda: f"basis must be {trainable[0]} or {trainable[1]}, got {basis.dtype}")
    _generator(basis, bias, depthwise)
    # A bfloat16 momentum is an option of float32 alone.
    dtypes = (basis.dtype, torch.bfloat16) if basis.dtype == torch.float32 else (basis.dtype,)
    expect("basis_momentum", basis_momentum, basis.shape, dtypes, basis, "= [O, I, K, H] ")
    expect("bias_momentum", bias_momentum, basis.shape[:3], (basis.dtype,), basis, "= [O, I, K] ")
    expect("written", written, basis.shape[:2], (torch.uint8,), basis, "= [O, I] ")
    expect("drift", drift, (DRIFTS, 4), (basis.dtype,), basis)


def generate_delayed(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    written: Tensor,
    drift: Tensor,
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    depthwise: bool,
) -> None:
    _state(basis, bias, basis_momentum, bias_momentum, written, drift, depthwise)
    _subnetworks(basis, codes, cin, cout)


def update_generators_(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    written: Tensor,
    drift: Tensor,
    codes: Tensor,
    grad: Tensor,
    cin: Tensor,
    cout: Tensor,
    depthwise: bool,
    lr: float,
    momentum: float,
    weight_decay: float,
    everywhere: bool,
    step: int,
) -> None:
    _state(basis, bias, basis_momentum, bias_momentum, written, drift, depthwise)
    o, i, taps, _ = basis.shape
    count = _subnetworks(basis, codes, cin, cout, least=0 if everywhere else 1)
    # A slot may be as small as its largest crop.
    largest = weight_slot(i, o, isqrt(taps), basis.dtype, depthwise)
    expect("grad", grad, (count, min(grad.shape[-1], largest)), (basis.dtype,), basis, "= [S, slot] ")
    constants = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    check(all(map(isfinite, constants.values())), lambda: f"these must be finite numbers: {constants}")
    check(everywhere or 0 < step < DRIFTS, lambda: f"step is {step}; legal values are 1..{DRIFTS - 1}")
