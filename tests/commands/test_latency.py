"""`engine.latency`: a table is built, survives a kill, and is checked against whole networks."""

from __future__ import annotations

import csv
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY_SEARCH, ErrorLine, start
from small_runs import run as run_command_of
from torch.utils.flop_counter import FlopCounterMode

from engine import latency
from engine.files import sha256_json
from engine.fit import agreement, fit, spread_genomes
from engine.pruned import PrunedNet
from engine.run import measurements
from engine.run.command import run_command
from engine.runtimes import Timing
from engine.space import architecture
from engine.space.costs import cost_model
from engine.space.latency_table import layer_kinds, load_latency_table
from engine.space.structure import convolutions

TINY = ("--runtime", "torch", "--resolution", "32", "--points", "2")


def run(*arguments: object) -> int:
    return run_command(latency.main, latency.COMMANDS, [str(argument) for argument in arguments])  # type: ignore[arg-type]


def groups(partial: Path) -> dict[str, Any]:
    """What a partial file holds so far, by group, and that no group is there twice."""
    lines = [json.loads(line) for line in partial.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]
    found = {line["group"]: line["ms"] for line in lines}
    assert len(found) == len(lines)
    return found


@dataclass(frozen=True)
class Killed:
    """A build that was killed with SIGKILL and resumed: its table and what was on disk before every measurement."""

    table: Path
    before: dict[str, Any]
    then: list[dict[str, Any]]


