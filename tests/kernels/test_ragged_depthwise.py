"""ragged_depthwise against one dense depthwise convolution per subnetwork, in every instruction set."""

from typing import Any

import pytest
import torch
from convolutions import Case, convolutions, dense, dense_sums, run
from hypothesis import given
from hypothesis import strategies as st
from ragged import (
    DTYPES,
    assert_as_exact_as_torch,
    int32,
    one_kernel_for_all_examples,
    random_activations,
)
from torch import Tensor

import kernels

OP = "ragged_depthwise"


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=True), st.sampled_from(DTYPES), st.booleans())
def test_each_subnetwork_equals_its_own_dense_convolution(case: Case, dtype: torch.dtype, wide: bool) -> None:
    case = case.cast(dtype, torch.float32 if wide else dtype)
    exact = case.cast(torch.float64)
    for s, actual in enumerate(run(case, statistics=False)[0]):
        assert_as_exact_as_torch(actual, dense(case, s), dense(exact, s), inner=case.input_scale is not None)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=True))
def test_sums_are_those_of_the_bare_convolution(case: Case) -> None:
    outputs, sums = run(case)
    expected = torch.stack([dense_sums(case, s) for s in range(len(outputs))])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(convolutions(depthwise=True), st.sampled_from(DTYPES))
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
    x, weight, *rest = arguments(dtype, [37, 40], image=(9, 11, 10))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y, sums = torch.ops.metaprune.ragged_depthwise(x, weight, *rest)
            results.append([*kernels.unpack_activations(y, rest[0], (9, 6, 5)), sums])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def arguments(dtype: torch.dtype, channels: list[int], image: tuple[int, int, int] = (2, 4, 3)) -> list[Any]:
    """Positional arguments of the op; the last subnetwork shares input and weights with the one before it."""
    torch.manual_seed(0)
    limit = max(channels)
    weight = [torch.randn(c, 1, 3, 3, dtype=dtype) for c in channels]
    source = [*range(len(channels)), len(channels) - 1]
    scale, shift = (torch.randn(len(source), limit, dtype=dtype, requires_grad=True) for _ in range(2))
    input_scale, input_shift = (torch.randn(len(channels), limit, dtype=dtype, requires_grad=True) for _ in range(2))
    return [
        kernels.pack_activations(random_activations(channels, image, dtype), limit).nan_to_num(0.0).requires_grad_(),
        kernels.pack_weights(weight, 1, limit, depthwise=True).requires_grad_(),
        int32([channels[s] for s in source]),
        int32(source),
        int32(source),
        list(image),
        3,
        2,
        limit,
        scale,
        shift,
        "relu6",
        input_scale,
        input_shift,
        "relu",
        True,
    ]


def bare_arguments(dtype: torch.dtype, channels: list[int]) -> list[Any]:
    args = arguments(dtype, channels)
    args[9:12] = [None, None, "none"]
    return args


def test_gradients_of_outputs_and_sums_are_exact() -> None:
    args = bare_arguments(torch.float64, [3, 9])
    positions = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    assert positions == [0, 1, 12, 13]

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(positions, leaves, strict=True))
        y, sums = torch.ops.metaprune_reference.ragged_depthwise(*(given.get(i, a) for i, a in enumerate(args)))
        return *kernels.unpack_activations(y, args[2], (2, 2, 2)), sums

    assert torch.autograd.gradcheck(outputs, tuple(args[i] for i in positions), fast_mode=True)


@pytest.mark.parametrize(("position", "value"), [(9, torch.ones(3, 9)), (10, torch.ones(3, 9)), (11, "relu")])
def test_there_is_no_gradient_through_what_follows_the_convolution(position: int, value: Any) -> None:
    args = bare_arguments(torch.float32, [3, 9])
    args[position] = value
    y, _ = torch.ops.metaprune.ragged_depthwise(*args)
    with pytest.raises(RuntimeError, match="a gradient only without scale, shift and activation"):
        torch.autograd.grad(y, args[0], torch.ones_like(y))


@pytest.mark.parametrize("namespace", ["metaprune", "metaprune_reference"])
def test_the_op_is_registered_correctly(namespace: str) -> None:
    args = bare_arguments(torch.float32, [16, 16])
    torch.library.opcheck(getattr(torch.ops, namespace).ragged_depthwise.default, tuple(args))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, torch.zeros(2, 5), "weight must be"),
        (2, int32([16, 17, 16]), r"channels\[1\] is 17; legal values are 1..16"),
        (3, int32([0, 2, 1]), r"source\[1\] is 2; legal values are 0..1"),
        (4, int32([0, 2, 1]), r"weight_source\[1\] is 2; legal values are 0..1"),
        (9, torch.zeros(2, 16), "scale must be"),
        (10, torch.zeros(3, 15), "shift must be"),
        (12, None, "input_scale and input_shift must be given together or not at all"),
        (13, torch.zeros(3, 16), "input_shift must be"),
        (14, "gelu", "input_activation must be one of"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(position: int, value: Any, message: str) -> None:
    args = arguments(torch.float32, [16, 16])
    args[position] = value
    names = "weight_source_S image kernel stride max_channels scale_SC shift_SC activation"
    more = "input_scale_LC input_shift_LC input_activation statistics"
    options: dict[str, Any] = dict(zip(f"{names} {more}".split(), args[4:], strict=True))
    with pytest.raises(RuntimeError, match=message):
        kernels.ragged_depthwise(*args[:4], **options)
