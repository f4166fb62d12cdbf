"""generate_weights against the best of two ways to say it in PyTorch.

    pytest --benchmark-only benchmarks/bench_generate_weights.py

Baselines: one product of the whole basis with all codes, then a crop per subnetwork; and one product of the
cropped basis per subnetwork. Results are compared before anything is timed. `extra_info` holds the faster
baseline's time, the ratio, the GB/s (each basis row read once, each weight written once), the GFLOP/s, and
the GB/s as a fraction of what copying a large tensor reaches in the same run.
"""

from functools import partial
from typing import Any

import pytest
import torch
from peak import median_seconds
from torch import Tensor

import kernels

# max_cout, max_cin, taps, hidden size, depthwise
LAYERS = {
    "mobilenet_v1-pointwise-1024x1024": (1024, 1024, 1, 32, False),
    "mobilenet_v1-depthwise-1024": (1024, 1, 9, 32, True),
    "mobilenet_v2-expand-960x160": (960, 160, 1, 64, False),
    "mobilenet_v2-project-160x960": (160, 960, 1, 64, False),
    "resnet50-conv3x3-128x128": (128, 128, 9, 32, False),
}


def whole_product(basis: Tensor, bias: Tensor, codes: Tensor, crops: list[tuple[int, int]]) -> list[Tensor]:
    weights = (basis.flatten(0, 2) @ codes.T).view(*bias.shape, -1) + bias[..., None]
    return [weights[:o, :i, :, s].contiguous() for s, (o, i) in enumerate(crops)]


def product_per_subnetwork(basis: Tensor, bias: Tensor, codes: Tensor, crops: list[tuple[int, int]]) -> list[Tensor]:
    return [basis[:o, :i] @ codes[s] + bias[:o, :i] for s, (o, i) in enumerate(crops)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("layer", LAYERS)
def test_generate_weights(benchmark: Any, copy_bandwidth: float, layer: str, count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    max_cout, max_cin, taps, hidden, depthwise = LAYERS[layer]
    basis = torch.randn(max_cout, max_cin, taps, hidden).to(dtype)
    bias = torch.randn(max_cout, max_cin, taps).to(dtype)
    codes = torch.randn(count, hidden).to(dtype)
    cout_S = torch.randint(max(1, max_cout // 4), max_cout + 1, (count,), dtype=torch.int32)
    cin_S = torch.randint(max(1, max_cin // 4), max_cin + 1, (count,), dtype=torch.int32)
    crops = list(zip(cout_S.tolist(), cin_S.tolist(), strict=True))

    def run() -> Tensor:
        return kernels.generate_weights(basis, bias, codes, cin_S, cout_S, depthwise=depthwise)

    baselines = [whole_product, product_per_subnetwork]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    unpacked = kernels.unpack_weights(run(), cin_S, cout_S, kernel=int(taps**0.5), depthwise=depthwise)
    for baseline in baselines:
        for actual, expected in zip(unpacked, baseline(basis, bias, codes, crops), strict=True):
            torch.testing.assert_close(actual.flatten(2), expected, atol=tolerance, rtol=tolerance)

    best = min(median_seconds(partial(baseline, basis, bias, codes, crops)) for baseline in baselines)
    benchmark(run)
    seconds = benchmark.stats.stats.median
    rows_out = sum(o * i for o, i in crops) * taps
    rows_in = max(o for o, _ in crops) * max(i for _, i in crops) * taps
    rate = (rows_in * (hidden + 1) + rows_out) * basis.element_size() / seconds
    benchmark.extra_info |= {
        "backend": kernels.backends.chosen("generate_weights", dtype=dtype),
        "pytorch_ms": round(best * 1e3, 3),
        "times_faster": round(best / seconds, 2),
        "GB/s": round(rate / 1e9, 1),
        "GFLOP/s": round(2 * rows_out * hidden / seconds / 1e9, 1),
        "of_copy_bandwidth": round(rate / copy_bandwidth, 2),
    }
