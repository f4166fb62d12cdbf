"""Compile every Triton kernel for one GPU, in a process of its own and without that GPU, and say what came out.

    python ahead_of_time.py 90        one line of JSON for every kernel of every case

The launchers themselves are called, on meta tensors of the shapes of real layers: what is compiled is what they
would launch, with the specialisations of their arguments. A meta tensor holds no values, so that a launcher which
read one back to the host would fail here.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from math import isqrt
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.fused_block.triton import fused_block_triton
from kernels.generate_delayed.triton import generate_delayed_triton
from kernels.generate_weights.triton import generate_weights_triton
from kernels.generated_conv.triton import generated_conv_triton
from kernels.layout import Image, activation_slot, output_image, weight_slot
from kernels.ragged_conv.triton import ragged_conv_triton
from kernels.ragged_conv.triton_backward import ragged_conv_backward_triton
from kernels.ragged_depthwise.triton import ragged_depthwise_triton
from kernels.ragged_depthwise.triton_backward import ragged_depthwise_backward_triton
from kernels.ragged_max_pool.triton import ragged_max_pool_triton
from kernels.ragged_max_pool.triton_backward import ragged_max_pool_backward_triton
from kernels.ragged_normalise.triton import ragged_normalise_triton
from kernels.ragged_normalise.triton_backward import ragged_normalise_backward_triton
from kernels.score_logits.triton import score_logits_triton
from kernels.update_generators.recurrence import DRIFTS
from kernels.update_generators.triton import update_generators_triton

S = 50
META = torch.device("meta")
INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "cp.async": "cp.async.cg"}


class Absent:
    """A GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def numbers() -> Tensor:
    return empty(S, dtype=torch.int32)


def activations(image: Image, channels: int, dtype: torch.dtype) -> Tensor:
    return empty(S, activation_slot(image, channels), dtype=dtype)


def weights(cin: int, cout: int, kernel: int, dtype: torch.dtype, depthwise: bool = False) -> Tensor:
    return empty(S, weight_slot(cin, cout, kernel, dtype, depthwise, META), dtype=dtype)


def generate(
    dtype: torch.dtype, cout: int, cin: int, taps: int, hidden: int, depthwise: bool = False, count: int = S
) -> None:
    basis, bias = empty(cout, cin, taps, hidden, dtype=dtype), empty(cout, cin, taps, dtype=dtype)
    generate_weights_triton(basis, bias, empty(count, hidden, dtype=dtype), numbers(), numbers(), depthwise)


def train(
    cout: int,
    cin: int,
    taps: int,
    hidden: int,
    depthwise: bool = False,
    count: int = 1,
    everywhere: bool = True,
    momentum: torch.dtype = torch.float32,
) -> None:
    """Update a generator by a step of `count` structures; if not everywhere, generate from rows that waited, too."""
    basis, bias = empty(cout, cin, taps, hidden), empty(cout, cin, taps)
    state = basis, bias, empty(*basis.shape, dtype=momentum), empty(*bias.shape)
    late = (*state, empty(cout, cin, dtype=torch.uint8), empty(DRIFTS, 4), empty(count, hidden))
    grad = empty(count, weight_slot(cin, cout, isqrt(taps), FP32, depthwise, META))
    widths = empty(count, dtype=torch.int32)
    update_generators_triton(*late, grad, widths, widths, depthwise, 0.1, 0.9, 1e-4, everywhere, 1)
    if not everywhere:
        generate_delayed_triton(*late, widths, widths, depthwise)


def conv(
    dtype: torch.dtype, image: Image, cin: int, cout: int, kernel: int = 1, stride: int = 1, calibrating: bool = False
) -> None:
    """As scoring calls it, with BatchNorm, shortcut and activation behind; or as calibration does, with them before."""
    out = output_image(image, kernel, stride)
    after: list[Any] = [None, None, "none", None, None] if calibrating else [
        empty(S, cout), empty(S, cout), "relu6", activations(out, cout, dtype), numbers()
    ]  # fmt: skip
    before: list[Any] = [empty(S, cin), empty(S, cin), "relu6"] if calibrating else [None, None, "none"]
    arguments: list[Any] = [
        activations(image, cin, dtype), weights(cin, cout, kernel, dtype), numbers(), numbers(), numbers(), numbers(),
        image, kernel, stride, cin, cout, *after, *before, calibrating,
    ]  # fmt: skip
    ragged_conv_triton(*arguments)


