"""The ops of a scoring or calibrating pass against the best of the ways to say them in eager PyTorch.

    pytest --benchmark-only benchmarks/bench_kernels.py

Eight subnetworks, 30 % to 100 % as wide as a case says, in one call. PyTorch takes them one by one, contiguous or
channels-last, 1 × 1 convolutions as such or as `linear`, with known BatchNorm folded into weights and bias, and with
shortcut and activation in place. A calibrating convolution normalises and activates its input, and leaves the mean and
variance of its output.

Results are compared before anything is timed: in float32 with PyTorch's, in bfloat16 with PyTorch's in float32 on the
same numbers, where twice PyTorch's error in bfloat16 is allowed. GFLOP/s are 2 × MACs of the widths kept; GB/s count
each input, weight and output of those widths once.

Legend: S subnetworks, N images, C channels, O channels out, T classes, J convolutions of a chain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peak import median_seconds, of_peak
from torch import Tensor

import kernels
from kernels.layout import output_image, unpack_activations

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
SUBNETWORKS = 8
OWN_S = torch.arange(SUBNETWORKS, dtype=torch.int32)
TOLERANCE = 1e-4  # in float32, of results of order one

Ways = dict[str, Callable[[], list[Tensor]]]


@dataclass(frozen=True)
class Job:
    """An op on its data: `results` makes of what `ours` returns what all of PyTorch's `ways(dtype)` return."""

    ours: Callable[[], Any]
    results: Callable[[Any], list[Tensor]]
    ways: Callable[[torch.dtype], Ways]
    read: list[Tensor]
    macs: int = 0


@dataclass(frozen=True)
class Conv:
    """A convolution to at most `width` channels; if it is depthwise, to those it reads."""

    width: int
    kernel: int = 1
    activation: str = "none"
    stride: int = 1
    depthwise: bool = False


