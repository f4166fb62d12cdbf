"""What can run each op here, what was chosen, and why the others were refused.

    backends.report()                  one line for every op and backend
    backends.use("reference")          for the whole process, or `with backends.use("reference"):` for a block
    backends.chosen("ragged_conv")     the backend a call would take

A forced backend is used or the call fails: it is never swapped for another.
"""

import hashlib
import importlib
import importlib.util
import os
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.ops import OPS
from kernels.registration import CUDA_NAMESPACE, NAMESPACE, REFERENCE_NAMESPACE, overload

BACKENDS = ("reference", "cpu", "triton", "cuda")
CHOICES = ("auto", *BACKENDS)
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
NAMESPACE_OF = {"reference": REFERENCE_NAMESPACE, "cpu": NAMESPACE, "triton": NAMESPACE, "cuda": CUDA_NAMESPACE}
OLDEST_GPU = (8, 0)
REBUILD = "pip install --no-build-isolation -e ."

_choice = "auto"


class BackendError(RuntimeError):
    """A backend was asked for that cannot run the op here."""


def _load_extension() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and why it is not there."""
    if os.environ.get("METAPRUNE_NO_EXTENSION") == "1":
        return None, "switched off by METAPRUNE_NO_EXTENSION=1"
    if importlib.util.find_spec("kernels._extension") is None:
        return None, f"the extension was not built; with a C++ compiler present: {REBUILD}"
    try:
        return importlib.import_module("kernels._extension"), ""
    except ImportError as error:
        return None, f"the extension does not load ({error}); rebuild it: {REBUILD}"


extension, _why_no_extension = _load_extension()


@cache
def digest() -> str:
    """A digest of the code of all kernels, compiled and Python: equal numbers are computed by equal ones."""
    folder = Path(__file__).parent
    files = [*folder.rglob("*.py")]
    if extension is not None:
        files.append(Path(str(extension.__file__)))
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def use(name: str) -> ExitStack:
    """Choose the backend of every later call in this process: one of `CHOICES`.

    `with use(name):` restores the previous choice at the end. Raises `BackendError` for an unknown name;
    whether an op has the backend is decided when the op is called.
    """
    if name not in CHOICES:
        raise BackendError(f"unknown backend {name!r}; legal: {', '.join(CHOICES)}")
    restore = ExitStack()
    restore.callback(_set_choice, _choice)
    _set_choice(name)
    return restore


def _set_choice(name: str) -> None:
    global _choice
    _choice = name


def chosen(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The backend that a call of `op` on tensors of this device and dtype takes.

    Raises `BackendError` if the forced backend cannot, naming the op and the legal backends.
    """
    kind = torch.device(device).type
    refused = {backend: _why_not_on(op, backend, kind, dtype) for backend in BACKENDS}
    legal = [backend for backend, reason in refused.items() if not reason]
    if _choice == "auto":
        return legal[-1]
    if refused[_choice]:
        raise BackendError(
            f"{op} on {kind} in {dtype} cannot run on backend {_choice!r}: {refused[_choice]}; "
            f"legal here: auto, {', '.join(legal)}"
        )
    return _choice


def implementation(op: str, like: Tensor) -> Any:
    """The callable for `op` on tensors of the device and dtype of `like`, in the chosen backend."""
    return _implementation(op, like.device.type, like.dtype, _choice)


@cache
def _implementation(op: str, kind: str, dtype: torch.dtype, choice: str) -> Any:
    """Of the chosen backend, which is part of the key."""
    backend = chosen(op, kind, dtype)
    if backend == "cuda" and (module := _module(op, backend)):
        return getattr(importlib.import_module(module), f"{op}_cuda")
    return overload(NAMESPACE_OF[backend], op)


def report() -> str:
    """One line for every op and backend: available, or why not."""
    return "\n".join(
        f"{op:<18} {backend:<10} {why_not(op, backend) or 'available'}" for op in OPS for backend in BACKENDS
    )


@cache
def why_not(op: str, backend: str) -> str:
    """Why `backend` cannot run `op` in this process, in one line; empty if it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        if extension is None:
            return _why_no_extension
        return "" if _has_kernel(op, backend, "CPU") else "this op has no C++ kernel yet"
    if backend == "cuda" and (reason := _why_no_cuda()):
        return reason
    if not torch.cuda.is_available():
        return "no GPU"
    if torch.cuda.get_device_capability() < OLDEST_GPU:
        return "the kernels need a GPU of compute capability {}.{}".format(*OLDEST_GPU)
    if backend == "triton" and (module := _module(op, backend)):
        return _register_triton(op, module)
    if backend == "triton" or not _has_kernel(op, backend, "CUDA"):
        return f"this op has no {backend} kernel yet"
    # With a module of its own, it takes the kernel for some calls and Triton for the others.
    return why_not(op, "triton") if _module(op, backend) else ""


def _why_no_cuda() -> str:
    """Why no CUDA C++ kernels were compiled, or nothing."""
    if extension is None:
        return _why_no_extension
    return str(getattr(extension, "no_cuda", f"the extension is not of this version; rebuild it: {REBUILD}"))


def _module(op: str, backend: str) -> str:
    """The op's module for a backend, or nothing if there is none."""
    # The trailing underscore of an op in place is not part of its stem; a gradient lies in the folder of its op.
    stem = op.removesuffix("_backward").rstrip("_")
    module = f"kernels.{stem}.{backend}" + ("_backward" if op.endswith("_backward") else "")
    return module if importlib.util.find_spec(module) else ""


def _register_triton(op: str, module: str) -> str:
    """Make the op's Triton kernel that of CUDA tensors; why that cannot be, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    try:
        launch = getattr(importlib.import_module(module), f"{op.rstrip('_')}_triton")
    except ImportError as error:
        return f"Triton does not load ({error})"
    if not _has_kernel(op, "triton", "CUDA"):
        torch.library.impl(f"{NAMESPACE}::{op}", "cuda", launch)
    # Autograd calls the gradient of an op by name: it must be there as soon as the op is.
    gradient = "" if op.endswith("_backward") else f"{op}_backward"
    return why_not(gradient, "triton") if gradient and _module(gradient, "triton") else ""


def _has_kernel(op: str, backend: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE_OF[backend]}::{op}", dispatch_key)


def _why_not_on(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    if backend == "reference":
        return ""
    if (backend == "cpu") != (device == "cpu"):
        return f"it does not run on {device} tensors"
    if dtype not in KERNEL_DTYPES[backend]:
        return f"it computes {' and '.join(map(str, KERNEL_DTYPES[backend]))}"
    return why_not(op, backend)
