"""Where the numbers of a ragged batch lie in memory.

Differently wide tensors share one buffer of equal slots, sized for the widest of them. Subnetwork `s` uses the
front of a slot as one dense block, whose size follows from its own channel counts:

    activations   [N, H, W, round_up(C_s, 8)]               pad channels: unspecified, never read
    weights       [ceil(O_s/16), K, ceil(I_s/p), 16, p]     pad channels: zero
    depthwise     [K, round_up(C_s, 8)]                     pad channels: zero

What lies behind the front is unspecified and never read.

Dense weights are panels of 16 output channels. A row of a panel is sixteen words, one for each of its output
channels, and a word holds p input channels: 2 in bfloat16 on the CPU, otherwise 1. Weight (o, i, k) lies at
`[o // 16, k, i // p, o % 16, i % p]`, so that one register of weights is multiplied by one word of the input.
A GPU multiplies from shared memory, where pairs of input channels would have to be copied four bytes at a time
(`kernels/ragged_conv/README.md`): a buffer of weights is read on the device that packed it.

Legend: S subnetworks, N images, C or I channels in, O channels out, H W size, K = kernel² taps.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

CHANNEL_MULTIPLE = 8
PANEL = 16
CPU = torch.device("cpu")

Image = Sequence[int]
"""(N, H, W): images in the batch, height and width in pixels."""


def round_up(n: int, multiple: int = CHANNEL_MULTIPLE) -> int:
    """The least multiple of `multiple` that is at least `n`."""
    return (n + multiple - 1) // multiple * multiple


def output_size(size: int, kernel: int, stride: int) -> int:
    """Height or width, in pixels, after a convolution or pooling padded by `kernel // 2`."""
    return (size + 2 * (kernel // 2) - kernel) // stride + 1


def output_image(image: Image, kernel: int, stride: int) -> tuple[int, int, int]:
    """(N, Ho, Wo) after a convolution or pooling padded by `kernel // 2`."""
    n, height, width = image
    return n, output_size(height, kernel, stride), output_size(width, kernel, stride)


def chained_image(image: Image, kernels: Sequence[int], strides: Sequence[int]) -> Image:
    """(N, Ho, Wo) after one convolution after another, each padded by `kernel // 2`."""
    for kernel, stride in zip(kernels, strides, strict=True):
        image = output_image(image, kernel, stride)
    return image


def activation_slot(image: Image, max_channels: int) -> int:
    """Elements of one activation slot: N · H · W · round_up(max_channels, 8)."""
    n, height, width = image
    return n * height * width * round_up(max_channels)


def channels_per_word(dtype: torch.dtype, device: torch.device) -> int:
    """Input channels that share one word of a row of dense weights: p in the layout above."""
    return 2 if dtype.itemsize == 2 and device.type == "cpu" else 1


def weight_slot(
    max_cin: int,
    max_cout: int,
    kernel: int,
    dtype: torch.dtype,
    depthwise: bool = False,
    device: torch.device = CPU,
) -> int:
    """Elements of one weight slot: ceil(O/16) · K · ceil(I/p) · 16 · p, or K · round_up(O, 8) if depthwise."""
    taps = kernel * kernel
    if depthwise:
        return taps * round_up(max_cout)
    return round_up(max_cout, PANEL) * taps * round_up(max_cin, channels_per_word(dtype, device))


def view_activations(slot: Tensor, image: Image, channels: int) -> Tensor:
    """The front of one slot `[slot]` as a view `[N, C_s, H, W]`, channels last, without its pad channels."""
    n, height, width = image
    front = slot[: activation_slot(image, channels)].view(n, height, width, round_up(channels))
    return front[..., :channels].permute(0, 3, 1, 2)


def _weight_front(slot: Tensor, cin: int, cout: int, kernel: int, depthwise: bool) -> Tensor:
    """The front of one slot as a view `[O, I, kh, kw]` with its pad channels; O and I as two dimensions each.

    `[panels, 16, words, p, kh, kw]`, or `[round_up(C_s, 8), 1, 1, 1, kh, kw]` if depthwise.
    """
    size = weight_slot(cin, cout, kernel, slot.dtype, depthwise, slot.device)
    if size > len(slot):
        raise RuntimeError(f"a crop of {cout} × {cin} channels has {size} numbers, its slot {len(slot)}")
    front = slot[:size]
    if depthwise:
        return front.view(kernel, kernel, -1, 1, 1, 1).permute(2, 3, 4, 5, 0, 1)
    p = channels_per_word(slot.dtype, slot.device)
    return front.view(-1, kernel, kernel, round_up(cin, p) // p, PANEL, p).permute(0, 4, 3, 5, 1, 2)


def read_weights(slot: Tensor, cin: int, cout: int, kernel: int, depthwise: bool = False) -> Tensor:
    """The weights `[O_s, I_s, kh, kw]`, or `[C_s, 1, kh, kw]` if depthwise, at the front of one slot `[slot]`.

    Differentiable in the slot. `cin` is ignored if depthwise.
    """
    front = _weight_front(slot, cin, cout, kernel, depthwise)
    return front.flatten(0, 1).flatten(1, 2)[:cout, : 1 if depthwise else cin]


def write_weights(slot: Tensor, dense: Tensor, depthwise: bool = False) -> None:
    """Write dense weights `[O_s, I_s, kh, kw]`, or `[C_s, 1, kh, kw]` if depthwise, to the front of one slot."""
    cout, cin, kernel, _ = dense.shape
    front = _weight_front(slot, cin, cout, kernel, depthwise)
    rows, columns = front.shape[0] * front.shape[1], front.shape[2] * front.shape[3]
    padded = functional.pad(dense, (0, 0, 0, 0, 0, columns - cin, 0, rows - cout))
    front.copy_(padded.unflatten(1, front.shape[2:4]).unflatten(0, front.shape[:2]))


def new_buffer(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor with the dtype and device of `like`.

    On the CPU the extension, if it is loaded, gives large ones memory that was used before: fresh memory costs a page
    fault for every 4 KB.
    """
    pooled = getattr(torch.ops.metaprune, "new_buffer", None) if like.device.type == "cpu" else None
    return like.new_empty(shape) if pooled is None else pooled(like, shape)


