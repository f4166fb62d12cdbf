"""The sizes of the tiles a kernel works in: chosen for an op, a dtype and the widths of a layer, never by timing.

They may not depend on the number of images or subnetworks. The order in which numbers are added depends on the
tile, and a subnetwork's result must be the same bits whatever is computed beside it. One table serves all GPUs:
its largest tile fits the shared memory of the smallest (99 KiB a block).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """`rows` of pixels by `columns` of channels out, `depth` channels in at a time."""

    rows: int
    columns: int
    depth: int = 16
    warps: int = 4
    stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """What a launch takes besides the arguments of its kernel."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# Under the interpreter time goes by the number of operations, whatever their size.
INTERPRETED = Tile(rows=64, columns=32, depth=32)
INTERPRETED_FOR = {"ragged_conv_weights": Tile(rows=64, columns=64, depth=64), "parts": Tile(rows=8192, columns=1)}
FIXED = {
    "generate_weights": Tile(rows=64, columns=16),
    "generated_conv": Tile(rows=128, columns=32, depth=16, warps=8, stages=2),
    "sums": Tile(rows=32, columns=64),
    "average_pool": Tile(rows=16, columns=128),
    "score_logits": Tile(rows=32, columns=32, depth=16, stages=2),
    "ragged_depthwise": Tile(rows=32, columns=64),
    "ragged_normalise": Tile(rows=64, columns=64),
    "ragged_max_pool": Tile(rows=32, columns=64),
    "arriving": Tile(rows=64, columns=64),
    "parts": Tile(rows=256, columns=1),
    "programs": Tile(rows=256, columns=16),
}
# Blocks of one subnetwork that a sum over pixels is divided among, at least: enough for every multiprocessor.
BLOCKS = 256
# Numbers of a basis that a program holds at a time, and the most programs of a pass over it: some for every processor
# of the largest GPU, few enough for their sums to be added in a moment.
GENERATOR_NUMBERS, GENERATOR_PROGRAMS = (8192, 3) if triton.knobs.runtime.interpret else (1024, 1024)


def tile(op: str, dtype: torch.dtype, max_cin: int = 1, max_cout: int = 1, prologue: bool = False) -> Tile:
    """The tile of an op for the widest layer it may meet; a small one under Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return INTERPRETED_FOR.get(op, INTERPRETED)
    if op in FIXED:
        return FIXED[op]
    return SIZED[op](dtype, max_cin, max_cout, prologue)


def parts(blocks: int, steps: int) -> int:
    """Into how many parts a sum of `steps` over pixels is cut, where each part has `blocks` blocks of its own."""
    return min(2 if triton.knobs.runtime.interpret else triton.cdiv(BLOCKS, blocks), steps)


def depthwise_taps(kernel: int) -> Tile:
    """Pixels and channels whose products with all taps of a window, rounded up to a power of 2, lie in registers."""
    if triton.knobs.runtime.interpret:
        return INTERPRETED
    columns, taps = 64, triton.next_power_of_2(kernel * kernel)
    return Tile(rows=_between(1, 8192 // (columns * taps), 32), columns=columns, warps=8)


def generator_tile(hidden: int) -> Tile:
    """Rows of a basis by as many columns as hold a row: `Tile(rows=16, columns=64)` for a hidden size of 64."""
    columns = max(triton.next_power_of_2(hidden), 16)
    return Tile(rows=max(GENERATOR_NUMBERS // columns, 1), columns=columns)


def generator_runs(rows: int, size: Tile) -> tuple[int, int]:
    """How many neighbouring tiles of a basis of `rows` rows a program takes, and how many programs there are."""
    tiles = triton.cdiv(rows, size.rows)
    tiles_each = triton.cdiv(tiles, GENERATOR_PROGRAMS)
    return tiles_each, triton.cdiv(tiles, tiles_each)


def _convolution(dtype: torch.dtype, max_cin: int, max_cout: int, prologue: bool) -> Tile:
    """128 pixels by up to 128 channels; in float32, which has no tensor cores, a quarter of that."""
    if dtype == torch.float32:
        return Tile(rows=64, columns=_between(16, max_cout, 64), depth=16, warps=4, stages=3)
    columns, depth = _between(16, max_cout, 128), _between(16, max_cin, 32 if prologue else 64)
    return Tile(rows=128, columns=columns, depth=depth, warps=8 if columns >= 64 else 4, stages=3)


def _input_gradient(dtype: torch.dtype, max_cin: int, max_cout: int, prologue: bool) -> Tile:
    """That of a convolution backwards, with registers left for the derivative of a prologue."""
    if dtype == torch.float32:
        return Tile(rows=64, columns=_between(16, max_cout, 64), depth=16, warps=8, stages=3)
    return _convolution(dtype, max_cin, max_cout, True)


def _weight_gradient(dtype: torch.dtype, max_cin: int, max_cout: int, prologue: bool) -> Tile:
    """64 channels in, which is what a warp group of sm_90 multiplies at least, by up to 128 out."""
    if dtype == torch.float32:
        return Tile(rows=_between(16, max_cin, 64), columns=_between(16, max_cout, 64), depth=16, stages=3)
    return Tile(rows=64, columns=_between(16, max_cout, 128), depth=32 if prologue else 64, stages=3)


def _between(least: int, width: int, most: int) -> int:
    return min(max(triton.next_power_of_2(width), least), most)


SIZED: dict[str, Callable[[torch.dtype, int, int, bool], Tile]] = {
    "ragged_conv": _convolution,
    "ragged_conv_input": _input_gradient,
    "ragged_conv_weights": _weight_gradient,
}


def product_precision(dtype: torch.dtype) -> str:
    """How float32 numbers are multiplied: exactly, unless `torch.set_float32_matmul_precision` allows TensorFloat32."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
