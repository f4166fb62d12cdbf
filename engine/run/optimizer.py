"""What makes a training step of gradients: momentum SGD, whose momentum can be written to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.space.recipe import Recipe


class Optimizer(Protocol):
    """What the training loop needs of an optimizer. Momentum goes by the names of the module's parameters."""

    @property
    def at_rest(self) -> bool:
        """Whether the module's parameters and the momentum are those after the last step."""

    def settle(self) -> None:
        """Come to rest."""

    def step(self, lr: float) -> None:
        """Apply what a backward pass has left, and drop it."""

    def momentum(self) -> dict[str, Tensor]:
        """The momentum of every parameter that has been changed."""

    def restore(self, momentum: Mapping[str, Tensor]) -> None:
        """Continue with the momentum of a checkpoint, whose shapes are those of the parameters."""


class SGD:
    """`torch.optim.SGD` over named parameters, always at rest."""

    at_rest = True

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], recipe: Recipe) -> None:
        self.parameters = dict(parameters)
        self.optimizer = torch.optim.SGD(
            self.parameters.values(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def settle(self) -> None:
        pass

    def momentum(self) -> dict[str, Tensor]:
        buffers = ((name, self.optimizer.state[p].get("momentum_buffer")) for name, p in self.parameters.items())
        return {name: buffer for name, buffer in buffers if buffer is not None}

    def restore(self, momentum: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            if name in momentum:
                self.optimizer.state[parameter]["momentum_buffer"] = momentum[name].to(parameter.device)
