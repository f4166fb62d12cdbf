"""The forward pass of training for S structures at once, through the ragged ops, under autograd.

A convolution leaves its output as it is, with the sums of its channels; whoever reads it normalises and activates on
reading, and a shortcut or a pooling on the way. So a training step keeps one tensor for each convolution, and the
gradient of BatchNorm flows through the sums. `engine.pruningnet.PruningNet.features` is the definition.

Shape suffixes: S structures, N images of a structure, G genes, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from engine.pruningnet import NORM_EPSILON, PruningNet
from engine.space import IMAGE, IMAGE_CHANNELS, Conv
from engine.trie import materialised
from kernels import layout
from kernels.layout import Image


@dataclass(frozen=True)
class Activations:
    """What a convolution left: ``[S, slot]`` of images (N, H, W), and the normalisation that its readers apply."""

    buffer: Tensor
    image: Image
    scale_SC: Tensor | None = None
    shift_SC: Tensor | None = None
    activation: str = "none"


def training_features(
    net: PruningNet,
    weights: Sequence[Tensor],
    widths: Sequence[tuple[Tensor, Tensor]],
    limits: Sequence[tuple[int, int]],
    features: Sequence[int],
    images_NCHW: Tensor,
    *,
    shared: bool = False,
) -> list[Tensor]:
    """What the classifier reads of S structures, ``[N, C]`` each, where ``features`` are the C.

    Of every convolution, ``weights`` are packed in slots for ``limits`` channels in and out, and ``widths`` are the
    channels ``[S]`` in and out of the structures. The images are split among the structures in order, and S divides
    their number; or all see the same (``shared``). Nothing is read back from the device. The bits of a structure's
    result depend on the limits, but not on the others.
    """
    return _Pass(net, len(weights[0]), images_NCHW, shared).run(weights, widths, limits, features)


class _Pass:
    def __init__(self, net: PruningNet, structures: int, images_NCHW: Tensor, shared: bool) -> None:
        self.space = net.space
        self.own_S = torch.arange(structures, dtype=torch.int32, device=images_NCHW.device)
        self.first_S = torch.zeros_like(self.own_S) if shared else self.own_S
        parts = [images_NCHW] if shared else images_NCHW.chunk(structures)
        n, _, height, width = parts[0].shape
        self.tensors = {IMAGE: Activations(layout.pack_activations(parts, IMAGE_CHANNELS), (n, height, width))}
        self.stored = materialised(net.space) | {net.space.convs[-1].name}

    def run(
        self,
        weights: Sequence[Tensor],
        widths: Sequence[tuple[Tensor, Tensor]],
        limits: Sequence[tuple[int, int]],
        features: Sequence[int],
    ) -> list[Tensor]:
        for conv, weight, width_S, limit in zip(self.space.convs, weights, widths, limits, strict=True):
            self.tensors[conv.name] = self._layer(conv, weight, *width_S, *limit)
        last = self.tensors[self.space.convs[-1].name]
        return list(_Averages.apply(last.buffer, last.image, features, limits[-1][1]))

    def _layer(self, conv: Conv, weight: Tensor, cin_S: Tensor, cout_S: Tensor, cin: int, cout: int) -> Activations:
        x = self.tensors[conv.source]
        source_S = self.first_S if conv.source == IMAGE else self.own_S
        shared: dict[str, Any] = {
            "weight_source_S": self.own_S, "image": x.image, "kernel": conv.kernel, "stride": conv.stride,
            "input_scale_LC": x.scale_SC, "input_shift_LC": x.shift_SC, "input_activation": x.activation,
            "statistics": True,
        }  # fmt: skip
        if conv.depthwise:
            y, sums = kernels.ragged_depthwise(x.buffer, weight, cout_S, source_S, max_channels=cout, **shared)
        else:
            y, sums = kernels.ragged_conv(
                x.buffer, weight, cin_S, cout_S, source_S, max_cin=cin, max_cout=cout, **shared
            )
        image = layout.output_image(x.image, conv.kernel, conv.stride)
        scale_SC, shift_SC = kernels.scale_and_shift(sums, image[0] * image[1] * image[2], NORM_EPSILON)
        if conv.name not in self.stored:
            return Activations(y, image, scale_SC, shift_SC, conv.activation)
        shortcut = None if conv.shortcut is None else self.tensors[conv.shortcut].buffer
        y = kernels.ragged_normalise(
            y, scale_SC, shift_SC, cout_S, self.own_S, image=image, max_channels=cout, activation=conv.activation,
            shortcut=shortcut, shortcut_source_S=None if shortcut is None else self.own_S,
        )  # fmt: skip
        if conv.max_pool:
            y = kernels.ragged_max_pool(y, cout_S, self.own_S, image=image, max_channels=cout)
            image = layout.output_image(image, 3, 2)
        return Activations(y, image)


class _Averages(torch.autograd.Function):
    """The averages ``[N, C]`` over the pixels of every structure; the gradient of their buffer is written once."""

    @staticmethod
    def forward(
        ctx: Any, buffer: Tensor, image: Image, channels: Sequence[int], max_channels: int
    ) -> tuple[Tensor, ...]:
        ctx.like, ctx.image, ctx.max_channels = buffer.new_empty(0), image, max_channels
        return tuple(x.mean(dim=(2, 3)) for x in layout.unpack_activations(buffer, channels, image))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        _, height, width = ctx.image
        shares = ((grad / (height * width))[:, :, None, None].expand(-1, -1, height, width) for grad in grads)
        buffer = layout.gather_activations(shares, len(grads), ctx.image, ctx.max_channels, ctx.like)
        return buffer, None, None, None