def generated(
    dtype: torch.dtype, image: Image, cin: int, cout: int, hidden: int, kernel: int = 1, calibrating: bool = True
) -> None:
    given: list[Any] = [empty(S, cin), empty(S, cin), "relu6"] if calibrating else [None, None, "none"]
    arguments: list[Any] = [
        activations(image, cin, dtype), empty(cout, cin, kernel**2, hidden, dtype=dtype),
        empty(cout, cin, kernel**2, dtype=dtype), empty(S, hidden, dtype=dtype), numbers(), numbers(), numbers(),
        image, 1, cin, cout, *given, calibrating,
    ]  # fmt: skip
    generated_conv_triton(*arguments)


def conv_backward(
    dtype: torch.dtype, image: Image, cin: int, cout: int, kernel: int = 1, stride: int = 1, prologue: bool = True
) -> None:
    """As training calls it, with BatchNorm before; or without, and of the first layer without the gradient of x."""
    out = output_image(image, kernel, stride)
    before: list[Any] = [empty(S, cin), empty(S, cin), "relu6"] if prologue else [None, None, "none"]
    arguments: list[Any] = [
        activations(out, cout, dtype), empty(S, 2, cout, dtype=torch.float64), activations(out, cout, dtype),
        activations(image, cin, dtype), weights(cin, cout, kernel, dtype), numbers(), numbers(), numbers(), numbers(),
        image, kernel, stride, cin, cout, *before, cin != 3,
    ]  # fmt: skip
    ragged_conv_backward_triton(*arguments)


def depthwise(dtype: torch.dtype, image: Image, channels: int, stride: int, calibrating: bool) -> None:
    given: list[Any] = [empty(S, channels), empty(S, channels), "relu6"]
    absent: list[Any] = [None, None, "none"]
    after, before = (absent, given) if calibrating else (given, absent)
    arguments: list[Any] = [
        activations(image, channels, dtype), weights(1, channels, 3, dtype, True), numbers(), numbers(), numbers(),
        image, 3, stride, channels, *after, *before, calibrating,
    ]  # fmt: skip
    ragged_depthwise_triton(*arguments)


def depthwise_backward(dtype: torch.dtype, image: Image, channels: int, stride: int) -> None:
    out = activations(output_image(image, 3, stride), channels, dtype)
    arguments: list[Any] = [
        out, empty(S, 2, channels, dtype=torch.float64), out, activations(image, channels, dtype),
        weights(1, channels, 3, dtype, True), numbers(), numbers(), numbers(), image, 3, stride, channels,
        empty(S, channels), empty(S, channels), "relu6", True,
    ]  # fmt: skip
    ragged_depthwise_backward_triton(*arguments)


def block(dtype: torch.dtype, image: Image, channels: int, inner: int) -> None:
    """The inverted residual of MobileNetV2."""
    widths = [inner, inner, channels]
    fused_block_triton(
        activations(image, channels, dtype), numbers(), numbers(),
        [weights(channels, inner, 1, dtype), weights(1, inner, 3, dtype, True), weights(inner, channels, 1, dtype)],
        [numbers()] * 3, [numbers()] * 3, [empty(S, w) for w in widths], [empty(S, w) for w in widths], image,
        channels, widths, [False, True, False], [1, 3, 1], [1, 1, 1], ["relu6", "relu6", "none"],
        activations(image, channels, dtype), numbers(),
    )  # fmt: skip


def normalise(dtype: torch.dtype, image: Image, channels: int) -> None:
    ragged_normalise_triton(
        activations(image, channels, dtype), empty(S, channels), empty(S, channels), numbers(), numbers(), image,
        channels, "relu6", activations(image, channels, dtype), numbers(),
    )  # fmt: skip


def normalise_backward(dtype: torch.dtype, image: Image, channels: int) -> None:
    x = activations(image, channels, dtype)
    scale, shift, shortcut = empty(S, channels), empty(S, channels), activations(image, channels, dtype)
    ragged_normalise_backward_triton(
        x, x, x, scale, shift, numbers(), numbers(), image, channels, "relu6", shortcut, numbers()
    )


def max_pool(dtype: torch.dtype, image: Image, channels: int) -> None:
    ragged_max_pool_triton(activations(image, channels, dtype), numbers(), numbers(), image, 3, 2, channels)


