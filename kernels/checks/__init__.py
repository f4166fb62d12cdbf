"""What every op demands of its arguments, for the fake kernels and the public functions alike.

Each function takes the arguments of the op of its name, in the order of the op's schema, and raises
`RuntimeError` (through `torch._check`) naming the argument, what it is and what it must be. Values inside
device tensors (channel counts, slot numbers) are not looked at here: a kernel that can see them checks them.
"""

from kernels.checks.generators import (
    generate_delayed,
    generate_weights,
    generate_weights_backward,
    update_generators_,
)
from kernels.checks.networks import (
    fused_block,
    generated_conv,
    ragged_conv,
    ragged_conv_backward,
    ragged_depthwise,
    ragged_depthwise_backward,
    ragged_max_pool,
    ragged_max_pool_backward,
    ragged_normalise,
    ragged_normalise_backward,
    scale_and_shift,
    scale_and_shift_backward,
    score_logits,
)

__all__ = [
    "fused_block",
    "generate_delayed",
    "generate_weights",
    "generate_weights_backward",
    "generated_conv",
    "ragged_conv",
    "ragged_conv_backward",
    "ragged_depthwise",
    "ragged_depthwise_backward",
    "ragged_max_pool",
    "ragged_max_pool_backward",
    "ragged_normalise",
    "ragged_normalise_backward",
    "scale_and_shift",
    "scale_and_shift_backward",
    "score_logits",
    "update_generators_",
]
