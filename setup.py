"""Builds `kernels._extension`, the C++ kernels, if it can.

    pip install --no-build-isolation -e .

Without a C++ compiler, without torch, or with METAPRUNE_NO_EXTENSION=1 the installation succeeds all the same, says so
in one line, and the reference backend does the work. With METAPRUNE_SANITIZE=1 (`make asan`) the kernels watch every
access to memory, and a failed build fails. Everything else is in pyproject.toml.
"""

import os
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


class OptionalBuild(build_ext):
    """Build the extension; if that fails say so in one line and go on."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if os.environ.get("METAPRUNE_NO_EXTENSION") == "1":
                raise CompileError("METAPRUNE_NO_EXTENSION=1")
            complete(ext)
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

    headers = [*cpp_extension.include_paths(), pybind11.get_include()]
    ext.extra_compile_args = [*FLAGS, *(flag for path in headers for flag in ("-isystem", path))]
    ext.library_dirs = cpp_extension.library_paths()


EXTENSION = Extension(
    "kernels._extension",
    sources=sorted(map(str, Path("csrc").rglob("*.cpp"))),
    depends=sorted(map(str, [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.inc")])),
    include_dirs=["csrc/include"],
    libraries=["torch_cpu", "c10"],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_STABLE_ABI), ("METAPRUNE_FLAGS", f'"{" ".join(FLAGS)}"')],
    extra_link_args=SANITIZERS,
    language="c++",
    optional=not SANITIZE,
)

setup(ext_modules=[EXTENSION], cmdclass={"build_ext": OptionalBuild})
