from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import genomes, names, pruned_net, random_genomes, space_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine.errors import UserError
from engine.pruned import ConvBlock, PrunedNet
from engine.space import IMAGE, Conv, Gene, Space, Width, max_width
from engine.space.costs import CHUNK, cost_model, format_count, macs_per_conv

classes = st.sampled_from([1, 2, 10, 1000])
resolutions = st.integers(32, 260)


def fixed_at(space: Space, width_at: Callable[[int], int]) -> Space:
    """The space whose every choice is one structure: each layer of maximum width ``w`` has ``width_at(w)``."""

    def fixed(width: Width) -> Width:
        if isinstance(width, int):
            return width if width == 3 else width_at(width)
        return Gene(width.name, width.max_width, (width_at(width.max_width),) * space.choices)

    def fixed_conv(conv: Conv) -> Conv:
        return replace(conv, cin=fixed(conv.cin), cout=fixed(conv.cout), context=())

    genes = tuple(width for width in map(fixed, space.genes) if isinstance(width, Gene))
    return replace(space, genes=genes, convs=tuple(map(fixed_conv, space.convs)))


def macs_of(space: Space, genome_PG: Tensor | None = None, convention: str = "macs") -> float:
    """Millions of MACs at 224 px; of the widest structure by default."""
    genome_PG = space.uniform_choice(space.choices - 1) if genome_PG is None else genome_PG
    return cost_model(space, 224, convention).macs(genome_PG).item() / 1e6  # type: ignore[arg-type]


# -- published values ----------------------------------------------------------------------------------------------
# In millions. The tables of MetaPruning (https://arxiv.org/abs/1903.10258) print them rounded: 569M, 325M, 149M and 41M
# for MobileNetV1, 4.1G, 3.0G, 2.3G and 1.1G for ResNet-50. The digits beyond follow from the layers' shapes:
# Σ (output pixels · kernel² · input channels · output channels), and 1000 · features for the classifier.


