"""`score_logits` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels, T classes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dense import compute_dtype, slots_on_host, widths_on_host
from kernels.layout import Image, view_activations


def score_logits_reference(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, channels: Tensor, source: Tensor, image: Image
) -> tuple[Tensor, Tensor]:
    """Top-1 hits and losses of logits[s] = mean_HW(x[source[s]]) @ weight[:, :channels[s]]ᵀ + bias, by image.

    Shapes and errors: `kernels.score_logits`.
    """
    dtype = compute_dtype(x.dtype)
    sources = slots_on_host("source", source, x.shape[0])
    widths = widths_on_host("channels", channels, weight.shape[1])
    correct, losses = [], []
    for c, slot in zip(widths, sources, strict=True):
        features = view_activations(x[slot], image, c).mean((2, 3), dtype=dtype)
        logits = functional.linear(features, weight[:, :c].to(dtype), bias.to(dtype))
        correct.append((logits.argmax(1) == labels) & ~logits.isnan().any(1))
        losses.append(functional.cross_entropy(logits.double(), labels, reduction="none"))
    return torch.stack(correct), torch.stack(losses)
