"""Time plain networks in the runtimes they are deployed with: eager PyTorch, `torch.compile`, ONNX Runtime.

A network is timed as it is deployed: BatchNorm folded into the convolutions, inference only, its answers first compared
with those of the unfolded module. What is compared with one another is timed in turn, round after round, so that a slow
moment of the machine hits all of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import Tensor, fx, nn

from engine.errors import UserError
from engine.inference import inference_module, onnx_model, padded
from engine.pruned import ConvBlock, PrunedNet
from engine.space.space import IMAGE_CHANNELS
from engine.space.structure import Structure

ROUNDS = 9
# A timing repeats a call until this many seconds are timed, within these counts.
LEAST_SECONDS, LEAST_CALLS, MOST_CALLS = 1e-3, 4, 50
# Written between calls where weights must not stay in the caches closest to the processor, which takes longer than many
# a call: fewer calls, then.
MOST_COLD_CALLS = 8
FLUSH_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Largest difference from the module's answers, relative to the largest answer: other orders of summation.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Settings:
    """How networks are run: runtime, ``cpu`` or ``cuda``, images at once, threads, image side in pixels.

    Channels are padded with zeros to a multiple of ``pad``, which changes no answer:
    `engine.inference.pad_channels`.
    """

    runtime: str = "onnx"
    device: str = "cpu"
    batch: int = 1
    threads: int = 1
    resolution: int = 224
    pad: int = 1

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Settings:
        """Those a latency table was measured with. Raises `UserError` if they are of another version."""
        try:
            return cls(**table)
        except TypeError:
            raise UserError("the table's settings are not those of this version: measure it anew") from None

    def check(self) -> None:
        """Raise `UserError` for a value that makes no sense, or a runtime or device that is not there."""
        if self.runtime not in RUNTIMES:
            raise UserError(f"unknown runtime {self.runtime!r}: choose one of {', '.join(RUNTIMES)}")
        if self.device not in FLUSH_BYTES:
            raise UserError(f"--device {self.device}: choose cpu or cuda")
        for name in ("batch", "threads", "resolution", "pad"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no usable GPU; choose cpu")
        if reason := RUNTIMES[self.runtime].why_not(self.device):
            raise UserError(f"--runtime {self.runtime}: {reason}")


@dataclass(frozen=True)
class Network:
    """What is timed: the convolutions of a `PrunedNet`, its classes, and the side of its images in pixels."""

    convolutions: Sequence[Mapping[str, Any]]
    classes: int
    resolution: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call in every round."""

    rounds: tuple[float, ...]

    @cached_property
    def ms(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @cached_property
    def spread(self) -> float:
        """Interquartile range of the rounds, relative to their median."""
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return (high - low) / self.ms


@dataclass(frozen=True)
class Program:
    """A network made ready: ``call`` runs it on fixed images, ``logits`` makes a tensor of what that returned."""

    call: Callable[[], Any]
    logits: Callable[[Any], Tensor]


def measure_structures(
    structures: Sequence[Structure | Sequence[Mapping[str, Any]]],
    settings: Settings,
    classes: int = 1000,
    rounds: int = ROUNDS,
) -> list[Timing]:
    """Time whole networks against each other, at ``settings.resolution``.

    Structures, or lists of convolutions as `PrunedNet` takes them, to which ``classes`` applies.
    """
    networks = [
        Network(s.convolutions, s.classes, settings.resolution)
        if isinstance(s, Structure)
        else Network(s, classes, settings.resolution)
        for s in structures
    ]
    return measure(networks, settings, rounds)


def measure(networks: Sequence[Network], settings: Settings, rounds: int = ROUNDS, cold: bool = False) -> list[Timing]:
    """Time networks in turn, ``rounds`` times; compiling and the first calls are not counted.

    A round's time is that of the fastest of several calls: what else runs on the machine can
    only add to it. With ``cold`` the nearest caches are
    overwritten before every call, as the other layers of a network would. Raises `UserError` if the settings are not
    possible here, and `RuntimeError` if a runtime gives other answers than the module.
    """
    settings.check()
    with _threads(settings.threads):
        programs = [prepare(network, settings) for network in networks]
        size = FLUSH_BYTES[settings.device] if cold else 0
        buffer = torch.zeros(size // 4, device=settings.device)
        clock = _clock(settings)
        most = MOST_COLD_CALLS if cold else MOST_CALLS
        calls = [min(most, _calls(program, clock)) for program in programs]
        times: list[list[float]] = [[] for _ in programs]
        for _ in range(rounds):
            for program, count, rows in zip(programs, calls, times, strict=True):
                rows.append(1e3 * _fastest_call(program, count, clock, buffer))
    return [Timing(tuple(rows)) for rows in times]


def prepare(network: Network, settings: Settings) -> Program:
    """Make a network with random weights ready to run, its answers compared with the module's.

    Raises `RuntimeError` if they differ by more than `TOLERANCE`.
    """
    net = _random_net(network, settings.pad)
    generator = torch.Generator().manual_seed(0)
    side = network.resolution
    images = torch.randn(settings.batch, IMAGE_CHANNELS, side, side, generator=generator)
    with torch.inference_mode():
        expected = net(images)
    program = RUNTIMES[settings.runtime].build(inference_module(net), images, settings)
    answers = program.logits(program.call()).cpu()
    error = float((answers - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"{settings.runtime} gives other answers than the module: they differ by {error:.1e}")
    return program


def _random_net(network: Network, pad: int) -> PrunedNet:
    """A network whose activations keep their size from layer to layer, so that a wrong layer shows in the answers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Without numbers first: those PyTorch draws for a new module would take longer than all the rest.
        with torch.device("meta"):
            net = PrunedNet(padded(network.convolutions, pad), network.classes).eval()
        net.to_empty(device="cpu")
        net.classifier.reset_parameters()
        for block in net.convs.values():
            assert isinstance(block, ConvBlock)
            nn.init.kaiming_normal_(block.conv.weight, nonlinearity="relu")
            block.norm.reset_parameters()
    return net


# -- runtimes ------------------------------------------------------------------------------------------------------


def _eager(module: fx.GraphModule, images: Tensor, settings: Settings) -> Program:
    return _torch_program(module.to(settings.device), images, settings)


def _compiled(module: fx.GraphModule, images: Tensor, settings: Settings) -> Program:
    # Imported here because it takes seconds.
    from torch._inductor import config

    program = _torch_program(torch.compile(module.to(settings.device), fullgraph=True, dynamic=False), images, settings)
    # Tracing reads the option before the `options` of a `torch.compile` call are in force, so it is set globally.
    with config.patch(freezing=True):
        program.call()
    return program


def _torch_program(module: Callable[[Tensor], Tensor], images: Tensor, settings: Settings) -> Program:
    images = images.to(settings.device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def call() -> Tensor:
        return module(images)

    return Program(call, lambda logits: logits)


def _onnx(module: fx.GraphModule, images: Tensor, settings: Settings) -> Program:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    cuda = settings.device == "cuda"
    provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
    session = ort.InferenceSession(onnx_model(module, images), options, providers=[provider])
    (image_input,) = session.get_inputs()
    if not cuda:
        feed = {image_input.name: images.numpy()}
        return Program(lambda: session.run(None, feed), lambda answers: torch.from_numpy(answers[0]))
    binding = session.io_binding()
    binding.bind_ortvalue_input(image_input.name, ort.OrtValue.ortvalue_from_numpy(images.numpy(), "cuda", 0))
    binding.bind_output(session.get_outputs()[0].name, "cuda", 0)

    def call() -> Any:
        session.run_with_iobinding(binding)
        return binding

    return Program(call, lambda bound: torch.from_numpy(bound.copy_outputs_to_cpu()[0]))


@dataclass(frozen=True)
class Runtime:
    """How a module is made a program, why that is not possible on a device (or None), and the padding it likes."""

    build: Callable[[fx.GraphModule, Tensor, Settings], Program]
    why_not: Callable[[str], str | None]
    pad: Callable[[], int] = lambda: 1


def _onnx_block() -> int:
    """Channels in a block of ONNX Runtime's fast layout, which it leaves, or enters with detours, for other widths."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def _onnx_missing(device: str) -> str | None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'metaprune[onnx]'"
    import onnxruntime

    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA: pip install onnxruntime-gpu, or choose --device cpu"
    return None


# The one place where a runtime is registered.
RUNTIMES = {
    "torch": Runtime(_eager, lambda device: None),
    "torch-compile": Runtime(_compiled, lambda device: None),
    "onnx": Runtime(_onnx, _onnx_missing, _onnx_block),
}


# -- the clock -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _clock(settings: Settings) -> Callable[[], float]:
    """Seconds. One thread of the CPU is timed only while it runs, so that other processes do not count.

    On a GPU, the clock is read after everything given to it is done.
    """
    if settings.device == "cpu":
        return thread_time if settings.threads == 1 else perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return perf_counter()

    return clock


def _calls(program: Program, clock: Callable[[], float]) -> int:
    """How many calls make a timing, found after a first one that warms up."""
    program.call()
    began = clock()
    program.call()
    return max(LEAST_CALLS, round(LEAST_SECONDS / max(1e-6, clock() - began)))


def _fastest_call(program: Program, calls: int, clock: Callable[[], float], buffer: Tensor) -> float:
    times = []
    for _ in range(calls):
        if len(buffer):
            buffer.add_(1)
        began = clock()
        program.call()
        times.append(clock() - began)
    return min(times)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    names = [
        line.partition(":")[2].strip()
        for line in (_CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.exists() else [])
        if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})}


_CPUINFO = Path("/proc/cpuinfo")
