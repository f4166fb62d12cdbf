"""`torchrun -m engine.evolve`: several processes write the bytes of one, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from launched import Printed, in_turn, ranks_of, torchrun
from small_runs import TINY_NET, run

from engine.errors import UserError
from engine.evolve import assist
from engine.run import ranks
from engine.run.command import use_device

torch_distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not torch_distributed.is_available(), reason="torch was built without distributed")

FILES = ("candidates.csv", "state.json", "structure.json", "uniform.json")
SHARED: tuple[str, ...] = ("--calibration-images", "32", "--device", "cpu", "--parents", "2")


def small(population: int, mutants: int, crossovers: int, generations: int = 2) -> tuple[str, ...]:
    numbers = {
        "population": population, "mutants": mutants, "crossovers": crossovers, "generations": generations,
    }  # fmt: skip
    return (*SHARED, *(text for name, number in numbers.items() for text in (f"--{name}", str(number))))


class Plan(NamedTuple):
    """A search on so many ranks; ``odd`` is what is wrong with rank 1; ``out`` is of another search to resume."""

    ranks: int
    arguments: tuple[str, ...]
    odd: str = ""
    out: str = ""


SAME = {
    "more candidates than two ranks": Plan(2, ("--flops", "300M", *small(5, 1, 2))),
    "more candidates than three ranks": Plan(3, ("--flops", "300M", *small(4, 1, 2))),
    "two candidates for three ranks": Plan(3, ("--flops", "300M", *small(2, 1, 1))),
    "one candidate for three ranks": Plan(3, ("--flops", "300M", *small(1, 1, 0))),
    "a race": Plan(3, ("--flops", "300M", "--race", "0.5", *small(6, 2, 4, 4))),
    "a Pareto search": Plan(2, ("--objectives", "accuracy,flops", *small(4, 1, 2))),
}
REFUSED = {
    "a budget that nothing fits": Plan(2, ("--flops", "1M", *SHARED)),
    "an unknown option": Plan(2, ("--population-count", "3")),
    "other images on one rank": Plan(2, ("--flops", "300M", *SHARED), "images"),
}
HELP = {"help": Plan(2, ("--help",))}
LONGER = ("--flops", "300M", *small(4, 1, 2, 6))
BROKEN = {
    "a rank that cannot score": Plan(3, LONGER, "scoring"),
    "a rank that dies": Plan(3, LONGER, "death"),
}
RESUMED = {"resumed": Plan(2, (*LONGER, "--resume"), out="a rank that dies")}
PLANS = {**SAME, **REFUSED, **HELP, **BROKEN, **RESUMED}


def evolve(ranks: int, *arguments: object) -> subprocess.Popen[str]:
    return torchrun(ranks, "-m", "--", "engine.evolve", *arguments)


@pytest.fixture(scope="module")
def pruningnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PruningNet to search in, shared by these tests: trained long enough for a race to tell structures apart."""
    out = tmp_path_factory.mktemp("ranks") / "run"
    assert run("metatrain", "--out", out, *TINY_NET, "--steps", "60") == 0
    return out


@pytest.fixture(scope="module")
def printed(pruningnet: Path) -> dict[str, list[Printed]]:
    """All searches of the tables above, done: what each rank printed."""
    folder = pruningnet.parent
    several = folder / "several"
    listed = [
        {
            "name": name, "command": "evolve", "ranks": plan.ranks, "odd": plan.odd,
            "scores": str(pruningnet / "scores"),
            "arguments": [*plan.arguments, "--run", str(pruningnet), "--out", str(several / (plan.out or name))],
        }
        for name, plan in PLANS.items()
    ]  # fmt: skip
    return in_turn(folder, 3, listed)


