from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import random_genomes, space_of, tiny_space
from torch import Tensor, nn

import kernels
from engine import calibrated, population, trie
from engine.data import ImageSet, Preprocessing, open_data
from engine.errors import UserError
from engine.population import Scores, ScoringImages, genomes_per_pass, score, score_passes, scoring_images
from engine.pruned import ConvBlock, PrunedNet
from engine.pruningnet import PruningNet
from engine.racing import Race
from engine.space.structure import convolutions
from engine.trie import activation_bytes, plan
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
    return all(torch.equal(value, vars(other)[name]) for name, value in vars(one).items())


def members_of(scores: Scores, members: Any) -> Scores:
    return Scores(*(value[members] for value in vars(scores).values()))


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
    assert scores.images.tolist() == [10, 10, 10]
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
        assert equal(alone, members_of(together, [p]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPACES)
def test_a_plan_of_fixed_shape_changes_no_bit_of_a_score(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = pruningnet(name).to_precision(dtype)
    images = images_of(net.space.classes, calibration=6, scored=4, side=32)
    genome_PG = random_genomes(net.space, 5)
    # Prefixes of any length, and an equal pair.
    for p, shared in enumerate((len(net.space.genes), len(net.space.genes) - 1, 2), start=1):
        genome_PG[p, :shared] = genome_PG[0, :shared]
    expected = score(net, genome_PG, images)
    monkeypatch.setattr(trie, "fixed_shape_on", lambda device: True)
    monkeypatch.setattr(population, "fixed_shape_on", lambda device: True)
    for memory in (10**9, 1):
        assert equal(score(net, genome_PG, images, memory), expected)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=20), st.sampled_from([1, 200_000, 1_000_000, 10**9]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_duplicates_and_memory_change_no_bit_of_a_score(
    dtype: torch.dtype, members: list[int], memory: int
) -> None:
    net = pruningnet("tiny").to_precision(dtype)
    images = images_of(5, calibration=5, scored=3, side=16)
    genome_PG = random_genomes(net.space, 12)
    genome_PG[6:, 0] = genome_PG[0, 0]
    expected = score(net, genome_PG, images, memory=10**9)
    scores = score(net, genome_PG[members], images, memory)
    assert equal(scores, members_of(expected, members))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_threads_and_image_chunks_change_no_bit_of_a_score(name: str, dtype: torch.dtype) -> None:
    if backends.chosen("fused_block") == "reference":
        pytest.skip("PyTorch's own convolutions may round differently for other threads and batches")
    net = pruningnet(name).to_precision(dtype)
    images = images_of(net.space.classes, calibration=6, scored=7, side=33)
    genome_PG = random_genomes(net.space, 3)
    expected = score(net, genome_PG, images)
    threads = torch.get_num_threads()
    for number, memory in ((1, 10**9), (3, 1), (2, 3_000_000)):
        torch.set_num_threads(number)
        try:
            assert equal(score(net, genome_PG, images, memory), expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_scores_in_bfloat16_are_near_those_in_float32(name: str) -> None:
    images = images_of(6, calibration=32, scored=10, side=40)
    genome_PG = random_genomes(SPACES[name][0], 3)
    exact = score(pruningnet(name), genome_PG, images)
    rounded = score(pruningnet(name).to_precision(torch.bfloat16), genome_PG, images)
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.1, atol=0)
    assert not torch.equal(rounded.loss, exact.loss)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_passes_cover_every_genome_once_and_fit_the_memory_they_are_given() -> None:
    net, images = pruningnet("tiny"), images_of(5, 4, 2, 16)
    genome_PG = random_genomes(net.space, 19)
    assert [len(members) for members, _ in score_passes(net, genome_PG, images, 10**9)] == [19]
    one_by_one = [members for members, _ in score_passes(net, genome_PG, images, 1)]
    assert [len(members) for members in one_by_one] == [1] * 19
    assert torch.cat(one_by_one).sort().values.tolist() == list(range(19))


@given(st.integers(1, 40), st.integers(0, 10**9))
def test_a_pass_is_the_largest_that_fits(population: int, seed: int) -> None:
    net, images = pruningnet("tiny"), images_of(5, 4, 2, 16)
    genome_PG = torch.randint(3, (population, len(net.space.genes)), generator=seeded(seed))
    needed = [
        activation_bytes(net.space, plan(net.space, genome_PG[:count]), (4, 16, 16), 4)
        for count in range(1, population + 1)
    ]
    assert needed == sorted(needed)
    for memory in (0, needed[0], needed[-1] - 1, needed[-1], (needed[0] + needed[-1]) // 2):
        count = genomes_per_pass(net, genome_PG, images, memory)
        assert count == 1 or needed[count - 1] <= memory
        assert count == population or needed[count] > memory


@pytest.mark.parametrize(
    ("chosen", "least"), [({"ragged_depthwise": "cuda"}, 0), ({"score_logits": "reference"}, 1), ({}, 0)]
)
def test_instances_have_no_channels_where_every_kernel_takes_such(
    chosen: dict[str, str], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "chosen", lambda op, device, dtype: chosen.get(op, "triton"))
    assert calibrated.least_channels(torch.zeros(1)) == least


class Allocator:
    """Stands before an op and runs out of memory for so many calls."""

    def __init__(self, op: Callable[..., Any], failures: int) -> None:
        self.op, self.failures = op, failures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return self.op(*args, **kwargs)


@pytest.mark.parametrize("op", ["ragged_conv", "fused_block"])
def test_running_out_of_memory_takes_smaller_bites_and_changes_no_score(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images = pruningnet("tiny"), images_of(5)
    genome_PG = random_genomes(net.space, 6)
    expected = score(net, genome_PG, images)
    allocator = Allocator(getattr(kernels, op), failures=3)
    monkeypatch.setattr(kernels, op, allocator)
    assert equal(score(net, genome_PG, images), expected)
    assert allocator.failures == 0


def test_one_structure_that_does_not_fit_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = pruningnet("tiny"), images_of(5)
    monkeypatch.setattr(kernels, "ragged_conv", Allocator(kernels.ragged_conv, failures=10**9))
    with pytest.raises(UserError, match="lower --calibration-images"):
        score(net, random_genomes(net.space, 2), images)


def test_an_error_that_is_not_about_memory_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("cin[0] is 0")

    monkeypatch.setattr(kernels, "ragged_conv", broken)
    net = pruningnet("tiny")
    with pytest.raises(RuntimeError, match="cin"):
        score(net, random_genomes(net.space, 2), images_of(5))


def test_scoring_twice_gives_the_same_bits() -> None:
    net, images = pruningnet("mobilenet_v2"), images_of(6, 4, 4, 32)
    genome_PG = random_genomes(net.space, 2)
    assert equal(score(net, genome_PG, images), score(net, genome_PG, images))


# -- races and shares of the images ----------------------------------------------------------------------------------


class Never(Race):
    """A race that stops everybody of an even position at its first test, and nobody else."""

    def goes_on(self, right_PN: Tensor, seen_N: Tensor) -> Tensor:
        return torch.arange(len(right_PN)) % 2 == 1


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("name", SPACES)
def test_who_goes_on_in_a_race_scores_as_without_one(
    name: str, fixed_shape: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trie, "fixed_shape_on", lambda device: fixed_shape)
    net = pruningnet(name)
    images = images_of(net.space.classes, calibration=6, scored=10, side=32)
    genome_PG = random_genomes(net.space, 8)
    # Prefixes that some stop with and others go on with.
    genome_PG[1::2, :3] = genome_PG[::2, :3]
    genome_PG[3] = genome_PG[2]
    expected = score(net, genome_PG, images)
    race = Never(torch.ones(10, dtype=torch.bool), 0.9)
    for members, scores in score_passes(net, genome_PG, images, race=race):
        assert len(members) == 8
        # Of those who are left at each of three tests every second one goes on: 8, 4, 2, 1.
        assert scores.images.sort().values.tolist() == [*[2] * 4, *[3] * 2, 5, 10]
        seen_PN = scores.seen_PN
        assert torch.equal(scores.right_PN & seen_PN, expected.right_PN[members] & seen_PN)
        assert torch.equal(scores.loss_PN[seen_PN], expected.loss_PN[members][seen_PN])
        assert torch.equal(scores.correct[-1:], (expected.right_PN[members] & seen_PN).sum(1)[-1:])
        seen_loss = expected.loss_PN[members].where(seen_PN, 0).sum(1) / seen_PN.sum(1)
        torch.testing.assert_close(scores.loss, seen_loss)


def test_a_race_that_stops_everybody_ends() -> None:
    net, images = pruningnet("tiny"), images_of(5)

    class Everybody(Race):
        def goes_on(self, right_PN: Tensor, seen_N: Tensor) -> Tensor:
            return torch.zeros(len(right_PN), dtype=torch.bool)

    ((_, scores),) = score_passes(
        net, random_genomes(net.space, 3), images, race=Everybody(torch.ones(10, dtype=torch.bool), 0.9)
    )
    assert scores.images.tolist() == [2, 2, 2]


def test_scores_on_shares_of_the_images_join_to_the_bits_of_the_whole() -> None:
    net, images = pruningnet("tiny"), images_of(5)
    genome_PG = random_genomes(net.space, 4)
    expected, joined = score(net, genome_PG, images), Scores.empty(4, 10, torch.device("cpu"))
    for positions in (torch.tensor([1, 4, 9]), torch.tensor([0, 2, 3, 5, 6, 7, 8])):
        for members, part in score_passes(net, genome_PG, images, positions=positions):
            assert torch.equal(part.seen_PN.any(0).nonzero()[:, 0], positions)
            for name, whole in vars(joined).items():
                whole[members[:, None], positions] = getattr(part, name)[:, positions]
    assert equal(joined, expected)
    assert torch.equal(joined.loss, expected.loss)


# -- images ----------------------------------------------------------------------------------------------------------


def test_every_scored_image_counts_once() -> None:
    net, images = pruningnet("tiny"), images_of(5)
    genome_PG = random_genomes(net.space, 4)
    whole = score(net, genome_PG, images)
    parts = [score(net, genome_PG, first_scored(images, start, stop)) for start, stop in pairwise((0, 3, 4, 10))]
    assert torch.equal(torch.stack([part.correct for part in parts]).sum(0), whole.correct)
    total = torch.stack([part.loss * part.images for part in parts]).sum(0)
    torch.testing.assert_close(total / 10, whole.loss)


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
    assert [len(labels) for *_, labels in images.chunks(torch.arange(len(validation)), 100)] == [100, 100, 100, 60]
    assert len(scoring_images(data, 10**6).calibration_NCHW) == len(train)