@pytest.mark.parametrize(
    ("name", "percent", "millions"),
    [
        ("mobilenet_v1", 100, 568.740),
        ("mobilenet_v1", 75, 325.400),
        ("mobilenet_v1", 50, 149.497),
        ("mobilenet_v1", 25, 41.030),
        ("resnet50", 100, 4089.184),
        ("resnet50", 85, 2950.121),
        ("resnet50", 75, 2322.678),
        ("resnet50", 50, 1052.312),
        ("mobilenet_v2", 100, 569.521),
    ],
)
def test_a_network_scaled_by_a_width_multiplier_has_its_published_macs(
    name: str, percent: int, millions: float
) -> None:
    scaled = fixed_at(space_of(name), lambda width: width * percent // 100)
    assert macs_of(scaled) == pytest.approx(millions, abs=5e-4)


def test_standard_mobilenet_v2_has_its_published_macs() -> None:
    # 300.8 M is the standard network (https://arxiv.org/abs/1801.04381, table 2), whose first block does not expand:
    # its 1×1 convolution of 32 → 32 channels, which the search space has, is left out of the sum.
    standard = {
        44: 32, 22: 16, 33: 24, 88: 64, 132: 96, 224: 160, 448: 320, 1280: 1280,
        198: 144, 264: 192, 528: 384, 792: 576, 1344: 960,
    }  # fmt: skip
    space = fixed_at(space_of("mobilenet_v2"), lambda width: standard[width])
    counts = macs_per_conv(cost_model(space), space.uniform_choice(0)[0])
    first_expansion = counts[space.conv_index["stage1.1.expand"]]
    assert first_expansion == 112 * 112 * 32 * 32
    assert (sum(counts) - first_expansion) / 1e6 == pytest.approx(300.8, abs=0.05)


# Genomes of https://github.com/liuzechun/MetaPruning, stage genes first; its lists repeat a stage gene for every block.
MOBILENET_V2_GENOME = [
    18, 23, 18, 28, 27, 2, 12, 15,
    4, 12, 25, 23, 20, 14, 24, 8, 19, 26, 2, 10, 24, 16, 6, 26, 10,
]  # fmt: skip
RESNET50_GENOME = [19, 9, 15, 13, 10, 9, 10, 6, 9, 13, 11, 12, 7, 18, 7, 13, 12, 10, 19, 18]


@pytest.mark.parametrize(
    ("name", "genome", "millions"),
    [("mobilenet_v2", MOBILENET_V2_GENOME, 202.289), ("resnet50", RESNET50_GENOME, 1027.555)],
)
def test_a_published_genome_has_its_macs(name: str, genome: list[int], millions: float) -> None:
    assert macs_of(space_of(name), torch.tensor([genome])) == pytest.approx(millions, abs=5e-4)


def test_the_metapruning_convention_counts_what_the_original_prints() -> None:
    # The original's log says 207.98M for its MobileNetV2 genome and its counter 4111.7M for the full ResNet-50.
    genome_PG = torch.tensor([MOBILENET_V2_GENOME])
    assert macs_of(space_of("mobilenet_v2"), genome_PG, "metapruning") == pytest.approx(207.977, abs=5e-4)
    assert macs_of(space_of("resnet50"), convention="metapruning") == pytest.approx(4111.7, abs=0.05)


def test_an_unknown_convention_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(UserError, match=r"'flops'.*macs, metapruning"):
        cost_model(space_of("mobilenet_v1"), convention="flops")  # type: ignore[arg-type]


# -- independent counts --------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.data(), names, classes, resolutions)
def test_macs_and_parameters_are_those_of_the_plain_network(
    data: st.DataObject, name: str, classes: int, resolution: int
) -> None:
    space = space_of(name, classes)
    genome_PG = data.draw(genomes(space))
    net, costs = pruned_net(space, genome_PG), cost_model(space, resolution)
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, resolution, resolution, device="meta"))
    # torch counts a multiplication and an addition as two operations.
    assert costs.macs(genome_PG).tolist() == [counter.get_total_flops() // 2]
    assert costs.parameters(genome_PG).tolist() == [sum(p.numel() for p in net.parameters())]


def peak_bytes_of_a_run(net: PrunedNet, resolution: int) -> int:
    """Run the network and follow its real tensors: each is freed after its last reader, the rest happens in place."""
    blocks = [block for block in net.convs.values() if isinstance(block, ConvBlock)]
    written: dict[nn.Module, int] = {}
    for module in (module for block in blocks for module in (block, block.conv)):
        module.register_forward_hook(lambda module, _, output: written.update({module: output.numel()}))
    image = torch.empty(1, 3, resolution, resolution, device="meta")
    net(image)

    readers = Counter(name for _, source, shortcut in net.routes for name in (source, shortcut) if name)
    alive, peak = {IMAGE: image.numel()}, 0
    for (name, source, shortcut), block in zip(net.routes, blocks, strict=True):
        convolved = written[block.conv]
        peak = max(peak, sum(alive.values()) + convolved)
        for read in (source, shortcut):
            if read:
                readers[read] -= 1
                if not readers[read]:
                    del alive[read]
        if not isinstance(block.pool, nn.Identity):
            peak = max(peak, sum(alive.values()) + convolved + written[block])
        alive[name] = written[block]
    return 4 * peak


@settings(max_examples=12)
@given(st.data(), names, resolutions)
def test_peak_activation_memory_is_that_of_a_simulated_run(data: st.DataObject, name: str, resolution: int) -> None:
    space = space_of(name, 10)
    genome_PG = data.draw(genomes(space))
    counted = cost_model(space, resolution).peak_activation_bytes(genome_PG).tolist()
    assert counted == [peak_bytes_of_a_run(pruned_net(space, genome_PG), resolution)]


def test_peak_activation_memory_of_full_mobilenet_v1_is_that_of_its_first_pointwise_convolution() -> None:
    # It reads 32 and writes 64 channels of 112×112 pixels, 4 bytes each; no other step holds as much.
    space = space_of("mobilenet_v1")
    peak = cost_model(space).peak_activation_bytes(space.uniform_choice(30))
    assert peak.tolist() == [(32 + 64) * 112 * 112 * 4]


@given(st.data(), names, resolutions)
def test_macs_of_the_convolutions_and_the_classifier_sum_to_those_of_the_network(
    data: st.DataObject, name: str, resolution: int
) -> None:
    space = space_of(name)
    genome_PG, costs = data.draw(genomes(space)), cost_model(space, resolution)
    counts = macs_per_conv(costs, genome_PG[0])
    assert len(counts) == len(space.convs) + 1
    assert counts[-1] == max_width(space.features) * space.classes
    assert sum(counts) == costs.macs(genome_PG).item()


# -- populations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["macs", "parameters", "peak_activation_bytes"])
@pytest.mark.parametrize("count", [0, 1, CHUNK, CHUNK + 1])
def test_a_population_costs_what_its_genomes_cost_one_by_one(cost: str, count: int) -> None:
    space = space_of("mobilenet_v2")
    costs, genome_PG = cost_model(space), random_genomes(space, count)
    together = getattr(costs, cost)(genome_PG)
    assert together.dtype == torch.int64
    assert together.shape == (count,)
    looked_at = [p for p in (0, 1, CHUNK - 1, CHUNK) if p < count]
    assert [together[p].item() for p in looked_at] == [
        getattr(costs, cost)(genome_PG[p][None]).item() for p in looked_at
    ]


@given(st.data(), names)
def test_a_wider_gene_never_lowers_a_cost(data: st.DataObject, name: str) -> None:
    space = space_of(name)
    genome_PG = data.draw(genomes(space))
    wider_PG = genome_PG.clone()
    wider_PG[0, data.draw(st.integers(0, len(space.genes) - 1))] = space.choices - 1
    costs = cost_model(space, 64)
    for cost in (costs.macs, costs.parameters, costs.peak_activation_bytes):
        assert cost(wider_PG) >= cost(genome_PG)


def test_a_resolution_below_the_total_stride_is_refused_and_says_why() -> None:
    space = space_of("resnet50")
    assert cost_model(space, 32).resolution == 32
    with pytest.raises(UserError, match=r"resolution 31 is too small: resnet50 has a total stride of 32"):
        cost_model(space, 31)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (568_740_352, "568.74M"), (4_089_184_256, "4.089G"), (2.5e12, "2500G")],
)
def test_a_count_is_shown_with_its_magnitude(count: float, text: str) -> None:
    assert format_count(count) == text
