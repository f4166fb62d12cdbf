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
    return buffer + tl.multiple_of(tl.cast(s, tl.int64) * elements, 8)


@triton.jit
def reader_width(source_S, channels_S, number, count):
    """The channels of slot `number` in the eyes of those of `count` subnetworks that read it, who agree; 0 of none."""
    width = 0
    for s in range(0, count):
        if tl.load(source_S + s) == number:
            width = tl.load(channels_S + s)
    return width


@triton.jit
def per_channel(values_SC, row, limit, channel_C, channels):
    """A row of numbers per channel in float32, 0 from `channels` on: what lies there is not read."""
    address_C = values_SC + tl.cast(row, tl.int64) * limit + channel_C
    return tl.load(address_C, mask=channel_C < channels, other=0).to(tl.float32)


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
def meeting_window(m, tap, height, width, out_height, out_width, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """The number of the pixel out whose window has each pixel of the image under this tap, and whether there is one."""
    top_M = m // width % height + KERNEL // 2 - tap // KERNEL
    left_M = m % width + KERNEL // 2 - tap % KERNEL
    y_M, x_M = top_M // STRIDE, left_M // STRIDE
    meets_M = (top_M >= 0) & (top_M % STRIDE == 0) & (y_M < out_height)
    meets_M &= (left_M >= 0) & (left_M % STRIDE == 0) & (x_M < out_width)
    return (m // (width * height) * out_height + y_M) * out_width + x_M, meets_M


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """none, relu or relu6. A NaN stays one: a subnetwork that diverged must not look well."""
    if ACTIVATION != "none":
        value = tl.where(value < 0, 0.0, value)
    if ACTIVATION == "relu6":
        value = tl.where(value > 6, 6.0, value)
    return value


@triton.jit
def stopped(value, ACTIVATION: tl.constexpr):
    """Where an activation lets no gradient through: `value`, before it or after it, is on a bound or beyond."""
    return (value <= 0) | (value >= 6) if ACTIVATION == "relu6" else value <= 0


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
