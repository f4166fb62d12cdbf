"""Memory of large results: it is used again, whatever was in it before was of another size."""

import resource
from pathlib import Path

import pytest
import torch
from ragged import int32
from torch import Tensor

import kernels
from kernels import backends

OP = "ragged_normalise"
# Bytes of results that are alive together, one after another: together they are four times the largest.
ALIVE = [[64 << 20], [24 << 20] * 2, [9 << 20] * 7, [3 << 20] * 20]
ROUNDS = 4

STATM = Path("/proc/self/statm")


def why_skip() -> str | None:
    if backends.extension is None:
        return backends.why_not(OP, "cpu")
    if "sanitize" in backends.extension.build_info()["flags"]:
        return "the sanitizers guard every result: no memory is used again"
    return None if STATM.exists() else "what a process holds is read from /proc"


pytestmark = pytest.mark.skipif(why_skip() is not None, reason=str(why_skip()))


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_results_of_all_sizes_share_their_memory() -> None:
    largest = torch.ones(1, (64 << 20) // 4)
    one, channels = torch.ones(1, 8), int32([8])

    def result(size: int) -> Tensor:
        pixels = size // (8 * 4)
        x = largest[:, : pixels * 8]
        return kernels.ragged_normalise(
            x, one, one, channels, int32([0]), image=(1, pixels, 1), max_channels=8, activation="none"
        )

    faults, grown = [], []
    with backends.use("cpu"):
        before = resident_bytes()
        for _ in range(ROUNDS):
            faults_before = page_faults()
            for sizes in ALIVE:
                results = [result(size) for size in sizes]
                assert all(float(y[0, -1]) == 2 for y in results)
                del results
            grown.append(resident_bytes() - before)
            faults.append(page_faults() - faults_before)
    assert max(faults[1:]) < 100, faults
    assert max(grown) < 1.5 * (64 << 20), grown


def test_images_are_packed_into_memory_that_is_used_again() -> None:
    images = torch.randn(4, 3, 512, 512)
    faults = []
    for _ in range(3):
        before = page_faults()
        packed = kernels.pack_activations([images], 3)
        assert torch.equal(kernels.unpack_activations(packed, [3], (4, 512, 512))[0], images)
        del packed
        faults.append(page_faults() - before)
    # Comparing takes memory as well, less than packing.
    assert faults[-1] < images.nbytes * 8 / 3 / resource.getpagesize() / 2, faults
