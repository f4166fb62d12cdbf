"""The public functions that train weight generators by momentum SGD, whole or only where a step has a gradient.

Rows of a weight generator that no structure of a step keeps have no gradient: what the step makes of them follows from
weights and momentum alone and can wait until somebody needs them (`update_generators/README.md`). Nothing here is
recorded for autograd. Errors, and the legend of the shapes: `kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.functions import _call
from kernels.update_generators.recurrence import Recurrence


@dataclass(frozen=True)
class GeneratorState:
    """Basis and bias of one convolution's weight generator and the momentum of each, all float32 or all float64.

    With float32 the momentum of the basis may be bfloat16: it is rounded to nearest when it is written.
    `written_OI`, uint8, is the step of the `Recurrence` after which the rows of channels out and in were last written.
    A depthwise basis is `[C, 1, K, H]`, its widths are `cout_S`, and `cin_S` is ignored.
    """

    basis_OIKH: Tensor
    bias_OIK: Tensor
    basis_momentum_OIKH: Tensor
    bias_momentum_OIK: Tensor
    written_OI: Tensor
    depthwise: bool = False

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Everything that training changes."""
        return (
            self.basis_OIKH,
            self.bias_OIK,
            self.basis_momentum_OIKH,
            self.bias_momentum_OIK,
            self.written_OI,
        )


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
    state: GeneratorState, recurrence: Recurrence, codes_SH: Tensor, cin_S: Tensor, cout_S: Tensor
) -> Tensor:
    """Generate, crop and pack the weights of one convolution whose rows were written after different steps.

        w[s,o,i,k] = Σ_h basis_t[o,i,k,h] · codes[s,h] + bias_t[o,i,k]    for o < cout[s], i < cin[s]

    with the basis and bias that the t steps of `recurrence` make of `state`. Only the crops are read, and their
    momentum only where not all was written after the last step. Returns what `generate_weights` does.
    """
    drift = recurrence.drift(state.basis_OIKH)
    with torch.no_grad():
        return _call("generate_delayed", *state.tensors, drift, codes_SH, cin_S, cout_S, state.depthwise)


def update_generators_(
    state: GeneratorState,
    recurrence: Recurrence,
    factors: Factors,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    everywhere: bool,
) -> Tensor:
    """Train the weight generator of one convolution: a step of momentum SGD in place, after those of `recurrence`.

    The rows that a structure keeps are brought up to date and take the step. All others do the same if `everywhere`,
    which starts a new `Recurrence()`; if not, they wait, and `recurrence.step` says what will become of them.

    Returns the gradient `[S, H]` of the codes, Σ_{o,i,k} g[s,o,i,k] · basis_t[o,i,k,h], of the basis before this step.
    """
    given = recurrence.drift(state.basis_OIKH), factors.codes_SH, factors.grad, factors.cin_S, factors.cout_S
    options = state.depthwise, lr, momentum, weight_decay, everywhere, recurrence.steps + 1
    with torch.no_grad():
        found: Tensor = _call("update_generators_", *state.tensors, *given, *options)
    return found


def settle_generators_(state: GeneratorState, recurrence: Recurrence) -> None:
    """Bring all rows up to date: after it comes a new `Recurrence()`."""
    basis = state.basis_OIKH
    nobody = torch.empty(0, dtype=torch.int32, device=basis.device)
    nothing = Factors(basis.new_empty(0, basis.shape[-1]), basis.new_empty(0, 0), nobody, nobody)
    # A step that changes nothing.
    update_generators_(state, recurrence, nothing, lr=0.0, momentum=1.0, weight_decay=0.0, everywhere=True)
