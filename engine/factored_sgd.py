"""Momentum SGD of a PruningNet that never makes the gradient of a basis.

The gradient of a basis is as large as the basis, and for S structures it has rank S: the gradients of the S generated
weights times their codes. So autograd stops at the generated weights; `kernels.update_generators_` applies what it
found there to basis and bias in one pass, and gives back the gradients of the codes. The result is that of plain
autograd and `torch.optim.SGD`, but for rounding.

Shape suffixes: S structures, N images, G genes, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from engine.pruningnet import PruningNet, count_parameters
from engine.run.optimizer import SGD
from engine.space import Gene, Space, Width
from engine.space.recipe import Recipe
from engine.training_pass import training_logits
from engine.trie import output_images
from kernels import backends, update_generators_

FLOAT_BYTES = 4
# Tensors as large as a convolution's output, at the peak of a step: autograd keeps two or three, others come and go.
KEPT_PER_CONV = 3
# Tensors as large as the generated weights: packed, unpacked, and their gradient.
WEIGHT_COPIES = 3


class FactoredSGD:
    """Trains a PruningNet: `logits`, a backward pass through them, then `step`.

    fc1 of the generators and the classifier are trained by `torch.optim.SGD`.
    """

    def __init__(self, net: PruningNet, recipe: Recipe) -> None:
        self.net, self.recipe = net, recipe
        self.generated = {
            f"generators.{layer}.{name}": parameter
            for layer in range(len(net.generators))
            for name, parameter in net.layer(layer).named_parameters(recurse=False)
        }
        self.rest = SGD(((n, p) for n, p in net.named_parameters() if n not in self.generated), recipe)
        self.generated_momentum: dict[str, Tensor] = {}
        self.codes: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.widths: list[tuple[Tensor, Tensor]] = []

    def logits(self, images_NCHW: Tensor, genome_SG: Tensor, *, shared: bool = False) -> Tensor:
        """Training logits of S structures; a backward pass ends at the generated weights.

        The N images are split among the structures in order, ``[S, N / S, classes]``, or all of them see the same
        ones (``shared``), ``[S, N, classes]``.
        """
        self.codes = self.net.all_codes(genome_SG)
        self.widths = self.net.widths(genome_SG)
        with torch.no_grad():
            self.weights = self.net.generate_packed(self.codes, self.widths)
        for weight in self.weights:
            weight.requires_grad_()
        if backends.chosen("ragged_conv_backward", images_NCHW.device, self.net.precision) != "reference":
            return training_logits(self.net, self.weights, genome_SG, images_NCHW, shared=shared)
        dense, structures = self.net.unpack(self.weights, self.widths), len(genome_SG)
        parts = [images_NCHW] * structures if shared else images_NCHW.chunk(structures)
        return torch.stack([self.net.logits(part, [w[s] for w in dense]) for s, part in enumerate(parts)])

    def step(self, lr: float) -> None:
        """Apply what a backward pass has left, and drop it."""
        d_codes = [self._update(layer, lr) for layer in range(len(self.codes))]
        torch.autograd.backward(self.codes, d_codes)
        self.rest.step(lr)
        self.codes, self.weights, self.widths = [], [], []

    def _update(self, layer: int, lr: float) -> Tensor:
        """Train one convolution's basis and bias; the gradient of its codes ``[S, H]``."""
        grad, (cin_S, cout_S) = self.weights[layer].grad, self.widths[layer]
        assert grad is not None
        basis, bias = (f"generators.{layer}.{name}" for name in ("basis", "bias"))
        for name in (basis, bias):
            if name not in self.generated_momentum:
                self.generated_momentum[name] = torch.zeros_like(self.generated[name])
        return update_generators_(
            self.generated[basis],
            self.generated[bias],
            self.generated_momentum[basis],
            self.generated_momentum[bias],
            self.codes[layer].detach(),
            grad,
            cin_S,
            cout_S,
            depthwise=self.net.space.convs[layer].depthwise,
            lr=lr,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )

    def momentum(self) -> dict[str, Tensor]:
        """The momentum of every parameter that has been changed."""
        return {**self.generated_momentum, **self.rest.momentum()}

    def restore(self, momentum: Mapping[str, Tensor]) -> None:
        """Continue with the momentum of a checkpoint, whose shapes are those of the parameters."""
        self.rest.restore(momentum)
        self.generated_momentum = {
            name: momentum[name].to(parameter.device) for name, parameter in self.generated.items() if name in momentum
        }


def parameter_bytes(space: Space, hidden: int | None, averaged: bool = False) -> int:
    """Bytes of a PruningNet's weights, of their momentum and, if they are averaged, of their average."""
    return (3 if averaged else 2) * FLOAT_BYTES * count_parameters(space, hidden)


def step_bytes(space: Space, batch: int, resolution: int) -> int:
    """About how many bytes a training step holds besides: activations and generated weights of a middling structure.

    The largest structure takes about twice as much.
    """
    convolved, _ = output_images(space, (batch, resolution, resolution))
    numbers = 0.0
    for conv in space.convs:
        cout, cin = _mean_width(conv.cout), 1 if conv.depthwise else _mean_width(conv.cin)
        numbers += KEPT_PER_CONV * cout * prod(convolved[conv.name]) + WEIGHT_COPIES * cout * cin * conv.kernel**2
    return int(FLOAT_BYTES * numbers)


def _mean_width(width: Width) -> float:
    return sum(width.widths) / len(width.widths) if isinstance(width, Gene) else width
