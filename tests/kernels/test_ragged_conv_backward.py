"""The gradient of ragged_conv against PyTorch's autograd, in every instruction set of this processor."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from convolutions import Case, convolutions, dense
from hypothesis import given
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
from kernels.layout import output_image
from kernels.registration import REFERENCE_NAMESPACE, overload

OP = "ragged_conv_backward"


@dataclass(frozen=True)
class Gradients:
    """Of the dense inputs, one per slot of x; of the weights, one per slot; of input_scale and input_shift."""

    inputs: list[Tensor]
    weights: list[Tensor]
    input_scale: Tensor
    input_shift: Tensor


def output_gradients(case: Case, grad_y: bool, grad_sums: bool) -> tuple[list[Tensor] | None, Tensor | None]:
    """Random gradients of the outputs of a case and of their sums, of order one together."""
    grads = random_activations(case.cout, case.out_image, case.inputs[0].dtype) if grad_y else None
    sums = torch.randn(len(case.cout), 2, case.max_cout, dtype=torch.float64) / 4 if grad_sums else None
    for s, o in enumerate(case.cout):
        if sums is not None:
            sums[s, :, o:] = NAN
    return grads, sums


def run_backward(
    case: Case, grads: list[Tensor] | None, grad_sums: Tensor | None, needs_x: bool = True
) -> tuple[Tensor, ...]:
    """What the op returns, for buffers with NaN wherever nothing may be read."""
    # Not PyTorch's bfloat16 convolution: of a single channel and column it may read memory that nobody wrote.
    exact = case.cast(torch.float64)
    outputs = [dense(exact, s).to(case.inputs[0].dtype) for s in range(len(case.cout))]
    return tuple(
        backends.implementation(OP, case.inputs[0])(
            None if grads is None else poisoned_activations(grads, case.max_cout),
            grad_sums,
            poisoned_activations(outputs, case.max_cout),
            poisoned_activations(case.inputs, case.max_cin),
            poisoned_weights(case.weights, case.max_cin, case.max_cout),
            int32(case.cin),
            int32(case.cout),
            int32(case.source),
            int32(case.weight_source),
            list(case.image),
            case.kernel,
            case.stride,
            case.max_cin,
            case.max_cout,
            case.input_scale,
            case.input_shift,
            case.input_activation,
            needs_x,
        )
    )


def unpack(case: Case, found: tuple[Tensor, ...]) -> Gradients:
    """The dense gradients of an answer of the op; slots that nobody reads are left out."""
    d_x, d_weight, d_scale, d_shift = found
    cin, cout = widths_of_weights(case)
    inputs = kernels.unpack_activations(d_x, [t.shape[1] for t in case.inputs], case.image) if d_x.numel() else []
    weights = kernels.unpack_weights(d_weight[: len(case.weights)], cin, cout, kernel=case.kernel)
    return Gradients(inputs, weights, d_scale, d_shift)


def widths_of_weights(case: Case) -> tuple[list[int], list[int]]:
    return [w.shape[1] for w in case.weights], [len(w) for w in case.weights]


def autograd(case: Case, grads: list[Tensor] | None, grad_sums: Tensor | None) -> Gradients:
    """The same by PyTorch in the precision of the case; every sum is that of one channel's own numbers."""
    leaves = replace(
        case,
        inputs=[t.detach().requires_grad_() for t in case.inputs],
        weights=[t.detach().requires_grad_() for t in case.weights],
        input_scale=None if case.input_scale is None else case.input_scale.detach().requires_grad_(),
        input_shift=None if case.input_shift is None else case.input_shift.detach().requires_grad_(),
    )
    total = torch.zeros((), dtype=torch.float64)
    for s, o in enumerate(case.cout):
        y = dense(leaves, s)
        if grads is not None:
            total = total + (y * grads[s].to(y.dtype)).double().sum()
        if grad_sums is not None:
            sums = torch.stack([y.double().sum((0, 2, 3)), y.double().square().sum((0, 2, 3))])
            total = total + (sums * grad_sums[s, :, :o]).sum()
    tensors = [*leaves.inputs, *leaves.weights]
    if leaves.input_scale is not None and leaves.input_shift is not None:
        tensors += [leaves.input_scale, leaves.input_shift]
    if total.requires_grad:
        found = torch.autograd.grad(total, tensors, materialize_grads=True)
    else:
        found = tuple(torch.zeros_like(t) for t in tensors)
    slots, weights = len(case.inputs), len(case.weights)
    empty = case.inputs[0].new_empty(0)
    rest = found[slots + weights :] or (empty, empty)
    return Gradients(list(found[:slots]), list(found[slots : slots + weights]), *rest)


