"""The CUDA kernels as a library for the CPU: their own sources and registrations, under emulation.

The emulation is csrc/cuda/emulated.h. A C++ compiler builds the library in some seconds; it is kept in build/ under
the digest of all that went in. The sanitizers that the compiler has watch it: of undefined behaviour (alignment,
overflow) always, of addresses (what lies outside of a tensor) in a process that began with `watched()`.
"""

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "csrc"
# An op has a CUDA kernel if it has a registration.
CUDA_OPS = tuple(sorted(path.stem for path in (CSRC / "ops" / "cuda").glob("*.cpp")))
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
WATCHED = "libasan" in os.environ.get("LD_PRELOAD", "")
SANITIZE = ["-fsanitize=address,undefined" if WATCHED else "-fsanitize=undefined", "-fno-sanitize-recover=all"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    named = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++"
    return shutil.which(named.split()[0]) or shutil.which("g++")


def runtime(name: str) -> str | None:
    """The library of a sanitizer that GCC brings, or None."""
    command = [str(compiler()), f"-print-file-name=lib{name}.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return path if Path(path).is_absolute() else None


def watched() -> dict[str, str]:
    """The environment of a process in which addresses are watched; empty if the compiler cannot."""
    runtimes = [runtime(name) for name in ("asan", "ubsan", "stdc++")]
    if None in runtimes:
        return {}
    return {
        "LD_PRELOAD": " ".join(map(str, runtimes)),
        # PyTorch's bfloat16 convolutions read memory they have not written: it is zero here (Makefile).
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1000000:malloc_fill_byte=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def load() -> None:
    """Register the emulated kernels as those of CPU tensors in `metaprune_cuda`."""
    headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    sources = (*sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "ops" / "cuda").glob("*.cpp")))
    options = [STABLE_ABI, "-DMETAPRUNE_EMULATED", *headers]
    links = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    torch.ops.load_library(build("kernels", sources, (*options,), (*links,)))


@cache
def build(name: str, sources: tuple[Path, ...], options: tuple[str, ...], links: tuple[str, ...]) -> Path:
    """The library of these sources, built if it is not there."""
    cxx = compiler()
    assert cxx is not None, "no C++ compiler"
    flags = [*FLAGS, *(SANITIZE if runtime("ubsan") else []), "-Wno-unknown-pragmas", f"-I{CSRC / 'include'}"]
    compile_one = [cxx, *flags, f"-I{CSRC / 'cuda'}", *options, "-c", "-x", "c++"]
    link = [cxx, *flags, "-shared"]
    read = [*sources, *(path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh"))]
    digest = hashlib.sha256("\0".join([*compile_one, *link, *links, torch.__version__]).encode())
    for path in read:
        digest.update(path.read_bytes())
    library = ROOT / "build" / "emulated" / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as unfinished:
            built = Path(unfinished, library.name)
            objects = [f"{unfinished}/{number}.o" for number in range(len(sources))]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compilations = ([*compile_one, str(s), "-o", o] for s, o in zip(sources, objects, strict=True))
                list(pool.map(_run, compilations))
            _run([*link, *objects, *links, "-o", str(built)])
            built.rename(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