def gather_activations(images: Iterable[Tensor], count: int, image: Image, max_channels: int, like: Tensor) -> Tensor:
    """Write `count` dense images `[N, C_s, H, W]`, taken one at a time, into a new buffer `[S, slot]`.

    The buffer has the dtype and device of `like`; values are rounded to it once. Where the images require
    grad the slots are stacked instead: S writes into one buffer would copy its whole gradient S times.
    """
    slot = activation_slot(image, max_channels)
    images = iter(images)
    first = next(images)
    if first.requires_grad:
        fronts = [
            functional.pad(dense.permute(0, 2, 3, 1), (0, round_up(dense.shape[1]) - dense.shape[1])).reshape(-1)
            for dense in (first, *images)
        ]
        return torch.stack([functional.pad(f, (0, slot - f.numel())) for f in fronts]).to(like.dtype)
    buffer = new_buffer(like, count, slot)
    for s, dense in enumerate(chain([first], images)):
        view_activations(buffer[s], image, dense.shape[1]).copy_(dense)
    return buffer


def pack_activations(images: Sequence[Tensor], max_channels: int) -> Tensor:
    """Lay S dense images `[N, C_s, H, W]`, equal in N, H, W and dtype, out as one buffer `[S, slot]`.

    Raises `ValueError` if an image has more than `max_channels` channels or another N, H, W than the first.
    """
    n, _, height, width = images[0].shape
    for dense in images:
        if (dense.shape[0], *dense.shape[2:]) != (n, height, width) or dense.shape[1] > max_channels:
            raise ValueError(
                f"every image must be [{n}, at most {max_channels}, {height}, {width}] like the first, "
                f"got {list(dense.shape)}"
            )
    return gather_activations(images, len(images), (n, height, width), max_channels, images[0])


def unpack_activations(x: Tensor, channels: Tensor | Sequence[int], image: Image) -> list[Tensor]:
    """The S dense images `[N, C_s, H, W]` of a buffer `[S, slot]`, as differentiable views.

    `channels` holds the S channel counts; a tensor is read back to the host.
    """
    return [view_activations(slot, image, c) for slot, c in zip(x.unbind(0), _integers(channels), strict=True)]


def pack_weights(weights: Sequence[Tensor], max_cin: int, max_cout: int, depthwise: bool = False) -> Tensor:
    """Lay dense weights `[O_s, I_s, kh, kw]` out as one buffer `[S, slot]`, zero wherever there are none.

    Depthwise weights are `[C_s, 1, kh, kw]`, C_s at most `max_cout`.
    """
    kernel, dtype = weights[0].shape[-1], weights[0].dtype
    slot_size = weight_slot(max_cin, max_cout, kernel, dtype, depthwise, weights[0].device)
    buffer = weights[0].new_zeros(len(weights), slot_size)
    for slot, dense in zip(buffer.unbind(0), weights, strict=True):
        write_weights(slot, dense, depthwise)
    return buffer


def unpack_weights(
    weight: Tensor,
    cin_S: Tensor | Sequence[int],
    cout_S: Tensor | Sequence[int],
    *,
    kernel: int,
    depthwise: bool = False,
) -> list[Tensor]:
    """The S dense weights `[O_s, I_s, kh, kw]` (`[C_s, 1, kh, kw]` if depthwise) of a buffer `[S, slot]`.

    They are differentiable in the buffer. A tensor of widths is read back to the host.
    """
    widths = zip(weight.unbind(0), _integers(cin_S), _integers(cout_S), strict=True)
    return [read_weights(slot, cin, cout, kernel, depthwise) for slot, cin, cout in widths]


def _integers(values: Tensor | Sequence[int]) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, which is not waited for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
