"""ragged_conv against one dense convolution per subnetwork, in every instruction set of this processor."""

from typing import Any

import pytest
import torch
from convolutions import Case, convolutions, dense, dense_sums, run
from hypothesis import given
from hypothesis import strategies as st
from ragged import (
    DTYPES,
    NAN,
    assert_as_exact_as_torch,
    int32,
    one_kernel_for_all_examples,
    random_activations,
)
from torch import Tensor
from torch.nn import functional

import kernels
from kernels import backends
from kernels.layout import output_image

OP = "ragged_conv"


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=False), st.sampled_from(DTYPES), st.booleans())
def test_each_subnetwork_equals_its_own_dense_convolution(case: Case, dtype: torch.dtype, wide: bool) -> None:
    case = case.cast(dtype, torch.float32 if wide else dtype)
    exact = case.cast(torch.float64)
    for s, actual in enumerate(run(case, statistics=False)[0]):
        assert_as_exact_as_torch(actual, dense(case, s), dense(exact, s), inner=case.input_scale is not None)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=False))
def test_sums_are_those_of_the_bare_convolution(case: Case) -> None:
    outputs, sums = run(case)
    expected = torch.stack([dense_sums(case, s) for s in range(len(outputs))])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=False), st.sampled_from(DTYPES))
def test_outputs_are_the_same_with_and_without_sums(case: Case, dtype: torch.dtype) -> None:
    case = case.cast(dtype)
    without, empty = run(case, statistics=False)
    assert empty.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(run(case)[0], without, strict=True))


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=False), st.sampled_from(DTYPES))
def test_a_subnetwork_computes_the_same_alone_and_in_a_batch(case: Case, dtype: torch.dtype) -> None:
    case = case.cast(dtype)
    together, sums = run(case)
    for s, expected in enumerate(together):
        [alone], alone_sums = run(case.alone(s))
        assert torch.equal(alone, expected)
        assert torch.equal(alone_sums[0], sums[s])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's convolutions make no such promise")
    x, weight, *rest = arguments(dtype, [37, 40], [33, 19], image=(9, 11, 10))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y, sums = torch.ops.metaprune.ragged_conv(x, weight, *rest)
            results.append([*kernels.unpack_activations(y, rest[1], (9, 6, 5)), sums])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_padding_is_zero_after_the_input_is_normalised() -> None:
    # One pixel of one channel: eight of the nine taps fall on the padding, whatever the shift is.
    x = kernels.pack_activations([torch.full((1, 1, 1, 1), 2.0)], 1)
    weight = kernels.pack_weights([torch.ones(1, 1, 3, 3)], 1, 1)
    one, first = int32([1]), int32([0])
    y, _ = kernels.ragged_conv(
        x,
        weight,
        one,
        one,
        first,
        weight_source_S=first,
        image=(1, 1, 1),
        kernel=3,
        stride=1,
        max_cin=1,
        max_cout=1,
        input_scale_LC=torch.full((1, 1), 0.5),
        input_shift_LC=torch.full((1, 1), 3.0),
    )
    assert y[0, 0] == 0.5 * 2 + 3


def arguments(
    dtype: torch.dtype, cin: list[int], cout: list[int], image: tuple[int, int, int] = (2, 4, 3)
) -> list[Any]:
    """Positional arguments of the op: a 3 × 3 convolution of stride 2 with everything it can do.

    The last subnetwork shares input and weights with the one before it.
    """
    torch.manual_seed(0)
    max_cin, max_cout = max(cin), max(cout)
    out_image = output_image(image, 3, 2)
    weight = [torch.randn(o, i, 3, 3, dtype=dtype) for o, i in zip(cout, cin, strict=True)]
    source = [*range(len(cin)), len(cin) - 1]
    cin_S, cout_S = [cin[s] for s in source], [cout[s] for s in source]
    per_channel = [
        torch.randn(rows, channels, dtype=dtype)
        for rows, channels in [(len(source), max_cout)] * 2 + [(len(cin), max_cin)] * 2
    ]
    return [
        kernels.pack_activations(random_activations(cin, image, dtype), max_cin).nan_to_num(0.0),
        kernels.pack_weights(weight, max_cin, max_cout),
        int32(cin_S),
        int32(cout_S),
        int32(source),
        int32(source),
        list(image),
        3,
        2,
        max_cin,
        max_cout,
        *per_channel[:2],
        "relu",
        kernels.pack_activations(random_activations(cout_S, out_image, dtype), max_cout).nan_to_num(0),
        int32(list(range(len(source)))),
        *per_channel[2:],
        "relu6",
        True,
    ]


