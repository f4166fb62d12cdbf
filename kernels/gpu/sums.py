"""Per-channel sums in two stages of fixed order: the same bits in every run, and for a subnetwork in any batch.

A kernel adds up each of its tiles of pixels in float32 (`add_tile`); `total` adds the tiles in float64. `add_parts`
adds what programs have left.

Legend: S subnetworks, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.tiles import tile


@triton.jit
def add_tile(partials, s, number, tiles, limit, channel_C, channels, value):
    """Write the sum and the sum of squares of a tile of pixels `[pixels, C]` to `partials` [S, tiles, 2, limit]."""
    row = partials + ((s.to(tl.int64) * tiles + number) * 2) * limit
    tl.store(row + channel_C, tl.sum(value, 0), mask=channel_C < channels)
    tl.store(row + limit + channel_C, tl.sum(value * value, 0), mask=channel_C < channels)


@triton.jit
def _total_kernel(partials, sums, channels_S, tiles, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    s = tl.program_id(1)
    which = tl.program_id(2)
    channel_C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel_C < tl.load(channels_S + s)
    total = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, tiles, ROWS):
        number = first + tl.arange(0, ROWS)
        address = ((s.to(tl.int64) * tiles + number) * 2 + which) * limit
        mask = (number < tiles)[:, None] & known[None, :]
        part = tl.load(partials + address[:, None] + channel_C[None, :], mask=mask, other=0)
        total += tl.sum(part.to(tl.float64), 0)
    tl.store(sums + (s * 2 + which).to(tl.int64) * limit + channel_C, total, mask=channel_C < limit)


def total(partials: Tensor | None, channels_S: Tensor, like: Tensor) -> Tensor:
    """The float64 sums `[S, 2, max channels]` of the tiles `[S, tiles, 2, max channels]`, zero beyond a
    subnetwork's channels; empty if there are none."""
    if partials is None:
        return like.new_empty(0, dtype=torch.float64)
    count, tiles, _, limit = partials.shape
    size = tile("sums", torch.float32)
    sums = partials.new_empty(count, 2, limit, dtype=torch.float64)
    grid = (triton.cdiv(limit, size.columns), count, 2)
    _total_kernel[grid](partials, sums, channels_S, tiles, limit, size.rows, size.columns, **size.options)
    return sums


@triton.jit
def _add_parts_kernel(parts, sums, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, count, ROWS):
        part = first + tl.arange(0, ROWS)
        mask = (part < count)[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(parts + part.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0), 0)
    tl.store(sums + column, total.to(sums.dtype.element_ty), mask=column < width)


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension of float64 `parts`, rounded once."""
    sums = parts.new_empty(parts.shape[1:], dtype=dtype)
    if sums.numel():
        size = tile("parts", dtype)
        _add_parts_kernel[triton.cdiv(sums.numel(), size.columns),](
            parts, sums, len(parts), sums.numel(), size.rows, size.columns, **size.options
        )
    return sums
