"""The trie of a population, the chains of a network, and the memory both need."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import random_genomes, space_of, tiny_space

from engine import trie
from engine.space import IMAGE, Conv, Gene, Space
from engine.trie import activation_bytes, blocks, last_reads, materialised, plan
from kernels.layout import activation_slot

SPACES = {"tiny": tiny_space(), **{name: space_of(name, 6) for name in ("mobilenet_v1", "mobilenet_v2", "resnet50")}}


def deciding_genes(space: Space) -> dict[str, list[int]]:
    """Positions of the genes that decide each layer's output and everything before it: all used so far."""
    used: list[Gene] = []
    deciding: dict[str, list[int]] = {IMAGE: []}
    for conv in space.convs:
        for width in (conv.cin, conv.cout, *conv.context):
            if isinstance(width, Gene) and width not in used:
                used.append(width)
        deciding[conv.name] = [space.genes.index(gene) for gene in used]
    return deciding


@settings(max_examples=20)
@given(st.sampled_from(sorted(SPACES)), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**32))
def test_a_plan_computes_every_shared_prefix_once_and_reads_the_right_parents(
    name: str, population: int, choices: int, seed: int
) -> None:
    space = SPACES[name]
    # Few choices, so that genomes share prefixes and some are equal.
    genome_PG = torch.randint(choices, (population, len(space.genes)), generator=torch.Generator().manual_seed(seed))
    deciding = deciding_genes(space)

    def nodes(layer: str, genomes: list[list[int]]) -> list[tuple[int, ...]]:
        return [tuple(genome[gene] for gene in deciding[layer]) for genome in genomes]

    computed: dict[str, list[tuple[int, ...]]] = {IMAGE: [()]}
    for conv, instances in zip(space.convs, plan(space, genome_PG), strict=True):
        genome_SG = genome_PG[instances.member_S].tolist()
        computed[conv.name] = nodes(conv.name, genome_SG)
        wanted = nodes(conv.name, genome_PG.tolist())
        assert sorted(computed[conv.name]) == sorted(set(wanted))
        assert [computed[conv.name][s] for s in instances.instance_P.tolist()] == wanted
        for read, source_S in ((conv.source, instances.source_S), (conv.shortcut, instances.shortcut_S)):
            assert (read is None) == (source_S is None)
            if read is not None and source_S is not None:
                assert [computed[read][s] for s in source_S.tolist()] == nodes(read, genome_SG)


@settings(max_examples=10)
@given(st.sampled_from(sorted(SPACES)), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**32))
def test_a_plan_of_fixed_shape_shares_what_the_trie_shares(name: str, population: int, choices: int, seed: int) -> None:
    space = SPACES[name]
    genome_PG = torch.randint(choices, (population, len(space.genes)), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie, "fixed_shape_on", lambda device: True)
        fixed_plan = plan(space, genome_PG)
    everyone = list(range(population))
    for shared, fixed in zip(plan(space, genome_PG), fixed_plan, strict=True):
        assert shared.idle_S is None
        assert shared.idle_W is None
        assert fixed.idle_S is not None
        assert fixed.idle_W is not None
        # Who is computed is the first genome of every node, and everybody is sent to theirs.
        first = [shared.instance_P.tolist().index(node) for node in shared.instance_P.tolist()]
        assert fixed.instance_P.tolist() == first
        assert fixed.member_S.tolist() == everyone
        assert fixed.idle_S.tolist() == [p != first[p] for p in everyone]
        assert (~fixed.idle_S).sum() == len(shared.member_S)
        assert (~fixed.idle_W).sum() == len(shared.weight_genome_WG)
        for ours, theirs in ((fixed.source_S, shared.source_S), (fixed.shortcut_S, shared.shortcut_S)):
            assert (ours is None) == (theirs is None)
        assert not fixed.idle_W[fixed.weight_S].any()


def test_genomes_that_differ_in_the_last_gene_alone_share_all_but_the_last_layers() -> None:
    space = space_of("mobilenet_v1")
    genome_PG = space.uniform_choice(5).repeat(4, 1)
    genome_PG[:, -1] = torch.arange(4)
    # The last gene is the output of block 12: its weights, and those of block 13, depend on it.
    assert [len(instances.member_S) for instances in plan(space, genome_PG)] == [1] * 23 + [4] * 4


