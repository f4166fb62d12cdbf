"""Images of one split, resident or streamed, and the order in which training visits them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import tee

import torch
from torch import Tensor

from engine.data.decode import Images
from engine.data.loader import CHUNK, decode_batches
from engine.errors import UserError
from engine.random import random_bits, stream_key


@dataclass(frozen=True)
class Stream:
    """How to decode images that do not fit the device.

    images   decodes image ``index``
    size     stored side, in pixels
    workers  processes that decode; 0: this one
    """

    images: Images
    size: int
    workers: int


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split, at positions 0 … M-1. Resident and streamed sets give the same bits.

    name     "sub_train", "sub_validation", "test", or that of a `join`
    indices  int64 [M] on the CPU: where each image stands in the data
    labels   int64 [M] on the device: class index of each image
    stored   uint8 [M,3,R,R] on the device, or how to decode it when needed
    """

    name: str
    indices: Tensor
    labels: Tensor
    stored: Tensor | Stream

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def resident(self) -> bool:
        """Whether the images live on the device."""
        return isinstance(self.stored, Tensor)

    def images(self, positions: Tensor | slice) -> Tensor:
        """Return uint8 [B,3,R,R] on the device for ``positions``: int64 [B], or a slice.

        Raises UserError, naming the image, when a streamed one can no longer be decoded.
        """
        if isinstance(self.stored, Tensor):
            return self.stored[positions if isinstance(positions, slice) else positions.to(self.labels.device)]
        chosen = torch.arange(len(self))[positions if isinstance(positions, slice) else positions.cpu()]
        return torch.cat([images for images, _ in self.stream(chosen.split(CHUNK))])

    def stream(self, index_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 images [B,3,R,R] and int64 labels [B] on the device, for each int64 positions [B].

        Streamed sets take the positions a few batches ahead of use. Raises UserError as ``images`` does.
        """
        if isinstance(self.stored, Tensor):
            for positions in index_batches:
                yield self.images(positions), self.labels[positions.to(self.labels.device)]
            return
        device, stream = self.labels.device, self.stored
        wanted, ahead = tee(index_batches)
        indices = (self.indices[positions.cpu()].tolist() for positions in ahead)
        decoded = decode_batches(stream.images, stream.size, indices, stream.workers)
        for positions, batch in zip(wanted, decoded, strict=True):
            for index, reason in batch.failures.items():
                name = stream.images.name(index)
                raise UserError(f"{name!r} can no longer be decoded ({reason}); restore it and resume")
            images = torch.from_numpy(batch.images)
            if device.type == "cuda":
                images = images.pin_memory().to(device, non_blocking=True)
            yield images, self.labels[positions.to(device)]


def join(name: str, first: ImageSet, second: ImageSet) -> ImageSet:
    """Return the images of two sets of the same data as one, the first set's before the second's."""
    stored = first.stored
    if isinstance(stored, Tensor) and isinstance(second.stored, Tensor):
        stored = torch.cat([stored, second.stored])
    indices, labels = torch.cat([first.indices, second.indices]), torch.cat([first.labels, second.labels])
    return ImageSet(name, indices, labels, stored)


def index_batches(count: int, batch_size: int, seed: int, start_step: int, steps: int) -> Iterator[Tensor]:
    """Yield the positions of ``steps`` training batches, from step ``start_step`` on.

    Each epoch is a fresh permutation of 0 … count-1 whose last partial batch is dropped. The batch of a step
    depends on (count, batch_size, seed, step) alone, so a run resumes exactly at any step. Where
    ``count < batch_size`` a batch is all ``count`` positions.

    Yields int64 [min(batch_size, count)] on the CPU. Raises UserError unless both are at least 1.
    """
    if count < 1 or batch_size < 1:
        raise UserError(f"{count} images in batches of {batch_size}: both must be at least 1")
    size = min(batch_size, count)
    epoch_steps = count // size
    epoch, order = -1, torch.empty(0, dtype=torch.int64)
    for step in range(start_step, start_step + steps):
        if step // epoch_steps != epoch:
            epoch = step // epoch_steps
            order = random_bits(stream_key(seed, "epoch", epoch), count).argsort(stable=True)
        start = step % epoch_steps * size
        yield order[start : start + size]
