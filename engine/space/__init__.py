"""What may be pruned, and what a choice costs: pure data and arithmetic, no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import UserError
from engine.space import mobilenet_v1, mobilenet_v2, resnet
from engine.space.recipe import Recipe
from engine.space.space import IMAGE, IMAGE_CHANNELS, Conv, Gene, Space, Width, gene, max_width, rounded

__all__ = [
    "ARCHITECTURES", "IMAGE", "IMAGE_CHANNELS", "Architecture", "Conv", "Gene", "Recipe", "Space", "Width",
    "architecture", "gene", "max_width", "rounded",
]  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A search space and the paper's recipes for it."""

    build: Callable[[int], Space]
    metatrain: Recipe
    retrain: Recipe


# The one place where an architecture is registered.
ARCHITECTURES = {
    "mobilenet_v1": Architecture(mobilenet_v1.mobilenet_v1, mobilenet_v1.METATRAIN, mobilenet_v1.RETRAIN),
    "mobilenet_v2": Architecture(mobilenet_v2.mobilenet_v2, mobilenet_v2.METATRAIN, mobilenet_v2.RETRAIN),
    "resnet50": Architecture(resnet.resnet50, resnet.METATRAIN, resnet.RETRAIN),
}


def architecture(name: str) -> Architecture:
    """The registered architecture, or a `UserError` that lists the legal names."""
    if name not in ARCHITECTURES:
        raise UserError(f"unknown architecture {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
