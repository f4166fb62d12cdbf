"""`torchrun -m engine.metatrain`: several processes train the PruningNet of one, bit for bit, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from launched import Printed, in_turn, ranks_of, torchrun
from small_runs import run

from engine.files import sha256_file

torch_distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not torch_distributed.is_available(), reason="torch was built without distributed")

NET: tuple[str, ...] = ("--hidden", "1", "--calibration-images", "16", "--device", "cpu")
# Every step is saved, which a delayed update would not allow.
SAVED = (*NET, "--batch", "8", "--checkpoint-minutes", "0", "--update", "immediate")
SHORT = (*SAVED, "--steps", "8")
# Long enough to be hit while it runs.
LONG = (*SAVED, "--steps", "30")


class Plan(NamedTuple):
    """A run on so many ranks; ``odd`` is what is wrong with rank 1; ``out`` is of another run to resume."""

    ranks: int
    arguments: tuple[str, ...]
    odd: str = ""
    out: str = ""


SAME = {
    "one structure for each of two ranks": Plan(2, SHORT),
    "two structures for each of three ranks": Plan(3, (*NET, "--steps", "2", "--batch", "30", "--structures", "6")),
}
REFUSED = {
    "structures that ranks cannot share": Plan(2, (*NET, "--structures", "3", "--batch", "9")),
    "a batch that ranks cannot share": Plan(2, (*NET, "--batch", "9")),
}
BROKEN = {
    "a rank that dies": Plan(2, SHORT, "death in training"),
    "a rank that fails": Plan(2, SHORT, "failure in training"),
    "a rank with another bit": Plan(2, SHORT, "another bit"),
    "a loss that is not finite": Plan(2, (*NET, "--steps", "3", "--batch", "8", "--lr", "1e38")),
}
STOPPED = {
    "a rank that is stopped": Plan(2, SHORT, "signal in training"),
    "resumed without the files": Plan(2, (*SHORT, "--resume"), "no checkpoint", out="a rank that is stopped"),
    "resumed": Plan(2, (*SHORT, "--resume"), out="a rank that is stopped"),
}
PLANS = {**SAME, **REFUSED, **BROKEN, **STOPPED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of these tests lie."""
    return tmp_path_factory.mktemp("metatrain-ranks")


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, list[Printed]]:
    """All runs of the tables above, done: what each rank printed."""
    plans: list[dict[str, Any]] = [
        {
            "name": name, "command": "metatrain", "ranks": plan.ranks, "odd": plan.odd,
            "arguments": [*plan.arguments, "--out", str(folder / (plan.out or name))],
        }
        for name, plan in PLANS.items()
    ]  # fmt: skip
    return in_turn(folder, 3, [*plans, {"name": "ddp", "command": "with_ddp", "ranks": 2, "odd": ""}])


def one_process(folder: Path, name: str, *arguments: str) -> Path:
    """The same run by a single process."""
    out = folder / f"{name} by one"
    assert run("metatrain", "--out", out, *arguments) == 0
    return out


@pytest.fixture(scope="module")
def short(folder: Path) -> Path:
    """The short run, uninterrupted."""
    return one_process(folder, "short", *SHORT, "--structures", "2")


@pytest.fixture(scope="module")
def long(folder: Path) -> Path:
    """The longer run, uninterrupted."""
    return one_process(folder, "long", *LONG, "--structures", "2")


def test_two_processes_train_the_pruningnet_of_one_bit_for_bit(
    folder: Path, printed: dict[str, list[Printed]], short: Path
) -> None:
    name, _ = SAME
    assert [rank.status for rank in printed[name]] == [0, 0]
    assert weights_digest(folder / name) == weights_digest(short)
    assert metrics(folder / name) == metrics(short)


def test_three_processes_with_two_structures_each_train_the_pruningnet_of_one_bit_for_bit(
    folder: Path, printed: dict[str, list[Printed]]
) -> None:
    _, name = SAME
    assert [rank.status for rank in printed[name]] == [0, 0, 0]
    whole = one_process(folder, name, *SAME[name].arguments)
    assert weights_digest(folder / name) == weights_digest(whole)
    assert metrics(folder / name) == metrics(whole)


@pytest.mark.parametrize("name", PLANS)
def test_only_rank_0_prints(name: str, printed: dict[str, list[Printed]]) -> None:
    first, *others = printed[name]
    assert first.lines
    assert not any(rank.lines for rank in others)


@pytest.mark.parametrize("name", REFUSED)
def test_what_ranks_cannot_share_ends_all_with_one_line_and_nothing_written(
    name: str, folder: Path, printed: dict[str, list[Printed]]
) -> None:
    assert [rank.status for rank in printed[name]] == [2, 2]
    (line,) = printed[name][0].lines
    assert line.startswith("error: --structures ")
    assert "evenly" in line
    assert not (folder / name).exists()


def test_ranks_say_what_they_exchange_and_the_log_what_they_did(
    folder: Path, printed: dict[str, list[Printed]]
) -> None:
    name, _ = SAME
    assert "2 processes with 1 of 2 structures each exchange about " in " ".join(printed[name][0].lines)
    logged = [line["exchanged_bytes"] for line in records(folder / name) if "loss" in line]
    # A structure has at most the 3.2 M weights of the whole network.
    assert all(2 * 4 * 1e5 < number < 2 * 4 * 3.3e6 for number in logged)
    assert len(set(logged)) == len(logged), "every step has structures of its own"


