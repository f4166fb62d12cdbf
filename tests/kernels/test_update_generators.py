"""update_generators_ against autograd's gradients given to torch.optim.SGD, in every instruction set here."""

import copy
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import NAN, assert_as_exact_as_torch, int32, one_kernel_for_all_examples, widths
from torch import Tensor

import kernels
from kernels import backends
from kernels.layout import pack_weights, unpack_weights, weight_slot, write_weights
from kernels.ops import overload

OP = "update_generators_"


@dataclass
class Generator:
    """The weight generator of one convolution, the constants of its optimizer, and S crops `(O_s, I_s)`."""

    state: tuple[Tensor, ...]  # basis, bias, and the momentum of each
    crops: list[tuple[int, int]]
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    depthwise: bool = False

    @property
    def kernel(self) -> int:
        return isqrt(self.basis.shape[2])

    @property
    def cin(self) -> Tensor:
        return int32([i for _, i in self.crops])

    @property
    def cout(self) -> Tensor:
        return int32([o for o, _ in self.crops])

    @property
    def basis(self) -> Tensor:
        return self.state[0]

    def to(self, dtype: torch.dtype) -> "Generator":
        """A copy in another precision."""
        return replace(self, state=tuple(t.to(dtype, copy=True) for t in self.state))

    def random_factors(self) -> tuple[Tensor, Tensor]:
        """Codes `[S, H]` and packed gradients `[S, slot]` in the dtype of the basis; pads of the gradients are NaN."""
        dtype, (o, i, taps, hidden) = self.basis.dtype, self.basis.shape
        grad = torch.full((len(self.crops), weight_slot(i, o, self.kernel, dtype, self.depthwise)), NAN, dtype=dtype)
        for slot, (cout, cin) in zip(grad, self.crops, strict=True):
            write_weights(slot, torch.full((cout, cin, self.kernel, self.kernel), 1.0).to(dtype), self.depthwise)
            pads = slot == 0
            write_weights(slot, torch.randn(cout, cin, taps).unflatten(2, (self.kernel, -1)).to(dtype), self.depthwise)
            slot[pads] = NAN
        return torch.randn(len(self.crops), hidden).to(dtype), grad

    def dense(self, grad: Tensor) -> list[Tensor]:
        """Packed gradients as `[O_s, I_s, K]` each."""
        unpacked = unpack_weights(grad, self.cin, self.cout, kernel=self.kernel, depthwise=self.depthwise)
        return [weight.flatten(2) for weight in unpacked]

    def update(self, codes: Tensor, grad: Tensor) -> Tensor:
        """The step under test: the gradient of the codes."""
        return kernels.update_generators_(
            self.state[0],
            self.state[1],
            self.state[2],
            self.state[3],
            codes,
            grad,
            self.cin,
            self.cout,
            depthwise=self.depthwise,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )


@st.composite
def generators(draw: st.DrawFn, fresh: bool = False) -> Generator:
    torch.manual_seed(draw(st.integers(0, 999)))
    depthwise, count = draw(st.booleans()), draw(st.integers(1, 5))
    hidden, taps = draw(st.sampled_from([0, 1, 3, 8, 16, 17, 32, 37, 64])), draw(st.sampled_from([1, 9, 49]))
    max_cin = 1 if depthwise else draw(st.sampled_from([1, 2, 7, 13, 33]))
    max_cout = draw(st.sampled_from([1, 3, 16, 31]))
    crops = list(zip(draw(widths(count, max_cout)), draw(widths(count, max_cin)), strict=True))
    basis, bias = torch.randn(max_cout, max_cin, taps, hidden), torch.randn(max_cout, max_cin, taps)
    momenta = [torch.zeros_like(t) if fresh else torch.randn_like(t) for t in (basis, bias)]
    lr, momentum = draw(st.sampled_from([0.0, 0.03, 1.0])), draw(st.sampled_from([0.0, 0.9]))
    state = tuple(t.double() for t in (basis, bias, *momenta))
    return Generator(state, crops, lr, momentum, draw(st.sampled_from([0.0, 0.04])), depthwise)


