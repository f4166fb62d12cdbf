"""Random weight generators and the factors of their gradients, and the same ones as parameters of torch.optim.SGD."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import isqrt

import torch
from hypothesis import strategies as st
from ragged import INTERPRETED, NAN, int32, widths
from torch import Tensor

from kernels import (
    Factors,
    GeneratorState,
    Recurrence,
    backends,
    generate_delayed,
    settle_generators_,
    unpack_weights,
    update_generators_,
)
from kernels.layout import weight_slot, write_weights

Crops = list[tuple[int, int]]


def state_of(tensors: Iterable[Tensor], depthwise: bool = False) -> GeneratorState:
    """Of basis, bias, and the momentum of each; all rows were just written."""
    basis, bias, basis_momentum, bias_momentum = tensors
    written = torch.zeros(basis.shape[:2], dtype=torch.uint8)
    return GeneratorState(basis, bias, basis_momentum, bias_momentum, written, depthwise)


@dataclass
class Generator:
    """The weight generator of one convolution, the constants of its optimizer, and the steps since all was written."""

    state: GeneratorState
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    recurrence: Recurrence = field(default_factory=Recurrence)

    @property
    def dtype(self) -> torch.dtype:
        return self.state.basis_OIKH.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Basis, bias and the momentum of each."""
        return self.state.tensors[:4]

    def _copy(self, tensors: Iterable[Tensor]) -> "Generator":
        state = replace(state_of(tensors, self.state.depthwise), written_OI=self.state.written_OI.clone())
        return replace(self, state=state)

    def to(self, dtype: torch.dtype) -> "Generator":
        """A copy in another precision."""
        return self._copy(t.to(dtype, copy=True) for t in self.tensors)

    def with_half_momentum(self) -> "Generator":
        """A copy whose basis has its momentum in bfloat16."""
        basis, bias, basis_momentum, bias_momentum = (t.clone() for t in self.tensors)
        return self._copy((basis, bias, basis_momentum.bfloat16(), bias_momentum))

    def random_factors(self, crops: Crops) -> Factors:
        """Of subnetworks that keep (O_s, I_s) channels; slots end where the largest does, and pads are NaN."""
        taps, hidden = self.state.basis_OIKH.shape[2:]
        o, i = (max(widths) for widths in zip(*crops, strict=True))
        side, depthwise = isqrt(taps), self.state.depthwise
        grad = torch.full((len(crops), weight_slot(i, o, side, self.dtype, depthwise)), NAN, dtype=self.dtype)
        for slot, (cout, cin) in zip(grad, crops, strict=True):
            write_weights(slot, torch.ones(cout, cin, side, side, dtype=self.dtype), depthwise)
            pads = slot == 0
            write_weights(slot, torch.randn(cout, cin, side, side).to(self.dtype), depthwise)
            slot[pads] = NAN
        codes = torch.randn(len(crops), hidden).to(self.dtype)
        return Factors(codes, grad, int32([c for _, c in crops]), int32([c for c, _ in crops]))

    def update(self, factors: Factors, lr: float | None = None, everywhere: bool = True) -> Tensor:
        """A step: the gradient of the codes."""
        constants = {
            "lr": self.lr if lr is None else lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }
        d_codes = update_generators_(self.state, self.recurrence, factors, **constants, everywhere=everywhere)
        self.recurrence = Recurrence() if everywhere else self.recurrence.step(**constants)
        return d_codes

    def settle(self) -> None:
        settle_generators_(self.state, self.recurrence)
        self.recurrence = Recurrence()

    def weights(self, factors: Factors) -> Tensor:
        """The packed weights for the codes of some factors."""
        return generate_delayed(self.state, self.recurrence, factors.codes_SH, factors.cin_S, factors.cout_S)


def dense(generator: Generator, packed: Tensor, factors: Factors) -> list[Tensor]:
    """Packed weights or gradients as `[O_s, I_s, K]` each."""
    side, depthwise = isqrt(generator.state.basis_OIKH.shape[2]), generator.state.depthwise
    weights = unpack_weights(packed, factors.cin_S, factors.cout_S, kernel=side, depthwise=depthwise)
    return [weight.flatten(2) for weight in weights]