DIFFERENTIABLE = [0, 1, 16, 17]


def bare_arguments(dtype: torch.dtype, cin: list[int], cout: list[int]) -> list[Any]:
    """`arguments` with nothing after the convolution, and everything that can require a gradient requiring it."""
    args = arguments(dtype, cin, cout)
    args[11:16] = None, None, "none", None, None
    return [a.requires_grad_() if i in DIFFERENTIABLE else a for i, a in enumerate(args)]


@pytest.mark.parametrize("prologue", [True, False])
def test_gradients_of_outputs_and_sums_are_exact(prologue: bool) -> None:
    args = bare_arguments(torch.float64, [3, 9], [2, 17])
    if not prologue:
        args[16:19] = None, None, "none"
    positions = DIFFERENTIABLE if prologue else DIFFERENTIABLE[:2]

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(positions, leaves, strict=True))
        y, sums = torch.ops.metaprune_reference.ragged_conv(*(given.get(i, a) for i, a in enumerate(args)))
        return *kernels.unpack_activations(y, args[3], (2, 2, 2)), sums

    assert torch.autograd.gradcheck(outputs, tuple(args[i] for i in positions), fast_mode=True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_gradients_flow_through_whichever_output_is_used(used: tuple[int, ...]) -> None:
    def gradients(args: list[Any], call: Any) -> list[Tensor]:
        outputs = call(*args)
        fronts = torch.stack([t.sum() for t in kernels.unpack_activations(outputs[0], args[3], (2, 2, 2))])
        sum([fronts.sum().double(), outputs[1].square().sum()][i] for i in used).backward()
        return [args[i].grad for i in DIFFERENTIABLE]

    args = bare_arguments(torch.float32, [3, 9], [2, 17])
    exact = bare_arguments(torch.float64, [3, 9], [2, 17])
    for i in DIFFERENTIABLE:
        exact[i] = args[i].detach().double().requires_grad_()
    actual = gradients(args, backends.implementation(OP, args[0]))
    expected = gradients(exact, torch.ops.metaprune_reference.ragged_conv)
    inside = kernels.unpack_activations(actual[0], [3, 9], (2, 4, 3))
    for a, e in zip(inside, kernels.unpack_activations(expected[0], [3, 9], (2, 4, 3)), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * e.abs().max().item())
    for a, e in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


@pytest.mark.usefixtures("kernel")
def test_only_what_requires_a_gradient_gets_one() -> None:
    args = bare_arguments(torch.float32, [3, 9], [2, 17])
    for i in (0, 16, 17):
        args[i] = args[i].detach()
    y, _ = backends.implementation(OP, args[0])(*args)
    sum(t.sum() for t in kernels.unpack_activations(y, args[3], (2, 2, 2))).backward()  # type: ignore[union-attr]
    assert args[1].grad.any()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("position", [11, 12, 13, 14])
def test_a_gradient_through_what_follows_the_convolution_is_refused(position: int) -> None:
    args = bare_arguments(torch.float32, [3, 9], [2, 17])
    full = arguments(torch.float32, [3, 9], [2, 17])
    args[position] = full[position]
    args[15] = full[15] if position == 14 else None
    y, _ = backends.implementation(OP, args[0])(*args)
    with pytest.raises(RuntimeError, match="a gradient only without scale, shift, activation and shortcut"):
        y.sum().backward()


@pytest.mark.parametrize("namespace", ["metaprune", "metaprune_reference"])
@pytest.mark.parametrize("make", [arguments, bare_arguments])
def test_the_op_is_registered_correctly(namespace: str, make: Any) -> None:
    # Whole registers and panels, so that no output holds unspecified numbers.
    args = make(torch.float32, [8, 8], [16, 16])
    torch.library.opcheck(getattr(torch.ops, namespace).ragged_conv.default, tuple(args))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 7), "x must be"),
        (1, torch.zeros(2, 7), "weight must be"),
        (1, torch.zeros(2, 16 * 9 * 8).double(), "weight must be"),
        (2, torch.tensor([8, 8, 8]), "cin must be torch.int32"),
        (2, int32([8, 9, 8]), r"cin\[1\] is 9; legal values are 1..8"),
        (3, int32([0, 8, 8]), r"cout\[0\] is 0; legal values are 1..16"),
        (4, int32([0, 2, 1]), r"source\[1\] is 2; legal values are 0..1"),
        (5, int32([0, 2, 1]), r"weight_source\[1\] is 2; legal values are 0..1"),
        (5, int32([0, -1, 1]), r"weight_source\[1\] is -1; legal values are 0..1"),
        (5, int32([0, 1]), "weight_source must be"),
        (6, [2, 0, 3], "must be at least 1"),
        (8, 0, "stride must be at least 1"),
        (11, torch.zeros(3, 3), "scale must be"),
        (12, torch.zeros(3, 16).double(), "shift must be"),
        (13, "gelu", "activation must be one of"),
        (14, None, "shortcut and shortcut_source must be given together or not at all"),
        (15, int32([0, 3, 1]), r"shortcut_source\[1\] is 3; legal values are 0..2"),
        (16, None, "input_scale and input_shift must be given together or not at all"),
        (16, torch.zeros(3, 8), "input_scale must be"),
        (18, "gelu", "input_activation must be one of"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(position: int, value: Any, message: str) -> None:
    args = arguments(torch.float32, [8, 8], [16, 16])
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        call(args)


def test_an_activation_of_the_input_needs_a_scale() -> None:
    args = arguments(torch.float32, [8, 8], [16, 16])
    args[16] = args[17] = None
    with pytest.raises(RuntimeError, match="input_activation must be 'none' without input_scale"):
        call(args)


def test_a_slot_of_weights_that_nobody_reads_may_hold_anything() -> None:
    args = [a.detach() if isinstance(a, Tensor) else a for a in arguments(torch.float32, [8, 8], [16, 16])]
    args[4], args[5] = int32([0, 0, 0]), int32([0, 0, 0])
    args[0][1], args[1][1] = NAN, NAN
    y, _ = call(args)
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, torch.zeros(2, 7)),
        (1, torch.zeros(2, 7)),
        (4, int32([0, 2, 1])),
        (5, int32([0, 2, 1])),
        (11, torch.zeros(3, 3)),
        (14, torch.zeros(3, 7)),
        (15, int32([0, 3, 1])),
        (16, torch.zeros(1, 8)),
    ],
)
def test_the_compiled_kernel_refuses_what_would_read_out_of_bounds(position: int, value: Tensor) -> None:
    if reason := backends.why_not(OP, "cpu"):
        pytest.skip(reason)
    args = arguments(torch.float32, [8, 8], [16, 16])
    args[position] = value
    with pytest.raises(RuntimeError, match=r"does not take|legal values"):
        torch.ops.metaprune.ragged_conv(*args)


