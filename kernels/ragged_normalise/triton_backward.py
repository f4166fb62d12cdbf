"""`ragged_normalise_backward` in Triton: a tile of pixels by a tile of channels of a slot, for all who read it.

Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, M pixels, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import own_slot, padded, per_channel, reader_width, stopped
from kernels.gpu.sums import add_two, totals
from kernels.gpu.tiles import tile
from kernels.layout import Image


@triton.jit
def _normalise_gradient_kernel(
    grad, y, x, result, partials, scale_SC, channels_S, source_S, count, pixels, elements, max_channels,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Without x, partials and scale: of what is only added."""
    row = tl.program_id(1)
    tiles_across = tl.cdiv(max_channels, COLUMNS)
    number, first = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * COLUMNS
    channels = reader_width(source_S, channels_S, row, count)
    # A slot that nobody reads is zero from end to end.
    stored = tl.where(channels > 0, channels, max_channels)
    if first >= stored:
        return
    m, c = number * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    stride = padded(stored)
    stored_MC = (m < pixels)[:, None] & (c < stride)[None, :]
    at = m.to(tl.int64)[:, None] * stride + c[None, :]
    if x is not None:
        x_MC = tl.load(own_slot(x, row, elements) + at, mask=stored_MC, other=0).to(tl.float32)

    acc_MC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(0, count):
        if tl.load(source_S + s) == row:
            d_MC = tl.load(own_slot(grad, s, elements) + at, mask=stored_MC, other=0).to(tl.float32)
            if ACTIVATION != "none":
                y_MC = tl.load(own_slot(y, s, elements) + at, mask=stored_MC, other=0).to(tl.float32)
                d_MC = tl.where(stopped(y_MC, ACTIVATION), 0, d_MC)
            if x is not None:
                # A subnetwork has one source, so that these sums are written once.
                tiles = tl.num_programs(0) // tiles_across
                add_two(partials, s, number, tiles, max_channels, c, channels, d_MC * x_MC, d_MC)
                d_MC *= per_channel(scale_SC, s, max_channels, c, channels)[None, :]
            acc_MC += d_MC
    tl.store(own_slot(result, row, elements) + at, acc_MC.to(result.dtype.element_ty), mask=stored_MC)


def ragged_normalise_backward_triton(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    max_channels: int,
    activation: str,
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels. Arguments and results: `ragged_normalise_backward_reference`."""
    count, pixels = len(channels), image[0] * image[1] * image[2]
    size = tile("ragged_normalise", x.dtype)
    tiles = triton.cdiv(pixels, size.rows)
    blocks = tiles * triton.cdiv(max_channels, size.columns)
    rest = (count, pixels, x.shape[1], max_channels, activation, size.rows, size.columns)
    grad_x, grad_shortcut = torch.empty_like(x), x.new_empty(0)
    partials = x.new_empty(count, tiles, 2, max_channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _normalise_gradient_kernel[blocks, len(x)](
            grad, y, x, grad_x, partials, scale, channels, source, *rest, **size.options
        )
        if shortcut is not None:
            grad_shortcut = torch.empty_like(shortcut)
            _normalise_gradient_kernel[blocks, len(shortcut)](
                grad, y, None, grad_shortcut, None, None, channels, shortcut_source, *rest, **size.options
            )
        grad_scale, grad_shift = totals(partials, channels, None, scale, shift)
    return grad_x, grad_scale, grad_shift, grad_shortcut
