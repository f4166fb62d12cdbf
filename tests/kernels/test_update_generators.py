"""update_generators_ against autograd's gradients given to torch.optim.SGD, in every instruction set here."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import NAN, assert_as_exact_as_torch, int32, one_kernel_for_all_examples
from weight_generators import (
    Dense,
    Generator,
    crops,
    dense,
    generators,
    in_precision,
    late_generators,
    state_of,
)

from kernels import Factors, backends
from kernels.functions import _call
from kernels.layout import pack_weights
from kernels.registration import overload

OP = "update_generators_"


@settings(max_examples=25)
@given(generators(fresh=True), st.data())
def test_many_steps_of_the_reference_are_those_of_autograd_and_torch_sgd(generator: Generator, data: Any) -> None:
    in_torch = Dense(generator, fresh=True)
    sizes = data.draw(crops(generator))
    for _ in range(12):
        factors = generator.random_factors(sizes)
        found, expected = generator.update(factors), in_torch.update(factors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(generator.tensors, in_torch.state, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(generators(), st.data())
def test_a_step_is_as_exact_as_autograd_and_torch_sgd(generator: Generator, data: Any) -> None:
    single = generator.to(torch.float32)
    factors = single.random_factors(data.draw(crops(generator)))
    in_torch, exact = Dense(single, fresh=False), Dense(single.to(torch.float64), fresh=False)
    steps = [single.update(factors), in_torch.update(factors), exact.update(in_precision(factors, torch.float64))]
    for actual, theirs, expected in zip(
        (steps[0], *single.tensors), (steps[1], *in_torch.state), (steps[2], *exact.state), strict=False
    ):
        assert_as_exact_as_torch(actual, theirs, expected)


def with_and_without_half_momentum(generator: Generator, data: Any) -> tuple[Any, Any]:
    """All that the ops make of the same numbers: with the basis's momentum in bfloat16, and in float32."""
    half = generator.to(torch.float32).with_half_momentum()
    factors, everywhere = half.random_factors(data.draw(crops(half))), data.draw(st.booleans())
    # In the order of this tuple: weights, then the gradient of the codes, then what the update has changed.
    found, expected = (
        (dense(each, each.weights(factors), factors), each.update(factors, everywhere=everywhere), each.tensors)
        for each in (half, half.to(torch.float32))
    )
    return found, expected


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(late_generators(), st.data())
def test_a_momentum_in_bfloat16_is_rounded_when_it_is_written_and_nothing_else_is(
    generator: Generator, data: Any
) -> None:
    found, expected = with_and_without_half_momentum(generator, data)
    basis, bias, basis_momentum, bias_momentum = expected[-1]
    rounded = (*expected[:-1], (basis, bias, basis_momentum.bfloat16(), bias_momentum))
    torch.testing.assert_close(found, rounded, rtol=0, atol=0)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(generators(), st.data())
def test_outside_all_crops_momentum_and_weights_still_decay(generator: Generator, data: Any) -> None:
    single = generator.to(torch.float32)
    before, sizes = copy.deepcopy(single), data.draw(crops(generator))
    single.update(single.random_factors(sizes))
    o, i = (max(widths) for widths in zip(*sizes, strict=True))
    for weights, momentum in ((0, 2), (1, 3)):
        decayed = single.momentum * before.tensors[momentum] + single.weight_decay * before.tensors[weights]
        expected = before.tensors[weights] - single.lr * decayed
        for found, wanted in ((single.tensors[momentum], decayed), (single.tensors[weights], expected)):
            torch.testing.assert_close(found[o:], wanted[o:])
            torch.testing.assert_close(found[:, i:], wanted[:, i:])


@pytest.mark.usefixtures("kernel")
def test_only_what_is_given_is_written() -> None:
    torch.manual_seed(0)
    guarded = [torch.full((n + 64,), NAN) for n in (5 * 3 * 9 * 17, 5 * 3 * 9) * 2]
    for buffer in guarded:
        buffer[32:-32] = torch.randn(len(buffer) - 64)
    shapes = [(5, 3, 9, 17), (5, 3, 9)] * 2
    tensors = [buffer[32:-32].view(shape) for buffer, shape in zip(guarded, shapes, strict=True)]
    generator = Generator(state_of(tensors))
    factors = generator.random_factors([(5, 2), (1, 3)])
    kept = copy.deepcopy(factors)
    generator.update(factors)
    assert all(t.isfinite().all() for t in tensors)
    assert all(b[:32].isnan().all() and b[-32:].isnan().all() for b in guarded)
    assert torch.equal(kept.codes_SH, factors.codes_SH)
    assert torch.equal(kept.grad.nan_to_num(7), factors.grad.nan_to_num(7))


def large() -> Generator:
    torch.manual_seed(0)
    shape = (70, 65, 9)
    tensors = torch.randn(*shape, 40), torch.randn(shape), torch.randn(*shape, 40), torch.randn(shape)
    return Generator(state_of(tensors), weight_decay=0.01)


LARGE_CROPS = [(70, 65), (33, 64), (1, 1)]


