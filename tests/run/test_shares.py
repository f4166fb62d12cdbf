"""Work is shared out to ranks without a gap or an overlap, and the answers are joined to those of one process."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.population import Scores
from engine.run.shared import packed, unpacked
from engine.run.shares import Joined, Share, share_out

COUNTS = st.integers(1, 9)


def population(genomes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 3, (genomes, 4), generator=torch.Generator().manual_seed(seed))


def cells(shares: list[Share], images: int) -> list[tuple[int, int]]:
    """All pairs of a genome and an image, as often as a rank scores it."""
    return [
        (genome, image)
        for share in shares
        for genome in share.members.tolist()
        for image in (range(images) if share.images is None else share.images.tolist())
    ]


@given(COUNTS, COUNTS, st.integers(0, 50), COUNTS, st.booleans())
def test_every_genome_is_shown_every_image_by_exactly_one_rank(
    genomes: int, ranks: int, calibration: int, images: int, whole: bool
) -> None:
    shares = share_out(population(genomes), ranks, calibration, images, whole)
    assert len(shares) == ranks
    assert sorted(cells(shares, images)) == [(genome, image) for genome in range(genomes) for image in range(images)]
    assert len(shares[0].members), "rank 0 always has work"


@given(COUNTS, COUNTS, COUNTS)
def test_neighbours_in_lexicographic_order_stay_together(genomes: int, ranks: int, images: int) -> None:
    genome_PG = population(genomes)
    shares = share_out(genome_PG, ranks, 10, images, whole=True)
    rows = genome_PG[torch.cat([share.members for share in shares])].tolist()
    assert rows == sorted(genome_PG.tolist())


@given(COUNTS, COUNTS, COUNTS)
def test_whole_images_are_not_shared_out(genomes: int, ranks: int, images: int) -> None:
    shares = share_out(population(genomes), ranks, 10, images, whole=True)
    assert all(share.images is None for share in shares)
    assert sum(len(share.members) > 0 for share in shares) == min(genomes, ranks)


def test_a_single_genome_is_shown_a_part_of_the_images_by_every_rank() -> None:
    shares = share_out(population(1), 3, calibration=1000, images=10)
    assert [share.members.tolist() for share in shares] == [[0], [0], [0]]
    assert [len(share.images) for share in shares if share.images is not None] == [4, 3, 3]


def test_many_genomes_are_shared_out_and_their_images_are_not() -> None:
    shares = share_out(population(50), 4, calibration=1000, images=5000)
    assert [len(share.members) for share in shares] == [13, 13, 12, 12]
    assert all(share.images is None for share in shares)


def test_calibrating_twice_is_worth_it_only_if_many_images_are_scored() -> None:
    few, many = (share_out(population(2), 4, calibration=1000, images=images) for images in (100, 100_000))
    assert [len(share.members) for share in few] == [1, 1, 1, 1]
    # Two teams of two show half of the images to one genome; one team of four would show a quarter to two.
    assert [len(share.members) for share in many] == [1, 1, 1, 1]
    assert [len(share.members) for share in share_out(population(2), 3, calibration=1000, images=100)] == [1, 1, 1]
    assert [len(share.members) for share in share_out(population(2), 3, calibration=1000, images=100_000)] == [2, 2, 2]


@given(COUNTS, COUNTS, COUNTS, st.booleans())
def test_answers_joined_in_any_order_are_those_of_one_process(
    genomes: int, ranks: int, images: int, whole: bool
) -> None:
    generator = torch.Generator().manual_seed(genomes)
    loss_PN = torch.rand(genomes, images, dtype=torch.float64, generator=generator)
    seen_PN = torch.rand(genomes, images, generator=generator) < (0.7 if whole else 2)
    everything = Scores(loss_PN < 0.5, loss_PN, seen_PN)
    shares = share_out(population(genomes), ranks, 10, images, whole)
    joined = Joined(shares, genomes, images, torch.device("cpu"))
    finished: list[int] = []
    for share in reversed([share for share in shares if len(share.members)]):
        assert not joined.complete
        shown_PN = everything.seen_PN[share.members].clone()
        if share.images is not None:
            shown_PN &= torch.zeros(images, dtype=torch.bool).index_fill(0, share.images, True)
        # What a rank did not look at must not be read.
        part = Scores(
            everything.right_PN[share.members] ^ ~shown_PN,
            everything.loss_PN[share.members].where(shown_PN, torch.nan),
            shown_PN,
        )
        members, scores = joined.add(share.members, unpacked(packed(share.members, part), images)[1])
        finished += members.tolist()
        assert torch.equal(scores.correct, everything.correct[members])
        assert torch.equal(scores.images, everything.images[members])
        assert torch.equal(scores.loss.nan_to_num(), everything.loss[members].nan_to_num())
    assert joined.complete
    assert sorted(finished) == list(range(genomes))


@given(COUNTS, COUNTS)
def test_scores_come_out_of_their_bytes_as_they_went_in(genomes: int, images: int) -> None:
    loss_PN = torch.rand(genomes, images, dtype=torch.float64)
    scores = Scores(loss_PN < 0.5, loss_PN, loss_PN < 0.7)
    members, back = unpacked(packed(torch.arange(genomes) + 7, scores), images)
    assert members.tolist() == [position + 7 for position in range(genomes)]
    for name, value in vars(scores).items():
        assert torch.equal(getattr(back, name), value)
