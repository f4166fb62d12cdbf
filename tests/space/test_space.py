from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structures import genomes, names, space_of

from engine.errors import UserError
from engine.space import IMAGE, Conv, Gene, Space, architecture, gene, max_width, rounded

STEM, WIDE = gene("stem", 10), gene("wide", 20)


def conv(name: str, source: str, cin: Gene | int, cout: Gene | int, **fields: Any) -> Conv:
    """A 3×3 convolution of stride 1."""
    plain = Conv(name, source, cin, cout, 3, 1, False, "relu", None, (), 4)
    return replace(plain, **fields)


def tiny(*convs: Conv, genes: tuple[Gene, ...] = (STEM, WIDE)) -> Space:
    """A stem of one gene and then ``convs``."""
    return Space("tiny", 10, genes, (conv("stem", IMAGE, 3, STEM, stride=2), *convs))


# -- the paper's spaces --------------------------------------------------------------------------------------------


def test_a_gene_offers_31_widths_truncated_from_ten_to_a_hundred_percent() -> None:
    # int(44 * (0.10 + 0.03 i)) in exact arithmetic: 4.4, 5.72, 7.04, 8.36, … 41.36, 42.68, 44.
    widths = gene("stem", 44).widths
    assert len(widths) == 31
    assert widths[:4] == (4, 5, 7, 8)
    assert widths[-3:] == (41, 42, 44)
    # 100 · 0.55 is 55.000000000000007 in floating point and 100 · 0.58 is 57.99999999999999.
    assert gene("hundred", 100).widths == tuple(range(10, 101, 3))


def test_a_gene_keeps_at_least_one_channel() -> None:
    assert min(gene("narrow", 3).widths) == 1


@pytest.mark.parametrize(
    ("name", "genes", "convs", "last"),
    [("mobilenet_v1", 13, 27, 1024), ("mobilenet_v2", 25, 53, 1280), ("resnet50", 20, 53, 2048)],
)
def test_a_space_has_the_papers_genes_and_layers(name: str, genes: int, convs: int, last: int) -> None:
    # Layers: 1 + 13·2; 1 + 17·3 + 1; 1 + 16·3 + 4 projections. Genes: 13; 8 + 17; 4 + 16. The last width is fixed.
    space = space_of(name)
    assert (len(space.genes), len(space.convs), space.features) == (genes, convs, last)
    assert space.total_stride == 32


def test_every_bottleneck_of_resnet_adds_its_input_projected_where_the_stage_begins() -> None:
    space = space_of("resnet50")
    shortcuts = {conv.name: conv.shortcut for conv in space.convs if conv.shortcut}
    assert len(shortcuts) == 16
    assert shortcuts["stage2.1.expand"] == "stage2.1.shortcut"
    assert shortcuts["stage2.2.expand"] == "stage2.1.expand"
    assert [conv.name for conv in space.convs if conv.max_pool] == ["stem"]


def test_only_blocks_of_mobilenet_v2_that_keep_size_and_width_have_a_shortcut() -> None:
    # Stages of 1, 2, 3, 4, 3, 3, 1 blocks: all but the first block of each.
    space = space_of("mobilenet_v2")
    assert [conv.name for conv in space.convs if conv.shortcut] == [
        f"stage{stage}.{block}.project"
        for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1), 1)
        for block in range(2, blocks + 1)
    ]


def test_an_unknown_architecture_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(UserError, match=r"'vgg'.*mobilenet_v1, mobilenet_v2, resnet50"):
        architecture("vgg")


# -- genomes and widths --------------------------------------------------------------------------------------------


@given(st.data(), names)
def test_encoding_the_widths_of_a_genome_gives_a_genome_of_the_same_widths(data: st.DataObject, name: str) -> None:
    space = space_of(name)
    genome_PG = torch.cat(data.draw(st.lists(genomes(space), min_size=1, max_size=4)))
    widths_PL = space.widths(genome_PG)
    encoded_PG = space.encode(widths_PL)
    assert torch.equal(space.widths(encoded_PG), widths_PL)
    # Where two choices truncate to the same width the smaller is taken; everywhere else the genome itself returns.
    for g, gene_ in enumerate(space.genes):
        for choice, encoded in zip(genome_PG[:, g].tolist(), encoded_PG[:, g].tolist(), strict=True):
            assert encoded == gene_.widths.index(gene_.widths[choice])


@given(st.data(), names)
def test_layers_that_meet_in_a_shortcut_are_equally_wide(data: st.DataObject, name: str) -> None:
    space = space_of(name)
    widths = dict(zip(space.conv_index, space.widths(data.draw(genomes(space)))[0].tolist(), strict=True))
    for layer in space.convs:
        if layer.shortcut is not None:
            assert widths[layer.shortcut] == widths[layer.name]


