"""`engine.report`: one page with the right numbers, the same bytes every time, and nothing from outside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from search_files import (
    COSTS,
    IMAGES,
    structure,
    winner,
    write_report,
    write_run,
    write_search,
    write_training,
    write_trust,
)
from small_runs import ErrorLine, run

from engine.reporting.lineage import ancestors, changes, diversity, main_line
from engine.reporting.text import command, confidence, count
from engine.retrain import Retrain
from engine.run.searched import load_search

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The text of a page, its tables as lists of cells, its figures, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.figures: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag == "svg":
            self.figures.append(str(named.get("aria-label")))
        if "id" in named:
            self.ids.append(str(named["id"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "title" not in self.open:
            self.words.append(data)
            if "tr" in self.open and self.rows[-1:] and self.rows[-1]:
                self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def row(self, label: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == label)


def page_of(folder: Path, *arguments: object) -> Page:
    assert write_report(folder, *arguments) == 0
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A finished search in a run."""
    write_search(write_run(tmp_path / "run") / "search-300M")
    return tmp_path / "run/search-300M"


def test_a_report_has_the_numbers_of_the_search(search: Path) -> None:
    best, page = winner(write_search(search.parent / "again")), page_of(search)
    full = int(COSTS.macs(COSTS.space.uniform_choice(30)))
    assert page.row("MACs") == [
        f"{best['macs'] / 1e6:.1f} M {100 * best['macs'] / full:.0f} % of full",
        "299.0 M 53 % of full",
        "567.7 M",
    ]
    assert page.row("search score") == [f"{best['correct'] / 3.6:.1f} % {best['correct']}/360", "55.6 % 200/360", "–"]
    assert "best of 18 structures of at most 300 M MACs, scored in 3 generations" in page.text
    assert f"all {IMAGES} sub-validation images: {18 * IMAGES:,} images" in page.text
    assert "None of these structures has been trained" in page.text
    assert json.loads((search / "state.json").read_text())["digest"] in page.text
    assert len(page.figures) == 6
    assert len(page.ids) == len(set(page.ids))


def test_the_layers_of_the_winner_are_listed_with_widths_and_macs(search: Path) -> None:
    best, page = winner(write_search(search.parent / "again")), page_of(search)
    convolution = structure(best["genome"], None).convolutions[-1]
    row = next(row for row in page.rows if row[1:2] == [convolution["name"]])
    macs = 7 * 7 * convolution["in_channels"] * convolution["out_channels"]
    assert row[:4] == ["27", "block13.pointwise", str(convolution["out_channels"]), "1024"]
    assert row[6] == f"{macs / 1e6:.3f} M"
    assert row[7] == f"{100 * macs / best['macs']:.1f} %"


def test_the_lineage_goes_from_the_winner_to_its_founders(search: Path) -> None:
    rows, page = write_search(search.parent / "again"), page_of(search)
    candidates = load_search(search).candidates
    assert rows.index(winner(rows)) == 17
    assert main_line(candidates, 17) == [17, 7, 1]
    assert ancestors(candidates, 17) == [17, 7, 1]
    assert ancestors(candidates, 16) == [16, 7, 6, 1, 0]
    gene = COSTS.space.genes[7]
    before, after = (int(rows[row]["genome"].split()[7]) for row in (7, 17))
    line = next(row for row in page.rows if row[0] == "#17" and len(row) == 6)
    assert line[1:3] == ["3", "mutation of #7"]
    assert line[5] == f"{gene.name} {gene.widths[before]} → {gene.widths[after]}"
    gene = COSTS.space.genes[3]
    before, after = (int(rows[row]["genome"].split()[3]) for row in (6, 16))
    expected = f"as #6; new: {gene.name} {gene.widths[before]} → {gene.widths[after]}"
    assert changes(candidates, 16, COSTS.space).replace("\u00a0", " ") == expected
    assert "from #" in changes(candidates, 6, COSTS.space)
    assert next(row for row in page.rows if row[0] == "#1" and len(row) == 6)[5] == "drawn at random"


