"""Delayed updates of weight generators against updates at once, and their kernels against their definition."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import INTERPRETED, NAN, assert_as_exact_as_torch, error, int32, one_kernel_for_all_examples
from torch import Tensor
from weight_generators import Dense, Generator, crops, dense, generators, in_precision, state_of

import kernels
from kernels import Factors, Recurrence, backends

OP = "generate_delayed"
EVERY = 4
STEPS = 3 * EVERY + 2


class Delayed:
    """The generator with updates some steps late."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.pending: list[Factors] = []
        self.recurrence = Recurrence()

    def weights(self, factors: Factors) -> Tensor:
        made = factors.codes_SH, factors.cin_S, factors.cout_S
        return kernels.generate_delayed(self.generator.state, self.pending, self.recurrence, *made)

    def update(self, factors: Factors, lr: float) -> Tensor:
        state, before, after = self.generator.state, self.recurrence, self.generator.next(self.recurrence, lr)
        self.pending, self.recurrence = [*self.pending, factors], after
        if len(self.pending) < EVERY:
            given = factors.grad, factors.cin_S, factors.cout_S
            return kernels.code_gradients(state, self.pending[:-1], before, *given)
        found = kernels.update_generators_(state, self.pending, after, before)
        assert found is not None
        self.pending, self.recurrence = [], Recurrence()
        return found

    def settle(self) -> None:
        if self.pending:
            kernels.update_generators_(self.generator.state, self.pending, self.recurrence)


def lr_at(step: int) -> float:
    return 0.2 * (1 - step / STEPS)


@settings(max_examples=25)
@given(generators(fresh=True), st.data())
def test_delayed_updates_are_those_of_autograd_and_torch_sgd(generator: Generator, data: Any) -> None:
    in_torch, delayed = Dense(generator, fresh=True), Delayed(generator)
    for step in range(STEPS):
        factors = generator.random_factors(data.draw(crops(generator, most=3)))
        weights = dense(generator, delayed.weights(factors), factors)
        torch.testing.assert_close(weights, [w.detach() for w in in_torch.weights(factors)], rtol=1e-10, atol=1e-10)
        found, expected = delayed.update(factors, lr_at(step)), in_torch.update(factors, lr_at(step))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    delayed.settle()
    for mine, theirs in zip(generator.tensors, in_torch.state, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("kernel")
def test_in_single_precision_delayed_updates_stay_as_close_to_double_as_updates_at_once() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(40, 19, 9, 32) / 6, torch.randn(40, 19, 9) / 6]
    state = state_of([*tensors, *map(torch.zeros_like, tensors)])
    at_once = Generator(state, weight_decay=4e-5)
    late, exact = Delayed(at_once.to(torch.float32)), Dense(at_once.to(torch.float64), fresh=True)
    for step in range(STEPS):
        factors = at_once.random_factors([(40, 19), (17, 19), (33, 5)])
        late.update(factors, lr_at(step))
        at_once.update(factors, lr_at(step))
        exact.update(in_precision(factors, torch.float64), lr_at(step))
    late.settle()
    for mine, theirs, expected in zip(late.generator.tensors, at_once.tensors, exact.state, strict=True):
        assert error(mine, expected) <= 2 * error(theirs, expected)


def test_weight_decay_is_not_lost_where_it_is_less_than_the_rounding_of_a_weight() -> None:
    shape = (1, 1, 1, 1)
    tensors = [torch.ones(shape), torch.ones(shape[:3]), torch.zeros(shape), torch.zeros(shape[:3])]
    generator = Generator(state_of(tensors), lr=1e-4, weight_decay=1e-4)
    recurrence = generator.next()
    assert 1 + recurrence.weights[0] == pytest.approx(1 - 1e-8, abs=1e-15)
    assert recurrence.weights[0] == pytest.approx(-1e-8, rel=1e-12)


