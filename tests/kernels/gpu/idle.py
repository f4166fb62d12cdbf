"""Subnetworks of no channels: nothing is computed of them, and those beside them do not notice.

A plan of fixed shape has them wherever two genomes share a layer (`engine.trie`). Run by test_idle.py in a process of
its own, under Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import DEVICE, LAUNCHERS
from ragged import moved
from test_on_a_gpu import ARGUMENTS
from torch import Tensor

from kernels import layout

# Where an op takes the channels of its subnetworks.
WIDTHS = {
    "generate_weights": (3, 4),
    "ragged_conv": (2, 3),
    "ragged_depthwise": (2,),
    "ragged_normalise": (3,),
    "ragged_max_pool": (1,),
    "score_logits": (4,),
    "fused_block": (1, 5),
}


def launch(op: str, arguments: list[Any]) -> list[Tensor]:
    with torch.no_grad():
        results = moved(LAUNCHERS[op](*moved(arguments, DEVICE)), "cpu")
    return list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("idle", [0, 1])
@pytest.mark.parametrize("op", WIDTHS)
def test_a_subnetwork_beside_an_idle_one_computes_the_same(op: str, idle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if op not in LAUNCHERS:
        pytest.skip("no such kernel")
    monkeypatch.setattr(layout, "channels_per_word", lambda dtype, device: 1)
    arguments = ARGUMENTS[op]()
    expected = launch(op, arguments)
    for place in WIDTHS[op]:
        widths = arguments[place] if isinstance(arguments[place], list) else [arguments[place]]
        for width_S in widths:
            width_S[idle] = 0
    results = launch(op, arguments)
    for result, wanted in zip(results, expected, strict=True):
        if len(wanted):
            assert torch.equal(result[1 - idle], wanted[1 - idle])
    if op in ("ragged_conv", "ragged_depthwise") and len(results[1]):
        assert not results[1][idle].any()