def test_weights_are_those_of_distributed_data_parallel_and_bytes_less_than_a_sixteenth(
    folder: Path, printed: dict[str, list[Printed]]
) -> None:
    assert [rank.status for rank in printed["ddp"]] == [0, 0], printed["ddp"]
    for rank in range(2):
        counted = json.loads((folder / f"ddp.{rank}.json").read_text())
        assert set(counted) == {"32", "64"}
        assert all(0 < size["ours"] <= size["theirs"] / 16 for size in counted.values())


def test_a_rank_that_dies_ends_the_others_and_one_process_resumes_to_the_same_bits(
    folder: Path, printed: dict[str, list[Printed]], short: Path
) -> None:
    name = "a rank that dies"
    assert [rank.status for rank in printed[name]] == [1, -signal.SIGKILL]
    line = printed[name][0].lines[-1]
    assert line == "error: rank 1 died; the same command with --resume goes on from the last checkpoint"
    assert 0 < last_step(folder / name) <= 5
    assert run("metatrain", "--out", folder / name, *SHORT, "--resume") == 0
    assert weights_digest(folder / name) == weights_digest(short)
    assert metrics(folder / name) == metrics(short)


def test_what_went_wrong_on_another_rank_is_said_in_one_line(printed: dict[str, list[Printed]]) -> None:
    outcome = printed["a rank that fails"]
    assert [rank.status for rank in outcome] == [1, 1]
    assert outcome[0].lines[-1].startswith("error: rank 1: RuntimeError: a cable is loose")


def test_ranks_that_differ_in_one_bit_are_found_before_it_is_saved(
    folder: Path, printed: dict[str, list[Printed]]
) -> None:
    name = "a rank with another bit"
    assert [rank.status for rank in printed[name]] == [1, 1]
    line = printed[name][0].lines[-1]
    assert line.startswith("error: rank 1 has another classifier.weight (")
    assert "than rank 0, which must be the same in every bit" in line
    assert last_step(folder / name) <= 5


def test_a_loss_that_is_not_finite_ends_all_ranks_before_anything_is_applied(
    folder: Path, printed: dict[str, list[Printed]]
) -> None:
    name = "a loss that is not finite"
    assert [rank.status for rank in printed[name]] == [1, 1]
    assert "the loss of step 2 is " in printed[name][0].lines[-1]
    assert not list((folder / name).glob("checkpoints/*"))


def test_a_signal_to_any_rank_stops_all_with_the_step_saved_and_they_resume_to_the_same_bits(
    folder: Path, printed: dict[str, list[Printed]], short: Path
) -> None:
    stopped, _, resumed = STOPPED
    assert [rank.status for rank in printed[stopped]] == [143, 143]
    assert printed[stopped][0].lines[-1].startswith("stopped; everything done so far is saved")
    assert [rank.status for rank in printed[resumed]] == [0, 0]
    assert weights_digest(folder / stopped) == weights_digest(short)
    assert metrics(folder / stopped) == metrics(short)


def test_ranks_that_do_not_see_the_same_run_directory_do_not_resume(printed: dict[str, list[Printed]]) -> None:
    outcome = printed["resumed without the files"]
    assert [rank.status for rank in outcome] == [1, 1]
    assert outcome[0].lines[-1].startswith("error: the ranks found different checkpoints in ")


def test_torchrun_starts_killed_ranks_again_and_they_end_with_the_same_bits(folder: Path, long: Path) -> None:
    out = folder / "killed"
    # Begun over another run: started again, it must go on instead.
    out.mkdir()
    (out / "config.toml").write_text("[options]\n[resolved]\n")
    arguments = ("-m", "engine.metatrain", "--out", out, *LONG, "--overwrite")
    process = torchrun(2, *arguments, options=("--max-restarts=1",))
    wait_for_checkpoint(process, out)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 0, complaint
    assert complaint.count("30 steps on cpu") == 2, "started twice"
    errors = [line for line in complaint.splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1 died; the same command with --resume goes on from the last checkpoint"]
    assert weights_digest(out) == weights_digest(long)
    assert metrics(out) == metrics(long)


def test_ctrl_c_in_the_terminal_of_torchrun_saves_the_run_and_resuming_completes_it(folder: Path, long: Path) -> None:
    out = folder / "interrupted"
    process = torchrun(2, "-m", "engine.metatrain", "--out", out, *LONG, own_group=True)
    wait_for_checkpoint(process, out)
    processes = ranks_of(process)
    # A terminal signals torchrun and the ranks, and torchrun signals the ranks once more.
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert "stopped; everything done so far is saved" in complaint
    assert not any(Path(f"/proc/{process_id}").exists() for process_id in processes.values())
    assert 0 < last_step(out) < 30, "the run ended before the signal: nothing was tested"
    assert run("metatrain", "--out", out, *LONG, "--resume") == 0
    assert weights_digest(out) == weights_digest(long)
    assert metrics(out) == metrics(long)


def weights_digest(run_folder: Path) -> str:
    return sha256_file(sorted(run_folder.glob("checkpoints/step-*"))[-1] / "weights.safetensors")


def records(run_folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def metrics(run_folder: Path) -> list[dict[str, float]]:
    """What was logged, but for what only several processes log, and the time spent waiting for images."""
    varying = ("exchanged_bytes", "data_wait")
    return [{name: value for name, value in line.items() if name not in varying} for line in records(run_folder)]


def last_step(run_folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in run_folder.glob("checkpoints/step-*")), default=0)


def wait_for_checkpoint(process: subprocess.Popen[str], run_folder: Path) -> None:
    while process.poll() is None and last_step(run_folder) == 0:
        time.sleep(0.02)
