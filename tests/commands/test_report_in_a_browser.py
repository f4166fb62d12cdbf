"""A report as a browser shows it, at the widths of a desk and of a phone. Skipped where there is no Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from search_files import write_run, write_search

from engine import report
from engine.run.command import run_command

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Asks a frame, once it is loaded, what it shows.
MEASURE = """
const errors = []; window.onerror = message => errors.push(message);
function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  const boxes = [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
  const outside = [...page.querySelectorAll("figure, p, pre, h1, h2, dl, .scroll")]
    .filter(element => element.getBoundingClientRect().right > root.clientWidth + 1).length;
  const texts = [...page.querySelectorAll("svg text")].filter(text => {
    const own = text.getBoundingClientRect(), svg = text.ownerSVGElement.getBoundingClientRect();
    return own.left < svg.left - 1 || own.right > svg.right + 1 || own.top < svg.top - 1 || own.bottom > svg.bottom + 1;
  }).length;
  const measured = { figures: boxes.filter(box => box.width > 200 && box.height > 100).length,
    overflow: root.scrollWidth - root.clientWidth, outside, texts, errors };
  document.body.dataset.measured = JSON.stringify(measured);
}
"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a search with everything in it."""
    folder = write_run(tmp_path_factory.mktemp("browser") / "run") / "search"
    write_search(folder, raced=True, latency=True, front=True)
    assert run_command(report.main, report.Report, [str(folder)]) == 0
    return folder / "report.html"


def browse(folder: Path, page: Path, *arguments: str) -> str:
    line = [str(BROWSER), *QUIET, f"--user-data-dir={folder / 'profile'}", *arguments, page.as_uri()]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [1200, 768, 375])
def test_every_figure_is_shown_and_nothing_sticks_out(width: int, page: Path, tmp_path: Path) -> None:
    opened = page.read_text().replace("<details>", "<details open>")
    frame = f'<iframe srcdoc="{html.escape(opened)}" style="width: {width}px; height: 3000px" onload="measure(this)">'
    framed = tmp_path / "framed.html"
    framed.write_text(f'<!doctype html><meta charset="utf-8"><body><script>{MEASURE}</script>{frame}</iframe></body>')
    dom = browse(tmp_path, framed, "--window-size=1400,3200", "--dump-dom")
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found is not None
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert measured == {"figures": 7, "overflow": 0, "outside": 0, "texts": 0, "errors": []}


def test_a_browser_repairs_nothing(page: Path, tmp_path: Path) -> None:
    """The page it builds has as many of every element as the file."""
    dom = browse(tmp_path, page, "--dump-dom")
    written = page.read_text()
    for tag in ("svg", "table", "tr", "td", "th", "p", "figure", "pre", "path", "use", "text"):
        assert len(re.findall(f"<{tag}[ >]", dom)) == len(re.findall(f"<{tag}[ >]", written)), tag


def test_the_picture_of_a_report_is_not_blank(page: Path, tmp_path: Path) -> None:
    for name, setting in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        picture = tmp_path / f"{name}.png"
        browse(tmp_path, page, "--window-size=1200,2400", f"--screenshot={picture}", *setting)
        with Image.open(picture) as image:
            pixels = image.convert("L")
            counts = pixels.histogram()
        total, background = sum(counts), counts.index(max(counts))
        assert pixels.size == (1200, 2400)
        assert (background > 128) == (name == "light")
        assert sum(1 for count in counts if count) > 100
        assert 0.02 < 1 - counts[background] / total < 0.5