@given(st.data(), names)
def test_a_width_no_choice_gives_is_refused_by_the_name_of_its_layer(data: st.DataObject, name: str) -> None:
    space = space_of(name)
    widths_PL = space.widths(space.uniform_choice(30))
    layer = data.draw(st.integers(0, len(space.convs) - 1))
    cout = space.convs[layer].cout
    legal = {cout} if isinstance(cout, int) else set(cout.widths)
    widths_PL[0, layer] = data.draw(st.integers(-1, 2 * max_width(cout)).filter(lambda width: width not in legal))
    with pytest.raises(ValueError, match=rf"^{space.convs[layer].name} (cannot have|has a fixed width)"):
        space.encode(widths_PL)


def test_tied_layers_of_different_widths_are_refused() -> None:
    space = space_of("resnet50")
    widths_PL = space.widths(space.uniform_choice(30))
    widths_PL[0, space.conv_index["stage2.3.expand"]] = space.genes[2].widths[7]
    with pytest.raises(ValueError, match=r"stage2\.3\.expand must be as wide as the other layers of gene stage2"):
        space.encode(widths_PL)


@pytest.mark.parametrize("shape", [(13,), (2, 12), (2, 14), (1, 13, 1)])
def test_a_genome_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a mobilenet_v1 genome has 13 genes"):
        space_of("mobilenet_v1").check_genome(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("choice", [-1, 31, 2**40])
def test_a_choice_out_of_range_is_refused(choice: int) -> None:
    space = space_of("mobilenet_v1")
    genome_PG = space.uniform_choice(30).repeat(3, 1)
    assert torch.equal(space.check_genome(genome_PG.int()), genome_PG)
    genome_PG[1, 5] = choice
    with pytest.raises(ValueError, match="0 to 30"):
        space.check_genome(genome_PG)


# -- tables that make no sense -------------------------------------------------------------------------------------


def test_a_table_that_makes_sense_is_taken() -> None:
    space = tiny(
        conv("wide", "stem", STEM, WIDE, stride=2, max_pool=True),
        conv("depthwise", "wide", WIDE, WIDE, depthwise=True),
        conv("project", "depthwise", WIDE, WIDE, shortcut="wide", context=(STEM, WIDE)),
    )
    assert space.total_stride == 8
    assert space.widths(torch.tensor([[0, 30]])).tolist() == [[1, 20, 20, 20]]


@pytest.mark.parametrize(
    ("reason", "convs"),
    [
        ("distinct", (conv("stem", "stem", STEM, WIDE),)),
        ("not computed yet", (conv("a", "b", STEM, WIDE), conv("b", "stem", STEM, WIDE))),
        ("not computed yet", (conv("a", "a", STEM, STEM),)),
        ("not computed yet", (conv("a", "nowhere", STEM, WIDE),)),
        ("cin does not match", (conv("a", "stem", WIDE, WIDE),)),
        ("cin does not match", (conv("a", IMAGE, 4, WIDE),)),
        ("cin does not match", (conv("a", "stem", STEM, WIDE, depthwise=True),)),
        ("whose width is another gene", (conv("a", "stem", STEM, WIDE, shortcut="stem"),)),
        ("not computed yet", (conv("a", "stem", STEM, STEM, shortcut="b"), conv("b", "stem", STEM, STEM))),
        ("not computed yet", (conv("a", "stem", STEM, STEM, shortcut="nowhere"),)),
        ("does not list", (conv("a", "stem", STEM, gene("other", 10)),)),
        ("does not list", (conv("a", "stem", STEM, WIDE, context=(gene("other", 10),)),)),
    ],
)
def test_a_table_that_contradicts_itself_is_refused_when_it_is_written_down(
    reason: str, convs: tuple[Conv, ...]
) -> None:
    with pytest.raises(ValueError, match=reason):
        tiny(*convs)


def test_two_genes_of_one_name_are_refused() -> None:
    other = gene("stem", 20)
    with pytest.raises(ValueError, match="distinct"):
        tiny(conv("a", "stem", STEM, other), genes=(STEM, other))


# -- multiples -----------------------------------------------------------------------------------------------------


@given(names, st.integers(1, 40))
def test_rounded_widths_are_the_closest_multiples_the_full_network_has(name: str, divisor: int) -> None:
    space = space_of(name)
    for before, after in zip(space.genes, rounded(space, divisor).genes, strict=True):
        multiples = range(divisor, before.max_width + 1, divisor)
        if not multiples:
            assert after == before
            continue
        assert set(after.widths) <= set(multiples)
        for width, multiple in zip(before.widths, after.widths, strict=True):
            assert abs(width - multiple) == min(abs(width - other) for other in multiples)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_a_rounded_space_ties_the_same_layers_and_a_divisor_of_one_changes_nothing(name: str) -> None:
    space = space_of(name)
    assert rounded(space, 1) == space
    by_eight = rounded(space, 8)
    assert by_eight.divisor == 8
    for before, after in zip(space.convs, by_eight.convs, strict=True):
        for field in ("cin", "cout"):
            width = getattr(before, field)
            kept = width if isinstance(width, int) else by_eight.genes[space.gene_index[width]]
            assert getattr(after, field) == kept
        assert [gene.name for gene in after.context] == [gene.name for gene in before.context]


def test_a_divisor_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="--divisor 0: at least 1"):
        rounded(space_of("mobilenet_v1"), 0)
