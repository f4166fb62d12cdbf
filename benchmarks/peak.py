"""What this machine can do at most, in arithmetic and in copying: what rates are compared with."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from threading import Barrier
from time import perf_counter
from typing import Any

import torch

from kernels import backends

COPIED_FLOATS = 64 << 20
FMA_SECONDS = 0.5


def median_seconds(function: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds of `repeats` calls after one to warm up."""
    function()
    return median(seconds_of(function) for _ in range(repeats))


def seconds_of(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = perf_counter()
    function()
    return perf_counter() - began


def copy_bytes_per_second() -> float:
    """Bytes per second, read and written, of copying 256 MB."""
    source = torch.ones(COPIED_FLOATS)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def in_place_bytes_per_second() -> float:
    """Bytes per second, read and written, of changing 256 MB in place: no line is fetched only to be overwritten."""
    changed = torch.ones(COPIED_FLOATS)
    return 2 * changed.nbytes / median_seconds(lambda: changed.add_(1))


def peak_flops(dtype: torch.dtype) -> float | None:
    """Floating-point operations per second of all threads together in float32 or bfloat16.

    Multiply-adds on registers, in the fastest instructions the C++ extension knows for the dtype here. None without
    the extension.
    """
    extension = backends.extension
    if extension is None:
        return None
    threads = torch.get_num_threads()
    together = Barrier(threads)

    def one_thread(_: int) -> float:
        together.wait()
        flops: float = extension.peak_flops(FMA_SECONDS, dtype == torch.bfloat16)
        return flops

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one_thread, range(threads)))


def of_peak(flops: float, peak: float | None) -> float | str:
    """The fraction that `flops` per second are of `peak_flops`, or why there is none."""
    return "unknown without the extension" if peak is None else float(f"{flops / peak:.3g}")
