"""Which backend runs an op, and what is said when it cannot."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backends
from kernels.ops import OPS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments() -> tuple[torch.Tensor, ...]:
    widths = torch.tensor([2, 1], dtype=torch.int32)
    return torch.ones(3, 2, 1, 4), torch.zeros(3, 2, 1), torch.ones(2, 4), widths, widths


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def without_extension(code: str) -> subprocess.CompletedProcess[str]:
    return run(code, METAPRUNE_NO_EXTENSION="1")


def test_the_report_has_one_line_for_every_op_and_backend() -> None:
    lines = [line.split(maxsplit=2) for line in backends.report().splitlines()]
    assert [line[:2] for line in lines] == [[op, b] for op in OPS for b in backends.BACKENDS]
    assert all(line[2] for line in lines)


def test_every_op_has_a_reference() -> None:
    assert all(not backends.why_not(op, "reference") for op in OPS)


def test_auto_takes_the_compiled_kernel_where_there_is_one() -> None:
    expected = "cpu" if backends.extension else "reference"
    assert backends.chosen("generate_weights") == expected


def test_auto_takes_the_reference_in_float64() -> None:
    assert backends.chosen("generate_weights", dtype=torch.float64) == "reference"


def test_a_choice_holds_until_the_end_of_its_block() -> None:
    before = backends.chosen("generate_weights")
    with backends.use("reference"):
        assert backends.chosen("generate_weights") == "reference"
    assert backends.chosen("generate_weights") == before


def test_a_choice_without_a_block_holds_for_the_process() -> None:
    try:
        backends.use("reference")
        assert backends.chosen("generate_weights") == "reference"
    finally:
        backends.use("auto")


def test_an_unknown_backend_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(backends.BackendError, match="'gpu'; legal: auto, reference, cpu, triton, cuda"):
        backends.use("gpu")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_forced_backend_that_cannot_run_is_never_swapped(backend: str, arguments: tuple[torch.Tensor, ...]) -> None:
    with backends.use(backend), pytest.raises(backends.BackendError, match=r"generate_weights .* legal here: auto"):
        kernels.generate_weights(*arguments)


def test_the_forced_compiled_kernel_refuses_float64(arguments: tuple[torch.Tensor, ...]) -> None:
    basis, bias, codes, cin, cout = arguments
    with backends.use("cpu"), pytest.raises(backends.BackendError, match="float64"):
        kernels.generate_weights(basis.double(), bias.double(), codes.double(), cin, cout)


def test_an_illegal_instruction_set_is_refused_with_the_legal_ones(
    arguments: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backends.extension is None:
        pytest.skip(backends.why_not("generate_weights", "cpu"))
    monkeypatch.setenv("METAPRUNE_ISA", "mmx")
    with pytest.raises(RuntimeError, match=r"METAPRUNE_ISA=mmx cannot be used; .*portable"):
        kernels.generate_weights(*arguments)


def test_the_build_tells_how_it_was_made() -> None:
    if backends.extension is None:
        pytest.skip(backends.why_not("generate_weights", "cpu"))
    info = backends.extension.build_info()
    assert set(info) == {"compiler", "flags", "torch", "instruction_set", "instruction_sets"}
    assert info["instruction_set"] in info["instruction_sets"]


def test_the_digest_is_of_the_code_that_computes(tmp_path: Path) -> None:
    """A copy of the package has the same one, until a kernel's code is another."""
    shutil.copytree(Path(kernels.__file__).parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        code = "from kernels import backends; print(backends.digest())"
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    found = [digest()]
    assert found == [backends.digest()]
    for changed in ("score_logits/triton.py", "layout.py", *([] if backends.extension is None else ["_extension*.so"])):
        with next((tmp_path / "kernels").glob(changed)).open("ab") as file:
            file.write(b"# changed\n")
        found.append(digest())
    assert len(set(found)) == len(found)


def test_everything_runs_without_the_extension() -> None:
    code = (
        "import torch, kernels; w = torch.tensor([2, 1], dtype=torch.int32);"
        "y = kernels.generate_weights(torch.ones(3, 2, 1, 4), torch.zeros(3, 2, 1), torch.ones(2, 4), w, w);"
        "print(y[1, 0].item(), kernels.backends.chosen('generate_weights'));"
        "print(kernels.backends.why_not('generate_weights', 'cpu'))"
    )
    done = without_extension(code)
    assert done.stdout.splitlines() == ["4.0 reference", "switched off by METAPRUNE_NO_EXTENSION=1"], done.stderr


def as_if_on_a_gpu(code: str, capability: tuple[int, int] = (9, 0), before: str = "") -> list[str]:
    """The lines that the code prints where torch believes in a GPU: Triton's kernels are registered, not run."""
    pretend = (
        "import torch, kernels; from kernels import backends as b;"
        f"torch.cuda.is_available = lambda: True; torch.cuda.get_device_capability = lambda: {capability};"
    )
    # Triton does not load beside the sanitizers.
    done = run(before + pretend + code, METAPRUNE_NO_EXTENSION="1", LD_PRELOAD="")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_tensors_on_a_gpu_take_the_triton_kernels() -> None:
    code = (
        "print(*(op for op in b.OPS if b.chosen(op, 'cuda') == 'triton'));"
        "print(b.chosen('ragged_conv', 'cuda', torch.float64))"
    )
    assert as_if_on_a_gpu(code) == [" ".join(OPS), "reference"]


@needs_triton
def test_auto_prefers_the_cuda_kernel_and_both_can_be_forced() -> None:
    code = (
        "from types import SimpleNamespace; from kernels.registration import CUDA_NAMESPACE;"
        "b.extension = SimpleNamespace(no_cuda='');"
        "torch.library.impl(f'{CUDA_NAMESPACE}::ragged_depthwise', 'cuda', lambda *args: None);"
        "like = SimpleNamespace(device=torch.device('cuda'), dtype=torch.float16);"
        "print(b.chosen('ragged_depthwise', 'cuda'), b.chosen('ragged_conv', 'cuda'));"
        "print(b.implementation('ragged_depthwise', like));"
        "b.use('triton');"
        "print(b.implementation('ragged_depthwise', like));"
        "b.use('cuda');"
        "print(b.implementation('ragged_depthwise', like), b.why_not('ragged_conv', 'cuda'))"
    )
    assert as_if_on_a_gpu(code) == [
        "cuda triton",
        "metaprune_cuda.ragged_depthwise.default",
        "metaprune.ragged_depthwise.default",
        "metaprune_cuda.ragged_depthwise.default this op has no cuda kernel yet",
    ]


@needs_triton
def test_a_fused_block_in_cuda_is_one_kernel_where_it_is_separable_and_the_gpu_large_enough() -> None:
    code = (
        "from types import SimpleNamespace; from kernels.fused_block import cuda;"
        "b.extension = SimpleNamespace(no_cuda='');"
        "torch.library.impl('metaprune_cuda::fused_block', 'cuda', lambda *args: None);"
        "print(b.chosen('fused_block', 'cuda'));"
        "run = b.implementation('fused_block', SimpleNamespace(device=torch.device('cuda'), dtype=torch.float32));"
        "cuda.overload = lambda *op: lambda *args: 'one kernel';"
        "cuda.fused_block_triton = lambda *args: 'Triton';"
        "tell = lambda cin, *form: run(torch.zeros(1), *[None] * 8, cin, None, *zip(*form), None, None, None);"
        "window, pointwise = (True, 3, 2), (False, 1, 1);"
        "large, small = (SimpleNamespace(shared_memory_per_block_optin=kib << 10) for kib in (163, 99));"
        "torch.cuda.get_device_properties = lambda device: large;"
        "print(tell(999, window, pointwise), tell(256, pointwise, window, pointwise));"
        "print(tell(257, pointwise, window, pointwise), tell(8, window), tell(8, (True, 3, 3), pointwise));"
        "print(tell(8, pointwise, (False, 3, 1), pointwise), tell(8, (False, 1, 2), window, pointwise));"
        "torch.cuda.get_device_properties = lambda device: small;"
        "print(tell(8, window, pointwise))"
    )
    assert as_if_on_a_gpu(code) == [
        "cuda",
        "one kernel one kernel",
        "Triton Triton Triton",
        "Triton Triton",
        "Triton",
    ]


def test_without_cuda_kernels_the_report_says_why() -> None:
    reasons = {backends.why_not(op, "cuda") for op in OPS}
    if backends.extension is not None and torch.version.cuda is None:
        assert reasons == {backends.extension.no_cuda}
    assert "" not in reasons or torch.cuda.is_available()


@needs_triton
def test_the_gradients_of_ragged_ops_are_there_on_a_gpu_as_soon_as_the_ops_are() -> None:
    ops = [op for op in OPS if op.startswith("ragged_")]
    code = (
        f"ops = {ops}; [b.chosen(op, 'cuda') for op in ops];"
        "print(*(b._has_kernel(f'{op}_backward', 'triton', 'CUDA') for op in ops));"
        "print(*(b.chosen(f'{op}_backward', 'cuda') for op in ops))"
    )
    assert as_if_on_a_gpu(code) == [" ".join(["True"] * len(ops)), " ".join(["triton"] * len(ops))]


CHOICE = "print(b.chosen('ragged_conv', 'cuda')); print(b.why_not('ragged_conv', 'triton'))"


@needs_triton
def test_a_gpu_that_is_too_old_says_so_and_takes_the_reference() -> None:
    expected = ["reference", "the kernels need a GPU of compute capability 8.0"]
    assert as_if_on_a_gpu(CHOICE, capability=(7, 5)) == expected


def test_a_gpu_without_triton_takes_the_reference_and_says_why() -> None:
    chosen, reason = as_if_on_a_gpu(CHOICE, before="import sys; sys.modules['triton'] = None;")
    assert chosen == "reference"
    assert "Triton" in reason


def test_a_forced_compiled_kernel_fails_without_the_extension() -> None:
    done = without_extension("import kernels; kernels.backends.use('cpu'); kernels.backends.chosen('ragged_conv')")
    assert done.returncode != 0
    assert "ragged_conv on cpu in torch.float32 cannot run on backend 'cpu': switched off" in done.stderr


@pytest.mark.skipif(backends.extension is None, reason="the C++ extension was not built")
@pytest.mark.parametrize("bf16", [False, True])
def test_the_peak_is_measured_at_every_instruction_set(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = backends.extension
    assert extension is not None
    for level in extension.build_info()["instruction_sets"]:
        monkeypatch.setenv("METAPRUNE_ISA", level)
        assert extension.peak_flops(0.01, bf16) > 1e8