def poison(generator: Generator, sizes: list[tuple[int, int]], with_momentum: bool) -> None:
    """NaN in whatever may not be read for these crops."""
    outside = torch.ones(generator.state.bias_OIK.shape, dtype=torch.bool)
    for o, i in sizes:
        outside[:o, :i] = False
    for tensor in generator.tensors:
        tensor[outside] = NAN
    if not with_momentum:
        for tensor in generator.tensors[2:]:
            tensor.fill_(NAN)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(generators(), st.data())
def test_kernels_are_as_exact_as_the_reference_in_the_same_precision(generator: Generator, data: Any) -> None:
    single = generator.to(torch.float32)
    steps = data.draw(st.integers(0, 2 if INTERPRETED else 4))
    pending = [single.random_factors(data.draw(crops(generator, most=3))) for _ in range(steps)]
    recurrence = Recurrence()
    for step in range(len(pending)):
        recurrence = single.next(recurrence, 0.1 / (1 + step))
    sizes = data.draw(crops(generator))
    factors = single.random_factors(sizes)
    poisoned = copy.deepcopy(single)
    poison(poisoned, sizes, recurrence.weights[1] != 0)

    def results(of: Generator, like: Generator) -> list[Tensor]:
        given = [in_precision(f, of.dtype) for f in (*pending, factors)]
        made, late = given[-1], (given[:-1], recurrence)
        weights = kernels.generate_delayed(like.state, *late, made.codes_SH, made.cin_S, made.cout_S)
        d_codes = kernels.code_gradients(like.state, *late, made.grad, made.cin_S, made.cout_S)
        updated = copy.deepcopy(of)
        again = kernels.update_generators_(updated.state, given, single.next(recurrence), recurrence)
        assert again is not None
        return [*dense(of, weights, made), d_codes, again, *updated.tensors]

    actual = results(single, poisoned)
    with backends.use("reference"):
        in_torch, exact = results(single, single), results(single.to(torch.float64), single.to(torch.float64))
    for found, theirs, expected in zip(actual, in_torch, exact, strict=True):
        assert_as_exact_as_torch(found, theirs, expected)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(generators(), st.data())
def test_at_rest_it_generates_what_generate_weights_does_with_pad_channels_of_zero(
    generator: Generator, data: Any
) -> None:
    single = generator.to(torch.float32)
    factors = single.random_factors(data.draw(crops(generator)))
    given = factors.codes_SH, factors.cin_S, factors.cout_S
    packed = kernels.generate_delayed(single.state, [], Recurrence(), *given)
    for slot, other, grad in zip(packed, single.weights(factors), factors.grad, strict=True):
        front = max(int((~grad.isnan()).nonzero().max()) + 1, 1)
        torch.testing.assert_close(slot[:front], other[:front], rtol=1e-4, atol=1e-4)
        assert (slot[:front][grad[:front].isnan()] == 0).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("codes", torch.zeros(1, 3), "codes must be"),
        ("cin", [4], r"cin\[0\] is 4"),
        ("cout", [9], r"cout\[0\] is 9"),
        ("recurrence", Recurrence(), r"coefficients must be 2 \+ 1 finite numbers"),
        ("grad", torch.zeros(1, 7), "a crop of 5 × 3 channels has 432 numbers, its slot 7"),
        ("grad", torch.zeros(2, 432), "grad must be"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(name: str, value: Any, message: str) -> None:
    tensors = torch.ones(5, 3, 9, 4), torch.ones(5, 3, 9), torch.ones(5, 3, 9, 4), torch.ones(5, 3, 9)
    generator = Generator(state_of(tensors))
    factors = generator.random_factors([(5, 3)])
    given: dict[str, Any] = {
        "codes": factors.codes_SH,
        "cin": [3],
        "cout": [5],
        "grad": factors.grad,
        "recurrence": generator.next(),
    }
    given |= {name: value}
    late = generator.state, [factors], given["recurrence"]
    cin, cout = (int32(given[n]) for n in ("cin", "cout"))
    op, argument = (kernels.code_gradients, "grad") if name == "grad" else (kernels.generate_delayed, "codes")
    with pytest.raises(RuntimeError, match=message):
        op(*late, given[argument], cin, cout)
