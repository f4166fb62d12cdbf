"""`fused_block` in CUDA: separable blocks as one kernel, any other block as its convolutions in Triton.

The kernel is csrc/cuda/fused_block.cuh. Nothing is read back to the host. Proven under emulation and by compilation;
not run on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.fused_block.separable import is_separable
from kernels.fused_block.triton import fused_block_triton
from kernels.registration import CUDA_NAMESPACE, overload

# Of a block of threads, as csrc/cuda/block_tile.cuh has it.
SHARED_BYTES = 163 * 1024


def fused_block_cuda(x: Tensor, *rest: Any) -> Tensor:
    """Queue what computes this form of block. Arguments and result: `kernels.fused_block`, as its op takes them."""
    max_channels, _, depthwise, kernels, strides = rest[8:13]
    if is_separable(max_channels, depthwise, kernels, strides) and _shared_bytes(x.device) >= SHARED_BYTES:
        y: Tensor = overload(CUDA_NAMESPACE, "fused_block")(x, *rest)
        return y
    return fused_block_triton(x, *rest)


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a block of threads may have there."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
