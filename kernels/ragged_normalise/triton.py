"""`ragged_normalise` in Triton: a tile of pixels by a tile of channels.

Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, M pixels, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import finish, padded, slot
from kernels.gpu.tiles import tile
from kernels.layout import Image


@triton.jit
def _normalise_kernel(
    x, y, scale_SC, shift_SC, channels_S, source_S, shortcut, shortcut_source_S, pixels, elements, max_channels,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    channels = tl.load(channels_S + s)
    tiles_across = tl.cdiv(max_channels, COLUMNS)
    number, first = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * COLUMNS
    if first >= channels:
        return
    m, c = number * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    stride = padded(channels)
    inside_MC = (m < pixels)[:, None] & (c < stride)[None, :]
    at = m.to(tl.int64)[:, None] * stride + c[None, :]
    value_MC = tl.load(slot(x, source_S, s, elements) + at, mask=inside_MC, other=0).to(tl.float32)
    finish(
        y, value_MC, s, m, pixels, c, channels, max_channels, elements, scale_SC, shift_SC, shortcut,
        shortcut_source_S, ACTIVATION,
    )  # fmt: skip


def ragged_normalise_triton(
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
) -> Tensor:
    """Launch the kernel. Arguments and results: `kernels.ragged_normalise`."""
    count, pixels = channels.shape[0], image[0] * image[1] * image[2]
    size = tile("ragged_normalise", x.dtype)
    y = x.new_empty(count, x.shape[1])
    with torch.cuda.device_of(x):
        _normalise_kernel[triton.cdiv(pixels, size.rows) * triton.cdiv(max_channels, size.columns), count](
            x, y, scale, shift, channels, source, shortcut, shortcut_source, pixels, x.shape[1], max_channels,
            activation, size.rows, size.columns, **size.options,
        )  # fmt: skip
    return y
