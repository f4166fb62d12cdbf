"""`engine.evolve` under several limits, along a front, in a race: what is written keeps what was promised."""

from __future__ import annotations

import csv
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from small_runs import TINY_NET, TINY_SEARCH, ErrorLine, run
from torch.utils.flop_counter import FlopCounterMode

from engine.pruned import PrunedNet
from engine.space import architecture, rounded
from engine.space.costs import cost_model
from engine.space.structure import Structure, load_structure


def counted(structure: Structure) -> tuple[int, int]:
    """MACs at 224 px and parameters of the plain network, by PyTorch's own counter."""
    convolutions = structure.convolutions
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = PrunedNet(convolutions, structure.classes).eval()
        net(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in net.parameters())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_structures_meet_every_limit_as_counted_by_others(copied: Path, tmp_path: Path) -> None:
    limits = ("--flops", "280M:300M", "--params", "1.8M", "--memory-peak", "3.6MB")
    assert run("evolve", *limits, "--run", copied, "--out", tmp_path / "search", *TINY_SEARCH) == 0
    for row in rows_of(tmp_path / "search/candidates.csv"):
        assert 280_000_000 <= int(row["macs"]) <= 300_000_000
        assert int(row["parameters"]) <= 1_800_000
        assert int(row["peak_activation_bytes"]) <= 3_600_000
    macs, parameters = counted(load_structure(tmp_path / "search/structure.json"))
    assert 280_000_000 <= macs <= 300_000_000
    assert parameters <= 1_800_000
    resolved = tomllib.loads((tmp_path / "search/config.toml").read_text())["resolved"]
    assert resolved["budget"] == {
        "flops": {"low": 280_000_000, "high": 300_000_000},
        "params": {"high": 1_800_000},
        "memory_peak": {"high": 3_600_000},
    }


def test_the_folder_is_named_after_every_limit(copied: Path) -> None:
    assert run("evolve", "--flops", "45%:50%", "--params", "2M", "--run", copied, *TINY_SEARCH) == 0
    assert (copied / "search-45pctto50pct-params-2M/structure.json").is_file()


