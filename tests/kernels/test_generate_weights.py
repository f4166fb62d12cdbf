"""generate_weights against one dense product per subnetwork, in every instruction set of this processor."""

from math import isqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import DTYPES, NAN, assert_as_exact_as_torch, int32, one_kernel_for_all_examples, widths
from torch import Tensor

import kernels
from kernels import backends
from kernels.layout import weight_slot, write_weights

OP = "generate_weights"


@st.composite
def layers(draw: st.DrawFn, max_count: int = 12) -> dict[str, Any]:
    """Arguments of the op in float64; basis and bias are NaN outside all crops."""
    torch.manual_seed(draw(st.integers(0, 999)))
    depthwise = draw(st.booleans())
    count, hidden = draw(st.integers(1, max_count)), draw(st.sampled_from([0, 1, 5, 16, 17, 32, 64]))
    taps = draw(st.sampled_from([1, 9, 25]))
    max_cin = 1 if depthwise else draw(st.sampled_from([1, 3, 8, 17, 33]))
    max_cout = draw(st.sampled_from([1, 7, 16, 23, 33]))
    cin, cout = draw(widths(count, max_cin)), draw(widths(count, max_cout))
    basis, bias = torch.randn(max_cout, max_cin, taps, hidden), torch.randn(max_cout, max_cin, taps)
    for tensor in (basis, bias):
        tensor[max(cout) :] = NAN
        tensor[:, max(cin) :] = NAN
    return {
        "basis_OIKH": basis.double(),
        "bias_OIK": bias.double(),
        "codes_SH": torch.randn(count, hidden).double(),
        "cin_S": int32(cin),
        "cout_S": int32(cout),
        "depthwise": depthwise,
    }


