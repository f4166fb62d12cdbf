"""Updating weight generators: at once against autograd and PyTorch's fused SGD, and delayed against at once.

    pytest --benchmark-only benchmarks/bench_update_generators.py

At once, by layer. Baseline: what training does without it. The gradients of basis, bias and code, the first as large as
the basis, by `generate_weights`'s own backward kernel or by PyTorch's products (`pytorch_ms`: the faster of the two),
and then `torch.optim.SGD(fused=True)`. Results are compared before anything is timed. `of_copy_bandwidth` is the rate
of the least traffic, 16 bytes for each number of the basis (it and its momentum, read and written once), as a fraction
of what copying a large tensor reaches in the same run, `of_in_place_bandwidth` of what adding one to it does: a copy
also fetches the lines that it writes, and does not count them.

Delayed, for all layers of a network, each step with a random structure as in training: from rest to rest, so that
bringing everything up to date is in the time of a step. Both ways take the same steps in turn, and what it takes to
generate weights and to update is timed, without what lies between. `update_of_immediate` compares the updates alone,
`of_immediate` counts that by which generating takes longer (`generation_ms`, `immediate_generation_ms`) to the update
(`update_ms`, `immediate_ms`). `of_in_place_bandwidth` is the rate of the immediate update.
"""

from collections.abc import Callable
from statistics import mean
from typing import Any

import pytest
import torch
from peak import median_seconds, seconds_of
from torch import Tensor

import kernels
from engine.pruningnet import PruningNet
from engine.space import architecture
from engine.training_costs import steps_between_rests
from kernels import Factors, GeneratorState, Recurrence

# max_cout, max_cin, taps, hidden size, depthwise
LAYERS = {
    "mobilenet_v1-pointwise-1024x1024": (1024, 1024, 1, 32, False),
    "mobilenet_v1-depthwise-1024": (1024, 1, 9, 32, True),
    "mobilenet_v2-last-1280x320": (1280, 320, 1, 64, False),
    "mobilenet_v2-expand-960x160": (960, 160, 1, 64, False),
    "resnet50-conv3x3-512x512": (512, 512, 9, 32, False),
}
CONSTANTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 4e-5}
# Of the channels a structure keeps: the mean of the choices.
KEPT = 0.55
# Images of a step and their side in pixels: they decide how often everything is brought up to date.
TRAINING = 64, 32


class Dense:
    """Basis and bias as parameters of `torch.optim.SGD`, with their whole gradients."""

    def __init__(self, basis: Tensor, bias: Tensor, generate: Callable[..., Tensor]) -> None:
        self.parameters = [t.clone().requires_grad_() for t in (basis, bias)]
        self.generate = generate
        self.optimizer = torch.optim.SGD(self.parameters, **CONSTANTS, fused=True)  # type: ignore[arg-type]

    def update(self, codes: Tensor, grad: Tensor) -> Callable[[], Tensor]:
        """The step after the forward pass, which is left out: its graph is used again."""
        codes = codes.clone().requires_grad_()
        weight = self.generate(*self.parameters, codes)

        def step() -> Tensor:
            *gradients, d_codes = torch.autograd.grad(weight, [*self.parameters, codes], grad, retain_graph=True)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            return d_codes

        return step


def fresh(basis: Tensor, bias: Tensor, depthwise: bool) -> GeneratorState:
    """A generator that was never trained."""
    written = torch.zeros(basis.shape[:2], dtype=torch.uint8)
    return GeneratorState(basis, bias, torch.zeros_like(basis), torch.zeros_like(bias), written, depthwise)