def in_precision(factors: Factors, dtype: torch.dtype) -> Factors:
    """The same factors, converted."""
    return replace(factors, codes_SH=factors.codes_SH.to(dtype), grad=factors.grad.to(dtype))


@st.composite
def crops(draw: st.DrawFn, generator: Generator, most: int = 5) -> Crops:
    """(O_s, I_s) of 1 to `most` subnetworks."""
    o, i, _, _ = generator.state.basis_OIKH.shape
    count = draw(st.integers(1, most))
    return list(zip(draw(widths(count, o)), draw(widths(count, i)), strict=True))


@st.composite
def generators(draw: st.DrawFn, fresh: bool = False) -> Generator:
    """In float64; with a momentum of zeros if `fresh`."""
    torch.manual_seed(draw(st.integers(0, 999)))
    depthwise = draw(st.booleans())
    hidden = draw(st.sampled_from([0, 1, 3, 8, 16, 17, 32, 37, 64]))
    taps = draw(st.sampled_from([1, 9] if INTERPRETED else [1, 9, 49]))
    max_cin = 1 if depthwise else draw(st.sampled_from([1, 2, 7] if INTERPRETED else [1, 2, 7, 13, 33]))
    max_cout = draw(st.sampled_from([1, 3, 16, 31]))
    shape = max_cout, max_cin, taps
    tensors = [torch.randn(*shape, hidden).double(), torch.randn(shape).double()]
    tensors += [torch.zeros_like(t) if fresh else torch.randn_like(t) for t in tensors]
    lr, momentum = draw(st.sampled_from([0.0, 0.03, 1.0])), draw(st.sampled_from([0.0, 0.9]))
    return Generator(state_of(tensors, depthwise), lr, momentum, draw(st.sampled_from([0.0, 0.04])))


@st.composite
def late_generators(draw: st.DrawFn) -> Generator:
    """In float64, after some steps since all rows were written, of other rows each."""
    generator = draw(generators())
    with backends.use("reference"):
        for step in range(draw(st.integers(0, 2 if INTERPRETED else 4))):
            factors = generator.random_factors(draw(crops(generator, most=2)))
            generator.update(factors, 0.1 / (1 + step), everywhere=False)
    return generator


class Dense:
    """The same generator as parameters of `torch.optim.SGD`, its weights generated under autograd."""

    def __init__(self, generator: Generator, fresh: bool) -> None:
        self.generator = generator
        self.parameters = [t.clone().requires_grad_() for t in generator.tensors[:2]]
        constants = generator.lr, generator.momentum
        self.optimizer = torch.optim.SGD(self.parameters, *constants, weight_decay=generator.weight_decay, fused=True)
        if not fresh and generator.momentum:
            for parameter, buffer in zip(self.parameters, generator.tensors[2:], strict=True):
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.clone()

    def weights(self, factors: Factors) -> list[Tensor]:
        """The weights `[O_s, I_s, K]` for the codes of some factors."""
        basis, bias = self.parameters
        widths_S = zip(factors.codes_SH, factors.cout_S.tolist(), factors.cin_S.tolist(), strict=True)
        return [basis[:o, :i] @ code + bias[:o, :i] for code, o, i in widths_S]

    def update(self, factors: Factors, lr: float | None = None) -> Tensor:
        """One step: the gradient of the codes."""
        codes = factors.codes_SH.clone().requires_grad_()
        self.optimizer.zero_grad()
        self.optimizer.param_groups[0]["lr"] = self.generator.lr if lr is None else lr
        weights = self.weights(replace(factors, codes_SH=codes))
        torch.autograd.backward(weights, dense(self.generator, factors.grad, factors))
        self.optimizer.step()
        assert codes.grad is not None
        return codes.grad

    @property
    def state(self) -> list[Tensor]:
        buffers = [self.optimizer.state[p].get("momentum_buffer") for p in self.parameters]
        return [t.detach() for t in (*self.parameters, *(b for b in buffers if b is not None))]
