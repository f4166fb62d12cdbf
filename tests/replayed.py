"""A CUDA graph without a GPU: what a function does with tensors, recorded once and done again on the same tensors.

    with Tape() as tape:
        function()
    tape.replay()

What Python computed while the function ran is in the tape as it was then, as in a graph: a function that should do
something else the next time does not. Unlike a graph's, its operations are done while they are recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Operations in order, with what they were given and what came out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func == torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a number was read back: a graph would not know what to do with another one")
        # What an operation returns of its arguments, changed or seen otherwise, is there anyway.
        given = {
            value.untyped_storage().data_ptr() for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)
        }
        fresh = [
            (place, value)
            for place, value in enumerate(tree_leaves(result))
            if isinstance(value, Tensor) and storage_of(value) not in given
        ]
        self.operations.append((func, args, kwargs, fresh))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Do all of it again."""
        for func, args, kwargs, fresh in self.operations:
            results = tree_leaves(func(*args, **kwargs))
            for place, value in fresh:
                value.copy_(results[place])


def storage_of(tensor: Tensor) -> int:
    """Where its numbers lie."""
    return tensor.untyped_storage().data_ptr()
