"""A front on disk: structures that load, a table that says what they are, a picture, and nothing of an earlier one."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from PIL import Image
from structures import random_genomes, space_of
from torch import Tensor

from engine.run import front
from engine.run.front import COSTS, front_picture, write_front
from engine.space.costs import cost_model
from engine.space.structure import Structure, load_structure, make_structure

COST_MODEL = cost_model(space_of("mobilenet_v1", 10), 224)
IMAGES = 360
HEADER = ["file", "correct", "images", "loss", "macs", "parameters", "peak_activation_bytes", "latency_ms", "genome"]


def columns_of(genome_PG: Tensor) -> dict[str, list[Any]]:
    """The columns of ``front.csv`` after ``file``, with scores by an arbitrary rule."""
    correct = genome_PG.sum(1) % 200 + 100
    return {
        "correct": correct.tolist(),
        "images": [IMAGES] * len(genome_PG),
        "loss": (1 / correct.double()).tolist(),
        "macs": COST_MODEL.macs(genome_PG).tolist(),
        "parameters": COST_MODEL.parameters(genome_PG).tolist(),
        "peak_activation_bytes": COST_MODEL.peak_activation_bytes(genome_PG).tolist(),
        "latency_ms": (COST_MODEL.macs(genome_PG) / 1e7).tolist(),
        "genome": [" ".join(map(str, row)) for row in genome_PG.tolist()],
    }


def structures_of(genome_PG: Tensor) -> list[Structure]:
    columns = columns_of(genome_PG)
    scores = [{name: columns[name][i] for name in ("correct", "images", "loss")} for i in range(len(genome_PG))]
    return [make_structure(COST_MODEL, row, 32, score=score) for row, score in zip(genome_PG, scores, strict=True)]


SCORED = columns_of(random_genomes(COST_MODEL.space, 60))
UNIFORM = columns_of(torch.cat([COST_MODEL.space.uniform_choice(choice) for choice in (3, 12, 30)]))
OLD, NEW = random_genomes(COST_MODEL.space, 3, seed=1), random_genomes(COST_MODEL.space, 2, seed=2)


def write(out: Path, genome_PG: Tensor) -> None:
    write_front(out, structures_of(genome_PG), columns_of(genome_PG), SCORED, UNIFORM)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def genomes_in(folder: Path) -> list[list[int]]:
    return [list(load_structure(path).genome) for path in sorted(folder.iterdir())]


def test_every_row_is_a_file_that_loads_and_says_the_same(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    with (tmp_path / "front.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == HEADER
    assert [row["file"] for row in rows] == [f"front/00{number}.json" for number in range(1, 4)]
    assert sorted(path.name for path in (tmp_path / "front").iterdir()) == [row["file"][6:] for row in rows]
    for row, genome in zip(rows, OLD.tolist(), strict=True):
        structure = load_structure(tmp_path / row["file"])
        assert [int(choice) for choice in row["genome"].split()] == list(structure.genome) == genome
        assert (int(row["macs"]), int(row["parameters"])) == (structure.macs, structure.parameters)
        assert structure.score is not None
        for name, kind in (("correct", int), ("images", int), ("loss", float)):
            assert kind(row[name]) == structure.score[name]


def test_the_same_front_is_the_same_bytes_and_nothing_is_left_over(tmp_path: Path) -> None:
    write(tmp_path / "one", OLD)
    write(tmp_path / "other", OLD)
    write(tmp_path / "other", OLD)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert set(contents(tmp_path / "one")) == {f"front/00{n}.json" for n in range(1, 4)} | {"front.csv", "front.png"}


def test_a_shorter_front_leaves_no_structure_of_the_longer_one_behind(tmp_path: Path) -> None:
    write(tmp_path / "rewritten", OLD)
    write(tmp_path / "rewritten", NEW)
    write(tmp_path / "fresh", NEW)
    assert contents(tmp_path / "rewritten") == contents(tmp_path / "fresh")


def test_an_empty_front_is_an_empty_folder_and_a_table_without_rows(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    write(tmp_path, OLD[:0])
    assert list((tmp_path / "front").iterdir()) == []
    assert (tmp_path / "front.csv").read_text() == ",".join(HEADER) + "\n"


def test_more_than_999_structures_have_longer_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Structure, "save", lambda self, path: path.touch())
    structure, columns = structures_of(OLD[:1]) * 1000, {name: v * 1000 for name, v in columns_of(OLD[:1]).items()}
    write_front(tmp_path, structure, columns, SCORED)
    assert (tmp_path / "front" / "999.json").exists()
    assert (tmp_path / "front" / "1000.json").exists()
    write(tmp_path, OLD[:1])
    assert [path.name for path in (tmp_path / "front").iterdir()] == ["001.json"]


def test_what_else_lies_in_the_folder_stays(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    network = tmp_path / "front" / "retrained" / "model.safetensors"
    network.parent.mkdir()
    network.write_bytes(b"weights")
    write(tmp_path, NEW)
    assert network.read_bytes() == b"weights"
    assert len(list((tmp_path / "front").glob("*.json"))) == len(NEW)


# -- when something goes wrong -------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


def crash_at(step: int) -> Any:
    """A profiler that ends the process before its ``step``-th change to the disk."""
    changes = {"rename", "replace", "unlink", "mkdir", "rmdir", "fsync"}
    count = 0

    def before(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event == "c_call" and argument.__name__ in changes and argument.__module__ == "posix":
            count += 1
            if count == step:
                raise Crash

    return before


def test_after_a_crash_anywhere_the_old_front_or_the_new_one_is_there_and_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "front_picture", lambda columns, *rest: str(columns["macs"]).encode())
    write(tmp_path / "fresh", NEW)
    expected = contents(tmp_path / "fresh")
    seen = set()
    for step in range(1, 1000):
        out = tmp_path / str(step)
        write(out, OLD)
        table = (out / "front.csv").read_bytes()
        (out / "front" / "notes").mkdir()
        sys.setprofile(crash_at(step))
        try:
            write(out, NEW)
            crashed = False
        except Crash:
            crashed = True
        finally:
            sys.setprofile(None)
        assert (out / "front" / "notes").exists() or (out / ".front.replaced" / "notes").exists()
        folder = out / "front" if (out / "front").exists() else out / ".front.replaced"
        found = [list(load_structure(path).genome) for path in sorted(folder.glob("*.json"))]
        assert found in (OLD.tolist(), NEW.tolist())
        seen.add((folder.name, found == NEW.tolist()))
        if (out / "front.csv").exists():
            assert (out / "front.csv").read_bytes() == (table if found == OLD.tolist() else expected["front.csv"])
        write(out, NEW)
        assert contents(out) == expected
        assert (out / "front" / "notes").exists()
        if not crashed:
            break
    assert seen == {("front", False), (".front.replaced", False), ("front", True)}


def test_columns_that_do_not_fit_the_structures_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="shorter"):
        write_front(tmp_path, structures_of(NEW), columns_of(NEW[:1]), SCORED)
    with pytest.raises(ValueError, match="longer"):
        write_front(tmp_path, structures_of(NEW), columns_of(OLD), SCORED)
    with pytest.raises(KeyError):
        write_front(tmp_path, structures_of(NEW), columns_of(NEW), SCORED, cost="price")
    assert contents(tmp_path) == before


# -- the picture ---------------------------------------------------------------------------------------------------


def colours(png: bytes) -> set[Any]:
    with Image.open(io.BytesIO(png)) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height) or ()}


GREY, BLUE, ORANGE = (191, 191, 191), (31, 119, 180), (255, 127, 14)


@pytest.mark.parametrize("cost", sorted(COSTS))
def test_a_picture_shows_what_was_scored_the_front_and_the_uniform_structures(cost: str) -> None:
    shown = colours(front_picture(columns_of(OLD), SCORED, UNIFORM, cost))
    assert {GREY, BLUE, ORANGE} <= shown
    assert ORANGE not in colours(front_picture(columns_of(OLD), SCORED, cost=cost))


def test_every_cost_of_the_table_has_a_picture_of_its_own() -> None:
    pictures = [front_picture(columns_of(OLD), SCORED, cost=cost) for cost in COSTS]
    assert len(set(pictures)) == len(COSTS) == 4


def test_a_picture_names_no_date_and_no_software_and_heeds_no_setting_of_matplotlib() -> None:
    picture = front_picture(columns_of(OLD), SCORED, UNIFORM)
    with Image.open(io.BytesIO(picture)) as image:
        assert set(image.info) <= {"dpi"}
    with matplotlib.rc_context({"axes.facecolor": "red", "lines.linewidth": 9, "savefig.dpi": 30}):
        assert front_picture(columns_of(OLD), SCORED, UNIFORM) == picture
        assert matplotlib.rcParams["axes.facecolor"] == "red"


def test_a_line_joins_those_that_none_cheaper_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[Any]] = {}
    plot = Axes.plot

    def watched(self: Axes, x: Any, y: Any, *style: str, **options: Any) -> Any:
        drawn[options.get("label", "line")] = [list(x), list(y)]
        return plot(self, x, y, *style, **options)

    monkeypatch.setattr(Axes, "plot", watched)
    macs, correct = [3e6, 1e6, 2e6, 2e6, 4e6], [80, 50, 50, 70, 60]
    front_picture({"macs": macs, "correct": correct, "images": [100] * 5}, SCORED)
    assert drawn["front"] == [[1, 2, 2, 3, 4], [50, 70, 50, 80, 60]]
    assert drawn["line"] == [[1, 2, 3], [50, 70, 80]]
    assert len(drawn["scored"][0]) == 60
    assert "uniform" not in drawn


def test_writing_a_front_neither_needs_nor_touches_pyplot(tmp_path: Path) -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    write(tmp_path, NEW)
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert not hasattr(front, "matplotlib")
