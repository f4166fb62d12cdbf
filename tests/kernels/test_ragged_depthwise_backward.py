"""The gradient of ragged_depthwise against that of one dense convolution per subnetwork, in every instruction set."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from convolutions import Case, convolutions, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import (
    DTYPES,
    NAN,
    assert_as_exact_as_torch,
    int32,
    one_kernel_for_all_examples,
    poisoned_activations,
    poisoned_weights,
    random_activations,
)
from torch import Tensor

import kernels
from kernels import backends, checks

OP = "ragged_depthwise_backward"
Gradients = tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]


def arguments(case: Case, grads: list[Tensor] | None, grad_sums: Tensor | None, needs_x: bool = True) -> list[Any]:
    """Positional arguments of the op for a bare case; `grad_sums` may be NaN beyond a subnetwork's channels."""
    outputs = [dense(case, s) for s in range(len(case.source))]
    return [
        None if grads is None else poisoned_activations(grads, case.max_cin),
        grad_sums,
        poisoned_activations(outputs, case.max_cin),
        poisoned_activations(case.inputs, case.max_cin),
        poisoned_weights(case.weights, 1, case.max_cin, depthwise=True),
        int32(case.cout),
        int32(case.source),
        int32(case.weight_source),
        list(case.image),
        case.kernel,
        case.stride,
        case.max_cin,
        case.input_scale,
        case.input_shift,
        case.input_activation,
        needs_x,
    ]


def call(args: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    getattr(checks, OP)(*args)
    return backends.implementation(OP, args[3])(*args)


def dense_gradients(case: Case, grads: list[Tensor] | None, grad_sums: Tensor | None) -> Gradients:
    """Gradients of inputs, weights, input_scale and input_shift by PyTorch in the precision of the case."""
    inputs, weights = ([t.clone().requires_grad_() for t in tensors] for tensors in (case.inputs, case.weights))
    prologue = [None if t is None else t.clone().requires_grad_() for t in (case.input_scale, case.input_shift)]
    case = replace(case, inputs=inputs, weights=weights, input_scale=prologue[0], input_shift=prologue[1])
    total = torch.zeros((), dtype=torch.float64)
    for s in range(len(case.source)):
        out = dense(case, s).double()
        if grads is not None:
            total = total + (out * grads[s].double()).sum()
        if grad_sums is not None:
            sums = torch.stack([out.sum((0, 2, 3)), out.square().sum((0, 2, 3))])
            total = total + (sums * grad_sums[s, :, : out.shape[1]]).sum()
    leaves = [*inputs, *weights, *(t for t in prologue if t is not None)]
    found = list(torch.autograd.grad(total, leaves, materialize_grads=True))
    first, second = len(inputs), len(inputs) + len(weights)
    scale, shift = found[second:] or (None, None)
    return found[:first], found[first:second], scale, shift


@st.composite
def output_gradients(draw: st.DrawFn, case: Case) -> tuple[list[Tensor] | None, Tensor | None]:
    """Gradients of the outputs and of their sums, at least one of them, of effects of order one."""
    given = draw(st.sampled_from(["y", "sums", "both"]))
    grad_sums = None
    if given != "y":
        grad_sums = torch.full((len(case.source), 2, case.max_cin), NAN, dtype=torch.float64)
        for row, c in zip(grad_sums, case.cout, strict=True):
            row[:, :c] = torch.randn(2, c)
    grads = random_activations(case.cout, case.out_image, torch.float32)
    return (None if given == "sums" else grads), grad_sums


@pytest.mark.usefixtures("kernel")
@settings(one_kernel_for_all_examples, max_examples=12)
@given(st.data(), convolutions(depthwise=True), st.sampled_from(DTYPES), st.booleans())
def test_gradients_equal_those_of_dense_convolutions(
    data: st.DataObject, case: Case, dtype: torch.dtype, wide: bool
) -> None:
    case = case.bare().cast(dtype, torch.float32 if wide else dtype)
    grads, grad_sums = data.draw(output_gradients(case))
    grads = None if grads is None else [g.to(dtype) for g in grads]
    d_x, d_weight, d_scale, d_shift = call(arguments(case, grads, grad_sums))
    in_torch = dense_gradients(case, grads, grad_sums)
    exact = dense_gradients(case.cast(torch.float64), grads, grad_sums)
    # An output of order one may be rounded before it is multiplied by the gradient of its square.
    inner = 0 if grad_sums is None else 8

    channels = [dense_input.shape[1] for dense_input in case.inputs]
    found_inputs = kernels.unpack_activations(d_x, channels, case.image)
    widths = [len(weight) for weight in case.weights]
    found_weights = kernels.unpack_weights(d_weight[:-1], widths, widths, kernel=case.kernel, depthwise=True)
    for actual, theirs, true in zip(
        [*found_inputs, *found_weights], [*in_torch[0], *in_torch[1]], [*exact[0], *exact[1]], strict=True
    ):
        assert_as_exact_as_torch(actual, theirs, true, inner)
    assert torch.equal(d_weight[:-1], kernels.pack_weights(found_weights, 1, case.max_cin, depthwise=True))
    assert not d_weight[-1].any()
    for found, theirs_or_none, true_or_none in ((d_scale, in_torch[2], exact[2]), (d_shift, in_torch[3], exact[3])):
        if theirs_or_none is None or true_or_none is None:
            assert found.shape == (0,)
        else:
            assert_as_exact_as_torch(found, theirs_or_none, true_or_none, inner)


@pytest.mark.usefixtures("kernel")
@settings(one_kernel_for_all_examples, max_examples=5)
@given(st.data(), convolutions(depthwise=True))
def test_only_the_weights_get_a_gradient_if_nothing_else_needs_one(data: st.DataObject, case: Case) -> None:
    case = case.bare()
    given_gradients = data.draw(output_gradients(case))
    _, expected, _, _ = call(arguments(case, *given_gradients))
    d_x, d_weight, d_scale, d_shift = call(arguments(case, *given_gradients, needs_x=False))
    assert torch.equal(d_weight, expected)
    assert d_x.shape == d_scale.shape == d_shift.shape == (0,)


def fixed_case(channels: list[int], image: tuple[int, int, int], kernel: int, stride: int, dtype: torch.dtype) -> Case:
    """The last subnetwork shares input and weights with the one before it."""
    torch.manual_seed(0)
    source = [*range(len(channels)), len(channels) - 1]
    limit = max(channels)
    return Case(
        depthwise=True,
        inputs=random_activations(channels, image, dtype),
        weights=[torch.randn(c, 1, kernel, kernel).to(dtype) for c in channels],
        source=source,
        weight_source=source,
        image=image,
        stride=stride,
        max_cin=limit,
        max_cout=limit,
        scale=None,
        shift=None,
        activation="none",
        shortcuts=None,
        input_scale=torch.randn(len(channels), limit).to(dtype),
        input_shift=torch.randn(len(channels), limit).to(dtype),
        input_activation="relu6",
    )


def fixed_arguments(case: Case) -> list[Any]:
    grads = random_activations(case.cout, case.out_image, case.inputs[0].dtype)
    return arguments(case, grads, torch.randn(len(case.source), 2, case.max_cin, dtype=torch.float64))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("image", [(2, 33, 21), (1, 4, 150)])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (7, 1), (5, 3), (1, 2)])
