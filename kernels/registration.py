"""How an op is registered: in which namespaces, with which kernels, and how it is differentiated.

An op lives in three namespaces. `metaprune::<op>` takes the kernel registered for the device of its arguments
(C++ for the CPU, one file per op in `csrc/ops/`; Triton for a GPU, `kernels/<op>/triton.py` and `triton_backward.py`)
and falls back on the reference where a device has none.
`metaprune_cuda::<op>` is the CUDA C++ kernel (`csrc/ops/cuda/`), beside which an op may have one in Triton.
`metaprune_reference::<op>` is the reference on every device and in every precision: no kernel is ever
registered there. `kernels.ops` declares the ops, `kernels.backends` picks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import checks

NAMESPACE = "metaprune"
CUDA_NAMESPACE = "metaprune_cuda"
REFERENCE_NAMESPACE = "metaprune_reference"
NAMESPACES = (NAMESPACE, CUDA_NAMESPACE, REFERENCE_NAMESPACE)
LIBRARIES = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in NAMESPACES}


def overload(namespace: str, name: str) -> Any:
    """The callable op `namespace::name`."""
    return getattr(getattr(torch.ops, namespace), name).default


def declare(
    name: str,
    arguments: str,
    returns: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Define `name` in all namespaces, with the reference as the kernel of every device that has no other."""

    def checked_fake(*args: Any) -> Any:
        getattr(checks, name)(*args)
        return fake(*args)

    _define(name, f"({arguments}) -> {returns}", reference, checked_fake)


def _define(name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    for namespace in NAMESPACES:
        qualified = f"{namespace}::{name}"
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", reference)
        torch.library.register_fake(qualified, fake)


def differentiate(name: str, gradient: Callable[[str, tuple[Any, ...], tuple[Any, ...]], list[Any]]) -> None:
    """Register `gradient(namespace, inputs, output gradients) -> input gradients` in all namespaces."""
    register_backward(name, lambda namespace, inputs, _, grads, __: gradient(namespace, inputs, grads))


def register_backward(name: str, gradient: Callable[..., list[Any]], outputs: int = 0) -> None:
    """Register the gradient of an op in all namespaces, which may use the first `outputs` results of the op.

    It is called as `gradient(namespace, inputs, results, output gradients, which inputs need one)` and returns
    the gradients of the inputs. An output that nobody used has the gradient None. Behind a CUDA C++ kernel,
    which may be all that its namespace has, gradients are those of `NAMESPACE`.
    """

    for namespace in NAMESPACES:
        _differentiable_in(namespace, name, gradient, outputs)


def _differentiable_in(namespace: str, name: str, gradient: Callable[..., list[Any]], outputs: int) -> None:
    # What torch.library.register_autograd does, in a third of the time a call: training makes hundreds in a step.
    op = overload(namespace, name)
    of_gradient = NAMESPACE if namespace == CUDA_NAMESPACE else namespace

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                found = op(*inputs)
            results = (found if isinstance(found, tuple) else (found,))[:outputs]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*results, *(a if isinstance(a, Tensor) else None for a in inputs))
            ctx.constants = [None if isinstance(a, Tensor) else a for a in inputs]
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.constants)
            saved = ctx.saved_tensors
            if torch.is_grad_enabled():
                # Gradients have no gradients.
                saved = [None if tensor is None else tensor.detach() for tensor in saved]
            pairs = zip(saved[outputs:], ctx.constants, strict=True)
            inputs = tuple(constant if tensor is None else tensor for tensor, constant in pairs)
            return tuple(gradient(of_gradient, inputs, saved[:outputs], grads, ctx.needs_input_grad))

    def forward(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in inputs):
            return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    LIBRARIES[namespace].impl(name, forward, "Autograd")