def compare(case: Case, actual: Gradients, in_torch: Gradients, exact: Gradients) -> None:
    """Each is as exact as PyTorch's own, whose sums of many terms are in another order.

    What is allowed on top is the rounding of n terms: n times that of a sum in float32, at random, and of the terms
    themselves in bfloat16, y among them, whatever the precision of input_scale.
    """
    dtype = case.inputs[0].dtype
    pixels = len(case.source) * case.out_image[0] * case.out_image[1] * case.out_image[2]
    taps = sum(case.cout) * case.kernel**2
    groups = [
        (taps, actual.inputs, in_torch.inputs, exact.inputs),
        (pixels, actual.weights, in_torch.weights, exact.weights),
        (taps + pixels, [actual.input_scale], [in_torch.input_scale], [exact.input_scale]),
        (taps + pixels, [actual.input_shift], [in_torch.input_shift], [exact.input_shift]),
    ]
    for terms, *triple in groups:
        for ours, theirs, truth in zip(*triple, strict=True):
            if truth.numel():
                largest, at_random = truth.abs().max().item(), 2 * terms**0.5
                inner = (1 + largest) * at_random if dtype == torch.float32 else largest + at_random
                assert_as_exact_as_torch(ours.to(dtype), theirs, truth, inner=inner)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=False), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans())
def test_gradients_are_as_exact_as_those_of_torch(
    case: Case, dtype: torch.dtype, grad_y: bool, grad_sums: bool, wide: bool
) -> None:
    case = case.bare().cast(dtype, torch.float32 if wide else dtype)
    grads, sums = output_gradients(case, grad_y, grad_sums)
    exact_grads = None if grads is None else [g.double() for g in grads]
    exact = autograd(case.cast(torch.float64), exact_grads, sums)
    actual = unpack(case, run_backward(case, grads, sums))
    compare(case, actual, autograd(case, grads, sums), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("cin", "cout", "kernel_size", "stride", "image"),
    [
        pytest.param([70, 33], [200, 130], 5, 1, (3, 9, 9), id="weights in ranges of channels"),
        pytest.param([64, 40], [64, 20], 3, 1, (2, 40, 40), id="an image in strips"),
        pytest.param([16, 12], [64, 50], 7, 2, (1, 71, 70), id="an image in strips, every other pixel"),
        pytest.param([32, 9], [48, 33], 1, 1, (9, 30, 31), id="images in groups"),
        pytest.param([40, 32], [33, 48], 1, 2, (9, 30, 31), id="every fourth pixel"),
    ],
)
@pytest.mark.usefixtures("kernel")
def test_gradients_of_large_layers_are_as_exact_as_those_of_torch(
    dtype: torch.dtype, cin: list[int], cout: list[int], kernel_size: int, stride: int, image: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    widths = zip(cin, cout, strict=True)
    max_cin = max(cin)
    case = Case(
        depthwise=False,
        # Channels last, as the buffers are: in another order of sums PyTorch's own error is another.
        inputs=[t.contiguous(memory_format=torch.channels_last) for t in random_activations(cin, image, torch.float32)],
        weights=[torch.randn(o, i, kernel_size, kernel_size) / (i * kernel_size**2) ** 0.5 for i, o in widths],
        source=[1, 0],
        weight_source=[1, 0],
        image=image,
        stride=stride,
        max_cin=max_cin,
        max_cout=max(cout),
        scale=None,
        shift=None,
        activation="none",
        shortcuts=None,
        input_scale=torch.rand(2, max_cin) + 0.5,
        input_shift=torch.randn(2, max_cin) / 4,
        input_activation="relu6",
    ).cast(dtype, torch.float32)
    grads, sums = output_gradients(case, True, True)
    assert grads is not None
    exact = autograd(case.cast(torch.float64), [g.double() for g in grads], sums)
    compare(case, unpack(case, run_backward(case, grads, sums)), autograd(case, grads, sums), exact)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=False), st.sampled_from(DTYPES))
def test_the_gradient_of_weights_is_the_same_without_that_of_the_input(case: Case, dtype: torch.dtype) -> None:
    case = case.bare().cast(dtype)
    grads, sums = output_gradients(case, True, True)
    d_x, d_weight, d_scale, d_shift = run_backward(case, grads, sums, needs_x=False)
    assert d_x.numel() == d_scale.numel() == d_shift.numel() == 0
    torch.testing.assert_close(d_weight, run_backward(case, grads, sums)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=False), st.sampled_from(DTYPES))
def test_what_nobody_reads_has_no_gradient(case: Case, dtype: torch.dtype) -> None:
    case = case.bare().cast(dtype)
    d_x, d_weight, d_scale, d_shift = run_backward(case, *output_gradients(case, True, True))
    for slot in {*range(len(case.inputs))} - {*case.source}:
        assert not d_x[slot].any()
    for slot, channels in enumerate(t.shape[1] for t in case.inputs):
        for sums in (d_scale, d_shift):
            assert not sums.numel() or not sums[slot, channels if slot in case.source else 0 :].any()
    cin, cout = widths_of_weights(case)
    dense_weights = kernels.unpack_weights(d_weight[: len(cin)], cin, cout, kernel=case.kernel)
    repacked = kernels.pack_weights(dense_weights, case.max_cin, case.max_cout)
    assert torch.equal(d_weight[: len(cin)], repacked)  # so that pads are zero
    assert not d_weight[len(cin) :].any()


