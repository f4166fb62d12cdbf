"""Rows of weight generators that wait until a structure needs them, against updates everywhere in every step."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import NAN, assert_as_exact_as_torch, error, int32, one_kernel_for_all_examples
from torch import Tensor
from weight_generators import Dense, Generator, crops, dense, generators, in_precision, late_generators, state_of

import kernels
from kernels import Factors, Recurrence, backends

OP = "generate_delayed"
REST = 6
STEPS = 2 * REST + 2


def lr_at(step: int) -> float:
    return 0.2 * (1 - step / STEPS)


@settings(max_examples=25)
@given(generators(fresh=True), st.data())
def test_delayed_updates_are_those_of_autograd_and_torch_sgd(generator: Generator, data: Any) -> None:
    in_torch = Dense(generator, fresh=True)
    for step in range(STEPS):
        factors = generator.random_factors(data.draw(crops(generator, most=3)))
        weights = dense(generator, generator.weights(factors), factors)
        torch.testing.assert_close(weights, [w.detach() for w in in_torch.weights(factors)], rtol=1e-10, atol=1e-10)
        found = generator.update(factors, lr_at(step), everywhere=step % REST == REST - 1)
        torch.testing.assert_close(found, in_torch.update(factors, lr_at(step)), rtol=1e-10, atol=1e-10)
    generator.settle()
    for mine, theirs in zip(generator.tensors, in_torch.state, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("kernel")
def test_in_single_precision_delayed_updates_stay_as_close_to_double_as_updates_at_once() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(40, 19, 9, 32) / 6, torch.randn(40, 19, 9) / 6]
    at_once = Generator(state_of([*tensors, *map(torch.zeros_like, tensors)]), weight_decay=4e-5)
    late, exact = at_once.to(torch.float32), Dense(at_once.to(torch.float64), fresh=True)
    for step in range(STEPS):
        sizes = [[(40, 19), (17, 19)], [(33, 5)], [(8, 12), (3, 17)]][step % 3]
        factors = at_once.random_factors(sizes)
        late.update(factors, lr_at(step), everywhere=False)
        at_once.update(factors, lr_at(step))
        exact.update(in_precision(factors, torch.float64), lr_at(step))
    late.settle()
    for mine, theirs, expected in zip(late.tensors, at_once.tensors, exact.state, strict=True):
        assert error(mine, expected) <= 2 * error(theirs, expected)


def test_weight_decay_is_not_lost_where_it_is_less_than_the_rounding_of_a_weight() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    (decayed, *_), *_ = Recurrence().step(lr=1e-4, momentum=0.9, weight_decay=1e-4).drift(like).tolist()
    assert decayed == pytest.approx(-1e-8, rel=1e-12)


def test_it_is_known_of_255_steps_when_rows_were_written_and_not_of_more() -> None:
    recurrence = Recurrence()
    for step in range(Recurrence.LONGEST):
        assert recurrence.steps == step
        recurrence = recurrence.step(lr=0.1, momentum=0.9, weight_decay=0.0)
    assert recurrence.drift(torch.zeros(1)).isfinite().all()
    with pytest.raises(ValueError, match="after 255 steps all rows have to be written"):
        recurrence.step(lr=0.1, momentum=0.9, weight_decay=0.0)


def inside(generator: Generator, sizes: list[tuple[int, int]]) -> Tensor:
    """Which channels out and in any of the crops holds."""
    kept = torch.zeros_like(generator.state.written_OI, dtype=torch.bool)
    for o, i in sizes:
        kept[:o, :i] = True
    return kept


def with_only(generator: Generator, kept: Tensor, momentum_kept: Tensor) -> Generator:
    """A copy with NaN in all other rows, or in their momentum alone."""
    poisoned = copy.deepcopy(generator)
    for number, tensor in enumerate(poisoned.tensors):
        tensor[~(kept if number < 2 else momentum_kept)] = NAN
    return poisoned


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(late_generators(), st.data())
def test_kernels_are_as_exact_as_the_reference_and_read_no_more_than_they_need(generator: Generator, data: Any) -> None:
    single, sizes = generator.to(torch.float32), data.draw(crops(generator))
    factors, kept = single.random_factors(sizes), inside(generator, sizes)
    written, drift = generator.state.written_OI.long(), generator.recurrence.drift(single.tensors[0])

    def results(of: Generator, for_weights: Generator, for_update: Generator) -> list[Tensor]:
        made = in_precision(factors, of.dtype)
        weights, updated = dense(of, for_weights.weights(made), made), copy.deepcopy(for_update)
        d_codes = updated.update(made, everywhere=False)
        assert updated.state.written_OI.equal(of.state.written_OI.masked_fill(kept, of.recurrence.steps + 1))
        # Rows that wait are left as they are, whatever they hold.
        for after, before in zip(updated.tensors, for_update.tensors, strict=True):
            torch.testing.assert_close(after[~kept], before[~kept], rtol=0, atol=0, equal_nan=True)
        everywhere, settled = copy.deepcopy(of), copy.deepcopy(of)
        d_codes_again = everywhere.update(made)
        settled.settle()
        assert not any(each.state.written_OI.any() for each in (everywhere, settled))
        changed = [tensor[kept] for tensor in updated.tensors]
        return [*weights, d_codes, *changed, d_codes_again, *everywhere.tensors, *settled.tensors]

    of_weights = with_only(single, kept, kept & (drift[written, 1] != 0))
    actual = results(single, of_weights, with_only(single, kept, kept))
    double = single.to(torch.float64)
    with backends.use("reference"):
        in_torch, exact = results(single, single, single), results(double, double, double)
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
    basis, bias, *_ = single.tensors
    given = basis, bias, factors.codes_SH, factors.cin_S, factors.cout_S
    others = kernels.generate_weights(*given, depthwise=single.state.depthwise)
    for slot, other, grad in zip(single.weights(factors), others, factors.grad, strict=True):
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
        ("grad", torch.zeros(1, 7), "a crop of 5 × 3 channels has 432 numbers, its slot 7"),
        ("grad", torch.zeros(2, 432), "grad must be"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(name: str, value: Any, message: str) -> None:
    tensors = torch.ones(5, 3, 9, 4), torch.ones(5, 3, 9), torch.ones(5, 3, 9, 4), torch.ones(5, 3, 9)
    generator = Generator(state_of(tensors))
    factors = generator.random_factors([(5, 3)])
    given: dict[str, Any] = {"codes": factors.codes_SH, "cin": [3], "cout": [5], "grad": factors.grad} | {name: value}
    cin, cout = (int32(given[n]) for n in ("cin", "cout"))
    bad = Factors(given["codes"], given["grad"], cin, cout)
    with pytest.raises(RuntimeError, match=message):
        generator.update(bad) if name == "grad" else generator.weights(bad)
    assert all((tensor == 1).all() for tensor in generator.tensors)