@given(st.sampled_from(sorted(SPACES)), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**32))
def test_weights_are_generated_once_for_equal_choices_of_the_genes_they_depend_on(
    name: str, population: int, choices: int, seed: int
) -> None:
    space = SPACES[name]
    generator = torch.Generator().manual_seed(seed)
    genome_PG = torch.randint(choices, (population, len(space.genes)), generator=generator)
    for conv, instances in zip(space.convs, plan(space, genome_PG), strict=True):
        genes = [space.gene_index[g] for g in {conv.cin, conv.cout, *conv.context} if isinstance(g, Gene)]
        distinct = [tuple(row) for row in instances.weight_genome_WG[:, genes].tolist()]
        assert len(set(distinct)) == len(distinct)
        used = [distinct[w] for w in instances.weight_S.tolist()]
        assert used == [tuple(row) for row in genome_PG[instances.member_S][:, genes].tolist()]


# -- chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_every_convolution_is_in_one_chain_and_reads_what_was_computed_before(name: str) -> None:
    space = SPACES[name]
    chains = blocks(space)
    assert sorted(conv.name for chain in chains for conv in chain) == sorted(conv.name for conv in space.convs)
    computed = {IMAGE}
    for chain in chains:
        assert {chain[0].source, chain[-1].shortcut or IMAGE} <= computed
        for before, conv in pairwise(chain):
            assert conv.source == before.name
            assert before.shortcut is None
            assert not before.max_pool
            assert sum(before.name in (c.source, c.shortcut) for c in space.convs) == 1
        computed.add(chain[-1].name)


def names(chain: list[Conv]) -> str:
    return " ".join(conv.name for conv in chain)


def test_chains_are_the_blocks_of_the_papers() -> None:
    v1 = [names(chain) for chain in blocks(SPACES["mobilenet_v1"])]
    assert v1[:3] == ["stem", "block1.depthwise block1.pointwise", "block2.depthwise block2.pointwise"]
    v2 = [names(chain) for chain in blocks(SPACES["mobilenet_v2"])]
    assert "stage3.2.expand stage3.2.depthwise stage3.2.project" in v2
    resnet = [names(chain) for chain in blocks(SPACES["resnet50"])]
    first, second = (
        "stage2.1.reduce stage2.1.spatial stage2.1.expand",
        "stage2.2.reduce stage2.2.spatial stage2.2.expand",
    )
    assert {"stem", first, second} <= set(resnet)
    assert resnet.index("stage2.1.shortcut") < resnet.index(first)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_activation_bytes_are_those_of_a_network_followed_by_hand() -> None:
    """MobileNetV1 at its widest point: the stem's output, read by the first pair, and what the pair writes."""
    space, image = SPACES["mobilenet_v1"], (2, 32, 32)
    layers = plan(space, space.uniform_choice(30))
    # No shortcuts: at most an input and an output are alive; 16 × 16 × 32 in and × 64 out is the largest pair.
    assert activation_bytes(space, layers, image, 4) == 4 * (
        activation_slot((2, 16, 16), 32) + activation_slot((2, 16, 16), 64)
    )
    assert activation_bytes(space, layers, image, 2) * 2 == activation_bytes(space, layers, image, 4)


def test_memory_is_counted_in_instances_not_in_genomes() -> None:
    space, image = SPACES["mobilenet_v2"], (2, 32, 32)
    one = space.uniform_choice(30)
    same, different = one.repeat(5, 1), random_genomes(space, 5)
    alone = activation_bytes(space, plan(space, one), image, 4)
    assert activation_bytes(space, plan(space, same), image, 4) == alone
    assert activation_bytes(space, plan(space, different), image, 4) > 3 * alone


@pytest.mark.parametrize("name", SPACES)
def test_what_is_materialised_is_what_cannot_be_normalised_by_its_readers(name: str) -> None:
    space = SPACES[name]
    added = {conv.shortcut for conv in space.convs}
    for conv in space.convs:
        assert (conv.name in materialised(space)) == bool(conv.shortcut or conv.max_pool or conv.name in added)


def test_a_tensor_lives_until_the_last_chain_that_reads_it() -> None:
    space = SPACES["resnet50"]
    chains = blocks(space)
    for name, step in last_reads(chains).items():
        readers = [i for i, chain in enumerate(chains) if name in (chain[0].source, chain[-1].shortcut)]
        assert max(readers) == step
