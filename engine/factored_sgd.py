"""Momentum SGD of a PruningNet that never makes the gradient of a basis.

The gradient of a basis is as large as the basis, and for S structures it has rank S: the gradients of the S generated
weights times their codes. So autograd stops at the generated weights, and `kernels.update_generators_` applies what it
found there to basis and bias in one pass: of all rows, or of those that a structure of the step keeps, while the others
wait. The result is that of plain autograd and `torch.optim.SGD`, but for rounding.

Several ranks have an equal part of the structures each. The gradients of generated weights and classifiers, cropped,
are all that they exchange: codes, and so the gradients of bases and fc1, every rank makes itself, of all structures.
The bits are those of one process with the same structures.

Structures come from the host, where their widths are looked up, so that a step reads nothing back from a GPU: it takes
genomes, widths and what becomes of rows that wait there in one copy each, and all else follows them.

Shape suffixes: S structures, N images, G genes, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.pruningnet import PruningNet
from engine.run.optimizer import SGD
from engine.run.team import ALONE, Shape, Team
from engine.space import Conv
from engine.space.recipe import Recipe
from engine.training_pass import training_features
from kernels import (
    Factors,
    GeneratorState,
    Recurrence,
    backends,
    generate_delayed,
    settle_generators_,
    update_generators_,
)
from kernels.layout import pack_weights, sent, weight_slot


class FactoredSGD:
    """Trains a PruningNet: `logits`, a backward pass through them, then `step`.

    A step changes of the generators what its structures keep. The rest waits until a structure needs it, or until
    ``delay`` steps were done since the optimizer was last `at_rest`: then everything is brought up to date. fc1 of the
    generators and the classifier are trained by `torch.optim.SGD` in every step. The momentum of the bases, half of all
    memory, may be bfloat16 (``basis_momentum``): it is rounded whenever it is written.
    """

    def __init__(
        self,
        net: PruningNet,
        recipe: Recipe,
        delay: int = 1,
        team: Team = ALONE,
        basis_momentum: torch.dtype = torch.float32,
    ) -> None:
        if not 1 <= delay <= Recurrence.LONGEST:
            raise ValueError(f"delay is {delay}; legal values are 1..{Recurrence.LONGEST}")
        self.net, self.recipe, self.delay, self.team, self.basis_momentum = net, recipe, delay, team, basis_momentum
        self.generated = {
            f"generators.{layer}.{name}": parameter
            for layer in range(len(net.generators))
            for name, parameter in net.layer(layer).named_parameters(recurse=False)
        }
        self.rest = SGD(((n, p) for n, p in net.named_parameters() if n not in self.generated), recipe)
        self.generated_momentum: dict[str, Tensor] = {}
        self.codes: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.classifiers: list[tuple[Tensor, Tensor]] = []
        # Channels in and out of every convolution, on the host and on the device.
        self.channels: list[tuple[Tensor, Tensor]] = []
        self.widths: list[tuple[Tensor, Tensor]] = []
        self.start = Recurrence()
        self.recurrence = self.start
        self.states: dict[int, GeneratorState] = {}

    @property
    def at_rest(self) -> bool:
        """Whether parameters and momentum are those after the last step: nothing waits."""
        return self.recurrence.steps == 0

    def logits(self, images_NCHW: Tensor, genome_SG: Tensor, *, shared: bool = False) -> Tensor:
        """Training logits of S structures; a backward pass ends at the generated weights and the classifier.

        The N images are split among the structures in order, ``[S, N / S, classes]``, or all of them see the same
        ones (``shared``), ``[S, N, classes]``. With several ranks, images and logits are of the own structures.
        """
        device, genome_SG = self.net.classifier.weight.device, genome_SG.cpu()
        self.channels = self.net.widths(genome_SG)
        self.codes = self.net.all_codes(sent(genome_SG, device))
        self.widths = _pairs(sent(torch.stack([width_S for pair in self.channels for width_S in pair]), device))
        codes, widths = [self._own(code_SH) for code_SH in self.codes], self._own_pairs(self.widths)
        # The same on all ranks, whoever has the widest structure.
        limits = [(int(cin.max()), int(cout.max())) for cin, cout in self.channels]
        with torch.no_grad():
            self.weights = [
                self._leaf(*each)
                for each in zip(self._generate(codes, widths), self.net.space.convs, limits, strict=True)
            ]
        features = self._features(images_NCHW, widths, limits, shared)
        # A classifier of its own for each structure: their gradients are added in order, whoever has made them.
        weight, bias = self.net.classifier.weight.detach(), self.net.classifier.bias.detach()
        self.classifiers = [
            (weight[:, : x.shape[1]].requires_grad_(), bias.view(-1).requires_grad_()) for x in features
        ]
        return torch.stack([F.linear(x, *classifier) for x, classifier in zip(features, self.classifiers, strict=True)])

    def _features(
        self, images_NCHW: Tensor, widths: list[tuple[Tensor, Tensor]], limits: list[tuple[int, int]], shared: bool
    ) -> list[Tensor]:
        """What the classifier reads of every structure: of all in one pass, where there are kernels for that."""
        channels = self._own_pairs(self.channels)
        if backends.chosen("ragged_conv_backward", images_NCHW.device, self.net.precision) != "reference":
            features: list[int] = channels[-1][1].tolist()
            return training_features(self.net, self.weights, widths, limits, features, images_NCHW, shared=shared)
        dense, structures = self.net.unpack(self.weights, channels), len(self.weights[0])
        parts = [images_NCHW] * structures if shared else images_NCHW.chunk(structures)
        return [self.net.features(part, [w[s] for w in dense]) for s, part in enumerate(parts)]

    def _own(self, of_all: Tensor) -> Tensor:
        """What is of this rank's structures."""
        return of_all if self.team.size == 1 else of_all[self.team.own(len(of_all))]

    def _own_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [(self._own(cin_S), self._own(cout_S)) for cin_S, cout_S in pairs]

    @staticmethod
    def _leaf(weight: Tensor, conv: Conv, limit: tuple[int, int]) -> Tensor:
        """What autograd makes the gradient of: slots for no more channels than that, in and out."""
        slot = weight_slot(*limit, conv.kernel, weight.dtype, conv.depthwise, weight.device)
        return weight[:, :slot].contiguous().requires_grad_()

    def _generate(self, codes: list[Tensor], widths: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The packed weights of every convolution."""
        if self.at_rest:
            return self.net.generate_packed(codes, widths)
        return [
            generate_delayed(self._state(layer), self.recurrence, code_SH, *width_S)
            for layer, (code_SH, width_S) in enumerate(zip(codes, widths, strict=True))
        ]

    def step(self, lr: float) -> None:
        """Apply what a backward pass has left, and drop it."""
        rests = self.recurrence.steps + 1 == self.delay
        constants = {"lr": lr, "momentum": self.recipe.momentum, "weight_decay": self.recipe.weight_decay}
        grads, classifier_grads = self._gathered()
        d_codes = []
        for layer, grad in enumerate(grads):
            factors = Factors(self.codes[layer].detach(), grad, *self.widths[layer])
            state = self._state(layer)
            d_codes.append(update_generators_(state, self.recurrence, factors, **constants, everywhere=rests))
        torch.autograd.backward(self.codes, d_codes)
        weight, bias = self.net.classifier.weight, self.net.classifier.bias
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        for d_weight, d_bias in classifier_grads:
            weight.grad[:, : d_weight.shape[1]] += d_weight
            bias.grad += d_bias
        self.rest.step(lr)
        self.codes, self.weights, self.classifiers, self.channels, self.widths = [], [], [], [], []
        self.recurrence = self.start if rests else self.recurrence.step(**constants)

    def settle(self) -> None:
        """Bring everything up to date."""
        if not self.at_rest:
            for layer in range(len(self.net.generators)):
                settle_generators_(self._state(layer), self.recurrence)
            self.recurrence = self.start

    def _gathered(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Gradients of all S structures: packed, one tensor a convolution, and of the classifier that each had."""
        grads = [_grad(weight) for weight in self.weights]
        classifier_grads = [[_grad(leaf) for leaf in leaves] for leaves in self.classifiers]
        if self.team.size == 1:
            return grads, classifier_grads
        # Dense crops: pad channels need not travel.
        convs = self.net.space.convs
        dense = self.net.unpack(grads, self._own_pairs(self.channels))
        lists = [[*(of_conv[s] for of_conv in dense), *extra] for s, extra in enumerate(classifier_grads)]
        found = self.team.gather_lists(lists, gradient_shapes(self.net, self.channels))
        packed = [
            pack_weights([of_one[layer] for of_one in found], int(cin.max()), int(cout.max()), conv.depthwise)
            for layer, (conv, (cin, cout)) in enumerate(zip(convs, self.channels, strict=True))
        ]
        return packed, [of_one[len(convs) :] for of_one in found]

    def _state(self, layer: int) -> GeneratorState:
        """One convolution's basis and bias, with their momentum, and when they were written."""
        if layer not in self.states:
            self.states[layer] = self._new_state(layer)
        return self.states[layer]

    def _new_state(self, layer: int) -> GeneratorState:
        basis, bias = (f"generators.{layer}.{name}" for name in ("basis", "bias"))
        for name in (basis, bias):
            if name not in self.generated_momentum:
                self.generated_momentum[name] = torch.zeros_like(self.generated[name], dtype=self._momentum_dtype(name))
        weights, momentum, depthwise = self.generated, self.generated_momentum, self.net.space.convs[layer].depthwise
        written_OI = weights[basis].new_zeros(weights[basis].shape[:2], dtype=torch.uint8)
        return GeneratorState(weights[basis], weights[bias], momentum[basis], momentum[bias], written_OI, depthwise)

    def _momentum_dtype(self, name: str) -> torch.dtype:
        """Reduced for a basis, if at all."""
        own = self.generated[name].dtype
        return self.basis_momentum if own == torch.float32 and name.endswith(".basis") else own

    def momentum(self) -> dict[str, Tensor]:
        """The momentum of every parameter that has been changed, true `at_rest`."""
        return {**self.generated_momentum, **self.rest.momentum()}

    def restore(self, momentum: Mapping[str, Tensor]) -> None:
        """Continue at rest with the momentum of a checkpoint, whose shapes are those of the parameters."""
        self.recurrence, self.states = self.start, {}
        self.rest.restore(momentum)
        self.generated_momentum = {
            name: momentum[name].to(parameter.device, self._momentum_dtype(name))
            for name, parameter in self.generated.items()
            if name in momentum
        }


def _pairs(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The rows of a matrix, two and two."""
    return [(first, second) for first, second in rows.unflatten(0, (-1, 2))]


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def gradient_shapes(net: PruningNet, widths: list[tuple[Tensor, Tensor]]) -> list[list[Shape]]:
    """The shapes of every structure's generated weights, one a convolution, and of its classifier."""
    convs, classes = net.space.convs, net.space.classes
    cins, couts = (torch.stack(of_all, dim=1).tolist() for of_all in zip(*widths, strict=True))
    shapes: list[list[Shape]] = []
    for cin, cout in zip(cins, couts, strict=True):
        channels = zip(convs, cout, cin, strict=True)
        convolved = [(o, 1 if conv.depthwise else i, conv.kernel, conv.kernel) for conv, o, i in channels]
        shapes.append([*convolved, (classes, cout[-1]), (classes,)])
    return shapes