def test_gradients_of_images_of_many_rows_or_wide_ones_equal_the_reference(
    kernel_size: int, stride: int, image: tuple[int, int, int]
) -> None:
    case = fixed_case([17, 24], image, kernel_size, stride, torch.float32)
    args = fixed_arguments(case)
    with backends.use("reference"):
        expected_x, *expected = call(args)
    d_x, *others = call(args)
    for actual, wanted in zip(
        [*kernels.unpack_activations(d_x, [17, 24], image), *others],
        [*kernels.unpack_activations(expected_x, [17, 24], image), *expected],
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("activation", "passed"), [("none", [1, 1, 1, 1]), ("relu", [0, 0, 1, 1]), ("relu6", [0, 0, 1, 0])]
)
def test_the_bounds_of_an_activation_let_no_gradient_through(activation: str, passed: list[float]) -> None:
    case = fixed_case([1], (1, 1, 4), 1, 1, torch.float32)
    x, weight = torch.tensor([-1.0, 0.0, 3.0, 6.0]).view(1, 1, 1, 4), torch.ones(1, 1, 1, 1)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    case = replace(case, inputs=[x], weights=[weight], input_scale=one, input_shift=zero, input_activation=activation)
    d_x, _, d_scale, d_shift = call(arguments(case.alone(0), [torch.ones_like(x)], None))
    assert kernels.unpack_activations(d_x, [1], (1, 1, 4))[0].flatten().tolist() == passed
    assert d_shift.item() == sum(passed)
    assert d_scale.item() == sum(p * value for p, value in zip(passed, [-1, 0, 3, 6], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_results_do_not_depend_on_the_number_of_threads(
    kernel: str, kernel_size: int, stride: int, dtype: torch.dtype
) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's convolutions make no such promise")
    case = fixed_case([37, 40], (9, 11, 10), kernel_size, stride, dtype)
    args = fixed_arguments(case)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            d_x, *others = call(args)
            results.append([*kernels.unpack_activations(d_x, [37, 40], case.image), *others])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("kernel")
def test_an_input_that_nobody_reads_has_no_gradient() -> None:
    case = fixed_case([9, 5], (2, 4, 3), 3, 1, torch.float32)
    d_x, d_weight, d_scale, d_shift = call(fixed_arguments(replace(case, source=[0], weight_source=[0])))
    assert all(not grads[1].any() for grads in (d_x, d_weight, d_scale, d_shift))
    assert d_weight[0].any()


def test_the_op_is_registered_correctly() -> None:
    if reason := backends.why_not(OP, "cpu"):
        pytest.skip(reason)  # the reference asks autograd, which opcheck keeps out of an op
    args = fixed_arguments(fixed_case([16, 16], (2, 4, 3), 3, 2, torch.float32))
    torch.library.opcheck(torch.ops.metaprune.ragged_depthwise_backward.default, tuple(args))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 5), "grad_y must be"),
        (1, torch.zeros(3, 2, 16), "grad_sums must be"),
        (2, torch.zeros(2, 5), "y must be"),
        (6, int32([0, 2, 1]), r"source\[1\] is 2; legal values are 0..1"),
        (12, None, "input_scale and input_shift must be given together or not at all"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(position: int, value: Any, message: str) -> None:
    args = fixed_arguments(fixed_case([16, 16], (2, 4, 3), 3, 2, torch.float32))
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        call(args)


def test_readers_of_one_slot_must_be_of_one_width(kernel: str) -> None:
    if kernel == "reference":
        pytest.skip("the reference takes the front that each of them describes")
    args = fixed_arguments(fixed_case([16, 16], (2, 4, 3), 3, 2, torch.float32))
    args[5] = int32([16, 16, 15])
    with pytest.raises(
        RuntimeError, match=r"channels\[2\] is 15; that of subnetwork 1, which reads the same slot, is 16"
    ):
        call(args)