def one_process(pruningnet: Path, name: str, *arguments: object) -> Path:
    """The same search by a single process, without scores of others."""
    out = pruningnet.parent / "one" / name
    shutil.rmtree(pruningnet / "scores", ignore_errors=True)
    assert run("evolve", *arguments, "--run", pruningnet, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def whole(pruningnet: Path) -> Path:
    """The longer search, uninterrupted."""
    return one_process(pruningnet, "whole", *LONGER)


@pytest.mark.parametrize("name", SAME)
def test_several_processes_write_the_bytes_of_one(
    name: str, pruningnet: Path, printed: dict[str, list[Printed]]
) -> None:
    assert [rank.status for rank in printed[name]] == [0] * SAME[name].ranks
    one, several = one_process(pruningnet, name, *SAME[name].arguments), pruningnet.parent / "several" / name
    for path in [one / "front.csv"] * ("Pareto" in name) + [one / file for file in FILES]:
        assert (several / path.name).read_bytes() == path.read_bytes()
    images = {row["images"] for row in _rows(one)}
    assert (len(images) > 1) == ("race" in name), "a race stops some candidates early"


@pytest.mark.parametrize("name", PLANS)
def test_only_rank_0_prints(name: str, printed: dict[str, list[Printed]]) -> None:
    first, *others = printed[name]
    assert first.lines
    assert not any(rank.lines for rank in others)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_ends_all_ranks_with_one_line_and_nothing_written(
    name: str, pruningnet: Path, printed: dict[str, list[Printed]]
) -> None:
    assert [rank.status for rank in printed[name]] == [2] * REFUSED[name].ranks
    assert len([line for line in printed[name][0].lines if line.startswith("error: ")]) == 1
    assert not (pruningnet.parent / "several" / name).exists()


def test_ranks_that_would_compute_something_else_are_named(printed: dict[str, list[Printed]]) -> None:
    line = printed["other images on one rank"][0].lines[-1]
    assert line.startswith("error: rank 1 has another calibration batch than rank 0 (")


def test_help_ends_all_ranks(printed: dict[str, list[Printed]]) -> None:
    assert [rank.status for rank in printed["help"]] == [0, 0]


def test_what_went_wrong_on_another_rank_is_said_in_one_line(printed: dict[str, list[Printed]]) -> None:
    outcome = printed["a rank that cannot score"]
    assert [rank.status for rank in outcome] == [1, 1, 1]
    assert outcome[0].lines[-1].startswith("error: rank 1: RuntimeError: a cable is loose")


def test_a_rank_that_dies_ends_the_others_without_torchrun_and_several_processes_resume(
    pruningnet: Path, printed: dict[str, list[Printed]], whole: Path
) -> None:
    first, *others = printed["a rank that dies"]
    assert first.lines[-1].startswith("error: rank 1 died; everything done so far is saved")
    assert [first.status, *(rank.status for rank in others)] == [1, -signal.SIGKILL, 1]
    assert any(line.startswith("generation 2/6") for line in first.lines)
    assert not any(line.startswith("generation 1/6") for line in printed["resumed"][0].lines)
    assert [rank.status for rank in printed["resumed"]] == [0, 0]
    assert _bytes(pruningnet.parent / "several" / "a rank that dies") == _bytes(whole)


def test_a_rank_that_dies_ends_the_search_under_torchrun_and_one_process_resumes(pruningnet: Path, whole: Path) -> None:
    shutil.rmtree(pruningnet / "scores")
    out = pruningnet.parent / "killed"
    arguments = (*LONGER, "--run", pruningnet, "--out", out)
    process = evolve(3, *arguments)
    _wait_for_generation(process, out, 2)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode != 0
    errors = [line for line in complaint.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: rank 1 died; everything done so far is saved")
    assert 2 <= _generation(out) < 6, "the search ended before the rank was killed: nothing was tested"

    assert run("evolve", *arguments, "--resume") == 0
    assert _bytes(out) == _bytes(whole)


def test_a_signal_to_torchrun_ends_a_search_with_its_scores_kept(pruningnet: Path) -> None:
    shutil.rmtree(pruningnet / "scores", ignore_errors=True)
    out = pruningnet.parent / "stopped"
    process = evolve(2, *LONGER, "--run", pruningnet, "--out", out)
    _wait_for_generation(process, out, 1)
    processes = ranks_of(process)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert "stopped; everything done so far is saved" in complaint
    assert not any(line.startswith("error: ") for line in complaint.splitlines())
    assert not any(Path(f"/proc/{process_id}").exists() for process_id in processes.values())
    assert 1 <= _generation(out) < 6, "the search ended before the signal: nothing was tested"
    cached = next((pruningnet / "scores").iterdir()).read_text().splitlines()
    assert len(cached) >= len(_rows(out))


@pytest.mark.parametrize("size", [None, "1"])
def test_a_single_process_meets_nobody(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if size:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", size)

    def command() -> int:
        assert ranks.leader() is None
        return 7

    assert ranks.launch(command, assist) == 7
    assert not torch_distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.device_count() > 3, reason="there is a fourth GPU")
@pytest.mark.parametrize(("device", "says"), [("cuda", "cuda:3: this machine has"), ("cuda:0", "a GPU of its own")])
def test_every_rank_takes_the_gpu_of_its_number(device: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        use_device(device, "auto")


def _rows(search: Path) -> list[dict[str, str]]:
    heading, *lines = (search / "candidates.csv").read_text().splitlines()
    return [dict(zip(heading.split(","), line.split(","), strict=True)) for line in lines]


def _bytes(search: Path) -> list[bytes]:
    return [(search / name).read_bytes() for name in FILES]


def _generation(search: Path) -> int:
    state = search / "state.json"
    return int(json.loads(state.read_text())["generation"]) if state.exists() else 0


def _wait_for_generation(process: subprocess.Popen[str], search: Path, generation: int) -> None:
    while process.poll() is None and _generation(search) < generation:
        time.sleep(0.02)
