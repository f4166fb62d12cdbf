"""What `recipes.py` makes of scores and accuracies, made up."""

import json
from typing import Any

import pytest
import torch
from recipes import compare, difference, held_out, table

from engine.space import architecture
from engine.space.budget import quantities
from engine.space.costs import cost_model

COSTS = cost_model(architecture("mobilenet_v1").build(10))
ACCURACY_MK = torch.arange(8.0).double()[:, None].expand(8, 2) / 10


def made_up(scores: list[float], **row: Any) -> dict[str, Any]:
    run = {"seed": 0, "steps": 5, "seconds_per_step": 0.1, "scores": scores}
    return {"recipe": "plain", "equal": "steps", "steps": 5, "seconds_per_step": 0.1, "runs": [run, run]} | row


def test_half_of_the_structures_cover_all_macs_and_half_lie_in_the_band() -> None:
    genome_MG = held_out(COSTS, 24, "10%:12%")
    macs = quantities(COSTS)["flops"]
    share_M = (COSTS.macs(genome_MG) - macs.least) / (macs.full - macs.least)
    torch.testing.assert_close(share_M[:12], (torch.arange(12) + 0.5) / 12, rtol=0, atol=0.03)
    part_M = COSTS.macs(genome_MG[12:]) / macs.full
    assert ((part_M >= 0.1) & (part_M <= 0.12)).all()
    assert len(genome_MG.unique(dim=0)) == 24


def test_a_recipe_that_ranks_better_is_told_from_one_that_ranks_the_same() -> None:
    right, wrong = torch.arange(8.0).double()[None], torch.arange(8.0).double().flip(0)[None]
    accuracy_M = ACCURACY_MK.mean(1)
    better, same = difference(right, wrong, accuracy_M), difference(right, right, accuracy_M)
    assert (better.value, better.low, better.high) == pytest.approx((2, 2, 2))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_report_is_json_and_the_table_has_a_line_for_each_row_even_where_nothing_is_ranked() -> None:
    rows = [made_up([float(n) for n in range(8)]), made_up([0.5] * 8, recipe="sandwich", equal="time")]
    report = compare(rows, torch.arange(8), ACCURACY_MK)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["recipes"][0]["kendall"]["all"]["tau"] == pytest.approx([1, 1])
    plain, sandwich = table(report).splitlines()[2:4]
    assert plain.startswith("| plain | steps | 5 | 100 |")
    assert "| 1.00, 1.00 |" in plain
    assert "| –, – | – (– to –) |" in sandwich
