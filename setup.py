"""Builds `kernels._extension`, the C++ and CUDA kernels, if it can.

    pip install --no-build-isolation -e .

Without a C++ compiler, without torch, or with METAPRUNE_NO_EXTENSION=1 the installation succeeds all the same, says so
in one line, and the reference backend does the work. With METAPRUNE_SANITIZE=1 (`make asan`) the kernels watch every
access to memory, and a failed build fails.

CUDA kernels are compiled where torch was built for CUDA and nvcc is there, for the GPUs of TORCH_CUDA_ARCH_LIST, else
for those present, else for `ARCHITECTURES`; where not, the extension says why (`kernels._extension.no_cuda`) and has
the others. Everything else is in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import shorten

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic"]
SANITIZE = os.environ.get("METAPRUNE_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined"] if SANITIZE else []
if SANITIZE:
    FLAGS += ["-O0", "-g1", "-fno-omit-frame-pointer", *SANITIZERS, "-fno-sanitize-recover=all", "-DMETAPRUNE_SANITIZE"]
TORCH_STABLE_ABI = "0x020b000000000000"  # 2.11, the oldest torch the binary loads with
ARCHITECTURES = ("8.0", "9.0", "10.0+PTX")
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
OPS_ON_A_GPU = Path("csrc/ops/cuda")


class NoCudaError(Exception):
    """Why no CUDA kernels are compiled."""


class OptionalBuild(build_ext):
    """Build the extension; if that fails say so in one line and go on."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if os.environ.get("METAPRUNE_NO_EXTENSION") == "1":
                raise CompileError("METAPRUNE_NO_EXTENSION=1")
            complete(ext)
            try:
                add_cuda(ext, Path(self.build_temp))
            except NoCudaError as reason:
                print(f"metaprune: no CUDA kernels ({reason})", file=sys.stderr)
                ext.define_macros.append(("METAPRUNE_NO_CUDA", '"{}"'.format(str(reason).replace('"', "'"))))
            super().build_extension(ext)
        except (BaseError, CompileError, LinkError, ImportError, OSError) as error:
            if SANITIZE:  # tests that skip every kernel would find nothing
                raise
            why = shorten(str(error), 100)
            print(f"metaprune: no C++ kernels, the reference backend does the work ({why})", file=sys.stderr)


def complete(ext: Extension) -> None:
    """Add what only torch and pybind11 know: where their headers and libraries are."""
    import pybind11
    from torch.utils import cpp_extension

    # First, because torch ships a pybind11 of its own that refuses whoever uses the stable ABI.
    headers = [pybind11.get_include(), *cpp_extension.include_paths()]
    ext.extra_compile_args = [*FLAGS, *(flag for path in headers for flag in ("-isystem", path))]
    ext.library_dirs = cpp_extension.library_paths()


def add_cuda(ext: Extension, build: Path) -> None:
    """Compile the CUDA kernels into `build` and add them with their registration; `NoCudaError` if that cannot be."""
    import torch

    if SANITIZE:
        raise NoCudaError("the sanitizers watch the CPU")
    if torch.version.cuda is None:
        raise NoCudaError("torch was built without CUDA")
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places_of_nvcc()))
    if nvcc is None:
        raise NoCudaError("nvcc was not found when the extension was built")
    runtime = runtime_directories(nvcc)
    if not runtime:
        raise NoCudaError(f"{nvcc} has no libcudart_static.a")
    flags = [*NVCC_FLAGS, "-Icsrc/include", *architecture_flags(nvcc)]
    objects = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        objects.append(str((build / source).with_suffix(".o")))
        Path(objects[-1]).parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([nvcc, *flags, "-c", str(source), "-o", objects[-1]], capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr)
            raise NoCudaError(f"nvcc failed on {source}")
    ext.sources += sorted(map(str, OPS_ON_A_GPU.glob("*.cpp")))
    ext.extra_objects += objects
    ext.libraries += ["torch_cuda"]
    ext.library_dirs += runtime
    ext.extra_link_args = [*ext.extra_link_args, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    ext.define_macros.append(("METAPRUNE_NO_CUDA", '""'))


def places_of_nvcc() -> list[str]:
    """Where nvcc is looked for, the chosen one first."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return [*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]


def runtime_directories(nvcc: str) -> list[str]:
    """Where the CUDA runtime that belongs to this nvcc lies, which may be a script in front of it."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", plan, re.MULTILINE)
    found = re.findall(r"-L([^\"\s]+)", libraries[1] if libraries else "")
    return [path for path in found if (Path(path) / "libcudart_static.a").exists()]


def architecture_flags(nvcc: str) -> list[str]:
    """What nvcc compiles for."""
    import torch

    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        wanted = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split()
    elif torch.cuda.is_available():
        capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
        wanted = sorted({"{}.{}".format(*capability) for capability in capabilities})
    else:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        wanted = [name for name in ARCHITECTURES if f"sm_{digits(name)}" in known]
    flags = []
    for name in wanted:
        if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name):
            raise NoCudaError(f"TORCH_CUDA_ARCH_LIST names {name}; it is written like 9.0 or 9.0+PTX")
        codes = [f"sm_{digits(name)}", *([f"compute_{digits(name)}"] if name.endswith("+PTX") else [])]
        flags += [f"-gencode=arch=compute_{digits(name)},code={code}" for code in codes]
    return flags


def digits(architecture: str) -> str:
    """90 of 9.0+PTX."""
    return architecture.removesuffix("+PTX").replace(".", "")


EXTENSION = Extension(
    "kernels._extension",
    sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.parent != OPS_ON_A_GPU),
    depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".inc", ".cu", ".cuh")),
    include_dirs=["csrc/include"],
    libraries=["torch_cpu", "c10"],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_STABLE_ABI), ("METAPRUNE_FLAGS", f'"{" ".join(FLAGS)}"')],
    extra_link_args=SANITIZERS,
    language="c++",
    optional=not SANITIZE,
)

setup(ext_modules=[EXTENSION], cmdclass={"build_ext": OptionalBuild})