def arguments(dtype: torch.dtype, cin: list[int], cout: list[int], image: tuple[int, int, int]) -> list[Any]:
    """Positional arguments of a 3 × 3 convolution of stride 2 with a prologue; the last subnetwork shares all."""
    torch.manual_seed(0)
    source = [*range(len(cin)), len(cin) - 1]
    cout_S, max_cin, max_cout = [cout[s] for s in source], max(cin), max(cout)
    out_image = output_image(image, 3, 2)
    weights = [torch.randn(o, i, 3, 3, dtype=dtype) for o, i in zip(cout, cin, strict=True)]
    return [
        kernels.pack_activations(random_activations(cout_S, out_image, dtype), max_cout),
        torch.randn(len(source), 2, max_cout, dtype=torch.float64),
        kernels.pack_activations(random_activations(cout_S, out_image, dtype), max_cout),
        kernels.pack_activations(random_activations(cin, image, dtype), max_cin),
        kernels.pack_weights(weights, max_cin, max_cout),
        int32([cin[s] for s in source]),
        int32(cout_S),
        int32(source),
        int32(source),
        list(image),
        3,
        2,
        max_cin,
        max_cout,
        torch.randn(len(cin), max_cin, dtype=dtype),
        torch.randn(len(cin), max_cin, dtype=dtype),
        "relu",
        True,
    ]


def with_outputs(arguments: list[Any]) -> list[Any]:
    """The same, with the outputs that the convolution has."""
    forward = (*arguments[3:14], None, None, "none", None, None, *arguments[14:])
    y, _ = overload(REFERENCE_NAMESPACE, "ragged_conv")(*forward)
    return [*arguments[:2], y, *arguments[3:]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cin", "cout"), [([37, 40], [33, 19]), ([90, 100], [100, 80])])
def test_results_do_not_depend_on_the_number_of_threads(
    kernel: str, dtype: torch.dtype, cin: list[int], cout: list[int]
) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's convolutions make no such promise")
    args = arguments(dtype, cin, cout, (33, 11, 10))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            d_x, *rest = torch.ops.metaprune.ragged_conv_backward(*args)
            results.append([*kernels.unpack_activations(d_x, cin, (33, 11, 10)), *rest])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_op_is_registered_correctly() -> None:
    # The reference is not checked: opcheck runs an op below autograd, and it is autograd that it consists of.
    if reason := backends.why_not(OP, "cpu"):
        pytest.skip(reason)
    args = arguments(torch.float32, [8, 8], [16, 16], (2, 4, 3))
    torch.library.opcheck(torch.ops.metaprune.ragged_conv_backward.default, tuple(args))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1)])
def test_a_gradient_that_is_absent_is_zero(missing: tuple[int, ...]) -> None:
    args = arguments(torch.float32, [8, 5], [16, 3], (2, 4, 3))
    zeros = list(args)
    for i in missing:
        zeros[i], args[i] = torch.zeros_like(args[i]), None
    backward = backends.implementation(OP, args[3])
    for actual, expected in zip(backward(*args)[1:], backward(*zeros)[1:], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 7), "grad_y must be"),
        (1, torch.zeros(3, 2, 16), "grad_sums must be torch.float64"),
        (2, torch.zeros(2, 2 * 2 * 2 * 16), "y must be"),
        (3, torch.zeros(2, 7), "x must be"),
        (4, torch.zeros(2, 7), "weight must be"),
        (10, 0, "kernel and stride must be at least 1"),
        (14, None, "input_scale and input_shift must be given together or not at all"),
    ],
)
def test_bad_shapes_are_refused_before_anything_runs(position: int, value: Any, message: str) -> None:
    args = arguments(torch.float32, [8, 8], [16, 16], (2, 4, 3))
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        checks.ragged_conv_backward(*args)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, torch.zeros(3, 7)),
        (1, torch.zeros(3, 2, 15).double()),
        (2, torch.zeros(2, 2 * 2 * 2 * 16)),
        (3, torch.zeros(2, 7)),
        (4, torch.zeros(2, 7)),
        (5, int32([8, 9, 8])),
        (6, int32([0, 9, 8])),
        (7, int32([0, 2, 1])),
        (8, int32([0, 2, 1])),
        (14, torch.zeros(1, 8)),
    ],
)
def test_the_compiled_kernel_refuses_what_would_read_out_of_bounds(position: int, value: Tensor) -> None:
    if reason := backends.why_not(OP, "cpu"):
        pytest.skip(reason)
    args = arguments(torch.float32, [8, 8], [16, 16], (2, 4, 3))
    args[position] = value
    with pytest.raises(RuntimeError, match=r"does not take|legal values"):
        torch.ops.metaprune.ragged_conv_backward(*args)


@pytest.mark.parametrize(("position", "name"), [(5, "cin"), (6, "cout")])
def test_the_compiled_kernel_refuses_readers_of_one_slot_that_differ(position: int, name: str) -> None:
    if reason := backends.why_not(OP, "cpu"):
        pytest.skip(reason)
    args = arguments(torch.float32, [8, 8], [16, 16], (2, 4, 3))
    args[position] = int32([8, 8, 7])
    with pytest.raises(RuntimeError, match=rf"{name}\[2\] is 7; that of subnetwork 1, which reads the same slot, is 8"):
        torch.ops.metaprune.ragged_conv_backward(*args)
