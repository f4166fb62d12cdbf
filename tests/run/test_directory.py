from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.run.directory import CONFIG, check_output, continued, read_config, resumed_options, start_output


@dataclass(frozen=True)
class Example:
    """Options like those of a command."""

    data: Path = Path("digits")
    steps: int | None = None
    lr: float = 0.1
    device: str = "auto"
    cache: Path | None = None
    resume: bool = False
    overwrite: bool = False


def started(out: Path, options: Example | None = None) -> Path:
    """A run directory with a file of results in it."""
    start_output(out, options or Example(), {"batch": 64})
    (out / "result").write_text("precious")
    return out


# -- where a run may write -------------------------------------------------------------------------------------------


def test_a_run_may_write_to_a_folder_that_is_new_or_empty(tmp_path: Path) -> None:
    check_output(tmp_path / "new", resume=False, overwrite=False)
    check_output(tmp_path, resume=False, overwrite=False)
    check_output(tmp_path, resume=False, overwrite=True)


def test_a_run_that_exists_is_continued_or_replaced_only_when_asked(tmp_path: Path) -> None:
    out = started(tmp_path / "run")
    with pytest.raises(UserError, match=f"^{out} exists: add --resume to continue or --overwrite to start anew"):
        check_output(out, resume=False, overwrite=False)
    check_output(out, resume=True, overwrite=False)
    check_output(out, resume=False, overwrite=True)
    assert (out / "result").read_text() == "precious"


def test_resuming_and_overwriting_at_once_is_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contradict each other"):
        check_output(started(tmp_path / "run"), resume=True, overwrite=True)


def test_there_is_nothing_to_resume_where_no_run_is(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "new"):
        with pytest.raises(UserError, match=f"nothing to resume in {out}: start without --resume"):
            check_output(out, resume=True, overwrite=False)


def test_only_a_run_is_ever_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match=f"^{out} is no run directory, or choose another folder with --out"):
            check_output(out, resume=False, overwrite=True)


# -- config.toml -----------------------------------------------------------------------------------------------------


def test_starting_a_run_empties_its_folder_and_writes_down_what_was_asked_for(tmp_path: Path) -> None:
    out = started(tmp_path / "run")
    start_output(out, Example(data=Path("a/b"), lr=0.5, device="cpu"), {"batch": 64, "none": None, "mean": (0.5, 1.0)})
    assert [file.name for file in out.iterdir()] == [CONFIG]
    # Where a run is carried out is not what it computes: the device is not written down.
    assert read_config(out) == {
        "options": {"data": "a/b", "lr": 0.5},
        "resolved": {"batch": 64, "mean": [0.5, 1.0]},
    }


@pytest.mark.parametrize(
    ("started_by", "continues"),
    [(("a", "7"), True), (("b", "7"), False), (("none", "7"), False), ((None, None), False)],
)
def test_what_the_same_torchrun_has_begun_is_resumed_when_it_starts_processes_again(
    started_by: tuple[str | None, str | None], continues: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def under(launch: str | None, size: str | None) -> None:
        for name, value in {"RANK": "0", "WORLD_SIZE": size or "1", "TORCHELASTIC_RUN_ID": launch or ""}.items():
            monkeypatch.setenv(name, value)

    given = Example(data=Path("a/b"), overwrite=True)
    under(*started_by)
    assert continued(given, tmp_path / "run") == given, "there is nothing yet"
    start_output(tmp_path / "run", given, {})
    under("a", "7")
    expected = replace(given, resume=True, overwrite=False) if continues else given
    assert continued(given, tmp_path / "run") == expected


@pytest.mark.parametrize(
    "content",
    [
        b"[options",
        b"\xff",
        b"",
        b"[options]\nlr = 0.1\n",
        b"options = 1\nresolved = 2\n",
        b"lr = 1" + b"0" * 5000,
        b"lr = " + b"[" * 100_000,
    ],
)
def test_a_damaged_config_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path / CONFIG} is damaged: ") as error:
        read_config(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_config_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read {tmp_path / CONFIG}: No such file"):
        read_config(tmp_path)


# -- the options of a resumed run ------------------------------------------------------------------------------------


def test_a_resumed_run_takes_the_options_it_was_started_with(tmp_path: Path) -> None:
    out = started(tmp_path / "run", Example(data=Path("faces"), steps=30, lr=0.5))
    assert resumed_options(Example(resume=True), out) == Example(Path("faces"), 30, 0.5, resume=True)


def test_a_resumed_run_takes_the_device_it_is_given(tmp_path: Path) -> None:
    out = started(tmp_path / "run", Example(device="cuda"))
    assert resumed_options(Example(device="cpu"), out).device == "cpu"


def test_an_option_given_again_unchanged_is_taken(tmp_path: Path) -> None:
    options = Example(data=Path("faces"), steps=30)
    assert resumed_options(options, started(tmp_path / "run", options)) == options


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (Example(lr=0.2), r"^--lr 0\.2: the run in .* was started with 0\.5; resume without it, or start anew$"),
        (Example(steps=40), "^--steps 40: .* started with None"),
        (Example(data=Path("cars")), "^--data cars: .* started with faces"),
    ],
)
def test_an_option_that_contradicts_the_run_is_refused(tmp_path: Path, now: Example, reason: str) -> None:
    out = started(tmp_path / "run", Example(data=Path("faces"), lr=0.5))
    with pytest.raises(UserError, match=reason):
        resumed_options(now, out)


def test_a_run_of_before_an_option_existed_is_resumed_with_its_default(tmp_path: Path) -> None:
    out = started(tmp_path / "run", Example(steps=7))
    text = (out / CONFIG).read_text()
    assert "lr = 0.1\n" in text
    (out / CONFIG).write_text(text.replace("lr = 0.1\n", ""))
    assert resumed_options(Example(resume=True), out).lr == 0.1
    with pytest.raises(UserError, match=r"--lr 0.5: .* was started with 0.1"):
        resumed_options(Example(lr=0.5, resume=True), out)


def test_a_resumed_run_keeps_its_cache_unless_it_is_given_another(tmp_path: Path) -> None:
    out = started(tmp_path / "run", Example(cache=Path("here")))
    assert str(resumed_options(Example(), out).cache) == "here"
    assert resumed_options(Example(cache=Path("there")), out).cache == Path("there")
