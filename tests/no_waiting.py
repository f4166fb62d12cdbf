"""What would wait for a GPU, found without one: computations on meta tensors, which hold no number to wait for.

    with no_waiting():
        score(net, genome_PG, images)          everything on `META`

Reading a number back, and results whose size depends on numbers, fail on meta tensors by themselves. What crosses over
between devices does not, nor do numbers and lists that Python hands over and that are copied: these are found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
COPIED_FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
INDEXED = (Tensor.__getitem__, Tensor.__setitem__)
BY_MASK = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class WaitError(AssertionError):
    """This would wait for a GPU."""


class _Functions(TorchFunctionMode):
    """Stands before the functions of PyTorch: numbers of Python become tensors there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in INDEXED and args[0].device == META and any(isinstance(i, list) for i in _places(args[1])):
            raise WaitError(f"a list is an index of {tuple(args[0].shape)}: it would be copied to the GPU")
        result = func(*args, **(kwargs or {}))
        if func in COPIED_FROM_PYTHON and result.device == META:
            raise WaitError(f"{func.__name__} copies numbers to the GPU")
        return result


class _Operations(TorchDispatchMode):
    """Stands before the operations on tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        result = func(*args, **(kwargs or {}))
        tensors += [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        # A number on the CPU is handed to a GPU's kernel as an argument.
        devices = {tensor.device for tensor in tensors if tensor.dim() or tensor.device == META}
        if len(devices) > 1:
            raise WaitError(f"{func} copies between devices")
        if func in BY_MASK and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise WaitError(f"{func} looks where a mask is true")
        return result


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, what would wait for a GPU if it stood in for the meta device raises."""
    with _Functions(), _Operations():
        yield


def _places(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)
