"""Scoring by several ranks: each scores its share, and the answers are those of one process, bit for bit.

Shape suffixes: P population, G genes, N images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.population import Scores
from engine.racing import Race
from engine.run import ranks
from engine.run.machine import machine_facts
from engine.run.scores import Scorer
from engine.run.scoring import Scoring
from engine.run.shares import Joined, share_out


def shared_scorer(scoring: Scoring) -> Scorer:
    """A scorer that shares the work out to all ranks there are.

    Waits until they are ready. Raises `UserError` if one of them cannot score, or would score something else.
    """
    leader = ranks.leader()
    if leader is None:
        return scoring.score
    own = facts(scoring)
    for rank, others in ranks.answers():
        check_facts(own, rank, others)
    ranks.rescue(ranks.SAVED_ALL)
    return partial(_score, leader, scoring)


def serve(scoring: Scoring, next_work: Callable[[], Any], answer: Callable[[Any], None]) -> None:
    """Score what rank 0 sends, pass by pass, for ever."""
    answer(facts(scoring))
    while True:
        genome_PG, race, positions = next_work()
        for members, scores in scoring.score(genome_PG.to(scoring.device), race, positions):
            answer(packed(members, scores))


def facts(scoring: Scoring) -> dict[str, str]:
    """What must be the same on all ranks for them to compute the same, bit for bit."""
    pixels = scoring.images.calibration_NCHW.cpu().numpy().tobytes()
    known = {name: str(value) for name, value in scoring.key.items()}
    known["calibration batch"] = hashlib.sha256(pixels).hexdigest()
    return known | machine_facts(scoring.device)


def check_facts(own: Mapping[str, str], rank: int, others: Mapping[str, str]) -> None:
    """Raise `UserError` unless another rank computes the same."""
    differing = [name for name in own if own[name] != others.get(name)]
    if differing:
        first = differing[0]
        raise UserError(
            f"rank {rank} has another {' and another '.join(differing)} than rank 0 ({others.get(first)} instead of "
            f"{own[first]}): give all ranks the same files and the same kind of processor"
        )


def _score(
    leader: ranks.Leader, scoring: Scoring, genome_PG: Tensor, race: Race | None
) -> Iterator[tuple[Tensor, Scores]]:
    """Score a population on all ranks; yields as answers come in, rank 0's own among them."""
    images = len(scoring.images.subset)
    # A race shows its images in an order of its own: they are not shared out.
    shares = share_out(genome_PG, leader.size, len(scoring.images.calibration_NCHW), images, whole=race is not None)
    joined = Joined(shares, len(genome_PG), images, genome_PG.device)

    def take() -> tuple[Tensor, Scores]:
        rank, content = leader.answer()
        members, scores = unpacked(content, images)
        return joined.add(shares[rank].members[members.cpu()], scores)

    for rank, share in enumerate(shares[1:], start=1):
        if len(share.members):
            leader.send(rank, (genome_PG[share.members].cpu(), race, share.images))
    for members, scores in scoring.score(genome_PG[shares[0].members], race, shares[0].images):
        yield joined.add(shares[0].members[members.cpu()], scores)
        while leader.has_answer():
            yield take()
    while not joined.complete:
        yield take()


def packed(members: Tensor, scores: Scores) -> Tensor:
    """Positions and scores as bytes; numbers of eight bytes come first, where they are aligned."""
    columns = (members, scores.loss_PN, scores.right_PN, scores.seen_PN)
    return torch.cat([column.contiguous().view(torch.uint8).flatten() for column in columns])


def unpacked(content: Tensor, images: int) -> tuple[Tensor, Scores]:
    """What `packed` made bytes of; the number of images is known."""
    genomes = len(content) // (8 + 10 * images)
    cells = genomes * images
    members, loss, right, seen = content.split([8 * genomes, 8 * cells, cells, cells])
    right_PN, seen_PN = (column.view(torch.bool).reshape(genomes, images) for column in (right, seen))
    return members.view(torch.int64), Scores(right_PN, loss.view(torch.float64).reshape(genomes, images), seen_PN)
