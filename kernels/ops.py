"""Every op, declared once: schema, reference, fake kernel, gradient.

To add an op: write `kernels/<op>/reference.py`, its demands in `checks/`, and one `declare` here.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from kernels.fused_block.reference import fused_block_reference
from kernels.generate_delayed.reference import generate_delayed_reference
from kernels.generate_weights.reference import generate_weights_backward_reference, generate_weights_reference
from kernels.generated_conv.reference import composed, generated, generated_conv_reference, own
from kernels.layout import activation_slot, chained_image, output_image, weight_slot
from kernels.ragged_conv.reference import ragged_conv_backward_reference, ragged_conv_reference
from kernels.ragged_depthwise.reference import ragged_depthwise_backward_reference, ragged_depthwise_reference
from kernels.ragged_max_pool.reference import ragged_max_pool_backward_reference, ragged_max_pool_reference
from kernels.ragged_normalise.reference import ragged_normalise_backward_reference, ragged_normalise_reference
from kernels.registration import NAMESPACE, declare, differentiate, overload, register_backward
from kernels.scale_and_shift.reference import scale_and_shift_backward_reference, scale_and_shift_reference
from kernels.score_logits.reference import score_logits_reference
from kernels.update_generators.reference import update_generators_reference

OPS = (
    "generate_weights",
    "ragged_conv",
    "generated_conv",
    "ragged_depthwise",
    "fused_block",
    "ragged_normalise",
    "ragged_max_pool",
    "score_logits",
    "generate_delayed",
    "update_generators_",
)


def _generate_weights_fake(basis: Tensor, bias: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    o, i, taps, _ = basis.shape
    slot = weight_slot(i, o, isqrt(taps), basis.dtype, rest[2], basis.device)
    return basis.new_empty(codes.shape[0], slot)


def _generate_weights_backward_fake(grad: Tensor, basis: Tensor, codes: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(basis), basis.new_empty(basis.shape[:3]), torch.empty_like(codes)


def _generate_weights_gradient(namespace: str, inputs: tuple[Any, ...], grads: tuple[Any, ...]) -> list[Any]:
    basis, _, codes, *rest = inputs
    backward = overload(namespace, "generate_weights_backward")
    return [*backward(grads[0].contiguous(), basis, codes, *rest), *(None for _ in rest)]


declare(
    "generate_weights",
    "Tensor basis, Tensor bias, Tensor codes, Tensor cin, Tensor cout, bool depthwise",
    "Tensor",
    generate_weights_reference,
    _generate_weights_fake,
)
declare(
    "generate_weights_backward",
    "Tensor grad, Tensor basis, Tensor codes, Tensor cin, Tensor cout, bool depthwise",
    "(Tensor, Tensor, Tensor)",
    generate_weights_backward_reference,
    _generate_weights_backward_fake,
)
differentiate("generate_weights", _generate_weights_gradient)


def _activations_and_sums(
    x: Tensor, count: int, slot: int, max_channels: int, statistics: bool
) -> tuple[Tensor, Tensor]:
    sums = (count, 2, max_channels) if statistics else (0,)
    return x.new_empty(count, slot), x.new_empty(sums, dtype=torch.float64)


def _like(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Tensors like these, empty for None."""
    return tuple(x.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in tensors)