def test_results_do_not_depend_on_the_number_of_threads(kernel: str) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's products make no such promise")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            generator = large()
            factors = [generator.random_factors(sizes) for sizes in (LARGE_CROPS[1:], LARGE_CROPS)]
            early = generator.update(factors[0], everywhere=False)
            weights = dense(generator, generator.weights(factors[1]), factors[1])
            results.append([early, *weights, generator.update(factors[1], everywhere=False), *generator.tensors])
            generator.settle()
            results[-1] += generator.tensors
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_long_sum_of_a_codes_gradient_loses_nothing(kernel: str) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's products make no such promise")
    # 2²⁰ rows of about the same size: a plain sum in single precision is off by some 1e-5 of the result.
    basis, bias, grad = torch.rand(1024, 1024, 1, 2), torch.zeros(1024, 1024, 1), torch.rand(1024, 1024, 1, 1)
    generator = Generator(state_of((basis, bias, torch.zeros_like(basis), torch.zeros_like(bias))))
    exact = torch.einsum("oik,oikh->h", grad.double()[..., 0], basis.double())
    whole = int32([1024])
    d_codes = generator.update(Factors(torch.ones(1, 2), pack_weights([grad], 1024, 1024), whole, whole))
    torch.testing.assert_close(d_codes[0].double(), exact, rtol=1e-6, atol=0)


def arguments() -> dict[str, Any]:
    """Of the op in the order of its schema."""
    torch.manual_seed(0)
    tensors = torch.ones(5, 3, 9, 4), torch.ones(5, 3, 9), torch.ones(5, 3, 9, 4), torch.ones(5, 3, 9)
    generator = Generator(state_of(tensors))
    factors = generator.random_factors([(5, 3), (1, 2)])
    names = ("basis", "bias", "basis_momentum", "bias_momentum", "written")
    return dict(zip(names, generator.state.tensors, strict=True)) | {
        "drift": generator.recurrence.drift(tensors[0]),
        "codes": factors.codes_SH,
        "grad": factors.grad,
        "cin": factors.cin_S,
        "cout": factors.cout_S,
        "depthwise": False,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "everywhere": False,
        "step": 1,
    }


@pytest.mark.parametrize("namespace", ["metaprune", "metaprune_reference"])
def test_the_ops_are_registered_with_what_they_change(namespace: str) -> None:
    # No gradient goes through them, and one may not change what autograd has saved: what is left to check of it.
    checked = ("test_schema", "test_faketensor")
    given = {k: v.nan_to_num() if k in ("grad", "drift") else v for k, v in arguments().items()}
    torch.library.opcheck(overload(namespace, OP), tuple(given.values()), test_utils=checked)
    names = ("basis", "bias", "basis_momentum", "bias_momentum", "written", "drift", "codes", "cin", "cout")
    generation = (*(given[name] for name in names), False)
    torch.library.opcheck(overload(namespace, "generate_delayed"), generation, test_utils=checked)


BAD = [
    ("basis", torch.zeros(5, 3, 9), "basis must be"),
    ("basis", torch.zeros(5, 3, 9, 4).bfloat16(), "basis must be torch.float32 or torch.float64"),
    ("bias", torch.zeros(5, 3, 4), "bias must be"),
    ("basis_momentum", torch.zeros(5, 3, 4, 9).mT, "basis_momentum must be"),
    ("bias_momentum", torch.zeros(5, 3, 9).double(), "bias_momentum must be"),
    ("written", torch.zeros(5, 3, dtype=torch.int32), r"written must be torch.uint8 \[5, 3\]"),
    ("written", torch.zeros(3, 5, dtype=torch.uint8), r"written must be torch.uint8 \[5, 3\]"),
    ("drift", torch.zeros(1, 4), r"drift must be torch.float32 \[256, 4\]"),
    ("codes", torch.zeros(1, 4), "codes must be"),
    ("grad", torch.zeros(1, 432), r"grad must be torch.float32 \[2, 432\] = \[S, slot\]"),
    ("grad", torch.zeros(2, 432).double(), "grad must be torch.float32"),
    ("cin", int32([3, 4]), r"cin\[1\] is 4; legal values are 1..3"),
    ("cout", int32([0, 1]), r"cout\[0\] is 0; legal values are 1..5"),
    ("depthwise", True, "a depthwise basis must be"),
    ("lr", NAN, "these must be finite numbers: {'lr': nan"),
    ("step", 0, r"step is 0; legal values are 1\.\.255"),
    ("step", 256, r"step is 256; legal values are 1\.\.255"),
]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_input_is_refused_with_the_argument_named_and_nothing_is_changed(
    name: str, value: Any, message: str
) -> None:
    good = arguments()
    given = good | {name: value}
    with pytest.raises(RuntimeError, match=message):
        _call(OP, *given.values())
    assert all((t == 1).all() for t in list(good.values())[:4])


def test_the_compiled_kernel_refuses_what_would_touch_memory_out_of_bounds() -> None:
    if backends.why_not(OP, "cpu"):
        pytest.skip(backends.why_not(OP, "cpu"))
    for name, value, _ in BAD:
        if name == "lr":
            continue  # a NaN among the constants touches nothing out of bounds
        with pytest.raises(RuntimeError, match=r"does not take|legal values|must"):
            overload("metaprune", OP)(*(arguments() | {name: value}).values())


def test_whatever_says_when_rows_were_written_nothing_out_of_bounds_is_read() -> None:
    # Of a step that there was not the drift is NaN, and so are weights and gradients.
    generator = large()
    generator.state.written_OI.fill_(255)
    factors = generator.random_factors(LARGE_CROPS)
    assert all(weights.isnan().all() for weights in dense(generator, generator.weights(factors), factors))
    assert generator.update(factors).isnan().all()
