"""One tiny PruningNet shared by the tests that only read it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import TINY_NET, ErrorLine, run

from kernels import backends


@pytest.fixture(autouse=True)
def restored_backend() -> Iterator[None]:
    with backends.use("auto"):
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PruningNet of MobileNetV1 on digits, three steps old. Only to be read."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run("metatrain", "--out", out, *TINY_NET) == 0
    return out


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to search in, or to damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def error_line(capfd: pytest.CaptureFixture[str]) -> ErrorLine:
    """The one line a failed command printed to stderr."""

    def read() -> str:
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, lines
        return errors[0]

    return read