def test_a_raced_search_says_how_many_images_it_saved(tmp_path: Path) -> None:
    rows = write_search(tmp_path / "search", raced=True)
    used = sum(row["images"] for row in rows)
    text = page_of(tmp_path / "search").text
    assert f"stopped 6 of 18 structures early and scored {used:,} images in place of {18 * IMAGES:,}" in text
    assert "it saved 16.7 %" in text


def test_a_pareto_search_is_shown_with_its_front_and_latencies(tmp_path: Path) -> None:
    rows = write_search(tmp_path / "search", latency=True, front=True)
    page, best = page_of(tmp_path / "search"), winner(rows)
    assert "Pareto front" in page.text
    assert "at most 300 M MACs and 1.5 ms to 9 ms" in page.text
    member = next(row for row in page.rows if row[0] == "001.json winner")
    assert member[2] == f"{best['macs'] / 1e6:.1f} M"
    assert member[5] == f"{best['latency_ms']:.3f} ms"
    assert page.row("latency") == [member[5], "–", "–"]


def test_networks_trained_from_scratch_are_shown_and_the_rest_is_what_to_run_next(search: Path) -> None:
    run = search.parent
    best = winner(write_search(run / "again"))
    assert "engine.retrain --structure" in page_of(search).text
    write_training(search / "retrained", structure(best["genome"], 0), 342, structure="s", epochs=15)
    uniform = " ".join(map(str, load_search(search).uniform.genome))  # type: ignore[union-attr]
    write_training(run / "uniform-300M", structure(uniform, None), 348, uniform="300M", epochs=15)
    page = page_of(search, "--overwrite")
    assert page.row("test accuracy")[:2] == ["95.0 % 342/360 92.2–96.8 %", "96.7 % 348/360 94.3–98.1 %"]
    assert page.text.count("Train the") == 1
    assert f"engine.retrain --full --run {run} --epochs 15" in page.text


def test_trainings_of_other_lengths_are_pointed_out(search: Path) -> None:
    best = winner(write_search(search.parent / "again"))
    for name, steps in (("first", 30), ("second", 60)):
        write_training(search / name, structure(best["genome"], 0), 342)
        result = json.loads((search / name / "result.json").read_text())
        (search / name / "result.json").write_text(json.dumps({**result, "steps": steps}))
    page = page_of(search)
    assert "The trainings differ in recipe or length." in page.text
    assert [row[0] for row in page.rows].count("test accuracy") == 2


def test_a_search_without_a_uniform_structure_is_reported_without_it(search: Path) -> None:
    (search / "uniform.json").unlink()
    page = page_of(search)
    assert page.row("MACs")[1] == "567.7 M"
    assert "uniform" not in page.text


def test_the_commands_that_made_a_search_are_written_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run")
    write_search(run / "search", mutation_probability=0.2, generations=20)
    text = page_of(run / "search").text
    assert f"python -m engine.metatrain --steps 60 --out '{run}'" in text
    expected = f"--flops 300M --run '{run}' --population 6 --mutation-probability 0.2 --out '{run / 'search'}'"
    assert f"python -m engine.evolve {expected}" in text
    assert command("engine.retrain", Retrain, {"full": True, "lr": 0.1, "seed": 0}) == (
        "python -m engine.retrain --full --lr 0.1"
    )


def test_a_run_is_reported_with_all_its_finished_searches(tmp_path: Path, error_line: ErrorLine) -> None:
    run = write_run(tmp_path / "run")
    for name in ("search-200M", "search-300M", "search-400M"):
        write_search(run / name)
    (run / "search-400M/structure.json").unlink()
    page = page_of(run)
    assert "2 finished searches" in page.text
    assert "Not finished, and not here: search-400M" in page.text
    assert len(page.figures) == 12
    assert len(page.ids) == len(set(page.ids))
    assert write_report(run / "search-400M") == 2
    assert "not finished" in error_line()


def test_a_run_with_one_search_is_reported_as_that_search(search: Path) -> None:
    assert "finished searches" not in page_of(search.parent).text


