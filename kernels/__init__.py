"""Ragged-batch kernels: many differently pruned subnetworks in one call.

`S` subnetworks with different channel counts share buffers (`kernels.layout`). Channel counts and slot
numbers are int32 tensors on the device of the data. Every op takes float32, bfloat16 (computed in float32,
rounded once) and, in the reference, float64; those that train (`kernels.training`) no bfloat16.

Where an op has a `source_S`, subnetwork s reads slot `source[s]` of the input, and with a `weight_source_S`
slot `weight_source[s]` of the weights: several subnetworks may share one.

Every op raises `RuntimeError` for a wrong shape, dtype, device or stride and, where the kernel can see them,
for channel counts and slot numbers out of range; `backends.BackendError` if a forced backend cannot run it.

Legend: S subnetworks, L slots of x, N images, C or I channels in, O channels out, H W size (in `codes_SH` and
`basis_OIKH`, H is the hidden size of the weight generator), K = kernel² taps, T classes.
"""

from kernels import backends
from kernels.functions import (
    BlockConv,
    fused_block,
    generate_weights,
    generated_conv,
    ragged_conv,
    ragged_depthwise,
    ragged_max_pool,
    ragged_normalise,
    scale_and_shift,
    score_logits,
)
from kernels.layout import (
    activation_slot,
    output_size,
    pack_activations,
    pack_weights,
    round_up,
    unpack_activations,
    unpack_weights,
    weight_slot,
)
from kernels.training import Factors, GeneratorState, generate_delayed, settle_generators_, update_generators_
from kernels.update_generators.recurrence import Recurrence

__all__ = [
    "BlockConv",
    "Factors",
    "GeneratorState",
    "Recurrence",
    "activation_slot",
    "backends",
    "fused_block",
    "generate_delayed",
    "generate_weights",
    "generated_conv",
    "output_size",
    "pack_activations",
    "pack_weights",
    "ragged_conv",
    "ragged_depthwise",
    "ragged_max_pool",
    "ragged_normalise",
    "round_up",
    "scale_and_shift",
    "score_logits",
    "settle_generators_",
    "unpack_activations",
    "unpack_weights",
    "update_generators_",
    "weight_slot",
]