def widths(limit: int) -> Tensor:
    return torch.randint(-(-3 * limit // 10), limit + 1, (SUBNETWORKS,), dtype=torch.int32)


def random_images(channels_S: Tensor, images: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(images, size, size, c).to(dtype).permute(0, 3, 1, 2) for c in channels_S.tolist()]


def affine(limit: int) -> tuple[Tensor, Tensor]:
    """Scale and shift, `[S, limit]` each."""
    return torch.rand(SUBNETWORKS, limit) + 0.5, torch.randn(SUBNETWORKS, limit) / 2


def batch_norm(x: Tensor, scale_C: Tensor, shift_C: Tensor) -> Tensor:
    scale_C, shift_C = scale_C[: x.shape[1]], shift_C[: x.shape[1]]
    return F.batch_norm(x, torch.zeros_like(shift_C), torch.ones_like(scale_C), scale_C, shift_C, eps=0)


def activate(x: Tensor, activation: str) -> Tensor:
    return torch.relu_(x) if activation == "relu" else F.relu6(x, inplace=True) if activation == "relu6" else x


def one_by_one(one: Callable[..., Sequence[Tensor]], inputs_S: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Ways:
    """The results of `one(s, *inputs)` for all subnetworks, in every memory format."""

    def way(form: torch.memory_format) -> Callable[[], list[Tensor]]:
        cast_S = [[x.to(dtype).contiguous(memory_format=form) for x in inputs] for inputs in inputs_S]
        return lambda: [result for s, inputs in enumerate(cast_S) for result in one(s, *inputs)]

    return {name: way(form) for name, form in FORMATS.items()}


def convolutions(
    limit: int, size: int, images: int, *convs: Conv, dtype: torch.dtype, shortcut: bool = False, sums: bool = False
) -> Job:
    """One convolution, calibrating if with `sums`; or a `fused_block`. Images of 3 channels are everyone's."""
    shared = limit == 3
    channels_S = torch.full_like(OWN_S, 3) if shared else widths(limit)
    xs = random_images(channels_S[:1] if shared else channels_S, images, size, dtype)
    x, source_S, before = kernels.pack_activations(xs, limit), OWN_S * (not shared), affine(limit)

    image, max_cin, cin_S, macs = (images, size, size), limit, channels_S, 0
    blocks, weights_JS = [], []
    for conv in convs:
        cout_S = cin_S if conv.depthwise else channels_S if shortcut and conv is convs[-1] else widths(conv.width)
        shapes = [(o, 1 if conv.depthwise else i, conv.kernel, conv.kernel) for o, i in zip(cout_S, cin_S, strict=True)]
        weights = [(torch.randn(shape) / prod(shape[1:]) ** 0.5).to(dtype) for shape in shapes]
        packed = kernels.pack_weights(weights, max_cin, conv.width, conv.depthwise)
        sizes = (conv.kernel, conv.stride)
        parameters = (packed, OWN_S, cout_S, *affine(conv.width), conv.width)
        blocks.append(kernels.BlockConv(*parameters, conv.depthwise, *sizes, conv.activation))
        weights_JS.append(weights)
        image, max_cin, cin_S = output_image(image, conv.kernel, conv.stride), conv.width, cout_S
        macs += prod(image) * sum(weight.numel() for weight in weights)

    def ours() -> Any:
        options: dict[str, Any] = {"image": (images, size, size)}
        if len(blocks) > 1:
            options |= {"shortcut": x, "shortcut_source_S": source_S} if shortcut else {}
            return kernels.fused_block(x, channels_S, source_S, blocks, max_channels=limit, **options), None
        block = blocks[0]
        options |= {"weight_source_S": block.weight_source_S, "kernel": block.kernel, "stride": block.stride}
        options |= {"activation": block.activation, "statistics": sums}
        if sums:
            options |= {"input_scale_LC": before[0], "input_shift_LC": before[1], "input_activation": "relu6"}
        scale, shift = (None, None) if sums else (block.scale_SO, block.shift_SO)
        if block.depthwise:
            options |= {"max_channels": limit, "scale_SC": scale, "shift_SC": shift}
            return kernels.ragged_depthwise(x, block.weight, channels_S, source_S, **options)
        options |= {"max_cin": limit, "max_cout": block.max_width, "scale_SO": scale, "shift_SO": shift}
        return kernels.ragged_conv(x, block.weight, channels_S, block.width_S, source_S, **options)

    def results(out: Any) -> list[Tensor]:
        dense = unpack_activations(out[0], blocks[-1].width_S, image)
        if not sums:
            return dense
        mean_SO, square_SO = (out[1] / prod(image)).unbind(1)
        moments = zip(dense, mean_SO, square_SO - mean_SO.square(), strict=True)
        return [result for y, mean_O, var_O in moments for result in (y, mean_O[: y.shape[1]], var_O[: y.shape[1]])]

    def ways(dtype: torch.dtype) -> Ways:
        def fold(j: int, s: int) -> tuple[Tensor, Tensor | None]:
            weight = weights_JS[j][s]
            if sums:
                return weight.to(dtype), None
            scale_O, shift_O = (t[s, : len(weight)] for t in (blocks[j].scale_SO, blocks[j].shift_SO))
            return (weight * scale_O[:, None, None, None]).to(dtype), shift_O.to(dtype)

        folded_SJ = [[fold(j, s) for j in range(len(convs))] for s in range(SUBNETWORKS)]

        def one(s: int, x: Tensor, linear: bool = False) -> Sequence[Tensor]:
            y = activate(batch_norm(x, before[0][s], before[1][s]), "relu6") if sums else x
            for conv, (weight, bias) in zip(convs, folded_SJ[s], strict=True):
                if linear and conv.kernel == 1:
                    y = F.linear(y.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
                else:
                    groups = len(weight) if conv.depthwise else 1
                    y = F.conv2d(y, weight, bias, conv.stride, conv.kernel // 2, groups=groups)
                y = activate(y.add_(x) if shortcut and conv is convs[-1] else y, conv.activation)
            # Many times as fast as `torch.var_mean`.
            return (y, *torch.batch_norm_update_stats(y, None, None, 0)) if sums else (y,)

        inputs_S = [(xs[s],) for s in source_S.tolist()]
        found = one_by_one(one, inputs_S, dtype)
        if any(conv.kernel == 1 for conv in convs):
            found["linear"] = one_by_one(partial(one, linear=True), inputs_S, dtype)["channels-last"]
        return found

    return Job(ours, results, ways, [*xs, *(weight for weights in weights_JS for weight in weights)], macs)


def normalise(limit: int, size: int, images: int, *, dtype: torch.dtype) -> Job:
    channels_S, image, (scale_SC, shift_SC) = widths(limit), (images, size, size), affine(limit)
    xs, shortcuts = (random_images(channels_S, images, size, dtype) for _ in range(2))
    x, shortcut = (kernels.pack_activations(dense, limit) for dense in (xs, shortcuts))
    options: Any = {"image": image, "max_channels": limit, "activation": "relu"}
    options |= {"shortcut": shortcut, "shortcut_source_S": OWN_S}

    def one(s: int, x: Tensor, shortcut: Tensor) -> Sequence[Tensor]:
        return (torch.relu_(batch_norm(x, scale_SC[s], shift_SC[s]).add_(shortcut)),)

    return Job(
        lambda: kernels.ragged_normalise(x, scale_SC, shift_SC, channels_S, OWN_S, **options),
        lambda y: unpack_activations(y, channels_S, image),
        partial(one_by_one, one, list(zip(xs, shortcuts, strict=True))),
        [*xs, *shortcuts],
    )


def max_pool(limit: int, size: int, images: int, *, dtype: torch.dtype) -> Job:
    channels_S, image = widths(limit), (images, size, size)
    xs = random_images(channels_S, images, size, dtype)
    x = kernels.pack_activations(xs, limit)
    return Job(
        lambda: kernels.ragged_max_pool(x, channels_S, OWN_S, image=image, max_channels=limit),
        lambda y: unpack_activations(y, channels_S, output_image(image, 3, 2)),
        partial(one_by_one, lambda s, x: (F.max_pool2d(x, 3, 2, 1),), [(x,) for x in xs]),
        xs,
    )


def score(limit: int, size: int, images: int, classes: int, *, dtype: torch.dtype) -> Job:
    channels_S = widths(limit)
    xs = random_images(channels_S, images, size, dtype)
    x = kernels.pack_activations(xs, limit)
    weight_TC, bias_T = torch.randn(classes, limit).to(dtype), torch.randn(classes).to(dtype)

    def logits(x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3)), weight_TC[:, : x.shape[1]].to(x.dtype), bias_T.to(x.dtype)).float()

    labels_N = logits(xs[0].float()).argmax(1)

    def one(s: int, x: Tensor) -> Sequence[Tensor]:
        logits_NT = logits(x)
        return logits_NT.argmax(1) == labels_N, F.cross_entropy(logits_NT, labels_N, reduction="none")

    return Job(
        lambda: kernels.score_logits(x, weight_TC, bias_T, labels_N, channels_S, OWN_S, image=(images, size, size)),
        lambda out: [result for pair in zip(*out, strict=True) for result in pair],
        partial(one_by_one, one, [(x,) for x in xs]),
        [*xs, weight_TC[:, : int(channels_S.max())]],
        images * classes * int(channels_S.sum()),
    )


def depthwise(width: int, activation: str, stride: int = 1) -> Conv:
    return Conv(width, 3, activation, stride, depthwise=True)


# Most channels, pixels a side, images; then what the op has besides.
CASES = {
    "ragged_conv-1x1-96-24-56px": partial(convolutions, 96, 56, 16, Conv(24)),
    "ragged_conv-1x1-132-1280-7px": partial(convolutions, 132, 7, 64, Conv(1280, 1, "relu6")),
    "ragged_conv-3x3-128-128-28px": partial(convolutions, 128, 28, 8, Conv(128, 3, "relu")),
    "ragged_conv-7x7s2-3-64-224px": partial(convolutions, 3, 224, 2, Conv(64, 7, "relu", 2)),
    "ragged_conv-calibrating-1x1-64-128-8px": partial(convolutions, 64, 8, 256, Conv(128), sums=True),
    "ragged_depthwise-3x3-144-56px": partial(convolutions, 144, 56, 8, depthwise(144, "relu6")),
    "ragged_depthwise-3x3s2-96-112px": partial(convolutions, 96, 112, 4, depthwise(96, "relu6", 2)),
    "ragged_depthwise-calibrating-3x3-384-8px": partial(convolutions, 384, 8, 256, depthwise(384, "none"), sums=True),
    "fused_block-inverted-24-144-24-56px": partial(
        convolutions, 24, 56, 8, Conv(144, 1, "relu6"), depthwise(144, "relu6"), Conv(24), shortcut=True
    ),
    "fused_block-inverted-88-528-88-14px": partial(
        convolutions, 88, 14, 16, Conv(528, 1, "relu6"), depthwise(528, "relu6"), Conv(88), shortcut=True
    ),
    "fused_block-separable-256-256-14px": partial(
        convolutions, 256, 14, 16, depthwise(256, "relu"), Conv(256, 1, "relu")
    ),
    "fused_block-bottleneck-256-64-256-56px": partial(
        convolutions, 256, 56, 2, Conv(64, 1, "relu"), Conv(64, 3, "relu"), Conv(256, 1, "relu"), shortcut=True
    ),
    "ragged_normalise-shortcut-128-16px": partial(normalise, 128, 16, 64),
    "ragged_max_pool-64-112px": partial(max_pool, 64, 112, 4),
    "score_logits-1280-1000-7px": partial(score, 1280, 7, 64, 1000),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_op(benchmark: Any, copy_bandwidth: float, peak_flops: Any, case: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    job: Job = case(dtype=dtype)
    exact = job.ways(torch.float32)["channels-last"]()
    ways = job.ways(dtype)
    tolerance = TOLERANCE
    if dtype != torch.float32:
        theirs = zip(ways["channels-last"](), exact, strict=True)
        tolerance = 2 * max(float((y - z).abs().max()) for y, z in theirs if y.is_floating_point())
    for actual, expected in zip(job.results(job.ours()), exact, strict=True):
        torch.testing.assert_close(actual.to(expected.dtype), expected, atol=tolerance, rtol=TOLERANCE)

    seconds_of_way = {way: median_seconds(run, 5) for way, run in ways.items()}
    best = min(seconds_of_way, key=seconds_of_way.__getitem__)
    benchmark.pedantic(job.ours, rounds=15, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    flops = 2 * job.macs / seconds
    moved = sum(t.numel() for t in [*job.read, *exact]) * dtype.itemsize / seconds
    arithmetic = {"GFLOP/s": float(f"{flops / 1e9:.3g}"), "of_peak": of_peak(flops, peak_flops(dtype))}
    benchmark.extra_info |= {
        **(arithmetic if job.macs else {}),
        "GB/s": float(f"{moved / 1e9:.3g}"),
        "of_copy_bandwidth": float(f"{moved / copy_bandwidth:.3g}"),
        "times_faster": float(f"{seconds_of_way[best] / seconds:.3g}"),
        "pytorch": best,
    }
