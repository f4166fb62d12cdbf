import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.run.metrics import MetricsLog, check_tensorboard


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_record_is_a_line_that_is_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(10, {"loss": 1.5, "lr": 0.1})
    assert records(tmp_path) == [{"step": 10, "loss": 1.5, "lr": 0.1}]
    log.write(20, {"loss": 1.25})
    assert records(tmp_path)[1:] == [{"step": 20, "loss": 1.25}]
    assert log.size() == (tmp_path / "metrics.jsonl").stat().st_size
    log.close()


@given(st.integers(0, 5), st.integers(0, 5), st.text(max_size=10))
def test_a_resumed_log_is_that_of_an_uninterrupted_run(
    tmp_path_factory: pytest.TempPathFactory, before: int, lost: int, torn: str
) -> None:
    run = tmp_path_factory.mktemp("run")
    log = MetricsLog(run)
    for step in range(before):
        log.write(step, {"loss": step / 4})
    known = log.size()
    for step in range(before, before + lost):
        log.write(step, {"loss": step / 4})
    log.file.write(torn)  # a line that a crash cut short
    log.close()
    resumed = MetricsLog(run, keep_bytes=known)
    for step in range(before, before + lost + 2):
        resumed.write(step, {"loss": step / 4})
    resumed.close()
    assert records(run) == [{"step": step, "loss": step / 4} for step in range(before + lost + 2)]


def test_a_new_log_starts_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of an earlier run\n")
    assert MetricsLog(tmp_path).size() == 0


def test_a_log_shorter_than_the_checkpoint_remembers_is_not_padded(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert MetricsLog(tmp_path, keep_bytes=1000).size() == 12


def test_tensorboard_that_is_not_installed_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install"):
        check_tensorboard()


def test_tensorboard_events_are_written_on_request(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    log = MetricsLog(tmp_path, tensorboard=True)
    log.write(1, {"loss": 0.5})
    log.close()
    [events] = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
