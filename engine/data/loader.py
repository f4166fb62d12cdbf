"""Batches of decoded images, in order, decoded ahead of use in worker processes."""

import multiprocessing
import signal
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from engine.data.decode import DecodeError, Images, Pixels

MAX_WORKERS = 16
CHUNK = 64
"""Images decoded as one unit of work, where no batch says otherwise."""
PREFETCH = 2
"""Batches each worker keeps ready."""


@dataclass(frozen=True)
class Batch:
    """Decoded images of one batch of indices.

    indices   of the images that decoded, in the order asked for
    images    uint8 [len(indices),3,size,size]
    failures  why each of the others did not, by index
    """

    indices: list[int]
    images: Pixels
    failures: dict[int, str]


def decode_batches(
    images: Images, size: int, index_batches: Iterable[list[int]], workers: int
) -> Generator[Batch, None, None]:
    """Decode batch after batch, in order. ``workers=0`` decodes in this process.

    The indices are taken lazily, a few batches ahead. PyTorch's global random state is left alone.
    """
    yield from DataLoader(
        _Batches(images, size),
        batch_sampler=index_batches,
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        multiprocessing_context=_worker_context() if workers else None,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_ignore_interrupts,
    )


def with_progress(batches: Iterable[Batch], what: str, total: int) -> Generator[Batch, None, None]:
    """Pass batches on, showing on a terminal how many of ``total`` images are decoded and the time left."""
    with Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TextColumn("time left"),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=total)
        for batch in batches:
            yield batch
            progress.advance(task, len(batch.indices) + len(batch.failures))


class _Batches(Dataset):
    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        # NumPy, not tensors: batches travel through a pipe then, not through /dev/shm, small in containers.
        decoded = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        good: list[int] = []
        failures: dict[int, str] = {}
        for index in indices:
            try:
                decoded[len(good)] = self.images(index, self.size)
                good.append(index)
            except DecodeError as error:
                failures[index] = str(error)
        return Batch(good, decoded[: len(good)], failures)


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_interrupts(_: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the process that ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _worker_context() -> multiprocessing.context.BaseContext:
    """Return a way to start workers that copies neither this process's threads nor its CUDA context."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