def call(args: list[Any]) -> tuple[Tensor, Tensor]:
    names = "weight_source_S image kernel stride max_cin max_cout scale_SO shift_SO activation shortcut"
    more = "shortcut_source_S input_scale_LC input_shift_LC input_activation statistics"
    options: dict[str, Any] = dict(zip(f"{names} {more}".split(), args[5:], strict=True))
    return kernels.ragged_conv(*args[:5], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_of_few_channels_stay_inside_the_copy_they_are_gathered_from(kernel: str, dtype: torch.dtype) -> None:
    """One image that fills its strip: nothing lies behind the copy but what a sanitizer guards."""
    x, weight = torch.randn(1, 1, 15, 15).to(dtype), torch.randn(3, 1, 3, 3).to(dtype)
    y, _ = kernels.ragged_conv(
        kernels.pack_activations([x], 1), kernels.pack_weights([weight], 1, 3), int32([1]), int32([3]), int32([0]),
        weight_source_S=int32([0]), image=(1, 15, 15), kernel=3, stride=1, max_cin=1, max_cout=3,
    )  # fmt: skip
    (actual,) = kernels.unpack_activations(y, [3], (1, 15, 15))
    exact = functional.conv2d(x.double(), weight.double(), padding=1)
    assert_as_exact_as_torch(actual, functional.conv2d(x, weight, padding=1), exact)