class Dense:
    """The same generator as parameters of `torch.optim.SGD`, its weights generated under autograd."""

    def __init__(self, generator: Generator, fresh: bool) -> None:
        self.parameters = [t.clone().requires_grad_() for t in generator.state[:2]]
        self.generator = generator
        self.optimizer = torch.optim.SGD(
            self.parameters, generator.lr, generator.momentum, weight_decay=generator.weight_decay, fused=True
        )
        if not fresh and generator.momentum:
            for parameter, buffer in zip(self.parameters, generator.state[2:], strict=True):
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.clone()

    def update(self, codes: Tensor, grad: Tensor) -> Tensor:
        basis, bias = self.parameters
        codes = codes.clone().requires_grad_()
        crops = zip(self.generator.crops, codes, strict=True)
        weights = [basis[:o, :i] @ code + bias[:o, :i] for (o, i), code in crops]
        self.optimizer.zero_grad()
        torch.autograd.backward(weights, self.generator.dense(grad))
        self.optimizer.step()
        assert codes.grad is not None
        return codes.grad

    @property
    def state(self) -> list[Tensor]:
        buffers = [self.optimizer.state[p].get("momentum_buffer") for p in self.parameters]
        return [*self.parameters, *(b for b in buffers if b is not None)]


@given(generators(fresh=True))
def test_many_steps_of_the_reference_are_those_of_autograd_and_torch_sgd(generator: Generator) -> None:
    dense = Dense(generator, fresh=True)
    for _ in range(12):
        factors = generator.random_factors()
        found, expected = generator.update(*factors), dense.update(*factors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(generator.state, dense.state, strict=False):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(generators())
def test_a_step_is_as_exact_as_autograd_and_torch_sgd(generator: Generator) -> None:
    single = generator.to(torch.float32)
    factors = single.random_factors()
    in_double = factors[0].double(), factors[1].double()
    in_torch, exact = Dense(single, fresh=False), Dense(single.to(torch.float64), fresh=False)
    steps = [way.update(*f) for way, f in ((single, factors), (in_torch, factors), (exact, in_double))]
    for actual, theirs, expected in zip(
        (steps[0], *single.state), (steps[1], *in_torch.state), (steps[2], *exact.state), strict=False
    ):
        assert_as_exact_as_torch(actual, theirs.detach(), expected.detach())


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(generators())
def test_outside_all_crops_momentum_and_weights_still_decay(generator: Generator) -> None:
    single = generator.to(torch.float32)
    before = copy.deepcopy(single)
    single.update(*single.random_factors())
    o, i = (max(sizes) for sizes in zip(*single.crops, strict=True))
    for weights, momentum in ((0, 2), (1, 3)):
        decayed = single.momentum * before.state[momentum] + single.weight_decay * before.state[weights]
        expected = before.state[weights] - single.lr * decayed
        for found, wanted in ((single.state[momentum], decayed), (single.state[weights], expected)):
            torch.testing.assert_close(found[o:], wanted[o:])
            torch.testing.assert_close(found[:, i:], wanted[:, i:])


@pytest.mark.usefixtures("kernel")
def test_only_what_is_given_is_written() -> None:
    torch.manual_seed(0)
    guarded = [torch.full((n + 64,), NAN) for n in (5 * 3 * 9 * 17, 5 * 3 * 9) * 2]
    for buffer in guarded:
        buffer[32:-32] = torch.randn(len(buffer) - 64)
    shapes = [(5, 3, 9, 17), (5, 3, 9)] * 2
    state = tuple(buffer[32:-32].view(shape) for buffer, shape in zip(guarded, shapes, strict=True))
    generator = Generator(state, crops=[(5, 2), (1, 3)])
    factors = generator.random_factors()
    kept = [factor.clone() for factor in factors]
    generator.update(*factors)
    assert all(t.isfinite().all() for t in state)
    assert all(b[:32].isnan().all() and b[-32:].isnan().all() for b in guarded)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(kept, factors, strict=True))


def large() -> Generator:
    torch.manual_seed(0)
    shape = (70, 65, 9)
    state = torch.randn(*shape, 40), torch.randn(shape), torch.randn(*shape, 40), torch.randn(shape)
    return Generator(state, crops=[(70, 65), (33, 64), (1, 1)], weight_decay=0.01)