def max_pool_backward(dtype: torch.dtype, image: Image, channels: int) -> None:
    grad = activations(output_image(image, 3, 2), channels, dtype)
    x = activations(image, channels, dtype)
    ragged_max_pool_backward_triton(grad, x, numbers(), numbers(), image, 3, 2, channels)


def score(dtype: torch.dtype, image: Image, channels: int, classes: int) -> None:
    score_logits_triton(
        activations(image, channels, dtype), empty(classes, channels), empty(classes),
        empty(image[0], dtype=torch.int64), numbers(), numbers(), image,
    )  # fmt: skip


def least() -> None:
    """Every size 1: Triton makes such an argument a constant."""
    image = (1, 1, 1)
    generate(BF16, 1, 1, 1, 1, count=1)
    conv(BF16, image, 1, 1)
    generated(BF16, image, 1, 1, 1)
    conv(BF16, image, 1, 1, 3, 1, calibrating=True)
    depthwise(BF16, image, 1, 1, calibrating=True)
    normalise(BF16, image, 1)
    max_pool(BF16, image, 1)
    conv_backward(BF16, image, 1, 1)
    conv_backward(BF16, image, 1, 1, 3, 2)
    depthwise_backward(BF16, image, 1, 1)
    normalise_backward(BF16, image, 1)
    max_pool_backward(BF16, image, 1)
    score(BF16, image, 1, 1)
    train(1, 1, 1, 1)


def tensor_float32() -> None:
    """float32 where `torch.set_float32_matmul_precision` lets tensor cores round it."""
    torch.set_float32_matmul_precision("high")
    generate(FP32, 576, 96, 1, 64)
    conv(FP32, (250, 14, 14), 96, 576)
    conv(FP32, (125, 28, 28), 256, 256, 3, 2, calibrating=True)
    conv_backward(FP32, (64, 14, 14), 96, 576)
    score(FP32, (1000, 7, 7), 1280, 1000)
    torch.set_float32_matmul_precision("highest")