def _placed(
    positions: Sequence[int], gradients: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of every input: those at `positions` where they are needed, None elsewhere."""
    by_position = dict(zip(positions, gradients, strict=True))
    return [by_position.get(i) if need else None for i, need in enumerate(needed)]


def _ragged_conv_fake(x: Tensor, weight: Tensor, cin: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    image, kernel, stride, _, max_cout, *_, statistics = rest[3:]
    slot = activation_slot(output_image(image, kernel, stride), max_cout)
    return _activations_and_sums(x, cin.shape[0], slot, max_cout, statistics)


declare(
    "ragged_conv",
    "Tensor x, Tensor weight, Tensor cin, Tensor cout, Tensor source, Tensor weight_source, SymInt[] image, "
    "int kernel, int stride, int max_cin, int max_cout, Tensor? scale, Tensor? shift, str activation, "
    "Tensor? shortcut, Tensor? shortcut_source, Tensor? input_scale, Tensor? input_shift, str input_activation, "
    "bool statistics",
    "(Tensor, Tensor)",
    ragged_conv_reference,
    _ragged_conv_fake,
)


def _ragged_conv_backward_fake(
    grad_y: Tensor | None, grad_sums: Tensor | None, y: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, input_scale, input_shift, _, needs_x = rest
    return _like(x, x, weight, input_scale, input_shift) if needs_x else _like(x, None, weight, None, None)


declare(
    "ragged_conv_backward",
    "Tensor? grad_y, Tensor? grad_sums, Tensor y, Tensor x, Tensor weight, Tensor cin, Tensor cout, Tensor source, "
    "Tensor weight_source, SymInt[] image, int kernel, int stride, int max_cin, int max_cout, Tensor? input_scale, "
    "Tensor? input_shift, str input_activation, bool needs_x",
    "(Tensor, Tensor, Tensor, Tensor)",
    ragged_conv_backward_reference,
    _ragged_conv_backward_fake,
)


def _ragged_conv_gradient(
    namespace: str, inputs: tuple[Any, ...], results: Sequence[Tensor], grads: tuple[Any, ...], needed: Sequence[bool]
) -> list[Any]:
    bare, epilogue, prologue = inputs[:11], inputs[11:16], inputs[16:19]
    torch._check(
        epilogue == (None, None, "none", None, None),
        lambda: "ragged_conv has a gradient only without scale, shift, activation and shortcut",
    )
    given = (None if grad is None else grad.contiguous() for grad in grads)
    needs_x = needed[0] or needed[16] or needed[17]
    found = overload(namespace, "ragged_conv_backward")(*given, *results, *bare, *prologue, needs_x)
    return _placed((0, 1, 16, 17), found, needed)


register_backward("ragged_conv", _ragged_conv_gradient, outputs=1)


def _generated_conv_fake(
    x: Tensor, basis: Tensor, bias: Tensor, codes: Tensor, cin: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    image, stride, _, max_cout, *_, statistics = rest[2:]
    slot = activation_slot(output_image(image, isqrt(basis.shape[2]), stride), max_cout)
    return _activations_and_sums(x, cin.shape[0], slot, max_cout, statistics)


def _generated_conv_gradient(
    namespace: str, inputs: tuple[Any, ...], results: Sequence[Tensor], grads: tuple[Any, ...], needed: Sequence[bool]
) -> list[Any]:
    """That of the two ops one after the other: the weights are generated again, and their gradient is made."""
    x, basis, bias, codes, cin, cout, source, image, stride, max_cin, max_cout, *prologue, _ = inputs
    weight = generated(overload(namespace, "generate_weights"), basis, bias, codes, cin, cout, max_cin, max_cout)
    given = (None if grad is None else grad.contiguous() for grad in grads)
    needs_x = needed[0] or needed[11] or needed[12]
    d_x, d_weight, d_scale, d_shift = overload(namespace, "ragged_conv_backward")(
        *given, *results, x, weight, cin, cout, source, own(cout), image, isqrt(basis.shape[2]), stride, max_cin,
        max_cout, *prologue, needs_x,
    )  # fmt: skip
    d_generator: Sequence[Tensor | None] = (None, None, None)
    if any(needed[1:4]):
        o, i, taps, _ = basis.shape
        slot = weight_slot(i, o, isqrt(taps), basis.dtype, device=basis.device)
        d_weight = torch.nn.functional.pad(d_weight, (0, slot - d_weight.shape[1]))
        backward = overload(namespace, "generate_weights_backward")
        d_generator = backward(d_weight, basis, codes, cin, cout, False)
    return _placed((0, 1, 2, 3, 11, 12), (d_x, *d_generator, d_scale, d_shift), needed)


declare(
    "generated_conv",
    "Tensor x, Tensor basis, Tensor bias, Tensor codes, Tensor cin, Tensor cout, Tensor source, SymInt[] image, "
    "int stride, int max_cin, int max_cout, Tensor? input_scale, Tensor? input_shift, str input_activation, "
    "bool statistics",
    "(Tensor, Tensor)",
    generated_conv_reference,
    _generated_conv_fake,
)
register_backward("generated_conv", _generated_conv_gradient, outputs=1)
# On a CPU the op is its definition in the C++ kernels of the two.
torch.library.impl(
    f"{NAMESPACE}::generated_conv",
    "cpu",
    lambda *inputs: composed(overload(NAMESPACE, "generate_weights"), overload(NAMESPACE, "ragged_conv"), *inputs),
)


def _ragged_depthwise_fake(x: Tensor, weight: Tensor, channels: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    image, kernel, stride, max_channels, *_, statistics = rest[2:]
    slot = activation_slot(output_image(image, kernel, stride), max_channels)
    return _activations_and_sums(x, channels.shape[0], slot, max_channels, statistics)


declare(
    "ragged_depthwise",
    "Tensor x, Tensor weight, Tensor channels, Tensor source, Tensor weight_source, SymInt[] image, int kernel, "
    "int stride, int max_channels, Tensor? scale, Tensor? shift, str activation, Tensor? input_scale, "
    "Tensor? input_shift, str input_activation, bool statistics",
    "(Tensor, Tensor)",
    ragged_depthwise_reference,
    _ragged_depthwise_fake,
)


def _ragged_depthwise_backward_fake(
    grad_y: Tensor | None, grad_sums: Tensor | None, y: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, input_scale, input_shift, _, needs_x = rest
    return _like(x, x, weight, input_scale, input_shift) if needs_x else _like(x, None, weight, None, None)


def _ragged_depthwise_gradient(
    namespace: str, inputs: tuple[Any, ...], results: Sequence[Tensor], grads: tuple[Any, ...], needed: Sequence[bool]
) -> list[Any]:
    *bare, scale, shift, activation, input_scale, input_shift, input_activation, _ = inputs
    torch._check(
        scale is None and shift is None and activation == "none",
        lambda: "ragged_depthwise has a gradient only without scale, shift and activation",
    )
    backward = overload(namespace, "ragged_depthwise_backward")
    prologue, needs_x = (input_scale, input_shift, input_activation), needed[0] or needed[12] or needed[13]
    given = (None if grad is None else grad.contiguous() for grad in grads)
    return _placed((0, 1, 12, 13), backward(*given, *results, *bare, *prologue, needs_x), needed)


declare(
    "ragged_depthwise_backward",
    "Tensor? grad_y, Tensor? grad_sums, Tensor y, Tensor x, Tensor weight, Tensor channels, Tensor source, "
    "Tensor weight_source, SymInt[] image, int kernel, int stride, int max_channels, Tensor? input_scale, "
    "Tensor? input_shift, str input_activation, bool needs_x",
    "(Tensor, Tensor, Tensor, Tensor)",
    ragged_depthwise_backward_reference,
    _ragged_depthwise_backward_fake,
)
register_backward("ragged_depthwise", _ragged_depthwise_gradient, outputs=1)


def _fused_block_fake(x: Tensor, channels: Tensor, *rest: Any) -> Tensor:
    image, _, max_widths, _, kernels, strides, *_ = rest[6:]
    return x.new_empty(channels.shape[0], activation_slot(chained_image(image, kernels, strides), max_widths[-1]))


declare(
    "fused_block",
    "Tensor x, Tensor channels, Tensor source, Tensor[] weights, Tensor[] weight_sources, Tensor[] widths, "
    "Tensor[] scales, Tensor[] shifts, SymInt[] image, int max_channels, int[] max_widths, bool[] depthwise, "
    "int[] kernels, int[] strides, str[] activations, Tensor? shortcut, Tensor? shortcut_source",
    "Tensor",
    fused_block_reference,
    _fused_block_fake,
)

declare(
    "scale_and_shift",
    "Tensor sums, SymInt count, float epsilon",
    "(Tensor, Tensor)",
    scale_and_shift_reference,
    lambda sums, *_: tuple(sums.new_empty(sums.shape[0], sums.shape[2], dtype=torch.float32) for _ in range(2)),
)
declare(
    "scale_and_shift_backward",
    "Tensor grad_scale, Tensor grad_shift, Tensor sums, SymInt count, float epsilon",
    "Tensor",
    scale_and_shift_backward_reference,
    lambda grad_scale, grad_shift, sums, *_: torch.empty_like(sums),
)


def _scale_and_shift_gradient(namespace: str, inputs: tuple[Any, ...], grads: tuple[Any, ...]) -> list[Any]:
    # One of the two may have no reader.
    used = next(grad for grad in grads if grad is not None)
    given = (torch.zeros_like(used) if grad is None else grad.contiguous() for grad in grads)
    return [overload(namespace, "scale_and_shift_backward")(*given, *inputs), None, None]


differentiate("scale_and_shift", _scale_and_shift_gradient)

declare(
    "ragged_normalise",
    "Tensor x, Tensor scale, Tensor shift, Tensor channels, Tensor source, SymInt[] image, int max_channels, "
    "str activation, Tensor? shortcut, Tensor? shortcut_source",
    "Tensor",
    ragged_normalise_reference,
    lambda x, scale, *_: x.new_empty(scale.shape[0], x.shape[1]),
)
declare(
    "ragged_normalise_backward",
    "Tensor grad, Tensor y, Tensor x, Tensor scale, Tensor shift, Tensor channels, Tensor source, SymInt[] image, "
    "int max_channels, str activation, Tensor? shortcut, Tensor? shortcut_source",
    "(Tensor, Tensor, Tensor, Tensor)",
    ragged_normalise_backward_reference,
    lambda grad, y, x, scale, shift, *rest: _like(x, x, scale, shift, rest[-2]),
)


def _ragged_normalise_gradient(
    namespace: str, inputs: tuple[Any, ...], results: Sequence[Tensor], grads: tuple[Any, ...], needed: Sequence[bool]
) -> list[Any]:
    backward = overload(namespace, "ragged_normalise_backward")
    return _placed((0, 1, 2, 8), backward(grads[0].contiguous(), results[0], *inputs), needed)


register_backward("ragged_normalise", _ragged_normalise_gradient, outputs=1)

declare(
    "ragged_max_pool",
    "Tensor x, Tensor channels, Tensor source, SymInt[] image, int kernel, int stride, int max_channels",
    "Tensor",
    ragged_max_pool_reference,
    lambda x, channels, _, image, kernel, stride, max_channels: x.new_empty(
        channels.shape[0], activation_slot(output_image(image, kernel, stride), max_channels)
    ),
)
declare(
    "ragged_max_pool_backward",
    "Tensor grad, Tensor x, Tensor channels, Tensor source, SymInt[] image, int kernel, int stride, int max_channels",
    "Tensor",
    ragged_max_pool_backward_reference,
    lambda grad, x, *_: torch.empty_like(x),
)


def _ragged_max_pool_gradient(namespace: str, inputs: tuple[Any, ...], grads: tuple[Any, ...]) -> list[Any]:
    backward = overload(namespace, "ragged_max_pool_backward")
    return [backward(grads[0].contiguous(), *inputs), *(None for _ in inputs[1:])]


differentiate("ragged_max_pool", _ragged_max_pool_gradient)

declare(
    "score_logits",
    "Tensor x, Tensor weight, Tensor bias, Tensor labels, Tensor channels, Tensor source, SymInt[] image",
    "(Tensor, Tensor)",
    score_logits_reference,
    lambda x, weight, bias, labels, channels, *_: (
        labels.new_empty(channels.shape[0], labels.shape[0], dtype=torch.bool),
        labels.new_empty(channels.shape[0], labels.shape[0], dtype=torch.float64),
    ),
)

# What has become of a weight generator in training.
_NAMES = ("basis", "bias", "basis_momentum", "bias_momentum", "written")

declare(
    "generate_delayed",
    ", ".join(f"Tensor {name}" for name in _NAMES) + ", Tensor drift, Tensor codes, Tensor cin, Tensor cout, "
    "bool depthwise",
    "Tensor",
    generate_delayed_reference,
    lambda basis, bias, *rest: _generate_weights_fake(basis, bias, *rest[4:]),
)
# Changes its first five arguments in place, outside of autograd: it is the step after the backward pass.
declare(
    "update_generators_",
    ", ".join(f"Tensor({alias}!) {name}" for alias, name in zip("abcde", _NAMES, strict=True))
    + ", Tensor drift, Tensor codes, Tensor grad, Tensor cin, Tensor cout, bool depthwise, float lr, float momentum, "
    "float weight_decay, bool everywhere, int step",
    "Tensor",
    update_generators_reference,
    lambda *args: torch.empty_like(args[6]),
)
