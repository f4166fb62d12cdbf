"""One structure as a plain `torch.nn.Module`. This file needs PyTorch alone and travels with every trained network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}


class ConvBlock(nn.Module):
    """``activation(BatchNorm(conv(x)) + shortcut)``, then an optional 3×3 max-pool of stride 2."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        depthwise: bool,
        activation: str,
        max_pool: bool,
    ) -> None:
        super().__init__()
        groups = in_channels if depthwise else 1
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = ACTIVATIONS[activation]()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if max_pool else nn.Identity()

    def forward(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        x = self.norm(self.conv(x))
        if shortcut is not None:
            x = x + shortcut
        return self.pool(self.activation(x))


class PrunedNet(nn.Module):
    """A convolutional network built from the ``convolutions`` of a ``structure.json`` or ``config.json``.

    Each convolution is a mapping with ``name``, ``source`` (an earlier name, or ``"image"``), ``in_channels``,
    ``out_channels``, ``kernel``, ``stride``, ``depthwise``, ``activation``, ``shortcut`` (an earlier name or None)
    and ``max_pool``. Images ``[N, 3, H, W]`` give logits ``[N, classes]``.
    """

    def __init__(self, convolutions: Sequence[dict[str, Any]], classes: int) -> None:
        super().__init__()
        self.routes = [(c["name"], c["source"], c["shortcut"]) for c in convolutions]
        fields = ("in_channels", "out_channels", "kernel", "stride", "depthwise", "activation", "max_pool")
        self.convs = nn.ModuleDict({_key(c["name"]): ConvBlock(*(c[f] for f in fields)) for c in convolutions})
        self.classifier = nn.Linear(convolutions[-1]["out_channels"], classes)

    def forward(self, images: Tensor) -> Tensor:
        tensors = {"image": images}
        for name, source, shortcut in self.routes:
            added = None if shortcut is None else tensors[shortcut]
            tensors[name] = self.convs[_key(name)](tensors[source], added)
        return self.classifier(tensors[self.routes[-1][0]].mean(dim=(2, 3)))


def _key(name: str) -> str:
    """A convolution's name as a module key, which may not contain dots."""
    return name.replace(".", "_")