@pytest.fixture(scope="module")
def killed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A table of MobileNetV1 with 10 classes at 32 px, coarse. Only to be read."""
    out = tmp_path_factory.mktemp("latency") / "tables" / "table.json"
    partial = out.with_name("table.json.partial")
    process = start("latency", "build", "--run", trained, "--out", out, *TINY)
    while process.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") > 6):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    with partial.open("a") as file:
        file.write('{"group": "cut short by')
    before, then, measure = groups(partial), [], measurements.measure

    def watched(networks: Any, *arguments: Any) -> list[Timing]:
        then.append(groups(partial))
        return measure(networks, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "measure", watched)
        assert run("build", "--run", trained, "--out", out, *TINY, "--resume") == 0
    return Killed(out, before, then)


@pytest.fixture
def built(killed: Killed) -> Path:
    """Its table."""
    return killed.table


def test_a_killed_build_measures_only_what_is_missing(killed: Killed) -> None:
    assert len(killed.before) > 4
    # The first thing measured anew comes after all that was kept, and that stays as it was.
    assert killed.then[0] == killed.before
    last = killed.then[-1]
    assert {group: last[group] for group in killed.before} == killed.before
    # Of the last state on disk all groups are there but one, which is written after it is measured.
    assert len(killed.then) == len(last) + 1 - len(killed.before)
    rows = sum(len(grid.in_widths) for grid in load_latency_table(killed.table).grids)
    others = [group for group in last if group.startswith(("whole networks", "blocks"))]
    assert len(last) == rows + len(others)
    assert list(killed.table.parent.glob("*.partial")) == []


def test_a_table_says_what_it_was_measured_with_and_orders_the_extremes(built: Path) -> None:
    space = architecture("mobilenet_v1").build(10)
    table = load_latency_table(built, space)
    settings = {"runtime": "torch", "device": "cpu", "batch": 1, "threads": 1, "resolution": 32, "pad": 1}
    assert table.settings == settings
    assert table.versions["torch"] == torch.__version__
    assert table.machine["cpu"]
    assert len(table.fitted) == 12
    least, greatest = table.legal_range(space)
    assert 0 < least < greatest


def test_a_check_measures_structures_and_says_how_well_they_are_predicted(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "--table", built, "--structures", "4", "--seed", "3") == 0
    result = json.loads(built.with_suffix(".check.json").read_text())
    assert "Spearman" in capsys.readouterr().out
    table = load_latency_table(built)
    assert result["table"] == table.to_dict()["digest"]
    assert len(result["structures"]) == 4
    genomes = torch.tensor([row["genome"] for row in result["structures"]])
    predicted, measured = (
        torch.tensor([row[name] for row in result["structures"]], dtype=torch.float64)
        for name in ("predicted_ms", "measured_ms")
    )
    assert torch.equal(table.predict(genomes), predicted)
    assert bool((measured > 0).all())
    assert agreement(predicted, measured).items() <= result.items()
    fitted = {tuple(entry["genome"]) for entry in table.fitted}
    assert not fitted & {tuple(row["genome"]) for row in result["structures"]}


def test_an_unfinished_build_is_not_lost_by_accident_nor_continued_with_other_options(
    tmp_path: Path, error_line: ErrorLine
) -> None:
    out, partial = tmp_path / "table.json", tmp_path / "table.json.partial"
    partial.write_text(json.dumps({"architecture": "mobilenet_v2"}) + "\n")
    before = partial.read_bytes()
    assert run("build", "--out", out, *TINY) == 2
    assert "--resume" in error_line()
    assert run("build", "--out", out, *TINY, "--resume") == 2
    assert "begun with other architecture" in error_line()
    partial.write_text("{}\nnonsense\n")
    assert run("build", "--out", out, *TINY, "--resume") == 2
    assert "damaged" in error_line()
    assert before
    assert not out.exists()


def test_a_run_gives_the_architecture_and_the_classes(trained: Path, tmp_path: Path) -> None:
    partial = tmp_path / "table.json.partial"
    process = start("latency", "build", "--out", tmp_path / "table.json", "--run", trained, *TINY)
    while process.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") > 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode == 130
    assert "--resume" in stderr
    identity = json.loads(partial.read_text().splitlines()[0])
    assert (identity["architecture"], identity["classes"]) == ("mobilenet_v1", 10)


BAD_BUILD = {
    "no output": ((), "--out"),
    "an unknown architecture": (("--architecture", "vgg"), "mobilenet_v1, mobilenet_v2, resnet50"),
    "an unknown runtime": (("--runtime", "tflite"), "torch, torch-compile, onnx"),
    "an unknown device": (("--runtime", "torch", "--device", "tpu"), "cpu or cuda"),
    "no images": (("--batch", "0"), "at least 1"),
    "no threads": (("--threads", "0"), "at least 1"),
    "padding to nothing": (("--pad", "0"), "at least 1"),
    "one point": (("--points", "1"), "at least 2"),
    "images too small for the strides": (("--resolution", "31"), "at least 32"),
    "a run and an architecture": (("--run", "x", "--architecture", "mobilenet_v1"), "give one of them"),
    "a run that is not there": (("--run", "/nowhere"), "no PruningNet"),
    "nothing to resume": (("--resume",), "nothing to resume"),
    "resume and overwrite": (("--resume", "--overwrite"), "contradict"),
    "a word for a number": (("--points", "many"), "--points"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_BUILD.values(), ids=BAD_BUILD)
def test_build_refuses_in_one_line_and_writes_nothing(
    arguments: tuple[str, ...], says: str, tmp_path: Path, error_line: ErrorLine
) -> None:
    out = ("--out", tmp_path / "folder" / "table.json") if arguments else ()
    assert run("build", "--runtime", "torch", *out, *arguments) == 2
    assert says in error_line()
    assert list(tmp_path.iterdir()) == []


def test_a_table_is_not_replaced_unasked(built: Path, error_line: ErrorLine) -> None:
    before = built.read_bytes()
    assert run("build", "--out", built, *TINY) == 2
    assert "--overwrite" in error_line()
    assert run("build", "--out", built.parent, *TINY) == 2
    assert "folder" in error_line()
    assert built.read_bytes() == before


def test_check_refuses_in_one_line(built: Path, tmp_path: Path, error_line: ErrorLine) -> None:
    for arguments, says in (
        (("--table", tmp_path / "none.json"), "cannot read"),
        (("--table", built, "--structures", "1"), "at least 2"),
        (("--table", built, "--seed", "-1"), "at least 0"),
    ):
        assert run("check", *arguments) == 2
        assert says in error_line()
    content = json.loads(built.read_text())
    content.pop("digest")
    content["settings"]["turbo"] = True
    damaged = tmp_path / "table.json"
    damaged.write_text(json.dumps({**content, "digest": sha256_json(content)}))
    assert run("check", "--table", damaged) == 2
    assert "measure it anew" in error_line()


@pytest.mark.parametrize("arguments", [(), ("bulid",)])
def test_without_a_subcommand_both_are_named(arguments: tuple[str, ...], error_line: ErrorLine) -> None:
    assert run(*arguments) == 2
    assert "--help" in error_line()


# -- fitting and agreement -----------------------------------------------------------------------------------------


def test_a_fit_finds_the_constant_and_the_scale_and_no_constant_below_zero() -> None:
    layers = [1.0, 2.0, 5.0]
    assert fit(layers, [0.5 + 0.8 * ms for ms in layers]) == pytest.approx((0.5, 0.8))
    constant, scale = fit(layers, [0.9, 2.0, 5.3])
    assert constant == 0
    assert 0.9 < scale < 1.1


def test_agreement_counts_order_and_relative_error() -> None:
    measured = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    same = agreement(measured * 1.1, measured)
    assert (same["spearman"], same["kendall"]) == pytest.approx((1, 1))
    assert (same["median_relative_error"], same["greatest_relative_error"]) == pytest.approx((0.1, 0.1))
    # One of six pairs is the other way round: 1 - 2 · 1/6; the ranks differ by 1 twice: 1 - 6 · 2 / (4 · 15).
    swapped = agreement(torch.tensor([2.0, 1.0, 4.0, 8.0], dtype=torch.float64), measured)
    assert (swapped["spearman"], swapped["kendall"]) == pytest.approx((0.8, 2 / 3))


def test_the_structures_of_build_and_check_span_the_range_and_differ() -> None:
    space = architecture("mobilenet_v2").build(1000)
    build, check, other = (spread_genomes(space, 30, *name) for name in (("build",), ("check", 0), ("check", 1)))
    for genomes in (build, check, other):
        means = genomes.double().mean(1)
        assert float(means[0]) < 6
        assert float(means[-1]) > 24
        assert bool((genomes >= 0).all())
        assert bool((genomes < space.choices).all())
    assert not torch.equal(check, other)
    assert not torch.equal(check, build)


# -- searching by a table ------------------------------------------------------------------------------------------


def test_a_search_meets_flops_params_and_latency_together_and_measures_what_it_found(
    killed: Killed, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    search, table = tmp_path / "search", load_latency_table(killed.table)
    least, full = table.legal_range(architecture("mobilenet_v1").build(10))
    limit = (least + full) / 2
    limits = ("--flops", "50%", "--params", "1.5M", "--latency", f"{limit:.6f}ms", "--latency-table", killed.table)
    shared = ("--run", copied, "--flops-resolution", "32", *TINY_SEARCH)
    assert run_command_of("evolve", *limits, *shared, "--out", search) == 0
    with (search / "candidates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    space = architecture("mobilenet_v1").build(10)
    full_macs = int(cost_model(space, 32).macs(space.uniform_choice(30)))
    grids = {grid.kind: grid for grid in table.grids}
    for row in rows:
        genome_1G = torch.tensor([[int(choice) for choice in row["genome"].split()]])
        layers = convolutions(space, genome_1G[0])
        # Layer by layer from the measured grids, and by PyTorch's counter.
        total = sum(
            float(
                grids[kind].at(
                    torch.tensor(1 if layer["depthwise"] else layer["in_channels"]), torch.tensor(layer["out_channels"])
                )
            )
            for layer, kind in zip(layers, layer_kinds(space, 32), strict=True)
        )
        assert float(row["latency_ms"]) == pytest.approx(table.constant_ms + table.scale * total)
        assert float(row["latency_ms"]) <= limit
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = PrunedNet(layers, 10).eval()
            net(torch.empty(1, 3, 32, 32))
        assert counter.get_total_flops() // 2 == int(row["macs"]) <= full_macs // 2
        assert sum(parameter.numel() for parameter in net.parameters()) == int(row["parameters"]) <= 1_500_000
    found = json.loads((search / "latency.json").read_text())
    assert [entry["name"] for entry in found["structures"]] == ["best", "uniform"]
    assert all(entry["measured_ms"] > 0 for entry in found["structures"])
    assert "best: predicted" in capfd.readouterr().out


def test_a_table_of_other_images_or_another_architecture_is_refused(
    killed: Killed, copied: Path, error_line: ErrorLine, tmp_path: Path
) -> None:
    arguments = ("--latency", "50%", "--latency-table", killed.table, "--run", copied, *TINY_SEARCH)
    assert run_command_of("evolve", *arguments) == 2
    assert "is of 32 px images and MACs are counted at 224 px" in error_line()
    content = json.loads(killed.table.read_text())
    content.pop("digest")
    content["architecture"] = "mobilenet_v2"
    (tmp_path / "other.json").write_text(json.dumps({**content, "digest": sha256_json(content)}))
    arguments = ("--latency", "50%", "--latency-table", tmp_path / "other.json", "--run", copied, *TINY_SEARCH)
    assert run_command_of("evolve", *arguments) == 2
    assert "it is of mobilenet_v2, not of mobilenet_v1" in error_line()
