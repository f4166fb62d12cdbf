"""Per-channel sums in two stages of fixed order: the same bits in every run, and for a subnetwork in any batch.

A kernel adds up each of its tiles of pixels in float32 (`add_tile`, `add_two`); `total` and `totals` add the tiles in
float64. `add_programs` adds what programs have left.

Legend: S subnetworks, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import reader_width
from kernels.gpu.tiles import tile


@triton.jit
def add_tile(partials, s, number, tiles, limit, channel_C, channels, value):
    """Write the sum and the sum of squares of a tile of pixels `[pixels, C]` to `partials` [S, tiles, 2, limit]."""
    add_two(partials, s, number, tiles, limit, channel_C, channels, value, value * value)


@triton.jit
def add_two(partials, s, number, tiles, limit, channel_C, channels, one, other):
    """Write the sums of two tiles of pixels `[pixels, C]` to `partials` [S, tiles, 2, limit]."""
    row = partials + ((tl.cast(s, tl.int64) * tiles + number) * 2) * limit
    tl.store(row + channel_C, tl.sum(one, 0), mask=channel_C < channels)
    tl.store(row + limit + channel_C, tl.sum(other, 0), mask=channel_C < channels)


@triton.jit
def _total_kernel(
    partials, one, other, channels_S, source_S, count, tiles, limit, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1)
    which = tl.program_id(2)
    channel_C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    channels = tl.load(channels_S + row) if source_S is None else reader_width(source_S, channels_S, row, count)
    known = channel_C < channels
    total = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, tiles, ROWS):
        number = first + tl.arange(0, ROWS)
        address = ((row.to(tl.int64) * tiles + number) * 2 + which) * limit
        mask = (number < tiles)[:, None] & known[None, :]
        part = tl.load(partials + address[:, None] + channel_C[None, :], mask=mask, other=0)
        total += tl.sum(part.to(tl.float64), 0)
    if one.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)  # Triton's interpreter knows no way from float64 to bfloat16.
    at = row.to(tl.int64) * stride + channel_C
    if which == 0:
        tl.store(one + at, total.to(one.dtype.element_ty), mask=channel_C < limit)
    else:
        tl.store(other + at, total.to(other.dtype.element_ty), mask=channel_C < limit)


def total(partials: Tensor | None, channels_S: Tensor, like: Tensor) -> Tensor:
    """The float64 sums `[S, 2, max channels]` of the tiles `[S, tiles, 2, max channels]`, zero beyond a
    subnetwork's channels; empty if there are none."""
    if partials is None:
        return like.new_empty(0, dtype=torch.float64)
    sums = partials.new_empty(len(partials), 2, partials.shape[-1], dtype=torch.float64)
    _add_tiles(partials, sums[:, 0], sums[:, 1], channels_S, None)
    return sums


def totals(
    partials: Tensor, channels_S: Tensor, source_S: Tensor | None, one: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sums of the tiles `[rows, tiles, 2, max channels]`, shaped and rounded like `one` and `other`.

    A row is a subnetwork, or with `source_S` the slot that it reads. It is zero beyond its channels.
    """
    sums = torch.empty_like(one), torch.empty_like(other)
    _add_tiles(partials, *sums, channels_S, source_S)
    return sums


def _add_tiles(partials: Tensor, one: Tensor, other: Tensor, channels_S: Tensor, source_S: Tensor | None) -> None:
    """Add the tiles up to rows of `one` and `other`, which lie equally far apart."""
    rows, tiles, _, limit = partials.shape
    size = tile("sums", torch.float32)
    _total_kernel[triton.cdiv(limit, size.columns), rows, 2](
        partials, one, other, channels_S, source_S, len(channels_S), tiles, limit, one.stride(0), size.rows,
        size.columns, **size.options,
    )  # fmt: skip


@triton.jit
def _add_programs_kernel(parts, sums, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, count, ROWS):
        part = first + tl.arange(0, ROWS)
        mask = (part < count)[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(parts + part.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0), 0)
    tl.store(sums + column, total.to(sums.dtype.element_ty), mask=column < width)


def add_programs(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension of float64 `parts`, rounded once."""
    sums = parts.new_empty(parts.shape[1:], dtype=dtype)
    if sums.numel():
        size = tile("programs", dtype)
        _add_programs_kernel[triton.cdiv(sums.numel(), size.columns),](
            parts, sums, len(parts), sums.numel(), size.rows, size.columns, **size.options
        )
    return sums
