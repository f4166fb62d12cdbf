"""`generated_conv` in PyTorch: the definition every kernel is held to, one op after the other.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, H hidden size of the weight generator.
"""

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from kernels.generate_weights.reference import generate_weights_reference
from kernels.layout import Image, weight_slot
from kernels.ragged_conv.reference import ragged_conv_reference


def generated_conv_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """y[s] = conv2d(input[source[s]], w[s]), where w[s,o,i,k] = Σ_h basis[o,i,k,h] · codes[s,h] + bias[o,i,k].

    With input[l] = act_in(x[l] · input_scale[l] + input_shift[l]). The arguments are those of `composed` after the
    first two; shapes and errors: `kernels.generated_conv`.
    """
    return composed(generate_weights_reference, ragged_conv_reference, *arguments)


def composed(
    generate_weights: Callable[..., Tensor],
    ragged_conv: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    basis: Tensor,
    bias: Tensor,
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    image: Image,
    stride: int,
    max_cin: int,
    max_cout: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """The op, made of these two."""
    weight = generated(generate_weights, basis, bias, codes, cin, cout, max_cin, max_cout)
    return ragged_conv(
        x, weight, cin, cout, source, own(cout), image, isqrt(basis.shape[2]), stride, max_cin, max_cout, None, None,
        "none", None, None, input_scale, input_shift, input_activation, statistics,
    )  # fmt: skip


def generated(
    generate_weights: Callable[..., Tensor],
    basis: Tensor,
    bias: Tensor,
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    max_cin: int,
    max_cout: int,
) -> Tensor:
    """The weights of every subnetwork, in slots for no more than `max_cin` and `max_cout` channels."""
    slot = weight_slot(max_cin, max_cout, isqrt(basis.shape[2]), basis.dtype, device=basis.device)
    return generate_weights(basis, bias, codes, cin, cout, False)[:, :slot].contiguous()


def own(cout: Tensor) -> Tensor:
    """The numbers of the subnetworks, each of which reads the slot of weights of its own number."""
    return torch.arange(len(cout), dtype=torch.int32, device=cout.device)