BF16, FP32 = torch.bfloat16, torch.float32
# Every tile of `kernels.gpu.tiles` at its narrowest and widest, on layers of MobileNetV2 and ResNet-50.
CASES: dict[str, Callable[[], None]] = {
    "generate_weights 1x1 bf16": lambda: generate(BF16, 576, 96, 1, 64),
    "generate_weights 1x1 fp32": lambda: generate(FP32, 576, 96, 1, 64),
    "generate_weights 3x3 bf16": lambda: generate(BF16, 512, 512, 9, 32),
    "generate_weights depthwise bf16": lambda: generate(BF16, 960, 1, 9, 64, True),
    "generate_weights depthwise fp32": lambda: generate(FP32, 960, 1, 9, 64, True),
    "update_generators 1x1": lambda: train(576, 96, 1, 64),
    "update_generators 3x3 8 structures": lambda: train(512, 512, 9, 32, count=8),
    "update_generators depthwise": lambda: train(960, 1, 9, 64, True),
    "update_generators shared": lambda: train(576, 96, 1, 0),
    "update_generators delayed": lambda: train(576, 96, 1, 64, count=4, everywhere=False),
    "update_generators delayed half": lambda: train(512, 512, 9, 32, everywhere=False, momentum=torch.bfloat16),
    "ragged_conv 1x1 32-16 bf16": lambda: conv(BF16, (125, 112, 112), 32, 16),
    "ragged_conv 1x1 96-576 bf16": lambda: conv(BF16, (250, 14, 14), 96, 576),
    "ragged_conv 1x1 96-576 fp32": lambda: conv(FP32, (250, 14, 14), 96, 576),
    "ragged_conv 1x1 144-24 calibrating bf16": lambda: conv(BF16, (125, 56, 56), 144, 24, calibrating=True),
    "ragged_conv 1x1 144-24 calibrating fp32": lambda: conv(FP32, (125, 56, 56), 144, 24, calibrating=True),
    "ragged_conv 1x1 96-576 calibrating bf16": lambda: conv(BF16, (125, 14, 14), 96, 576, calibrating=True),
    "ragged_conv 1x1 256-512 stride 2 bf16": lambda: conv(BF16, (125, 56, 56), 256, 512, 1, 2),
    "ragged_conv 3x3 64-64 bf16": lambda: conv(BF16, (125, 56, 56), 64, 64, 3),
    "ragged_conv 3x3 64-64 fp32": lambda: conv(FP32, (125, 56, 56), 64, 64, 3),
    "ragged_conv 3x3 256-256 stride 2 calibrating bf16": lambda: conv(BF16, (125, 28, 28), 256, 256, 3, 2, True),
    "ragged_conv 3x3 256-256 stride 2 calibrating fp32": lambda: conv(FP32, (125, 28, 28), 256, 256, 3, 2, True),
    "ragged_conv 7x7 3-64 stride 2 bf16": lambda: conv(BF16, (125, 224, 224), 3, 64, 7, 2),
    "generated_conv 1x1 320-1280 bf16": lambda: generated(BF16, (64, 1, 1), 320, 1280, 64),
    "generated_conv 1x1 320-1280 fp32": lambda: generated(FP32, (64, 1, 1), 320, 1280, 64, calibrating=False),
    "generated_conv 3x3 512-512 fp32": lambda: generated(FP32, (32, 2, 2), 512, 512, 32, 3),
    "ragged_conv_backward 1x1 96-576 bf16": lambda: conv_backward(BF16, (64, 14, 14), 96, 576),
    "ragged_conv_backward 3x3 256-256 stride 2 bf16": lambda: conv_backward(BF16, (64, 28, 28), 256, 256, 3, 2),
    "ragged_conv_backward 3x3 256-256 stride 2 fp32": lambda: conv_backward(FP32, (64, 28, 28), 256, 256, 3, 2),
    "ragged_conv_backward 1x1 256-512 stride 2 bf16": lambda: conv_backward(BF16, (64, 56, 56), 256, 512, 1, 2, False),
    "ragged_conv_backward 7x7 3-64 stride 2 bf16": lambda: conv_backward(BF16, (64, 224, 224), 3, 64, 7, 2, False),
    "ragged_depthwise bf16": lambda: depthwise(BF16, (125, 28, 28), 192, 1, False),
    "ragged_depthwise stride 2 calibrating bf16": lambda: depthwise(BF16, (125, 28, 28), 192, 2, True),
    "ragged_depthwise stride 2 calibrating fp32": lambda: depthwise(FP32, (125, 28, 28), 192, 2, True),
    "ragged_depthwise_backward bf16": lambda: depthwise_backward(BF16, (64, 28, 28), 192, 1),
    "ragged_depthwise_backward stride 2 fp32": lambda: depthwise_backward(FP32, (64, 28, 28), 192, 2),
    "ragged_normalise bf16": lambda: normalise(BF16, (125, 56, 56), 256),
    "ragged_normalise fp32": lambda: normalise(FP32, (125, 56, 56), 256),
    "ragged_max_pool bf16": lambda: max_pool(BF16, (125, 112, 112), 64),
    "ragged_normalise_backward bf16": lambda: normalise_backward(BF16, (64, 56, 56), 256),
    "ragged_max_pool_backward bf16": lambda: max_pool_backward(BF16, (64, 112, 112), 64),
    "score_logits bf16": lambda: score(BF16, (1000, 7, 7), 1280, 1000),
    "score_logits fp32": lambda: score(FP32, (1000, 7, 7), 1280, 1000),
    "TensorFloat32": tensor_float32,
    "least": least,
    "fused_block bf16": lambda: block(BF16, (250, 14, 14), 96, 576),
}


def compiled(capability: int) -> Iterator[dict[str, Any]]:
    """What every kernel of every case became."""
    driver.set_active(Absent(capability))
    run, kernels = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append((self.fn.__name__.strip("_"), run(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    for name, case in CASES.items():
        kernels.clear()
        case()
        for kernel_name, kernel in kernels:
            yield {"case": name, "kernel": kernel_name, "shared": kernel.metadata.shared, **resources(kernel)}


def resources(kernel: Any) -> dict[str, Any]:
    """Registers a thread, bytes of stack a thread (spills, above all), and the instructions that matter."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: re.search(rf"{key}:(\d+)", usage) for name, key in (("registers", "REG"), ("stack", "STACK"))}
    numbers = {name: int(match[1]) for name, match in found.items() if match}
    ptx = kernel.asm["ptx"]
    return {**numbers, "instructions": [name for name, text in INSTRUCTIONS.items() if text in ptx]}


if __name__ == "__main__":
    for line in compiled(int(sys.argv[1])):
        print(json.dumps(line), flush=True)
