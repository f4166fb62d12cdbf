"""`score_logits` in Triton: pool every image to one row of features, then classify and score blocks of images.

Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, N images, P pixels of an image, C channels, T classes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import multiply_add, padded, slot
from kernels.gpu.tiles import product_precision, tile
from kernels.layout import Image

# Below every logit, but finite: the first block of logits is compared with it.
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _pool_kernel(
    x, features, channels_S, source_S, images, pixels, x_slot, max_channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    s, n = tl.program_id(1), tl.program_id(0) % images
    c = tl.program_id(0) // images * COLUMNS + tl.arange(0, COLUMNS)
    stride = padded(tl.load(channels_S + s))
    image = slot(x, source_S, s, x_slot) + tl.multiple_of(n.to(tl.int64) * pixels * stride, 8)
    total_C = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, pixels, ROWS):
        p = first + tl.arange(0, ROWS)
        inside_PC = (p < pixels)[:, None] & (c < stride)[None, :]
        part_PC = tl.load(image + (p * stride)[:, None] + c[None, :], mask=inside_PC, other=0)
        total_C += tl.sum(part_PC.to(tl.float32), 0)
    row = (s.to(tl.int64) * images + n) * max_channels
    tl.store(features + row + c, total_C / pixels, mask=c < max_channels)


@triton.jit
def _score_kernel(
    features, weight, bias, labels, correct, loss, channels_S, images, classes, max_channels,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The classes go by in blocks; the largest logit, its class and Σ exp(logit - largest) are kept up to date."""
    s = tl.program_id(1)
    channels = tl.load(channels_S + s)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    label_N = tl.load(labels + n, mask=n < images, other=0)
    row_N = features + (s.to(tl.int64) * images + n) * max_channels
    largest_N = tl.full((ROWS,), LEAST, tl.float32)
    class_N = tl.zeros((ROWS,), tl.int64)
    sum_N = tl.zeros((ROWS,), tl.float64)
    answer_N = tl.zeros((ROWS,), tl.float32)
    nans_N = tl.zeros((ROWS,), tl.int32)
    for first in range(0, classes, COLUMNS):
        t = first + tl.arange(0, COLUMNS)
        logit_NT = tl.zeros((ROWS, COLUMNS), tl.float32)
        for c0 in range(0, channels, DEPTH):
            c = c0 + tl.arange(0, DEPTH)
            known_C = c < channels
            f_NC = tl.load(row_N[:, None] + c[None, :], mask=(n < images)[:, None] & known_C[None, :], other=0)
            w_CT = tl.load(
                weight + (t * max_channels)[None, :] + c[:, None],
                mask=(t < classes)[None, :] & known_C[:, None],
                other=0,
            )
            logit_NT = multiply_add(f_NC, w_CT.to(tl.float32), logit_NT, PRECISION)
        logit_NT += tl.load(bias + t, mask=t < classes, other=0).to(tl.float32)[None, :]
        logit_NT = tl.where((t < classes)[None, :], logit_NT, float("-inf"))
        nans_N += tl.sum((logit_NT != logit_NT).to(tl.int32), 1)
        answer_N += tl.sum(tl.where(t[None, :] == label_N[:, None], logit_NT, 0), 1)
        block_N, block_class_N = tl.max(logit_NT, 1, return_indices=True, return_indices_tie_break_left=True)
        class_N = tl.where(block_N > largest_N, first + block_class_N, class_N)
        new_N = tl.maximum(block_N, largest_N)
        sum_N *= tl.exp(largest_N - new_N).to(tl.float64)
        sum_N += tl.sum(tl.exp(logit_NT - new_N[:, None]).to(tl.float64), 1)
        largest_N = new_N
    at = s.to(tl.int64) * images + n
    tl.store(correct + at, (class_N == label_N) & (nans_N == 0), mask=n < images)
    tl.store(loss + at, largest_N.to(tl.float64) + tl.log(sum_N) - answer_N.to(tl.float64), mask=n < images)


def score_logits_triton(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, channels: Tensor, source: Tensor, image: Image
) -> tuple[Tensor, Tensor]:
    """Launch the kernels. Arguments and results: `kernels.score_logits`."""
    count, images, (classes, max_channels) = channels.shape[0], image[0], weight.shape
    pooling, size = tile("average_pool", x.dtype), tile("score_logits", torch.float32)
    features = x.new_empty(count, images, max_channels, dtype=torch.float32)
    correct = labels.new_empty(count, images, dtype=torch.bool)
    loss = labels.new_empty(count, images, dtype=torch.float64)
    with torch.cuda.device_of(x):
        _pool_kernel[images * triton.cdiv(max_channels, pooling.columns), count](
            x, features, channels, source, images, image[1] * image[2], x.shape[1], max_channels, pooling.rows,
            pooling.columns, **pooling.options,
        )  # fmt: skip
        _score_kernel[triton.cdiv(images, size.rows), count](
            features, weight, bias, labels, correct, loss, channels, images, classes, max_channels,
            product_precision(torch.float32), size.rows, size.columns, size.depth, **size.options,
        )  # fmt: skip
    return correct, loss
