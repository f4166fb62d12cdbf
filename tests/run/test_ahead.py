"""Making batches ahead of their use: order, bounds, errors, the end; and what the step timer says of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import count

import numpy as np
import pytest
import torch

from engine.data.decode import ArrayImages
from engine.data.loader import decode_batches
from engine.errors import UserError
from engine.run.ahead import AHEAD, StepTimer, made_ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "batches"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not threads()


class Source:
    """Yields 0, 1, …, each after some seconds, and notes what it made and that it was closed."""

    def __init__(self, count: int = 10**9, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.count, self.seconds, self.error = count, seconds, error
        self.made, self.closed = 0, False

    def __call__(self) -> Generator[int, None, None]:
        try:
            for number in range(self.count):
                time.sleep(self.seconds)
                self.made += 1
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def data_wait(source: Source, step_seconds: float, steps: int = 20) -> float:
    """What the timer says of a training whose steps take so long."""
    timer = StepTimer()
    with closing(made_ahead(source())) as batches:
        for _ in range(steps):
            timer.begin()
            next(batches)
            timer.ready()
            time.sleep(step_seconds)
            timer.done()
    return timer.data_wait


def test_items_come_in_order_and_end() -> None:
    source = Source(50)
    assert list(made_ahead(source())) == list(range(50))
    assert source.closed


def test_items_are_made_while_others_are_used_and_no_more_than_a_few() -> None:
    source = Source()
    with closing(made_ahead(source())) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 10
        while source.made < 1 + AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert source.made == 1 + AHEAD
    assert source.closed


def test_an_error_comes_after_the_items_before_it_with_its_message() -> None:
    source = Source(3, error=UserError("'cat.jpg' can no longer be decoded"))
    items = made_ahead(source())
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"'cat.jpg' can no longer be decoded"):
        next(items)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, SystemExit])
def test_leaving_by_an_exception_ends_the_thread_and_closes_the_source(error: type[BaseException]) -> None:
    source = Source(seconds=0.02)

    def use() -> None:
        with closing(made_ahead(source())) as items:
            next(items)
            raise error("stop")

    with pytest.raises(error):
        use()
    assert source.closed
    assert not threads()


def test_ending_early_ends_the_processes_that_decode() -> None:
    images = ArrayImages(np.zeros((4, 8, 8), np.uint8))
    endless = ([number % 4] for number in count())
    with closing(made_ahead(decode_batches(images, 8, endless, workers=1))) as batches:
        assert next(batches).indices == [0]
        (worker,) = multiprocessing.active_children()
        # Ctrl-C in a terminal reaches the worker as well: it is for the training to end, after its step.
        os.kill(worker.pid or 0, signal.SIGINT)
        assert [next(batches).indices for _ in range(20)] == [[number % 4] for number in range(1, 21)]
    assert not multiprocessing.active_children()


def test_an_iterator_that_is_never_begun_starts_nothing() -> None:
    source = Source()
    made_ahead(source()).close()
    assert source.made == 0


def test_the_thread_computes_on_one_core_and_leaves_the_others_to_the_step() -> None:
    counts: list[int] = []

    def items() -> Generator[int, None, None]:
        counts.append(torch.get_num_threads())
        yield 0

    def later() -> None:
        counts.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(made_ahead(items())) == [0]
        thread = threading.Thread(target=later)
        thread.start()
        thread.join()
        assert (counts, torch.get_num_threads()) == ([1, 3], 3)
    finally:
        torch.set_num_threads(before)


def test_a_source_slower_than_the_step_is_waited_for_and_the_timer_says_how_long() -> None:
    # A batch every 50 ms and 5 ms of work: 90 %, and less on a machine so busy that it sleeps in.
    assert 60 < data_wait(Source(seconds=0.05), step_seconds=0.005) <= 95


def test_a_source_faster_than_the_step_is_hardly_waited_for() -> None:
    assert data_wait(Source(seconds=0.005), step_seconds=0.03) < 5


def test_the_timer_counts_nothing_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 100.0, 100.0, 104.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    timer = StepTimer()
    assert timer.data_wait == 0
    for _ in range(2):
        timer.begin()
        timer.ready()
        timer.done()
    assert timer.data_wait == pytest.approx(100 * 1 / 8)
