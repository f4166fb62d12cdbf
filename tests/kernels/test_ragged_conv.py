"""ragged_conv against one dense convolution per subnetwork."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import (
    activate,
    assert_as_exact_as_torch,
    images,
    int32,
    poisoned_activations,
    poisoned_weights,
    random_activations,
    widths,
)
from torch import Tensor
from torch.nn import functional

import kernels
from kernels.layout import output_image


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 999)))
    count, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    max_cin, max_cout = draw(st.integers(1, 19)), draw(st.integers(1, 19))
    kernel, image = draw(st.sampled_from([1, 3, 5])), draw(images())
    source = draw(st.lists(st.integers(0, slots - 1), min_size=count, max_size=count))
    slot_channels, cout = draw(widths(slots, max_cin)), draw(widths(count, max_cout))
    return {
        "inputs": random_activations(slot_channels, image, torch.float32),
        "weights": [torch.randn(o, slot_channels[i], kernel, kernel) for o, i in zip(cout, source, strict=True)],
        "source": source,
        "image": image,
        "stride": draw(st.integers(1, 3)),
        "max_cin": max_cin,
        "max_cout": max_cout,
        "bias": torch.randn(count, max_cout) if draw(st.booleans()) else None,
        "activation": draw(st.sampled_from(["none", "relu", "relu6"])),
        "with_shortcut": draw(st.booleans()),
    }


def run(case: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Outputs of the op, of PyTorch in `dtype` and in float64, and the op's sums."""
    weights, image, stride = case["weights"], case["image"], case["stride"]
    kernel = weights[0].shape[-1]
    inputs, weights = [t.to(dtype) for t in case["inputs"]], [w.to(dtype) for w in weights]
    cin, cout = int32([w.shape[1] for w in weights]), int32([w.shape[0] for w in weights])
    out_image = output_image(image, kernel, stride)
    order = list(range(len(weights)))[::-1]
    shortcuts: list[Tensor] = []
    extra: dict[str, Any] = {}
    if case["with_shortcut"]:
        shortcuts = random_activations(cout.tolist(), out_image, dtype)
        slots = poisoned_activations([shortcuts[i] for i in order], case["max_cout"])
        extra = {"shortcut": slots, "shortcut_source_S": int32(order)}
    y, sums = kernels.ragged_conv(
        poisoned_activations(inputs, case["max_cin"]),
        poisoned_weights(weights, case["max_cin"], case["max_cout"]),
        cin,
        cout,
        int32(case["source"]),
        image=image,
        kernel=kernel,
        stride=stride,
        max_cin=case["max_cin"],
        max_cout=case["max_cout"],
        bias_SO=None if case["bias"] is None else case["bias"].to(dtype),
        activation=case["activation"],
        statistics=True,
        **extra,
    )

    def dense(s: int, precision: torch.dtype) -> Tensor:
        source, weight = inputs[case["source"][s]].to(precision), weights[s].to(precision)
        out = functional.conv2d(source, weight, stride=stride, padding=kernel // 2)
        if case["bias"] is not None:
            out = out + case["bias"][s, : len(weight), None, None].to(dtype).to(precision)
        if shortcuts:
            out = out + shortcuts[s].to(precision)
        return activate(out, case["activation"])

    everyone = range(len(weights))
    actual = kernels.unpack_activations(y, cout, out_image)
    return actual, [dense(s, dtype) for s in everyone], [dense(s, torch.float64) for s in everyone], sums


@given(convolutions(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_each_subnetwork_equals_its_own_dense_convolution(case: dict[str, Any], dtype: torch.dtype) -> None:
    for actual, in_torch, exact in zip(*run(case, dtype)[:3], strict=True):
        assert_as_exact_as_torch(actual, in_torch, exact)


@given(convolutions())
def test_sums_are_those_of_the_bare_convolution(case: dict[str, Any]) -> None:
    plain = case | {"bias": None, "activation": "none", "with_shortcut": False}
    *_, sums = run(case, torch.float64)
    _, _, outputs, _ = run(plain, torch.float64)
    expected = torch.zeros_like(sums)
    for s, out in enumerate(outputs):
        expected[s, :, : out.shape[1]] = torch.stack([out.sum((0, 2, 3)), out.square().sum((0, 2, 3))])
    torch.testing.assert_close(sums, expected)


def arguments(dtype: torch.dtype, cin: list[int], cout: list[int]) -> list[Any]:
    """Positional arguments of the op: two subnetworks of a 3 × 3 convolution with everything it can do."""
    torch.manual_seed(0)
    image, max_cin, max_cout = (2, 4, 3), max(cin), max(cout)
    x = poisoned_activations(random_activations(cin, image, dtype), max_cin)
    weight = [torch.randn(o, i, 3, 3, dtype=dtype) for o, i in zip(cout, cin, strict=True)]
    shortcut = random_activations(cout, output_image(image, 3, 2), dtype)
    return [
        x.nan_to_num(0.0).requires_grad_(),
        poisoned_weights(weight, max_cin, max_cout).nan_to_num(0.0).requires_grad_(),
        int32(cin),
        int32(cout),
        int32([0, 1]),
        list(image),
        3,
        2,
        max_cin,
        max_cout,
        torch.randn(2, max_cout, dtype=dtype, requires_grad=True),
        "relu",
        kernels.pack_activations(shortcut, max_cout).requires_grad_(),
        int32([0, 1]),
        True,
    ]


def test_gradients_of_outputs_and_sums_are_exact() -> None:
    x, weight, *rest = arguments(torch.float64, [3, 9], [2, 5])
    bias, shortcut = rest[8], rest[10]

    def outputs(x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor) -> tuple[Tensor, ...]:
        args = [x, weight, *rest[:8], bias, rest[9], shortcut, *rest[11:]]
        y, sums = torch.ops.metaprune.ragged_conv(*args)
        return *kernels.unpack_activations(y, rest[1], (2, 2, 2)), sums

    assert torch.autograd.gradcheck(outputs, (x, weight, bias, shortcut), fast_mode=True)


def test_the_op_is_registered_correctly() -> None:
    args = arguments(torch.float32, [8, 8], [16, 16])
    torch.library.opcheck(torch.ops.metaprune.ragged_conv.default, tuple(args))


@given(convolutions(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_subnetwork_computes_the_same_alone_and_in_a_batch(case: dict[str, Any], dtype: torch.dtype) -> None:
    case = case | {"with_shortcut": False}
    together, *_ = run(case, dtype)
    for s, expected in enumerate(together):
        alone = case | {"weights": [case["weights"][s]], "source": [case["source"][s]]}
        alone["bias"] = None if case["bias"] is None else case["bias"][s : s + 1]
        assert torch.equal(run(alone, dtype)[0][0], expected)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 7), "x must be"),
        (1, torch.zeros(2, 7), "weight must be"),
        (2, torch.tensor([8, 8]), "cin must be torch.int32"),
        (2, int32([8, 9]), r"cin\[1\] is 9; legal values are 1..8"),
        (3, int32([0, 8]), r"cout\[0\] is 0; legal values are 1..16"),
        (4, int32([0, 2]), r"source\[1\] is 2; legal values are 0..1"),
        (5, [2, 0, 3], "must be at least 1"),
        (7, 0, "stride must be at least 1"),
        (10, torch.zeros(2, 3), "bias must be"),
        (11, "gelu", "activation must be one of"),
        (12, None, "together or not at all"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(position: int, value: Any, message: str) -> None:
    args = arguments(torch.float32, [8, 8], [16, 16])
    args[position] = value
    image, kernel, stride, max_cin, max_cout, bias, activation, shortcut, shortcut_source, statistics = args[5:]
    with pytest.raises(RuntimeError, match=message):
        kernels.ragged_conv(
            *args[:5],
            image=image,
            kernel=kernel,
            stride=stride,
            max_cin=max_cin,
            max_cout=max_cout,
            bias_SO=bias,
            activation=activation,
            shortcut=shortcut,
            shortcut_source_S=shortcut_source,
            statistics=statistics,
        )
