from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import random_genomes, space_of, tiny_space
from torch import Tensor, nn

import engine.population
from engine.data import ImageSet, Preprocessing, open_data
from engine.population import Scores, ScoringImages, genomes_per_pass, plan, score, score_passes, scoring_images
from engine.pruned import ConvBlock, PrunedNet
from engine.pruningnet import PruningNet
from engine.space import IMAGE, Gene, Space
from engine.space.costs import cost_model
from engine.space.structure import convolutions
from kernels import backends

# Each with a small hidden size for its PruningNet.
SPACES = {
    "tiny": (tiny_space(), 4),
    "mobilenet_v1": (space_of("mobilenet_v1", 6), 3),
    "mobilenet_v2": (space_of("mobilenet_v2", 6), 3),
    "resnet50": (space_of("resnet50", 6), 2),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pruningnet(name: str) -> PruningNet:
    return PruningNet(*SPACES[name], generator=seeded())


def images_of(
    classes: int, calibration: int = 12, scored: int = 10, side: int = 40, split: str = "sub_validation"
) -> ScoringImages:
    """Noise with random labels."""
    preprocessing = Preprocessing(side, side, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    stored = torch.randint(256, (calibration + scored, 3, side, side), dtype=torch.uint8, generator=seeded(1))
    labels = torch.randint(classes, (scored,), generator=seeded(2))
    subset = ImageSet(split, torch.arange(scored), labels, stored[calibration:])
    return ScoringImages(preprocessing(stored[:calibration]), subset, preprocessing)


def first_scored(images: ScoringImages, start: int, stop: int) -> ScoringImages:
    """The same with fewer scored images."""
    subset = images.subset
    part = ImageSet(
        subset.name, subset.indices[start:stop], subset.labels[start:stop], subset.images(slice(start, stop))
    )
    return replace(images, subset=part)


def equal(one: Scores, other: Scores) -> bool:
    return torch.equal(one.correct, other.correct) and torch.equal(one.loss, other.loss)


# -- the definition, by a plain network ------------------------------------------------------------------------------


@torch.no_grad()
def plain_score(net: PruningNet, genome_G: Tensor, images: ScoringImages) -> tuple[int, float]:
    """Correct images and mean loss of a PrunedNet in float64 with generated weights, its BatchNorm calibrated."""
    plain = PrunedNet(convolutions(net.space, genome_G), net.space.classes).double().eval()
    blocks = [block for block in plain.convs.values() if isinstance(block, ConvBlock)]
    # `generate` is held to a plain implementation in test_pruningnet.py.
    for block, [weight] in zip(blocks, net.generate(genome_G[None]), strict=True):
        block.conv.weight.copy_(weight)
    plain.classifier.weight.copy_(net.classifier.weight[:, : plain.classifier.in_features])
    plain.classifier.bias.copy_(net.classifier.bias)

    def calibrate(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)

    hooks = [block.norm.register_forward_pre_hook(calibrate) for block in blocks]
    plain(images.calibration_NCHW.double())
    for hook in hooks:
        hook.remove()
    subset = images.subset
    logits = plain(images.preprocessing(subset.images(slice(None))).double())
    return int((logits.argmax(1) == subset.labels).sum()), float(F.cross_entropy(logits, subset.labels))


@pytest.mark.parametrize(("name", "side"), [("tiny", 21), ("mobilenet_v1", 32), ("mobilenet_v2", 64), ("resnet50", 40)])
def test_a_score_is_that_of_the_plain_network_with_generated_weights(name: str, side: int) -> None:
    net = pruningnet(name)
    images = images_of(net.space.classes, side=side)
    genome_PG = torch.cat([random_genomes(net.space, 2), net.space.uniform_choice(0)])
    scores = score(net, genome_PG, images)
    assert scores.images == 10
    for p, genome_G in enumerate(genome_PG):
        correct, loss = plain_score(net, genome_G, images)
        assert scores.correct[p] == correct
        assert float(scores.loss[p]) == pytest.approx(loss, rel=1e-4)


def test_a_network_that_knows_the_answers_has_them_all_correct() -> None:
    net = pruningnet("tiny")
    images = images_of(5)
    with torch.no_grad():
        net.classifier.weight.zero_()
        net.classifier.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0]))
    images.subset.labels[:] = torch.tensor([2] * 7 + [0] * 3)
    scores = score(net, random_genomes(net.space, 3), images)
    assert scores.correct.tolist() == [7, 7, 7]
    # Cross-entropy: log(Σ exp) - logit of the label.
    total = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0], dtype=torch.float64).logsumexp(0).item()
    torch.testing.assert_close(scores.loss, torch.full((3,), total - 9 * 0.7, dtype=torch.float64))


