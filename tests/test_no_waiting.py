"""What must not wait for a GPU does not; and the detector finds what would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from no_waiting import META, WaitError, no_waiting
from structures import space_of, tiny_space
from test_population import images_of
from torch import Tensor

from engine.population import ScoringImages, score
from engine.pruningnet import PruningNet
from engine.random import random_integers
from engine.trie import plan

# What meta tensors refuse by themselves.
REFUSED = (NotImplementedError, RuntimeError, WaitError)
WAITING: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: float(x[0, 0]),
    "a condition": lambda x: bool((x > 0).any()),
    "a list": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: torch.arange(3).to(x.device),
    "a copy in place": lambda x: x[0].copy_(torch.arange(4.0)),
    "an index from the host": lambda x: x[torch.arange(2)],
    "a list as an index": lambda x: x[:, [0, 1]],
    "numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new numbers": lambda x: x.new_tensor([1.0]),
    "where a mask is true": lambda x: x[x > 0],
    "setting where a mask is true": lambda x: x.__setitem__(x[:, 0] > 0, 1.0),
    "positions": lambda x: x.nonzero(),
    "distinct values": lambda x: x.unique(),
    "counts": lambda x: x[0].long().bincount(),
    "equality": lambda x: torch.equal(x, x),
    "selection": lambda x: x.masked_select(x > 0),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_would_wait_is_found(what: str) -> None:
    x = torch.empty(3, 4, device=META)
    with no_waiting(), pytest.raises(REFUSED):
        WAITING[what](x)


def test_what_does_not_wait_is_let_through() -> None:
    x = torch.empty(3, 4, device=META)
    with no_waiting():
        order = x[:, 0].argsort(stable=True)
        y = x[order].where(x > 0, torch.inf).cumsum(0) * 2.0 + torch.arange(4, device=META)
        y[order, 0] = x[:, 1]
        random_integers(7, 31, (3, 4), META)
    assert y.shape == x.shape


def test_a_plan_for_the_host_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    genome_PG = torch.zeros(4, 3, dtype=torch.int64, device=META)
    monkeypatch.setattr("engine.trie.fixed_shape_on", lambda device: False)
    with no_waiting(), pytest.raises(REFUSED):
        plan(tiny_space(), genome_PG)


# -- the scoring path ------------------------------------------------------------------------------------------------


def on_meta(images: ScoringImages) -> ScoringImages:
    subset = images.subset
    stored = subset.images(slice(None)).to(META)
    subset = replace(subset, labels=subset.labels.to(META), stored=stored)
    return replace(images, calibration_NCHW=images.calibration_NCHW.to(META), subset=subset)


@pytest.mark.parametrize(("name", "memory"), [("tiny", 1), ("mobilenet_v2", 10**9), ("resnet50", 10**9)])
def test_scoring_a_population_does_not_wait(name: str, memory: int) -> None:
    space = tiny_space() if name == "tiny" else space_of(name, 6)
    net = PruningNet(space, 2, device=META).requires_grad_(False).to_precision(torch.bfloat16)
    images = on_meta(images_of(space.classes, calibration=4, scored=5, side=40))
    genome_PG = torch.empty(3, len(space.genes), dtype=torch.int64, device=META)
    # What is copied once is copied by the first call.
    score(net, genome_PG[:1], images, memory)
    with no_waiting():
        scores = score(net, genome_PG, images, memory)
        found = scores.correct, scores.loss, scores.images
    assert [tuple(each.shape) for each in found] == [(3,)] * 3
