"""generated_conv against the two ops that it stands for, and against PyTorch, on a GPU if there is one.

    pytest --benchmark-only benchmarks/bench_generated_conv.py

On a CPU the op is those two. PyTorch generates the weights of each subnetwork by a product and convolves its images.
Results are compared before anything is timed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peak import median_seconds
from torch import Tensor

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN = 64
# Channels in and out, images, pixels of a side, subnetworks: one tile of pixels, several, and several subnetworks.
LAYERS = {
    "320-1280-1px": (320, 1280, 64, 1, 1),
    "320-1280-7px": (320, 1280, 64, 7, 1),
    "320-1280-1px-8-subnetworks": (320, 1280, 8, 1, 8),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_generated_conv(benchmark: Any, layer: str) -> None:
    torch.manual_seed(0)
    cin, cout, images, side, count = LAYERS[layer]
    basis, bias = torch.randn(cout, cin, 1, HIDDEN, device=DEVICE) / 160, torch.randn(cout, cin, 1, device=DEVICE) / 20
    codes, xs = torch.randn(count, HIDDEN, device=DEVICE), torch.randn(count, images, cin, side, side, device=DEVICE)
    x, own_S = kernels.pack_activations(xs.unbind(), cin), torch.arange(count, dtype=torch.int32, device=DEVICE)
    widths = torch.full_like(own_S, cin), torch.full_like(own_S, cout)
    sizes: dict[str, Any] = {"image": (images, side, side), "stride": 1, "max_cin": cin, "max_cout": cout}

    def one() -> Tensor:
        return kernels.generated_conv(x, basis, bias, codes, *widths, own_S, **sizes)[0]

    def two() -> Tensor:
        weight = kernels.generate_weights(basis, bias, codes, *widths)
        return kernels.ragged_conv(x, weight, *widths, own_S, weight_source_S=own_S, kernel=1, **sizes)[0]

    def in_torch() -> list[Tensor]:
        return [F.conv2d(images, (basis @ code + bias)[..., None]) for images, code in zip(xs, codes, strict=True)]

    for way in (one, two):
        dense = kernels.unpack_activations(way(), [cout] * count, sizes["image"])
        torch.testing.assert_close(dense, in_torch(), rtol=1e-4, atol=1e-3)

    benchmark(finished(one))
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "backend": kernels.backends.chosen("generated_conv", DEVICE),
        "two_ops_over_one": round(median_seconds(finished(two)) / seconds, 2),
        "pytorch_over_one": round(median_seconds(finished(in_torch)) / seconds, 2),
    }


def finished(way: Callable[[], Any]) -> Callable[[], None]:
    """The same, and until a GPU is done with it."""

    def run() -> None:
        way()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run
