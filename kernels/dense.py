"""What the reference of every op does to one dense subnetwork: precision, statistics, epilogue.

Legend: S subnetworks, N images, C channels, H W size.
"""

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("none", "relu", "relu6")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision a reference computes in: float64 for float64, float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widths_on_host(name: str, values_S: Tensor, limit: int) -> list[int]:
    """The S channel counts of `values_S` as Python integers; `RuntimeError` unless all lie in 1..limit."""
    return _in_range(name, values_S, 1, limit)


def slots_on_host(name: str, source_S: Tensor, slots: int) -> list[int]:
    """The S slot numbers of `source_S` as Python integers; `RuntimeError` unless all lie in 0..slots-1."""
    return _in_range(name, source_S, 0, slots - 1)


def _in_range(name: str, values_S: Tensor, low: int, high: int) -> list[int]:
    values: list[int] = values_S.tolist()
    for s, value in enumerate(values):
        if not low <= value <= high:
            raise RuntimeError(f"{name}[{s}] is {value}; legal values are {low}..{high}")
    return values


def channel_sums(dense_NCHW: Tensor, max_channels: int) -> Tensor:
    """Per-channel sum and sum of squares over N·H·W, `[2, max_channels]` float64, zero beyond C.

    Accumulated in float64 over blocks of rows that stay in cache, each summed as a product with ones: several
    times faster than `Tensor.sum` down the rows.
    """
    channels = dense_NCHW.shape[1]
    total = dense_NCHW.new_zeros(2, channels, dtype=torch.float64)
    for block in dense_NCHW.permute(0, 2, 3, 1).reshape(-1, channels).split(1024):
        wide = block.to(torch.float64, copy=True)
        ones = wide.new_ones(1, len(wide))
        total = total + torch.cat([ones @ wide, ones @ wide.square()])
    return functional.pad(total, (0, max_channels - channels))


def finish(out: Tensor, bias_C: Tensor | None, shortcut: Tensor | None, activation: str) -> Tensor:
    """act(out + bias + shortcut), in place on `out` `[N, C, H, W]`; `bias_C` may have more than C entries."""
    if bias_C is not None:
        out = out.add_(bias_C[: out.shape[1], None, None])
    if shortcut is not None:
        out = out.add_(shortcut)
    if activation == "relu":
        out = out.relu_()
    elif activation == "relu6":
        out = out.clamp_(0, 6)
    return out
