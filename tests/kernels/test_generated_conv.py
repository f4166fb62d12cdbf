"""generated_conv against dense convolutions by dense generated weights, and against the two ops it stands for."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from convolutions import Case, convolutions, dense, dense_sums
from hypothesis import given
from hypothesis import strategies as st
from ragged import (
    DTYPES,
    INTERPRETED,
    NAN,
    assert_as_exact_as_torch,
    int32,
    one_kernel_for_all_examples,
    poisoned_activations,
    random_activations,
)
from torch import Tensor

import kernels
from kernels import backends

OP = "generated_conv"


@dataclass(frozen=True)
class Layer:
    """A bare convolution, and the generator of its weights, NaN outside all crops."""

    case: Case
    basis: Tensor
    bias: Tensor
    codes: Tensor

    def cast(self, dtype: torch.dtype, per_channel: torch.dtype | None = None) -> "Layer":
        tensors = (tensor.to(dtype) for tensor in (self.basis, self.bias, self.codes))
        return Layer(self.case.cast(dtype, per_channel), *tensors)

    @property
    def dense(self) -> Case:
        """The convolution by weights that PyTorch generated in this precision."""
        crops = zip(self.case.cout, self.case.cin, self.codes, strict=True)
        side = self.case.kernel
        weights = [self.basis[:o, :i] @ code + self.bias[:o, :i] for o, i, code in crops]
        own = list(range(len(weights)))
        return replace(self.case, weights=[w.unflatten(2, (side, side)) for w in weights], weight_source=own)

    def alone(self, s: int) -> "Layer":
        return replace(self, case=self.case.alone(s), codes=self.codes[s : s + 1])


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    case = draw(convolutions(depthwise=False)).bare()
    hidden, more = (
        draw(st.sampled_from([0, 1, 5, 9] if INTERPRETED else [0, 1, 5, 16, 33])),
        draw(st.sampled_from([0, 1, 17])),
    )
    shape = case.max_cout + more, case.max_cin + more, case.kernel**2
    size = (shape[1] * shape[2]) ** 0.5
    basis, bias = torch.randn(*shape, hidden) / size / max(hidden, 1) ** 0.5, torch.randn(shape) / size
    for tensor in (basis, bias):
        tensor[max(case.cout) :] = NAN
        tensor[:, max(case.cin) :] = NAN
    return Layer(case, basis, bias, torch.randn(len(case.cout), hidden))


def run(layer: Layer, statistics: bool = True) -> tuple[list[Tensor], Tensor]:
    """Dense outputs and sums of the op."""
    case, cout = layer.case, int32(layer.case.cout)
    y, sums = kernels.generated_conv(
        poisoned_activations(case.inputs, case.max_cin), layer.basis, layer.bias, layer.codes, int32(case.cin), cout,
        int32(case.source), image=case.image, stride=case.stride, max_cin=case.max_cin, max_cout=case.max_cout,
        input_scale_LC=case.input_scale, input_shift_LC=case.input_shift, input_activation=case.input_activation,
        statistics=statistics,
    )  # fmt: skip
    return kernels.unpack_activations(y, cout, case.out_image), sums


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(layers(), st.sampled_from(DTYPES), st.booleans())
def test_each_subnetwork_equals_a_dense_convolution_by_its_generated_weights(
    layer: Layer, dtype: torch.dtype, wide: bool
) -> None:
    layer = layer.cast(dtype, torch.float32 if wide else dtype)
    in_torch, exact = layer.dense, layer.cast(torch.float64).dense
    for s, actual in enumerate(run(layer, statistics=False)[0]):
        assert_as_exact_as_torch(actual, dense(in_torch, s), dense(exact, s), inner=1)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(layers())
def test_sums_are_those_of_the_convolution(layer: Layer) -> None:
    outputs, sums = run(layer)
    expected = torch.stack([dense_sums(layer.dense, s) for s in range(len(outputs))])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(layers(), st.sampled_from(DTYPES))
def test_a_subnetwork_computes_the_same_alone_and_in_a_batch(layer: Layer, dtype: torch.dtype) -> None:
    layer = layer.cast(dtype)
    together, sums = run(layer)
    for s, expected in enumerate(together):
        [alone], alone_sums = run(layer.alone(s))
        assert torch.equal(alone, expected)
        assert torch.equal(alone_sums[0], sums[s])


def arguments(
    dtype: torch.dtype, cin: list[int], cout: list[int], image: tuple[int, int, int] = (2, 4, 3), more: int = 0
) -> list[Any]:
    """Positional arguments of the op: 3 × 3, stride 2, three subnetworks of which the last shares its input.

    The basis has `more` channels than are convolved.
    """
    torch.manual_seed(0)
    source = [*range(len(cin)), len(cin) - 1]
    max_cin, max_cout = max(cin), max(cout)
    shape = max_cout + more, max_cin + more, 9
    generator = [torch.randn(*shape, 5, dtype=dtype), torch.randn(shape, dtype=dtype)]
    return [
        kernels.pack_activations(random_activations(cin, image, dtype), max_cin).nan_to_num(0.0),
        *generator,
        torch.randn(len(source), 5, dtype=dtype),
        int32([cin[s] for s in source]),
        int32([cout[s] for s in source]),
        int32(source),
        list(image),
        2,
        max_cin,
        max_cout,
        *(torch.randn(len(cin), max_cin, dtype=dtype) for _ in range(2)),
        "relu6",
        True,
    ]


DIFFERENTIABLE = [0, 1, 2, 3, 11, 12]


def two_ops(*args: Any) -> tuple[Tensor, Tensor]:
    """What the op stands for, through the public functions."""
    x, basis, bias, codes, cin, cout, source, image, stride, max_cin, max_cout, scale, shift, activation, _ = args
    slot = kernels.weight_slot(max_cin, max_cout, 3, basis.dtype)
    weight = kernels.generate_weights(basis, bias, codes, cin, cout)[:, :slot].contiguous()
    return kernels.ragged_conv(
        x, weight, cin, cout, source, weight_source_S=int32(list(range(len(cout)))), image=image, kernel=3,
        stride=stride, max_cin=max_cin, max_cout=max_cout, input_scale_LC=scale, input_shift_LC=shift,
        input_activation=activation, statistics=True,
    )  # fmt: skip


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_kernel_of_its_own_it_is_the_two_ops_and_so_are_its_gradients(dtype: torch.dtype) -> None:
    def results(call: Any) -> list[Tensor]:
        args = arguments(dtype, [3, 9], [2, 17], more=4)
        args = [a.requires_grad_() if i in DIFFERENTIABLE else a for i, a in enumerate(args)]
        y, sums = call(*args)
        fronts = kernels.unpack_activations(y, args[5], (2, 2, 2))
        (sum(front.float().square().sum() for front in fronts) + sums.float().square().sum()).backward()
        d_x, *others = (args[i].grad for i in DIFFERENTIABLE)
        return [*fronts, sums, *kernels.unpack_activations(d_x, [3, 9], (2, 4, 3)), *others]

    for mine, theirs in zip(
        results(backends.implementation(OP, torch.empty(0, dtype=dtype))), results(two_ops), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("needed", [DIFFERENTIABLE, [3], [0, 11]])
def test_gradients_of_outputs_and_sums_are_exact(needed: list[int]) -> None:
    args = arguments(torch.float64, [3, 4], [2, 5], more=1)

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(needed, leaves, strict=True))
        y, sums = torch.ops.metaprune_reference.generated_conv(*(given.get(i, a) for i, a in enumerate(args)))
        return *kernels.unpack_activations(y, args[5], (2, 2, 2)), sums

    assert torch.autograd.gradcheck(outputs, tuple(args[i].requires_grad_() for i in needed), fast_mode=True)


@pytest.mark.parametrize("namespace", ["metaprune", "metaprune_reference"])
def test_the_op_is_registered_correctly(namespace: str) -> None:
    # Whole registers and panels, so that no output holds unspecified numbers.
    args = arguments(torch.float32, [8, 8], [16, 16])
    for i in DIFFERENTIABLE:
        args[i].requires_grad_()
    torch.library.opcheck(getattr(torch.ops, namespace).generated_conv.default, tuple(args))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 7), "x must be"),
        (0, torch.zeros(2, 2 * 4 * 3 * 8).double(), "basis must be torch.float64"),
        (1, torch.zeros(16, 8, 9), "basis must be"),
        (2, torch.zeros(16, 8, 4), "bias must be"),
        (3, torch.zeros(3, 4), "codes must be"),
        (4, int32([8, 9, 8]), r"cin\[1\] is 9; legal values are 1..8"),
        (5, int32([0, 8, 8]), r"cout\[0\] is 0; legal values are 1..16"),
        (6, int32([0, 2, 1]), r"source\[1\] is 2; legal values are 0..1"),
        (7, [2, 0, 3], "must be at least 1"),
        (8, 0, "stride must be at least 1"),
        (9, 9, r"max_cin and max_cout must be 1..8 and 1..16, got 9 and 16"),
        (10, 0, r"max_cin and max_cout must be 1..8 and 1..16, got 8 and 0"),
        (11, None, "input_scale and input_shift must be given together or not at all"),
        (13, "gelu", "input_activation must be one of"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(position: int, value: Any, message: str) -> None:
    args = arguments(torch.float32, [8, 8], [16, 16])
    args[position] = value
    names = "image stride max_cin max_cout input_scale_LC input_shift_LC input_activation statistics"
    with pytest.raises(RuntimeError, match=message):
        kernels.generated_conv(*args[:7], **dict(zip(names.split(), args[7:], strict=True)))
