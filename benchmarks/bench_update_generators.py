"""update_generators_ against autograd's gradient of the basis and PyTorch's fused SGD.

    pytest --benchmark-only benchmarks/bench_update_generators.py

Baseline: what training does without it. The gradients of basis, bias and code, the first as large as the basis, by
`generate_weights`'s own backward kernel or by PyTorch's products (`pytorch_ms`: the faster of the two), and then
`torch.optim.SGD(fused=True)`. Results are compared before anything is timed. `of_copy_bandwidth` is the rate of the
least traffic, 16 bytes for each number of the basis (it and its momentum, read and written once), as a fraction of
what copying a large tensor reaches in the same run, `of_in_place_bandwidth` of what adding one to it does: a copy also
fetches the lines that it writes, and does not count them.
"""

from collections.abc import Callable
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
    "mobilenet_v2-last-1280x320": (1280, 320, 1, 64, False),
    "mobilenet_v2-expand-960x160": (960, 160, 1, 64, False),
    "resnet50-conv3x3-512x512": (512, 512, 9, 32, False),
}
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 4e-5
# Of the channels a structure keeps: the mean of the choices.
KEPT = 0.55


class Dense:
    """Basis and bias as parameters of `torch.optim.SGD`, with their whole gradients."""

    def __init__(self, basis: Tensor, bias: Tensor, generate: Callable[..., Tensor]) -> None:
        self.parameters = [t.clone().requires_grad_() for t in (basis, bias)]
        self.generate = generate
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
        )

    def update(self, codes: Tensor, grad: Tensor) -> Callable[[], Tensor]:
        """The step after the forward pass, which is left out: its graph is used again."""
        codes = codes.clone().requires_grad_()
        weight = self.generate(*self.parameters, codes)

        def step() -> Tensor:
            *gradients, d_codes = torch.autograd.grad(weight, [*self.parameters, codes], grad, retain_graph=True)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            return d_codes

        return step


@pytest.mark.parametrize("layer", LAYERS)
def test_update_generators(benchmark: Any, copy_bandwidth: float, in_place_bandwidth: float, layer: str) -> None:
    torch.manual_seed(0)
    max_cout, max_cin, taps, hidden, depthwise = LAYERS[layer]
    o, i = max(1, int(KEPT * max_cout)), max(1, int(KEPT * max_cin))
    cout_S, cin_S = (torch.tensor([n], dtype=torch.int32) for n in (o, i))
    basis, bias = torch.randn(max_cout, max_cin, taps, hidden), torch.randn(max_cout, max_cin, taps)
    codes, grad = torch.rand(1, hidden), torch.randn(o, i, taps)
    side = int(taps**0.5)

    def with_kernel(basis: Tensor, bias: Tensor, codes: Tensor) -> Tensor:
        packed = kernels.generate_weights(basis, bias, codes, cin_S, cout_S, depthwise=depthwise)
        (weight,) = kernels.unpack_weights(packed, cin_S, cout_S, kernel=side, depthwise=depthwise)
        return weight.flatten(2)

    def with_products(basis: Tensor, bias: Tensor, codes: Tensor) -> Tensor:
        return basis[:o, :i] @ codes[0] + bias[:o, :i]

    packed = kernels.pack_weights([grad.unflatten(2, (side, side))], max_cin, max_cout, depthwise)
    state = basis.clone(), bias.clone(), torch.zeros_like(basis), torch.zeros_like(bias)

    def run() -> Tensor:
        return kernels.update_generators_(
            *state,
            codes,
            packed,
            cin_S,
            cout_S,
            depthwise=depthwise,
            lr=LR,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        )

    dense = [Dense(basis, bias, generate) for generate in (with_kernel, with_products)]
    steps = [each.update(codes, grad) for each in dense]
    d_codes = run()
    for each, step in zip(dense, steps, strict=True):
        torch.testing.assert_close(step(), d_codes, rtol=1e-4, atol=1e-3 * (o * i * taps) ** 0.5)
        for mine, theirs in zip(state, each.parameters, strict=False):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-5)

    best = min(median_seconds(step) for step in steps)
    benchmark(run)
    seconds = benchmark.stats.stats.median
    rate = 16 * basis.numel() / seconds
    benchmark.extra_info |= {
        "backend": kernels.backends.chosen("update_generators_"),
        "pytorch_ms": round(best * 1e3, 3),
        "times_faster": round(best / seconds, 2),
        "GB/s": round(rate / 1e9, 1),
        "of_copy_bandwidth": round(rate / copy_bandwidth, 2),
        "of_in_place_bandwidth": round(rate / in_place_bandwidth, 2),
    }