def test_what_the_space_offers_is_shown_before_anything_is_done(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(copied.rglob("*"))
    assert run("evolve", "--flops", "300M", "--params", "1K", "--run", copied, *TINY_SEARCH) == 2
    shown = capfd.readouterr().out
    row = {name: next(line for line in shown.splitlines() if name in line) for name in ("MACs", "parameters", "peak")}
    assert re.findall(r"[\d.]+[KMG]?B?", row["MACs"]) == ["12.496M", "189.886M", "567.727M", "300M"]
    assert "≤ 300M │         yes" in row["MACs"]
    assert "≤ 1K │          no" in row["parameters"]
    assert "yes" not in row["peak"]
    assert sorted(copied.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "give a budget: one or more of --flops, --params, --memory-peak, --latency"),
        (("--params", "1"), "--params 1: no structure fits that budget; mobilenet_v1 at 224 px has 143.851K to 3.217M"),
        (("--memory-peak", "3 parsecs"), "--memory-peak 3 parsecs: not a budget; write one like 1.5MB"),
        (("--flops", "90%:95%", "--params", "20%"), "none of 2048 structures steered there fits"),
        (("--latency", "8ms"), "--latency needs --latency-table"),
        (("--objectives", "accuracy,latency"), "--objectives accuracy,latency: latency needs --latency-table"),
        (("--objectives", "flops"), "accuracy, then any of flops, params, memory_peak, separated by commas"),
        (("--objectives", "accuracy,flops,flops"), "accuracy, then any of"),
        (("--objectives", "accuracy,beauty"), "accuracy, then any of"),
        (("--flops", "300M", "--race", "1"), "--race 1.0: a confidence from 0.5 to below 1"),
        (("--objectives", "accuracy,flops", "--race", "0.9"), "--race compares accuracies alone"),
        (("--flops", "300M", "--divisor", "0"), "--divisor 0: at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_refused_in_one_line_before_anything_is_written(
    arguments: tuple[str, ...], reason: str, copied: Path, error_line: ErrorLine
) -> None:
    before = sorted(copied.rglob("*"))
    assert run("evolve", *arguments, "--run", copied, *TINY_SEARCH) == 2
    assert reason in error_line()
    assert sorted(copied.rglob("*")) == before


def test_a_divisor_makes_every_searched_width_a_multiple(copied: Path, tmp_path: Path) -> None:
    arguments = ("--flops", "300M", "--divisor", "16", "--run", copied, *TINY_SEARCH)
    assert run("evolve", *arguments, "--out", tmp_path / "search") == 0
    structure = load_structure(tmp_path / "search/structure.json")
    assert structure.divisor == 16
    assert {conv["out_channels"] % 16 for conv in structure.convolutions} == {0}
    costs = cost_model(rounded(architecture("mobilenet_v1").build(10), 16))
    rows = rows_of(tmp_path / "search/candidates.csv")
    genomes = torch.tensor([[int(choice) for choice in row["genome"].split()] for row in rows])
    assert [int(row["macs"]) for row in rows] == costs.macs(genomes).tolist()
    assert run("retrain", "--structure", tmp_path / "search/structure.json", "--run", copied, "--steps", "1") == 0


def test_a_pareto_search_writes_a_front_of_structures(copied: Path, tmp_path: Path) -> None:
    search = tmp_path / "search"
    arguments = ("--objectives", "accuracy,flops,params", "--run", copied, "--population", "8", *TINY_SEARCH[2:])
    assert run("evolve", *arguments, "--out", search) == 0
    everything, front = rows_of(search / "candidates.csv"), rows_of(search / "front.csv")
    objectives = [
        (-int(row["correct"]), float(row["loss"]), int(row["macs"]), int(row["parameters"])) for row in everything
    ]

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        better = one[:2] <= other[:2] and one[2] <= other[2] and one[3] <= other[3]
        return better and one != other

    best = [row for row, own in zip(everything, objectives, strict=True) if not any(beats(o, own) for o in objectives)]
    assert sorted(row["genome"] for row in front) == sorted(row["genome"] for row in best)
    assert [int(row["macs"]) for row in front] == sorted(int(row["macs"]) for row in front)
    for row in front:
        structure = load_structure(search / row["file"])
        assert " ".join(map(str, structure.genome)) == row["genome"]
        assert counted(structure) == (int(row["macs"]), int(row["parameters"]))
    assert (search / "front.png").read_bytes().startswith(b"\x89PNG")
    assert run("retrain", "--structure", search / front[0]["file"], "--run", copied, "--steps", "1") == 0


def test_a_race_shows_fewer_images_and_gives_whoever_finishes_its_whole_score(tmp_path: Path) -> None:
    # Long enough for some structures to be clearly worse than others.
    folder = tmp_path / "run"
    assert run("metatrain", "--out", folder, *TINY_NET, "--steps", "60", "--calibration-images", "32") == 0
    settings = ("--population", "8", "--mutants", "2", "--crossovers", "2", "--parents", "2", "--generations", "4")
    for name, race in (("whole", ()), ("raced", ("--race", "0.6")), ("again", ("--race", "0.6"))):
        shutil.rmtree(folder / "scores", ignore_errors=True)
        arguments = ("--flops", "50%", "--run", folder, "--out", tmp_path / name, *settings, *race)
        assert run("evolve", *arguments, "--calibration-images", "32") == 0
    whole, raced = (rows_of(tmp_path / name / "candidates.csv") for name in ("whole", "raced"))
    images = [int(row["images"]) for row in raced]
    assert set(images[:8]) == {360}
    assert set(images) - {360}
    assert set(images) <= {45, 90, 180, 360}
    found = load_structure(tmp_path / "raced/structure.json")
    assert found.score is not None
    assert found.score["images"] == 360
    assert found.score["correct"] == max(int(row["correct"]) for row in raced if row["images"] == "360")
    # Whoever was shown everything has the score it has without a race.
    scores = {row["genome"]: (row["correct"], row["loss"]) for row in whole}
    shown = [row for row in raced if int(row["images"]) == 360 and row["genome"] in scores]
    assert all(scores[row["genome"]] == (row["correct"], row["loss"]) for row in shown)
    for name in ("candidates.csv", "state.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "raced" / name).read_bytes()


def test_a_search_of_another_kind_is_not_resumed(copied: Path, tmp_path: Path, error_line: ErrorLine) -> None:
    arguments = ("--flops", "300M", "--run", copied, "--out", tmp_path / "search", *TINY_SEARCH)
    assert run("evolve", *arguments) == 0
    state = tmp_path / "search/state.json"
    content = json.loads(state.read_text())
    assert content["budget"] == {"flops": {"high": 300_000_000}}
    assert run("evolve", *arguments, "--params", "2M", "--resume") == 2
    assert "--params 2M: the run" in error_line()
