import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structures import budget_of, genomes, names, random_genomes, space_of

from engine.errors import UserError
from engine.space.budget import KINDS, Quantity, parse_limit, quantities, uniform_genome
from engine.space.costs import cost_model


def quantity(name: str, architecture: str = "resnet50", resolution: int = 224) -> Quantity:
    """A cost of an architecture; latency is one millisecond for each million MACs, here."""
    costs = cost_model(space_of(architecture), resolution)
    return quantities(costs, lambda genome_PG: costs.macs(genome_PG).double() / 1e6)[name]


# -- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "high"),
    [
        ("flops", "300M", 300_000_000),
        ("flops", "300m", 300_000_000),
        ("flops", " 1.2G\n", 1_200_000_000),
        ("flops", "0.0012T", 1_200_000_000),
        ("flops", "1200000K", 1_200_000_000),
        ("flops", "1200000000", 1_200_000_000),
        # ResNet-50 has 4,089,184,256 MACs and 25,557,032 parameters: a percentage is of those, rounded down.
        ("flops", "50%", 2_044_592_128),
        ("flops", "33.3%", 1_361_698_357),
        ("flops", "100%", 4_089_184_256),
        ("params", "12.5M", 12_500_000),
        ("params", "50%", 12_778_516),
        ("memory_peak", "4MB", 4_000_000),
        ("memory_peak", "4M", 4_000_000),
        ("memory_peak", "4000000", 4_000_000),
        ("memory_peak", "4MiB", 4 * 2**20),
        ("memory_peak", "4000kb", 4_000_000),
        ("latency", "800ms", 800),
        ("latency", "0.8s", 0.8 * 1000),
        ("latency", "800000us", 800),
        ("latency", "50%", 4_089.184256 / 2),
    ],
)
def test_a_limit_is_a_count_a_size_a_time_or_a_share_of_the_full_network(name: str, text: str, high: float) -> None:
    limit = parse_limit(text, quantity(name)).check()
    assert (limit.low, limit.high) == (None, high)
    assert isinstance(limit.high, float if name == "latency" else int)


def test_a_band_has_a_lower_bound_too() -> None:
    limit = parse_limit("40%:2.1G", quantity("flops"))
    assert (limit.low, limit.high) == (1_635_673_702, 2_100_000_000)


@pytest.mark.parametrize("name", KINDS)
def test_the_ends_of_the_legal_range_are_limits_and_what_lies_beyond_is_not(name: str) -> None:
    cost = quantity(name, "mobilenet_v1")
    unit = {"latency": "ms"}.get(name, "")
    for edge, outwards in ((cost.least, -1), (cost.full, 1)):
        assert parse_limit(f"{edge}{unit}", cost).check().high == edge
        with pytest.raises(UserError, match="no structure fits"):
            parse_limit(f"{edge + outwards}{unit}", cost).check()


@pytest.mark.parametrize(
    "text",
    [
        "abc", "1M", "5T", "0.5%", "100.1%", "0", "-3", "", " ", "nan", "inf", "M", "%", "1e9", "1,2G", "1.G", "3 00M",
        "9" * 5000, "300MB", "8ms", ":", "100M:", ":100M", "200M:100M", "1M:2M:3M",
    ],
)  # fmt: skip
def test_what_is_no_limit_is_refused_in_one_line_with_the_legal_range(text: str) -> None:
    with pytest.raises(UserError, match=r"^--limit .*mobilenet_v1 at 224 px has 13\.509M to 568\.74M MACs$") as error:
        parse_limit(text, quantity("flops", "mobilenet_v1"), "--limit").check()
    assert len(str(error.value).splitlines()) == 1


def test_a_latency_needs_its_unit() -> None:
    with pytest.raises(UserError, match="write one like 8ms"):
        parse_limit("800", quantity("latency"))


# -- what fits -----------------------------------------------------------------------------------------------------


@given(st.data(), names)
def test_a_genome_fits_exactly_if_every_cost_is_within_its_bounds(data: st.DataObject, name: str) -> None:
    costs = cost_model(space_of(name), 64)
    edge_PG = data.draw(genomes(costs.space))[:1]
    # Bounds that are costs themselves: at most and at least include them.
    macs, parameters = int(costs.macs(edge_PG)), int(costs.parameters(edge_PG))
    full = int(quantities(costs)["flops"].full)
    budget = budget_of(costs, flops=f"{macs}:{full}", params=parameters)
    genome_PG = torch.cat([edge_PG, random_genomes(costs.space, 200)])
    fits = (costs.macs(genome_PG) >= macs) & (costs.parameters(genome_PG) <= parameters)
    assert bool(fits[0])
    assert torch.equal(budget.fits(genome_PG), fits)
    assert torch.equal(budget.violation(budget.costs(genome_PG)) == 0, fits)


def test_usage_is_the_share_of_the_tightest_limit() -> None:
    costs = cost_model(space_of("mobilenet_v1"))
    budget = budget_of(costs, flops="50%", params="100%")
    space = costs.space
    ends = torch.cat([space.uniform_choice(0), space.uniform_choice(30), random_genomes(space, 5)])
    usage = budget.usage(budget.costs(ends))
    assert usage[0] == 0
    assert usage[1] > 1.9
    flops = quantities(costs)["flops"]
    expected = (costs.macs(ends).double() - flops.least) / (flops.full // 2 - flops.least)
    assert torch.allclose(usage[1:2], expected[1:2])


def test_without_limits_everything_fits() -> None:
    costs = cost_model(space_of("mobilenet_v1"))
    assert budget_of(costs).fits(random_genomes(costs.space, 3)).all()


@given(st.data(), names)
def test_the_uniform_structure_is_the_greatest_that_fits(data: st.DataObject, name: str) -> None:
    costs = cost_model(space_of(name), 64)
    flops = quantities(costs)["flops"]
    macs = data.draw(st.integers(int(flops.least), int(flops.full)))
    genome_PG = uniform_genome(budget_of(costs, flops=macs))
    assert costs.macs(genome_PG) <= macs
    lowest = int(genome_PG.min())
    assert int(genome_PG.max()) - lowest <= 1
    if lowest < costs.space.choices - 1:
        # The next structure raises one of the genes that are a step behind: the last.
        genome_PG[0, int((genome_PG[0] == lowest).nonzero().max())] += 1
        assert costs.macs(genome_PG) > macs


def test_the_uniform_structure_meets_every_upper_bound() -> None:
    costs = cost_model(space_of("mobilenet_v2"))
    budget = budget_of(costs, flops="50%", params="30%", memory_peak="90%")
    genome_PG = uniform_genome(budget)
    assert budget.fits(genome_PG).all()
    assert not torch.equal(genome_PG, uniform_genome(budget_of(costs, flops="50%")))


def test_the_uniform_structure_of_the_ends_of_the_range_is_the_smallest_and_the_full_one() -> None:
    costs = cost_model(space_of("mobilenet_v2"))
    flops = quantities(costs)["flops"]
    assert torch.equal(uniform_genome(budget_of(costs, flops="100%")), costs.space.uniform_choice(30))
    assert costs.macs(uniform_genome(budget_of(costs, flops=int(flops.least)))) == flops.least
    with pytest.raises(UserError, match=r"no uniform structure has ≤ 12\.754M MACs"):
        uniform_genome(budget_of(costs, flops=int(flops.least) - 1))