def at_once(state: GeneratorState, factors: Factors) -> Tensor:
    return kernels.update_generators_(state, Recurrence(), factors, **CONSTANTS, everywhere=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_update_generators(benchmark: Any, copy_bandwidth: float, in_place_bandwidth: float, layer: str) -> None:
    torch.manual_seed(0)
    max_cout, max_cin, taps, hidden, depthwise = LAYERS[layer]
    o, i = max(1, int(KEPT * max_cout)), max(1, int(KEPT * max_cin))
    cout_S, cin_S = (torch.tensor([n], dtype=torch.int32) for n in (o, i))
    basis, bias = torch.randn(max_cout, max_cin, taps, hidden), torch.randn(max_cout, max_cin, taps)
    codes, grad = torch.rand(1, hidden), torch.randn(o, i, taps)
    side = int(taps**0.5)

    def with_kernel(basis: Tensor, bias: Tensor, codes: Tensor) -> Tensor:
        packed = kernels.generate_weights(basis, bias, codes, cin_S, cout_S, depthwise=depthwise)
        (weight,) = kernels.unpack_weights(packed, cin_S, cout_S, kernel=side, depthwise=depthwise)
        return weight.flatten(2)

    def with_products(basis: Tensor, bias: Tensor, codes: Tensor) -> Tensor:
        return basis[:o, :i] @ codes[0] + bias[:o, :i]

    packed = kernels.pack_weights([grad.unflatten(2, (side, side))], max_cin, max_cout, depthwise)
    factors = Factors(codes, packed, cin_S, cout_S)
    state = fresh(basis.clone(), bias.clone(), depthwise)

    dense = [Dense(basis, bias, generate) for generate in (with_kernel, with_products)]
    steps = [each.update(codes, grad) for each in dense]
    d_codes = at_once(state, factors)
    for each, step in zip(dense, steps, strict=True):
        torch.testing.assert_close(step(), d_codes, rtol=1e-4, atol=1e-3 * (o * i * taps) ** 0.5)
        for mine, theirs in zip(state.tensors, each.parameters, strict=False):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-5)

    best = min(median_seconds(step) for step in steps)
    benchmark(at_once, state, factors)
    seconds = benchmark.stats.stats.median
    rate = 16 * basis.numel() / seconds
    benchmark.extra_info |= {
        "backend": kernels.backends.chosen("update_generators_"),
        "pytorch_ms": round(best * 1e3, 3),
        "times_faster": round(best / seconds, 2),
        "GB/s": round(rate / 1e9, 1),
        "of_copy_bandwidth": round(rate / copy_bandwidth, 2),
        "of_in_place_bandwidth": round(rate / in_place_bandwidth, 2),
    }


class Generators:
    """The weight generators of a whole network, trained with random gradients; times are in seconds by kind of work."""

    def __init__(self, name: str, delay: int) -> None:
        self.net = PruningNet(architecture(name).build(1000), generator=torch.Generator().manual_seed(0))
        self.delay = delay
        self.seconds: dict[str, list[float]] = {"generate": [], "update": []}
        self.recurrence = Recurrence()
        layers = map(self.net.layer, range(len(self.net.generators)))
        self.states = [fresh(layer.basis.detach(), layer.bias.detach(), layer.depthwise) for layer in layers]

    @torch.no_grad()
    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        space = self.net.space
        genome_1G = torch.randint(space.choices, (1, len(space.genes)), generator=generator)
        codes, widths = self.net.all_codes(genome_1G), self.net.widths(genome_1G)
        weights: list[Tensor] = []
        self.seconds["generate"].append(seconds_of(lambda: weights.extend(self.generate(codes, widths))))
        # About a gradient's size, and no memory of its own.
        factors = [Factors(c, w.mul_(1e-3), *s) for c, w, s in zip(codes, weights, widths, strict=True)]
        self.seconds["update"].append(seconds_of(lambda: self.update(factors)))

    def generate(self, codes: list[Tensor], widths: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        if self.recurrence.steps == 0:
            return self.net.generate_packed(codes, widths)
        layers = zip(self.states, codes, widths, strict=True)
        return [kernels.generate_delayed(state, self.recurrence, code, *width) for state, code, width in layers]

    def update(self, factors: list[Factors]) -> None:
        rests = self.recurrence.steps + 1 == self.delay
        for state, new in zip(self.states, factors, strict=True):
            kernels.update_generators_(state, self.recurrence, new, **CONSTANTS, everywhere=rests)
        self.recurrence = Recurrence() if rests else self.recurrence.step(**CONSTANTS)


@pytest.mark.parametrize("name", ["mobilenet_v2"])
def test_delayed_update(benchmark: Any, in_place_bandwidth: float, name: str) -> None:
    delay = steps_between_rests("delayed", architecture(name).build(1000), None, *TRAINING)
    immediate, delayed = Generators(name, 1), Generators(name, delay)
    for number in range(delay):
        immediate.step(number)
        delayed.step(number)
    for mine, theirs in zip(immediate.states, delayed.states, strict=True):
        torch.testing.assert_close(mine.tensors, theirs.tensors, rtol=1e-4, atol=1e-5)

    for each in (immediate, delayed):
        each.seconds = {"generate": [], "update": []}
    numbers = iter(range(delay))

    def step() -> None:
        number = next(numbers)
        immediate.step(number)
        delayed.step(number)

    benchmark.pedantic(step, rounds=delay)
    (generation, update), (late_generation, late_update) = (
        (mean(each.seconds["generate"]), mean(each.seconds["update"])) for each in (immediate, delayed)
    )
    numbers_of_bases = sum(state.basis_OIKH.numel() for state in immediate.states)
    benchmark.extra_info |= {
        "steps_between_rests": delay,
        "immediate_ms": round(1e3 * update, 1),
        "immediate_generation_ms": round(1e3 * generation, 1),
        "update_ms": round(1e3 * late_update, 1),
        "generation_ms": round(1e3 * late_generation, 1),
        "update_of_immediate": round(late_update / update, 2),
        "of_immediate": round((late_update + late_generation - generation) / update, 2),
        "of_in_place_bandwidth": round(16 * numbers_of_bases / update / in_place_bandwidth, 2),
    }
