"""Which blocks are one kernel in CUDA."""

from collections.abc import Sequence

# As csrc/cuda/block_tile.cuh has it: of an expansion of more channels, no tile fits shared memory in float32.
MOST_EXPANDED = 256


def is_separable(max_channels: int, depthwise: Sequence[bool], kernels: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a block is [1×1,] depthwise 3×3 of stride 1 or 2, 1×1, and expands no more channels than it can."""
    convs = list(zip(depthwise, kernels, strides, strict=True))
    pointwise = (False, 1, 1)
    separable = [[*before, (True, 3, stride), pointwise] for before in ([], [pointwise]) for stride in (1, 2)]
    return convs in separable and (len(convs) == 2 or max_channels <= MOST_EXPANDED)