def cast(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floats = ("basis_OIKH", "bias_OIK", "codes_SH")
    return {k: v.to(dtype) if k in floats else v for k, v in case.items()}


def dense(case: dict[str, Any], s: int) -> Tensor:
    """The weights `[O_s, I_s, K]` of one subnetwork, in the dtype of the case."""
    o, i = case["cout_S"][s], case["cin_S"][s]
    return case["basis_OIKH"][:o, :i] @ case["codes_SH"][s] + case["bias_OIK"][:o, :i]


def unpack(case: dict[str, Any], packed: Tensor) -> list[Tensor]:
    side = isqrt(case["basis_OIKH"].shape[2])
    weights = kernels.unpack_weights(packed, case["cin_S"], case["cout_S"], kernel=side, depthwise=case["depthwise"])
    return [w.flatten(2) for w in weights]


def fronts(case: dict[str, Any], packed: Tensor) -> list[Tensor]:
    """The front of every slot with its pad channels."""
    side, depthwise = isqrt(case["basis_OIKH"].shape[2]), case["depthwise"]
    widths_S = zip(case["cin_S"].tolist(), case["cout_S"].tolist(), strict=True)
    lengths = [weight_slot(i, o, side, packed.dtype, depthwise) for i, o in widths_S]
    return [row[:n] for row, n in zip(packed, lengths, strict=True)]


def subset(case: dict[str, Any], s: int) -> dict[str, Any]:
    per_subnetwork = ("codes_SH", "cin_S", "cout_S")
    return {k: v[s : s + 1] if k in per_subnetwork else v for k, v in case.items()}


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(layers(), st.sampled_from(DTYPES))
def test_each_subnetwork_equals_its_own_dense_product(case: dict[str, Any], dtype: torch.dtype) -> None:
    case = cast(case, dtype)
    packed = kernels.generate_weights(**case)
    for s, actual in enumerate(unpack(case, packed)):
        assert_as_exact_as_torch(actual, dense(case, s), dense(cast(case, torch.float64), s))


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(layers(), st.sampled_from(DTYPES))
def test_pad_channels_are_zero(case: dict[str, Any], dtype: torch.dtype) -> None:
    packed = kernels.generate_weights(**cast(case, dtype))
    for front, weight in zip(fronts(case, packed), unpack(case, packed), strict=True):
        assert front.double().abs().sum() == weight.double().abs().sum()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_too_many_for_the_caches_equal_the_dense_products(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = {
        "basis_OIKH": torch.randn(100, 77, 9, 32).double(),
        "bias_OIK": torch.randn(100, 77, 9).double(),
        "codes_SH": torch.randn(19, 32).double(),
        "cin_S": int32([*range(1, 78, 5), 77, 76, 3]),
        "cout_S": int32([*range(100, 4, -6), 100, 100, 17]),
        "depthwise": False,
    }
    rounded = cast(case, dtype)
    packed = kernels.generate_weights(**rounded)
    assert packed.nbytes > 2 << 20
    for s, actual in enumerate(unpack(rounded, packed)):
        assert_as_exact_as_torch(actual, dense(rounded, s), dense(cast(rounded, torch.float64), s))


def gradients(case: dict[str, Any], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [case[name].detach().requires_grad_() for name in ("basis_OIKH", "bias_OIK", "codes_SH")]
    packed = kernels.generate_weights(*leaves, *list(case.values())[3:5], **dict(list(case.items())[5:]))
    return torch.autograd.grad(packed, leaves, grad)


def dense_gradients(case: dict[str, Any], grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients by PyTorch's autograd through `dense`, in the dtype of the case."""
    names = ("basis_OIKH", "bias_OIK", "codes_SH")
    leaves = {name: case[name].detach().requires_grad_() for name in names}
    outputs = [dense(case | leaves, s) for s in range(len(case["codes_SH"]))]
    return torch.autograd.grad(outputs, list(leaves.values()), unpack(case, grad))


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(layers(), st.sampled_from(DTYPES))
def test_gradients_equal_those_of_the_dense_products(case: dict[str, Any], dtype: torch.dtype) -> None:
    case = cast(case, dtype)
    basis = case["basis_OIKH"]
    side = isqrt(basis.shape[2])
    slot = weight_slot(basis.shape[1], basis.shape[0], side, dtype, case["depthwise"])
    grad = torch.full((len(case["codes_SH"]), slot), NAN, dtype=dtype)
    for row, o, i in zip(grad, case["cout_S"].tolist(), case["cin_S"].tolist(), strict=True):
        write_weights(row, torch.randn(o, i, side, side).to(dtype), case["depthwise"])
    exact = dense_gradients(cast(case, torch.float64), grad.double())
    for actual, in_torch, expected in zip(gradients(case, grad), dense_gradients(case, grad), exact, strict=True):
        assert_as_exact_as_torch(actual, in_torch, expected)


@pytest.mark.usefixtures("kernel")
@one_kernel_for_all_examples
@given(layers(max_count=5), st.sampled_from(DTYPES))
def test_a_subnetwork_generates_the_same_alone_and_in_a_batch(case: dict[str, Any], dtype: torch.dtype) -> None:
    case = cast(case, dtype)
    together = kernels.generate_weights(**case)
    grad = torch.randn(together.shape).to(dtype)
    d_codes = gradients(case, grad)[2]
    for s, expected in enumerate(fronts(case, together)):
        alone = subset(case, s)
        assert torch.equal(fronts(alone, kernels.generate_weights(**alone))[0], expected)
        assert torch.equal(gradients(alone, grad[s : s + 1])[2][0], d_codes[s])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "reference":
        pytest.skip("PyTorch's products make no such promise")
    torch.manual_seed(0)
    case = {
        "basis_OIKH": torch.randn(70, 65, 9, 32, dtype=dtype),
        "bias_OIK": torch.randn(70, 65, 9, dtype=dtype),
        "codes_SH": torch.randn(11, 32, dtype=dtype),
        "cin_S": torch.randint(1, 66, (11,), dtype=torch.int32),
        "cout_S": torch.randint(1, 71, (11,), dtype=torch.int32),
        "depthwise": False,
    }
    grad = torch.randn(11, weight_slot(65, 70, 3, dtype), dtype=dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            packed = kernels.generate_weights(**case)  # type: ignore[arg-type]
            results.append([*fronts(case, packed), gradients(case, grad)[2]])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def small(dtype: torch.dtype, max_cin: int, max_cout: int, depthwise: bool = False) -> list[Any]:
    """Positional arguments of the op."""
    torch.manual_seed(0)
    basis, bias = torch.randn(max_cout, max_cin, 9, 4, dtype=dtype), torch.randn(max_cout, max_cin, 9, dtype=dtype)
    codes = torch.randn(2, 4, dtype=dtype)
    leaves = [t.requires_grad_() for t in (basis, bias, codes)]
    return [*leaves, int32([1, max_cin]), int32([max_cout, 2]), depthwise]


@pytest.mark.parametrize("depthwise", [False, True])
def test_gradients_are_exact(depthwise: bool) -> None:
    *leaves, cin, cout, _ = small(torch.float64, 1 if depthwise else 3, 5, depthwise)

    def weights(basis: Tensor, bias: Tensor, codes: Tensor) -> list[Tensor]:
        packed = kernels.generate_weights(basis, bias, codes, cin, cout, depthwise=depthwise)
        return kernels.unpack_weights(packed, cin, cout, kernel=3, depthwise=depthwise)

    assert torch.autograd.gradcheck(weights, tuple(leaves))


@pytest.mark.parametrize("namespace", ["metaprune", "metaprune_reference"])
def test_the_op_is_registered_correctly(namespace: str) -> None:
    *leaves, _, _, depthwise = small(torch.float32, 8, 16)
    full = (int32([8, 8]), int32([16, 16]), depthwise)
    ops = getattr(torch.ops, namespace)
    torch.library.opcheck(ops.generate_weights.default, (*leaves, *full))
    basis, _, codes = (t.detach() for t in leaves)
    grad = torch.randn(2, weight_slot(8, 16, 3, torch.float32))
    torch.library.opcheck(ops.generate_weights_backward.default, (grad, basis, codes, *full))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5, 3, 9), "basis must be"),
        (0, torch.zeros(5, 3, 8, 4), "K must be a square"),
        (1, torch.zeros(5, 3, 4), "bias must be"),
        (2, torch.zeros(2, 5), "codes must be"),
        (2, torch.zeros(2, 4).double(), "codes must be"),
        (3, torch.tensor([1, 3]), r"cin must be torch\.int32"),
        (3, int32([1, 4]), r"cin\[1\] is 4; legal values are 1..3"),
        (4, int32([0, 2]), r"cout\[0\] is 0; legal values are 1..5"),
        (5, True, "a depthwise basis must be"),
    ],
)
def test_bad_input_is_refused_with_the_argument_named(position: int, value: Any, message: str) -> None:
    args = small(torch.float32, 3, 5)
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        kernels.generate_weights(*args[:5], depthwise=args[5])


def test_the_compiled_kernel_refuses_what_would_read_out_of_bounds() -> None:
    if backends.extension is None:
        pytest.skip(backends.why_not("generate_weights", "cpu"))
    for position, value in ((1, torch.zeros(5, 3, 4)), (2, torch.zeros(2, 5)), (4, int32([5, 6]))):
        args = small(torch.float32, 3, 5)
        args[position] = value
        with pytest.raises(RuntimeError, match=r"does not take|legal values"):
            torch.ops.metaprune.generate_weights(*args)
