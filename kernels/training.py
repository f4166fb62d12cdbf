"""The public functions that train weight generators by momentum SGD, at once or some steps later.

Between two updates of a weight generator its weights are known all the same: they are what is in memory, times
numbers, plus the factors of the gradients since then (`update_generators/README.md`). Nothing here is recorded for
autograd. Errors, and the legend of the shapes: `kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.functions import _call
from kernels.update_generators.recurrence import Recurrence


@dataclass(frozen=True)
class GeneratorState:
    """Basis and bias of one convolution's weight generator and the momentum of each, all float32 or all float64.

    With float32 the momentum of the basis may be bfloat16: it is rounded to nearest when it is written.
    A depthwise basis is `[C, 1, K, H]`, its widths are `cout_S`, and `cin_S` is ignored.
    """

    basis_OIKH: Tensor
    bias_OIK: Tensor
    basis_momentum_OIKH: Tensor
    bias_momentum_OIK: Tensor
    depthwise: bool = False

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Everything that training changes."""
        return self.basis_OIKH, self.bias_OIK, self.basis_momentum_OIKH, self.bias_momentum_OIK


@dataclass(frozen=True)
class Factors:
    """The gradients of basis and bias of one step: Σ_s g[s] ⊗ codes[s] and Σ_s g[s].

    `grad` `[S, slot]` holds g, the gradients of the generated weights, packed as `generate_weights` returns those, but
    slots may end after the largest crop. Pad channels are not read, and outside the crops g is zero.
    """

    codes_SH: Tensor
    grad: Tensor
    cin_S: Tensor
    cout_S: Tensor


def generate_delayed(
    state: GeneratorState,
    factors: Sequence[Factors],
    recurrence: Recurrence,
    codes_SH: Tensor,
    cin_S: Tensor,
    cout_S: Tensor,
) -> Tensor:
    """Generate, crop and pack the weights of one convolution after steps whose update is still to come.

        w[s,o,i,k] = Σ_h basis_t[o,i,k,h] · codes[s,h] + bias_t[o,i,k]    for o < cout[s], i < cin[s]

    with the basis and bias that `recurrence` makes of `state` and the factors of its t steps. Only the crops are read.
    Returns what `generate_weights` does.
    """
    with torch.no_grad():
        return _call("generate_delayed", *_pending(state, factors), list(recurrence.weights), codes_SH, cin_S, cout_S)


def code_gradients(
    state: GeneratorState,
    factors: Sequence[Factors],
    recurrence: Recurrence,
    grad: Tensor,
    cin_S: Tensor,
    cout_S: Tensor,
) -> Tensor:
    """The gradient `[S, H]` of the codes that `generate_delayed` took, of the gradient of what it returned.

        d_codes[s,h] = Σ_{o,i,k} grad[s,o,i,k] · basis_t[o,i,k,h]

    `grad` is packed as in `Factors`. Only the crops are read.
    """
    with torch.no_grad():
        return _call("code_gradients", *_pending(state, factors), list(recurrence.weights), grad, cin_S, cout_S)


def update_generators_(
    state: GeneratorState, factors: Sequence[Factors], after: Recurrence, before: Recurrence | None = None
) -> Tensor | None:
    """Train the weight generator of one convolution: all steps of momentum SGD in place, in one pass over the basis.

    `after` says what becomes of weights and momentum, from the factors of each of its steps.

    With `before`, the recurrence before the last step, returns the `code_gradients` of the last factors, which so cost
    no pass of their own. A step that is applied at once is
    `update_generators_(state, [factors], before=Recurrence(), after=Recurrence().step(...))`.
    """
    coefficients = [list(before.weights) if before else [], list(after.weights), list(after.momentum)]
    with torch.no_grad():
        d_codes: Tensor = _call("update_generators_", *_pending(state, factors), *coefficients)
    return d_codes if before else None


def _pending(
    state: GeneratorState, factors: Sequence[Factors]
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], bool]:
    """The first arguments of all three ops."""
    return (
        *state.tensors,
        [f.codes_SH for f in factors],
        [f.grad for f in factors],
        [f.cin_S for f in factors],
        [f.cout_S for f in factors],
        state.depthwise,
    )
