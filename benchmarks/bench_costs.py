"""What a million structures cost, against building each network and counting its operations with PyTorch's counter.

python -m pytest benchmarks/bench_costs.py --benchmark-only
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.pruned import PrunedNet
from engine.space import Space, architecture
from engine.space.costs import CostModel, cost_model
from engine.space.structure import convolutions

GENOMES = 1_000_000
BASELINE_GENOMES = 20
RESOLUTION = 224


def all_costs(costs: CostModel, genome_PG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MACs, parameters and peak activation bytes, ``[P]`` each."""
    return costs.macs(genome_PG), costs.parameters(genome_PG), costs.peak_activation_bytes(genome_PG)


def counted(space: Space, genome_G: Tensor) -> tuple[int, int]:
    """MACs and parameters of one structure, from a plain network on the meta device: nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = PrunedNet(convolutions(space, genome_G), space.classes).eval()
        net(torch.empty(1, 3, RESOLUTION, RESOLUTION))
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in net.parameters())


def test_costs_of_a_million_mobilenet_v2_structures(benchmark: Any) -> None:
    space = architecture("mobilenet_v2").build(1000)
    costs = cost_model(space, RESOLUTION)
    genome_PG = torch.randint(space.choices, (GENOMES, len(space.genes)), generator=torch.Generator().manual_seed(0))

    sample_PG = genome_PG[:: GENOMES // BASELINE_GENOMES]
    counted(space, sample_PG[0])  # the first use of the counter imports what it needs
    began = time.perf_counter()
    baseline = [counted(space, genome_G) for genome_G in sample_PG]
    baseline_rate = len(sample_PG) / (time.perf_counter() - began)
    macs, parameters, _ = all_costs(costs, sample_PG)
    assert list(zip(macs.tolist(), parameters.tolist(), strict=True)) == baseline

    macs, parameters, peaks = benchmark.pedantic(all_costs, (costs, genome_PG), rounds=3, warmup_rounds=1)
    assert macs.shape == parameters.shape == peaks.shape == (GENOMES,)
    rate = GENOMES / benchmark.stats.stats.median
    benchmark.extra_info.update(
        genomes_per_second=round(rate),
        flop_counter_genomes_per_second=round(baseline_rate, 1),
        speedup=round(rate / baseline_rate),
    )
