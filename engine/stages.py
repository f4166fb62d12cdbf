"""Where the time of a generation goes, stage by stage.

    with stages.recorded(device) as record:          what `engine.evolve --profile` does
        with stages.stage("weights"): ...            time in here, but for the stages within, is that of the weights
    record.seconds()                                 {"weights": 0.12, …, "other": 0.01}

On a CPU by the clock. On a GPU by events in the stream, so that nothing waits: what a stage takes is the time of the
GPU from its first work to that of the next stage, and where the GPU waits for the host, that is part of it (not run on
a GPU). Without a record a stage costs a comparison. One record at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from time import perf_counter
from typing import Any, TypeVar

import torch
from rich.table import Table

Item = TypeVar("Item")

# In the order of a generation, as a table lists them.
STAGES = (
    "proposals", "costs and filter", "duplicates", "sharing", "weights", "calibration", "images", "scoring",
    "selection", "state file", "progress line", "other",
)  # fmt: skip
OTHER = "other"
NOTHING = nullcontext()


class Record:
    """Moments at which one stage ended and another began."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open = [OTHER]
        self.totals = dict.fromkeys(STAGES, 0.0)
        self.marks: list[tuple[str, Any]] = []
        self._mark()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Until its end time is that of this stage."""
        self.open.append(name)
        self._mark()
        try:
            yield
        finally:
            self.open.pop()
            self._mark()

    def _mark(self) -> None:
        moment: Any = perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((self.open[-1], moment))

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far: together all that passed since the record began. Waits for a GPU."""
        self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for (name, began), (_, ended) in pairwise(self.marks):
            took = began.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - began
            self.totals[name] += took
        del self.marks[:-1]
        return dict(self.totals)


_record: Record | None = None


@contextmanager
def recorded(device: torch.device) -> Iterator[Record]:
    """A record of the stages until the end."""
    global _record
    _record = Record(device)
    try:
        yield _record
    finally:
        _record = None


def is_recorded() -> bool:
    """Whether anybody records."""
    return _record is not None


def stage(name: str) -> AbstractContextManager[None]:
    """What is done within is this stage, one of `STAGES`, if anybody records."""
    return NOTHING if _record is None else _record.stage(name)


def each(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items; what it takes to come by them is this stage, and what is done with them is not."""
    iterator = iter(items)
    while True:
        with stage(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def table(seconds: Mapping[str, float], generations: int) -> Table:
    """What every stage took, of all together and in an average generation."""
    total = sum(seconds.values())
    table = Table(title=f"where the time of {generations} generations went")
    for heading in ("", "seconds", "share", "ms a generation"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, took in [*seconds.items(), ("together", total)]:
        share, each_ms = took / max(total, 1e-9), 1000 * took / max(generations, 1)
        table.add_row(name, f"{took:.3f}", f"{100 * share:.1f} %", f"{each_ms:.2f}", end_section=name == OTHER)
    return table