# -- a genome's score is its own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_a_genome_scores_the_same_alone_and_in_a_population(name: str) -> None:
    net = pruningnet(name)
    images = images_of(net.space.classes, calibration=6, scored=4, side=32)
    genome_PG = random_genomes(net.space, 3)
    # Share prefixes: the second half of one genome after the first half of another.
    genome_PG[1, : len(net.space.genes) // 2] = genome_PG[0, : len(net.space.genes) // 2]
    together = score(net, genome_PG, images)
    for p in range(3):
        alone = score(net, genome_PG[p][None], images)
        assert equal(alone, Scores(together.correct[p][None], together.loss[p][None], 4))


@settings(max_examples=10)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=20), st.integers(1, 9), st.sampled_from(["auto", "reference"]))
def test_order_duplicates_and_the_size_of_a_pass_change_no_bit_of_a_score(
    members: list[int], per_pass: int, backend: str
) -> None:
    net = pruningnet("tiny")
    images = images_of(5, calibration=5, scored=3, side=16)
    genome_PG = random_genomes(net.space, 12)
    genome_PG[6:, 0] = genome_PG[0, 0]
    with backends.use(backend), pytest.MonkeyPatch.context() as patch:
        reference = score(net, genome_PG, images)
        patch.setattr(engine.population, "GENOMES_PER_PASS", per_pass)
        scores = score(net, genome_PG[members], images)
    assert equal(scores, Scores(reference.correct[members], reference.loss[members], 3))


def test_passes_cover_every_genome_once_and_are_no_larger_than_allowed() -> None:
    net = pruningnet("tiny")
    passes = [members for members, _ in score_passes(net, random_genomes(net.space, 19), images_of(5, 4, 2, 16))]
    assert [len(members) for members in passes] == [8, 8, 3]
    assert torch.cat(passes).sort().values.tolist() == list(range(19))


def test_scoring_twice_gives_the_same_bits() -> None:
    net, images = pruningnet("mobilenet_v2"), images_of(6, 4, 4, 32)
    genome_PG = random_genomes(net.space, 2)
    assert equal(score(net, genome_PG, images), score(net, genome_PG, images))


# -- images ----------------------------------------------------------------------------------------------------------


def test_every_scored_image_counts_once_however_the_images_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = pruningnet("tiny"), images_of(5)
    genome_PG = random_genomes(net.space, 4)
    whole = score(net, genome_PG, images)
    parts = [score(net, genome_PG, first_scored(images, start, stop)) for start, stop in pairwise((0, 3, 4, 10))]
    assert torch.equal(torch.stack([part.correct for part in parts]).sum(0), whole.correct)
    total = torch.stack([part.loss * part.images for part in parts]).sum(0)
    torch.testing.assert_close(total / 10, whole.loss)
    monkeypatch.setattr(engine.population, "IMAGE_CHUNK", 3)
    chunked = score(net, genome_PG, images)
    assert torch.equal(chunked.correct, whole.correct)
    torch.testing.assert_close(chunked.loss, whole.loss)


