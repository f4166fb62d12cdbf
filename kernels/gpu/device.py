"""Functions that several Triton kernels call on the device.

Legend: S subnetworks, M pixels out, C channels.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def padded(channels):
    """The stride of a pixel in elements: round_up(channels, 8), and the compiler sees that it is a multiple of 8."""
    return (channels + 7) // 8 * 8


@triton.jit
def slot(buffer, number_S, s, elements):
    """The slot of `elements` that subnetwork s reads. Slots begin at whole groups of 8 elements."""
    return buffer + tl.multiple_of(tl.load(number_S + s).to(tl.int64) * elements, 8)


@triton.jit
def own_slot(buffer, s, elements):
    """The slot of `elements` that subnetwork s writes."""
    return buffer + tl.multiple_of(s.to(tl.int64) * elements, 8)


@triton.jit
def per_channel(values_SC, row, limit, channel_C, channels):
    """A row of numbers per channel in float32, 0 from `channels` on: what lies there is not read."""
    return tl.load(values_SC + row.to(tl.int64) * limit + channel_C, mask=channel_C < channels, other=0).to(tl.float32)


@triton.jit
def window(m, height, width, out_height, out_width, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Where the window of each pixel out begins: row, column, and number of that pixel; negative in the padding."""
    top_M = m // out_width % out_height * STRIDE - KERNEL // 2
    left_M = m % out_width * STRIDE - KERNEL // 2
    return top_M, left_M, (m // (out_width * out_height) * height + top_M) * width + left_M


@triton.jit
def inside_image(top_M, left_M, tap, height, width, KERNEL: tl.constexpr):
    """Whether a tap of each window lies inside the image."""
    y_M, x_M = top_M + tap // KERNEL, left_M + tap % KERNEL
    return (y_M >= 0) & (y_M < height) & (x_M >= 0) & (x_M < width)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """none, relu or relu6. A NaN stays one: a subnetwork that diverged must not look well."""
    if ACTIVATION != "none":
        value = tl.where(value < 0, 0.0, value)
    if ACTIVATION == "relu6":
        value = tl.where(value > 6, 6.0, value)
    return value


@triton.jit
def finish(
    y, value_MC, s, m, pixels, c, channels, limit, slot_size, scale_SC, shift_SC, shortcut, shortcut_source_S,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store act(value · scale + shift + shortcut) to slot s of y. Whole groups of channels, as stores are aligned."""
    stride = padded(channels)
    stored_MC = (m < pixels)[:, None] & (c < stride)[None, :]
    at = m.to(tl.int64)[:, None] * stride + c[None, :]
    if scale_SC is not None:
        value_MC *= per_channel(scale_SC, s, limit, c, channels)[None, :]
    if shift_SC is not None:
        value_MC += per_channel(shift_SC, s, limit, c, channels)[None, :]
    if shortcut is not None:
        value_MC += tl.load(slot(shortcut, shortcut_source_S, s, slot_size) + at, mask=stored_MC, other=0).to(
            tl.float32
        )
    tl.store(own_slot(y, s, slot_size) + at, activate(value_MC, ACTIVATION).to(y.dtype.element_ty), mask=stored_MC)


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32."""
    if INTERPRETED:
        # The interpreter's product takes the bits of a bfloat16 for an integer.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
