"""Counter-based random numbers: the same seed gives the same numbers on CPU and GPU, whole or resumed.

Number ``i`` of a stream is ``splitmix64(key + (i + 1) * γ)``, a function of the stream's key and ``i`` alone, so
there is no generator state to save: a stream is named by what it is for (seed, purpose, generation, …). Keys may lie
on the device (`Keys`): what was captured in a graph then draws from other streams each time it is replayed.

Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
UNIFORM_BITS = 24
# Numbers mixed at once on a CPU: few enough to stay in cache.
CHUNK = 1 << 15


# How many streams `Keys` has room for.
MOST_KEYS = 64


@dataclass(frozen=True)
class DeviceKey:
    """The key of a stream that stands in `Keys`: ``name`` is what it is called there, and the names derived from it."""

    keys: Keys
    name: tuple[str, *tuple[tuple[int | str, ...], ...]]

    def derived(self, *name: int | str) -> DeviceKey:
        """What `stream_key` of this key and a name is."""
        return DeviceKey(self.keys, (*self.name, name))

    @property
    def number(self) -> Tensor:
        """The key as it stands on the device, int64 ``[]``."""
        return self.keys.place_of(self.name)


class Keys:
    """Keys on a device: some by name, and all that were ever derived from them."""

    def __init__(self, device: torch.device) -> None:
        self.key_K = torch.zeros(MOST_KEYS, dtype=torch.int64, device=device)
        self.places: dict[tuple[str, *tuple[tuple[int | str, ...], ...]], int] = {}
        self.named: Mapping[str, int] = {}

    def __getitem__(self, name: str) -> DeviceKey:
        """The key of this name."""
        return DeviceKey(self, (name,))

    def set(self, named: Mapping[str, int]) -> None:
        """Name these keys from here on, and derive from them what was derived before. A GPU is not waited for."""
        self.named = named
        numbers = torch.tensor([self._number(*name) for name in self.places], dtype=torch.int64)
        if self.key_K.is_cuda:
            numbers = numbers.pin_memory()
        self.key_K[: len(numbers)].copy_(numbers, non_blocking=True)

    def place_of(self, name: tuple[str, *tuple[tuple[int | str, ...], ...]]) -> Tensor:
        """Where a key stands."""
        if name not in self.places:
            self.places[name] = len(self.places)
            self.key_K[self.places[name]].fill_(self._number(*name))
        return self.key_K[self.places[name]]

    def _number(self, name: str, *derived: tuple[int | str, ...]) -> int:
        key = self.named[name]
        for more in derived:
            key = stream_key(key, *more)
        return _signed(key)


Key = int | DeviceKey


@overload
def stream_key(*name: int | str) -> int: ...


@overload
def stream_key(first: DeviceKey, /, *name: int | str) -> DeviceKey: ...


@overload
def stream_key(first: Key, /, *name: int | str) -> Key: ...


def stream_key(*name: Key | str) -> Key:
    """The 64-bit key of the stream with this name, a sequence of integers and words, the first of them a key or not."""
    if name and isinstance(name[0], DeviceKey):
        return name[0].derived(*name[1:])  # type: ignore[arg-type]
    digest = hashlib.sha256(repr(name).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def random_bits(key: Key, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The first ``count`` numbers of a stream: 64 random bits each, as int64 ``[count]``."""
    return _drawn(key, count, device, torch.int64, lambda bits: bits)


def random_uniform(key: Key, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Float32 numbers in [0, 1), multiples of 2^-24."""
    uniform = _drawn(key, math.prod(shape), device, torch.float32, lambda bits: _shift_right_(bits, 64 - UNIFORM_BITS))
    return uniform.mul_(2.0**-UNIFORM_BITS).reshape(shape)


def random_integers(key: Key, high: int | Tensor, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Integers from 0 to ``high - 1``, int64; ``high`` at most 2^31. The bias, below ``high`` / 2^32, is ignored."""
    scaled = _drawn(
        key, math.prod(shape), device, torch.int64,
        lambda bits: _shift_right_(bits, 32).mul_(high).bitwise_right_shift_(32),
    )  # fmt: skip
    return scaled.reshape(shape)


def _drawn(
    key: Key, count: int, device: torch.device | str, dtype: torch.dtype, made_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """What ``made_of`` makes of the first ``count`` numbers of a stream, in place, ``[count]``."""
    drawn = torch.empty(count, dtype=dtype, device=device)
    size = CHUNK if drawn.device.type == "cpu" else max(count, 1)
    # Number i + 1 of the stream, before it is mixed.
    step = torch.arange(1, min(size, count) + 1, dtype=torch.int64, device=device).mul_(_signed(GAMMA))
    for first in range(0, count, size):
        part = drawn[first : first + size]
        if isinstance(key, DeviceKey):
            z = step[: len(part)] + _signed(first * GAMMA) + key.number
        else:
            z = step[: len(part)] + _signed(key + first * GAMMA)
        z.bitwise_xor_(_shift_right(z, 30)).mul_(_signed(MIX_1))
        z.bitwise_xor_(_shift_right(z, 27)).mul_(_signed(MIX_2))
        part.copy_(made_of(z.bitwise_xor_(_shift_right(z, 31))))
    return drawn


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 patterns: the sign bit moves too."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _shift_right_(x: Tensor, bits: int) -> Tensor:
    """The same in place."""
    return x.bitwise_right_shift_(bits).bitwise_and_(2 ** (64 - bits) - 1)