def test_results_do_not_depend_on_the_number_of_threads(kernel: str) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's products make no such promise")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            generator = large()
            results.append([generator.update(*generator.random_factors()), *generator.state])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_long_sum_of_a_codes_gradient_loses_nothing(kernel: str) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's products make no such promise")
    # 2²⁰ rows of about the same size: a plain sum in single precision is off by some 1e-5 of the result.
    basis, bias = torch.rand(1024, 1024, 1, 2), torch.zeros(1024, 1024, 1)
    generator = Generator((basis, bias, torch.zeros_like(basis), torch.zeros_like(bias)), [(1024, 1024)])
    codes, grad = torch.ones(1, 2), torch.rand(1024, 1024, 1, 1)
    exact = torch.einsum("oik,oikh->h", grad.double()[..., 0], generator.basis.double())
    d_codes = generator.update(codes, pack_weights([grad], 1024, 1024))
    torch.testing.assert_close(d_codes[0].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("namespace", ["metaprune", "metaprune_reference"])
def test_the_op_is_registered_with_what_it_changes(namespace: str) -> None:
    generator = Generator(tuple(t[:3, :4].contiguous() for t in large().state), crops=[(3, 2), (1, 4)])
    # No gradient goes through it, and it may not change what autograd has saved: what is left to check of it.
    torch.library.opcheck(
        overload(namespace, OP),
        (*generator.state, *generator.random_factors(), generator.cin, generator.cout, False, 0.1, 0.9, 0.01),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5, 3, 9), "basis must be"),
        (0, torch.zeros(5, 3, 9, 4).bfloat16(), "basis must be torch.float32 or torch.float64"),
        (1, torch.zeros(5, 3, 4), "bias must be"),
        (2, torch.zeros(5, 3, 4, 9).mT, "basis_momentum must be"),
        (3, torch.zeros(5, 3, 9).double(), "bias_momentum must be"),
        (4, torch.zeros(1, 4), "codes must be"),
        (5, torch.zeros(1, 16 * 9 * 3), r"grad must be torch.float32 \[2, 432\] = \[S, slot\]"),
        (5, torch.zeros(2, 16 * 9 * 3).double(), "grad must be torch.float32"),
        (5, torch.zeros(2, 5, 3, 9), "grad must be"),
        (6, int32([3, 4]), r"cin\[1\] is 4; legal values are 1..3"),
        (7, int32([0, 5]), r"cout\[0\] is 0; legal values are 1..5"),
        (8, {"lr": NAN}, "lr must be a finite number from 0"),
        (8, {"momentum": -0.1}, "momentum must be"),
        (8, {"weight_decay": float("inf")}, "weight_decay must be"),
        (8, {"depthwise": True}, "a depthwise basis must be"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named_and_nothing_is_changed(
    position: int, value: Any, message: str
) -> None:
    generator = Generator((torch.ones(5, 3, 9, 4), torch.ones(5, 3, 9)) * 2, crops=[(5, 3), (1, 2)])
    arguments: list[Any] = [
        *generator.state,
        *generator.random_factors(),
        generator.cin,
        generator.cout,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
    ]
    arguments[position] = arguments[position] | value if position == 8 else value
    with pytest.raises(RuntimeError, match=message):
        kernels.update_generators_(*arguments[:8], **arguments[8])
    assert all((t == 1).all() for t in generator.state)


def test_the_compiled_kernel_refuses_what_would_touch_memory_out_of_bounds() -> None:
    if backends.why_not(OP, "cpu"):
        pytest.skip(backends.why_not(OP, "cpu"))
    shapes = [(5, 3, 9, 4), (5, 3, 9), (5, 3, 9, 4), (5, 3, 9), (1, 4), (1, 16 * 9 * 3)]
    for position, value in (
        (1, torch.zeros(5, 3, 4)), (2, torch.zeros(5, 3, 9, 3)), (3, torch.zeros(5, 9, 3)), (4, torch.zeros(1, 5)),
        (5, torch.zeros(1, 5 * 9 * 3)), (6, int32([4])), (7, int32([6])), (7, int32([5, 5])), (8, True),
    ):  # fmt: skip
        arguments: list[Any] = [*(torch.zeros(shape) for shape in shapes), int32([3]), int32([5]), False]
        arguments[position] = value
        with pytest.raises(RuntimeError, match=r"does not take|legal values|must"):
            overload("metaprune", OP)(*arguments, 0.1, 0.9, 0.0)