def test_every_calibration_image_shapes_the_statistics() -> None:
    net, images = pruningnet("tiny"), images_of(5)
    genome_PG = random_genomes(net.space, 1)
    loss = score(net, genome_PG, images).loss
    for n in range(12):
        changed = images.calibration_NCHW.clone()
        changed[n] = changed[n].flip(0) * 2
        assert score(net, genome_PG, replace(images, calibration_NCHW=changed)).loss != loss


def test_statistics_are_those_of_the_images_not_of_their_number_or_order() -> None:
    net, images = pruningnet("tiny"), images_of(5)
    genome_PG = random_genomes(net.space, 3)
    loss = score(net, genome_PG, images).loss
    twice = images.calibration_NCHW.repeat(2, 1, 1, 1).flip(0)
    torch.testing.assert_close(
        score(net, genome_PG, replace(images, calibration_NCHW=twice)).loss, loss, rtol=1e-5, atol=0
    )


def test_candidates_are_never_scored_on_the_test_split() -> None:
    with pytest.raises(ValueError, match="never scored on the test split"):
        images_of(5, split="test")


def test_calibration_takes_the_first_training_images_and_scoring_the_sub_validation_images() -> None:
    data = open_data("digits")
    train, validation = data.subset("sub_train"), data.subset("sub_validation")
    images = scoring_images(data, 50)
    assert torch.equal(images.calibration_NCHW, data.preprocessing(train.images(slice(50))))
    assert images.subset is validation
    assert sum(len(labels) for _, labels in images.chunks()) == len(validation)
    assert len(scoring_images(data, 10**6).calibration_NCHW) == len(train)


# -- the trie ----------------------------------------------------------------------------------------------------------


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
    space = SPACES[name][0]
    # Few choices, so that genomes share prefixes and some are equal.
    genome_PG = torch.randint(choices, (population, len(space.genes)), generator=seeded(seed))
    deciding = deciding_genes(space)

    def nodes(layer: str, genomes: list[list[int]]) -> list[tuple[int, ...]]:
        return [tuple(genome[gene] for gene in deciding[layer]) for genome in genomes]

    computed: dict[str, list[tuple[int, ...]]] = {IMAGE: [()]}
    for conv, instances in zip(space.convs, plan(space, genome_PG), strict=True):
        genome_SG = instances.genome_SG.tolist()
        computed[conv.name] = nodes(conv.name, genome_SG)
        wanted = nodes(conv.name, genome_PG.tolist())
        assert sorted(computed[conv.name]) == sorted(set(wanted))
        assert [computed[conv.name][s] for s in instances.instance_P.tolist()] == wanted
        for read, source_S in ((conv.source, instances.source_S), (conv.shortcut, instances.shortcut_S)):
            assert (read is None) == (source_S is None)
            if read is not None and source_S is not None:
                assert [computed[read][s] for s in source_S.tolist()] == nodes(read, genome_SG)


def test_genomes_that_differ_in_the_last_gene_alone_share_all_but_the_last_layers() -> None:
    space = space_of("mobilenet_v1")
    genome_PG = space.uniform_choice(5).repeat(4, 1)
    genome_PG[:, -1] = torch.arange(4)
    # The last gene is the output of block 12: its weights, and those of block 13, depend on it.
    assert [len(instances.genome_SG) for instances in plan(space, genome_PG)] == [1] * 23 + [4] * 4


def test_a_pass_takes_fewer_genomes_where_calibration_takes_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    space, images = space_of("mobilenet_v1", 6), images_of(6)
    assert genomes_per_pass(space, images) == engine.population.GENOMES_PER_PASS
    monkeypatch.setattr(engine.population, "PASS_BYTES", 1)
    assert genomes_per_pass(space, images) == 1
    peak = int(cost_model(space, 40).peak_activation_bytes(space.uniform_choice(30)))
    monkeypatch.setattr(engine.population, "PASS_BYTES", 3 * 2 * 12 * peak)
    assert genomes_per_pass(space, images) == 3