def test_what_training_from_scratch_said_is_shown(search: Path, error_line: ErrorLine) -> None:
    trust = write_trust(search / "trust", write_search(search.parent / "again"))
    page = page_of(search)
    chosen = next(row for row in trust["structures"] if row["roles"] == ["chosen"])
    assert page.row("chosen")[2].startswith(f"{100 * chosen['accuracy']:.1f} ± ")
    assert len(page.row("uniform, random-search")[-1].split()) == 2
    tau = trust["correlation"]["search_score"]["kendall"]
    shown = page.row("Kendall's τ, search score and test")
    assert shown == [f"{tau['value']:.2f}", f"{tau['low']:.2f} to {tau['high']:.2f}"]
    assert "360 test images, copies of 36 originals: the standard error is" in page.text
    path = search / "trust/trust.json"
    path.write_text(path.read_text().replace('"images": 360', '"images": 3600'))
    assert write_report(search, "--overwrite") == 2
    assert "trust.json is damaged" in error_line()


def test_the_same_search_gives_the_same_bytes(search: Path) -> None:
    page_of(search)
    first = (search / "report.html").read_bytes()
    page_of(search, "--overwrite")
    assert (search / "report.html").read_bytes() == first


def test_a_report_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    write_search(write_run(tmp_path / "run") / "search", latency=True, front=True)
    page_of(tmp_path / "run/search")
    text = (tmp_path / "run/search/report.html").read_text()
    for word in ("http:", "https:", "src=", "@import", "url(", "<script", "<link", "xmlns", "javascript:"):
        assert word not in text
    references = re.findall(r'href="([^"]*)"', text)
    ids = set(re.findall(r' id="([^"]*)"', text))
    assert references
    assert all(reference.startswith("#") and reference[1:] in ids for reference in references)


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>\"&"
    folder = write_run(tmp_path / "<img onerror=x>") / "search"
    write_trust(folder / "trust", write_search(folder, data=hostile), role=hostile)
    page = page_of(folder)
    text = (folder / "report.html").read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "alert('x')" in page.text


@pytest.mark.parametrize(
    "asked",
    [
        ("--flops", "280M:300M", "--params", "2M"),
        ("--objectives", "accuracy,flops"),
        ("--flops", "300M", "--race", "0.6"),
    ],
    ids=lambda asked: asked[0] + str(len(asked)),
)
def test_what_a_search_writes_is_reported(copied: Path, asked: tuple[str, ...]) -> None:
    settings = ("--population", "6", "--mutants", "2", "--crossovers", "2", "--parents", "2", "--generations", "3")
    arguments = (*asked, "--run", copied, "--out", copied / "search", *settings, "--calibration-images", "32")
    assert run("evolve", *arguments) == 0
    page, found = page_of(copied), load_search(copied / "search")
    assert found.structure.score is not None
    assert f"{found.structure.score['correct']}/360" in page.row("search score")[0]
    assert found.state_digest in page.text
    assert (found.front is not None) == ("--objectives" in asked)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(2, 31), st.integers(0, 99))
def test_diversity_is_the_mean_distance_of_two(P: int, genes: int, choices: int, seed: int) -> None:
    genome_PG = torch.randint(choices, (P, genes), generator=torch.Generator().manual_seed(seed))
    pairs = [(genome_PG[i] - genome_PG[j]).abs().double().mean() / (choices - 1) for i in range(P) for j in range(i)]
    expected = float(torch.stack(pairs).mean()) if pairs else 0.0
    assert diversity(genome_PG, choices) == pytest.approx(expected)


def test_counts_have_four_digits() -> None:
    numbers = (512, 1_000, 516_540, 299_000_000, 4_089_184_256, 999_960_000)
    assert [count(n).replace("\u00a0", " ") for n in numbers] == [
        "512", "1.000 K", "516.5 K", "299.0 M", "4.089 G", "1000 M",
    ]  # fmt: skip


def test_an_interval_stays_between_nothing_and_all() -> None:
    # Wilson, n = 10: p = 0 gives 0 to z²/(n + z²) = 27.75 %, by hand.
    assert confidence(0, 10) == "0.0–27.8\u00a0%"
    assert confidence(10, 10) == "72.2–100.0\u00a0%"
