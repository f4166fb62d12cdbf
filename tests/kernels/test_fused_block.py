"""fused_block against its convolutions one after another, in every instruction set of this processor."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from convolutions import SEPARABLE, Case, blocks, dense, run
from hypothesis import given
from hypothesis import strategies as st
from ragged import (
    DTYPES,
    assert_as_exact_as_torch,
    int32,
    one_kernel_for_all_examples,
    poisoned_activations,
    poisoned_weights,
    random_activations,
)
from torch import Tensor

import kernels
from kernels import BlockConv, backends, checks

OP = "fused_block"


def chain(cases: list[Case], outputs_of: Callable[[Case], list[Tensor]]) -> list[Tensor]:
    """The outputs of the last convolution, each fed with those of the one before."""
    outputs = outputs_of(cases[0])
    for case in cases[1:]:
        outputs = outputs_of(replace(case, inputs=outputs))
    return outputs


def by_torch(case: Case) -> list[Tensor]:
    return [dense(case, s) for s in range(len(case.source))]


def fused(cases: list[Case]) -> list[Tensor]:
    first, last = cases[0], cases[-1]
    convs = [
        BlockConv(
            weight=poisoned_weights(case.weights, case.max_cin, case.max_cout, case.depthwise),
            weight_source_S=int32(case.weight_source),
            width_S=int32(case.cout),
            scale_SO=case.scale,  # type: ignore[arg-type]
            shift_SO=case.shift,  # type: ignore[arg-type]
            max_width=case.max_cout,
            depthwise=case.depthwise,
            kernel=case.kernel,
            stride=case.stride,
            activation=case.activation,
        )
        for case in cases
    ]
    extra: dict[str, Any] = {}
    if last.shortcuts is not None:
        extra = {
            "shortcut": poisoned_activations(last.shortcuts[::-1], last.max_cout),
            "shortcut_source_S": int32(list(range(len(last.shortcuts)))[::-1]),
        }
    x = poisoned_activations(first.inputs, first.max_cin)
    y = kernels.fused_block(
        x, int32(first.cin), int32(first.source), convs, image=first.image, max_channels=first.max_cin, **extra
    )
    return kernels.unpack_activations(y, last.cout, last.out_image)


def cast(cases: list[Case], dtype: torch.dtype, per_channel: torch.dtype | None = None) -> list[Case]:
    return [case.cast(dtype, per_channel) for case in cases]


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(blocks(), st.sampled_from(DTYPES), st.booleans())
def test_a_block_equals_its_dense_convolutions_one_after_another(
    cases: list[Case], dtype: torch.dtype, wide: bool
) -> None:
    assert_block_is_exact(cases, dtype, wide)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(blocks(st.sampled_from(SEPARABLE)), st.sampled_from(DTYPES), st.booleans())
def test_a_separable_block_equals_its_dense_convolutions_one_after_another(
    cases: list[Case], dtype: torch.dtype, wide: bool
) -> None:
    assert_block_is_exact(cases, dtype, wide)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(blocks(st.sampled_from([[(False, 1, 1), (True, 1, 2)], [(False, 1, 2), (True, 3, 3)]]), image=(3, 6, 5)))
def test_images_stay_apart_where_a_stride_skips_the_last_rows_of_each(cases: list[Case]) -> None:
    assert_block_is_exact(cases, torch.float32, wide=True)


def assert_block_is_exact(cases: list[Case], dtype: torch.dtype, wide: bool) -> None:
    """As exact as PyTorch in this dtype; scales and shifts in float32 if wide."""
    cases = cast(cases, dtype, torch.float32 if wide else dtype)
    in_torch, exact = chain(cases, by_torch), chain(cast(cases, torch.float64), by_torch)
    for s, actual in enumerate(fused(cases)):
        assert_as_exact_as_torch(actual, in_torch[s], exact[s], inner=1)


@given(blocks())
def test_a_block_equals_a_chain_of_ops(cases: list[Case]) -> None:
    if cases[-1].depthwise:
        cases[-1] = replace(cases[-1], shortcuts=None)  # ragged_depthwise has none
    cases = cast(cases, torch.float64)
    for actual, expected in zip(fused(cases), chain(cases, lambda case: run(case)[0]), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(blocks(), st.sampled_from(DTYPES))
def test_a_subnetwork_computes_the_same_alone_and_in_a_batch(cases: list[Case], dtype: torch.dtype) -> None:
    assert_same_alone(cases, dtype)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(blocks(st.sampled_from(SEPARABLE)), st.sampled_from(DTYPES))
def test_a_separable_subnetwork_computes_the_same_alone_and_in_a_batch(cases: list[Case], dtype: torch.dtype) -> None:
    assert_same_alone(cases, dtype)


def assert_same_alone(cases: list[Case], dtype: torch.dtype) -> None:
    cases = cast(cases, dtype)
    for s, expected in enumerate(fused(cases)):
        first, *inner = [case.alone(s) for case in cases]
        [alone] = fused([first, *(replace(case, source=[0]) for case in inner)])
        assert torch.equal(alone, expected)


def arguments() -> list[Any]:
    """Positional arguments of the op: an inverted residual of two subnetworks."""
    torch.manual_seed(0)
    image, own = (2, 4, 3), int32([0, 1])
    cin, hidden = [8, 8], [16, 16]

    def per_channel() -> list[Tensor]:
        return [torch.randn(2, channels) for channels in (16, 16, 8)]

    return [
        kernels.pack_activations(random_activations(cin, image, torch.float32), 8),
        int32(cin),
        own,
        [
            kernels.pack_weights([torch.randn(16, 8, 1, 1) for _ in range(2)], 8, 16),
            kernels.pack_weights([torch.randn(16, 1, 3, 3) for _ in range(2)], 1, 16, depthwise=True),
            kernels.pack_weights([torch.randn(8, 16, 1, 1) for _ in range(2)], 16, 8),
        ],
        [own] * 3,
        [int32(hidden), int32(hidden), int32(cin)],
        per_channel(),
        per_channel(),
        list(image),
        8,
        [16, 16, 8],
        [False, True, False],
        [1, 3, 1],
        [1, 1, 1],
        ["relu6", "relu6", "none"],
        kernels.pack_activations(random_activations(cin, image, torch.float32), 8),
        int32([1, 0]),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's convolutions make no such promise")
    torch.manual_seed(0)
    image, weights = (9, 11, 10), [torch.randn(33, 37, 3, 3), torch.randn(19, 33, 1, 1)]
    x = kernels.pack_activations(random_activations([37], image, dtype), 37)
    first = int32([0])
    convs = [
        BlockConv(
            kernels.pack_weights([w.to(dtype)], w.shape[1], len(w)), first, int32([len(w)]), torch.randn(1, len(w)),
            torch.randn(1, len(w)), len(w), False, w.shape[-1], 1, "relu",
        )
        for w in weights
    ]  # fmt: skip
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y = kernels.fused_block(x, int32([37]), first, convs, image=image, max_channels=37)
            results.append(kernels.unpack_activations(y, [19], image)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("namespace", ["metaprune", "metaprune_reference"])
def test_the_op_is_registered_correctly(namespace: str) -> None:
    torch.library.opcheck(getattr(torch.ops, namespace).fused_block.default, tuple(arguments()))


def second(position: int, value: Any) -> Callable[[list[Any]], None]:
    """Replaces what the second convolution has at this position of the arguments."""

    def spoil(args: list[Any]) -> None:
        args[position][1] = value

    return spoil


def whole(position: int, value: Any) -> Callable[[list[Any]], None]:
    """Replaces one argument."""

    def spoil(args: list[Any]) -> None:
        args[position] = value

    return spoil


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (whole(0, torch.zeros(2, 7)), "x must be"),
        (whole(1, int32([9, 8])), r"channels\[0\] is 9; legal values are 1..8"),
        (whole(2, int32([0, 2])), r"source\[1\] is 2; legal values are 0..1"),
        (second(3, torch.zeros(2, 7)), r"weights\[1\] must be"),
        (second(4, int32([0, 2])), r"weight_source.*\[1\] is 2; legal values are 0..1"),
        (second(5, int32([16, 17])), r"widths.*\[1\] is 17; legal values are 1..16"),
        (second(5, int32([16, 15])), "a depthwise convolution keeps its"),
        (second(6, torch.zeros(2, 15)), r"scales\[1\] must be"),
        (second(7, torch.zeros(2, 16).double()), r"shifts\[1\] must be"),
        (second(13, 0), "stride must be at least 1"),
        (second(14, "gelu"), "activation must be one of"),
        (whole(14, ["none", "none"]), "each with all its arguments"),
        (whole(15, None), "together or not at all"),
        (whole(16, int32([1, 2])), r"shortcut_source\[1\] is 2; legal values are 0..1"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(spoil: Callable[[list[Any]], None], message: str) -> None:
    args = arguments()
    spoil(args)
    with pytest.raises(RuntimeError, match=message):
        call(args)


@pytest.mark.parametrize("length", [0, 4])
def test_a_block_is_one_to_three_convolutions(length: int) -> None:
    args = arguments()
    for position in (3, 4, 5, 6, 7, 10, 11, 12, 13, 14):
        args[position] = (args[position] * 2)[:length]
    with pytest.raises(RuntimeError, match="a fused block is 1 to 3 convolutions"):
        checks.fused_block(*args)


@pytest.mark.parametrize(
    "spoil",
    [
        whole(2, int32([0, 2])),
        second(3, torch.zeros(2, 7)),
        second(4, int32([0, 2])),
        second(5, int32([16, 17])),
        second(6, torch.zeros(2, 15)),
        whole(15, torch.zeros(2, 7)),
        whole(16, int32([1, 2])),
    ],
)
def test_the_compiled_kernel_refuses_what_would_read_out_of_bounds(spoil: Callable[[list[Any]], None]) -> None:
    if reason := backends.why_not(OP, "cpu"):
        pytest.skip(reason)
    args = arguments()
    spoil(args)
    with pytest.raises(RuntimeError, match=r"does not take|legal values"):
        torch.ops.metaprune.fused_block(*args)


def call(args: list[Any]) -> Tensor:
    """The op with its arguments checked."""
    checks.fused_block(*args)
    return backends.implementation("fused_block", args[0])(*args)
