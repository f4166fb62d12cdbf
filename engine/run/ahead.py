"""Batches made ahead of their use, and the time training waits for them all the same."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

import torch

Item = TypeVar("Item")

AHEAD = 2
"""Items made and not yet used, at most."""
PATIENCE = 10.0
"""Seconds that an item in the making is waited for at the end."""


def made_ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yield what ``items`` yields, made by a thread of its own that is up to ``AHEAD`` items ahead.

    The thread computes on one core. What ``items`` raises is raised here, after the items before it. Closing this
    generator closes ``items`` and ends the thread.
    """
    slots, stopped = threading.Semaphore(AHEAD), threading.Event()
    made: queue.SimpleQueue[tuple[Item] | BaseException] = queue.SimpleQueue()
    threads = torch.get_num_threads()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    started = threading.Event()

    def make() -> None:
        try:
            torch.set_num_threads(1)
            if gpu is not None:
                torch.cuda.set_device(gpu)
            started.set()
            with closing(items):
                while slots.acquire() and not stopped.is_set():
                    made.put((next(items),))
        except BaseException as error:
            made.put(error)
        finally:
            started.set()

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    # The number is each thread's own, but the last one set is also that of threads yet to come.
    started.wait()
    torch.set_num_threads(threads)
    try:
        while True:
            item = made.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            slots.release()
            yield item[0]
            del item
    finally:
        stopped.set()
        slots.release()
        thread.join(PATIENCE)


class StepTimer:
    """The share of training steps that passes before their batches are there.

    Around every step: ``begin()``, take the batch, ``ready()``, do the step, ``done()``.
    """

    def __init__(self) -> None:
        self.waited = self.total = 0.0

    def begin(self) -> None:
        """A batch is wanted."""
        self.began = time.monotonic()

    def ready(self) -> None:
        """The batch is there."""
        self.waited += time.monotonic() - self.began

    def done(self) -> None:
        """The step is over."""
        self.total += time.monotonic() - self.began

    @property
    def data_wait(self) -> float:
        """Percent of the time of all steps so far that they waited for their batches."""
        return 100 * self.waited / self.total if self.total else 0.0
