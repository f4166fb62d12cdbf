"""What a structure may cost: limits on MACs, parameters, activation memory and latency, alone and together.

A limit is an upper bound with an optional lower one, absolute or in percent of the full network: ``300M``,
``280M:300M``, ``50%``, ``1.5MB``, ``8ms``. No cost falls when a gene gets wider, so that the smallest structure meets
whatever upper bounds can be met at all.

Shape suffixes: P population, G genes, C limits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from engine.errors import UserError
from engine.space.costs import CostModel, format_count
from engine.space.space import Space

COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BYTE_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}
BYTE_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}
TIME_UNITS: Mapping[str, int | Fraction] = {"us": Fraction(1, 1000), "ms": 1, "s": 1000}
# Keeps a division by the width of an empty range finite.
TINY = 1e-9
BOUND = re.compile(r"(?P<number>\d{1,15}(\.\d{1,15})?)(?P<unit>[a-z]{0,3}|%)", re.IGNORECASE)


Cost = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of cost: how it is asked for, read and shown. ``whole`` ones are integers."""

    option: str
    heading: str
    unit: str
    units: Mapping[str, int | Fraction]
    examples: str
    whole: bool

    def show(self, value: float) -> str:
        """A value with its unit, if it is not clear from the heading."""
        return format_count(value) + self.unit


KINDS: Mapping[str, Kind] = {
    "flops": Kind("--flops", "MACs", "", COUNT_UNITS, "300M, 1.2G or 50%", True),
    "params": Kind("--params", "parameters", "", COUNT_UNITS, "2M or 50%", True),
    "memory_peak": Kind("--memory-peak", "memory peak", "B", BYTE_UNITS, "1.5MB, 800KiB or 50%", True),
    "latency": Kind("--latency", "latency", " ms", TIME_UNITS, "8ms, 900us or 50%", False),
}


@dataclass(frozen=True)
class Quantity:
    """One cost of the structures of one space: ``of`` valid genomes ``[P, G]`` it is ``[P]``.

    ``least``, ``middle`` and ``full`` are those of the structures that make every gene's first, middle and last choice;
    ``subject`` says of what, for a person.
    """

    name: str
    subject: str
    of: Cost
    least: float
    middle: float
    full: float

    @property
    def kind(self) -> Kind:
        """How it is read and shown."""
        return KINDS[self.name]

    @property
    def legal(self) -> str:
        """The range a limit may be in, for a person."""
        kind = self.kind
        return f"{self.subject} has {kind.show(self.least)} to {kind.show(self.full)} {kind.heading}"


def quantities(costs: CostModel, latency: Cost | None = None) -> dict[str, Quantity]:
    """What can be limited, by name: MACs, parameters, peak memory, and latency where something predicts it."""
    functions: dict[str, Cost] = {
        "flops": costs.macs,
        "params": costs.parameters,
        "memory_peak": costs.peak_activation_bytes,
    }
    if latency is not None:
        functions["latency"] = latency
    space, subject = costs.space, f"{costs.space.architecture} at {costs.resolution} px"
    ends = torch.cat([space.uniform_choice(choice) for choice in (0, space.choices // 2, space.choices - 1)])
    ends = ends.to(costs.macs_form.device)
    return {name: Quantity(name, subject, of, *of(ends).tolist()) for name, of in functions.items()}


@dataclass(frozen=True)
class Limit:
    """A quantity is at most ``high``, and at least ``low`` where that is given; ``text`` is how it was asked for."""

    quantity: Quantity
    high: float
    low: float | None = None
    text: str = ""

    @property
    def in_range(self) -> bool:
        """Whether some structures meet it; a limit above the full network is none."""
        return self.quantity.least <= self.high <= self.quantity.full

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds by name, as a search stores them."""
        return {"high": self.high} if self.low is None else {"low": self.low, "high": self.high}

    def check(self) -> Limit:
        """Return it, or raise `UserError` with the legal range if no structure of the space can meet it."""
        if not self.in_range:
            raise UserError(f"{self.text}: no structure fits that budget; {self.quantity.legal}")
        return self

    def show(self) -> str:
        """The bounds with their unit."""
        show = self.quantity.kind.show
        return f"≤ {show(self.high)}" if self.low is None else f"{show(self.low)} to {show(self.high)}"


@dataclass(frozen=True)
class Budget:
    """Limits that hold together; without any, every structure fits."""

    space: Space
    device: torch.device
    limits: tuple[Limit, ...] = ()

    def show(self) -> str:
        """All limits, for a person."""
        shown = (f"{limit.show()} {limit.quantity.kind.heading}" for limit in self.limits)
        return " and ".join(shown) or "none"

    def costs(self, genome_PG: Tensor) -> Tensor:
        """The limited costs of valid genomes, float64 ``[P, C]``."""
        if not self.limits:
            return self.high_C.expand(len(genome_PG), 0)
        return torch.stack([limit.quantity.of(genome_PG).double() for limit in self.limits], 1)

    def fits(self, genome_PG: Tensor) -> Tensor:
        """Which genomes meet every limit, bool ``[P]``."""
        costs_PC = self.costs(genome_PG)
        return ((costs_PC <= self.high_C) & (costs_PC >= self.low_C)).all(1)

    def violation(self, costs_PC: Tensor) -> Tensor:
        """How far costs are outside, float64 ``[P]``, summed over the limits, in ranges of the space; 0 if they fit."""
        outside_PC = (costs_PC - self.high_C).clamp(min=0) + (self.low_C - costs_PC).clamp(min=0)
        return (outside_PC / self._range_C).sum(1)

    def usage(self, costs_PC: Tensor) -> Tensor:
        """How much of the tightest limit costs use, float64 ``[P]``: 0 for the smallest structure, 1 at the limit."""
        if not self.limits:
            return costs_PC.sum(1)
        return ((costs_PC - self._least_C) / (self.high_C - self._least_C).clamp(min=TINY)).amax(1)

    @cached_property
    def high_C(self) -> Tensor:
        """The upper bounds, float64 ``[C]``."""
        return self._row([limit.high for limit in self.limits])

    @cached_property
    def low_C(self) -> Tensor:
        """The lower bounds, float64 ``[C]``; minus infinity where there is none."""
        return self._row([-torch.inf if limit.low is None else limit.low for limit in self.limits])

    @cached_property
    def _least_C(self) -> Tensor:
        return self._row([limit.quantity.least for limit in self.limits])

    @cached_property
    def _range_C(self) -> Tensor:
        return (self._row([limit.quantity.full for limit in self.limits]) - self._least_C).clamp(min=TINY)

    def _row(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)


def parse_limit(text: str, quantity: Quantity, option: str | None = None) -> Limit:
    """A limit such as ``300M``, ``280M:300M`` or ``45%:50%`` (of the full network); counts are rounded down.

    Raises `UserError` with the legal range if the text is no limit.
    """
    option = option or quantity.kind.option
    *lower, upper = text.strip().split(":")
    if len(lower) > 1:
        raise UserError(f"{option} {text}: write an upper bound, or LOW:HIGH. {quantity.legal}")
    high = _bound(upper, text, quantity, option)
    low = _bound(lower[0], text, quantity, option) if lower else None
    if low is not None and low > high:
        raise UserError(f"{option} {text}: the lower bound exceeds the upper one; {quantity.legal}")
    return Limit(quantity, high, low, f"{option} {text}")


def _bound(bound: str, text: str, quantity: Quantity, option: str) -> float:
    match, kind = BOUND.fullmatch(bound), quantity.kind
    unit = match["unit"].lower() if match else ""
    if match is None or (unit != "%" and unit not in kind.units):
        raise UserError(f"{option} {text}: not a budget; write one like {kind.examples}. {quantity.legal}")
    scale = Fraction(quantity.full) / 100 if unit == "%" else kind.units[unit]
    value = Fraction(match["number"]) * scale
    return int(value) if kind.whole else float(value)


def uniform_genome(budget: Budget) -> Tensor:
    """The structure closest to a width multiplier that meets the upper bounds of a budget, int64 ``[1, G]``.

    One ratio for all layers rarely lands on a budget when there are 31 of them, so gene ``g`` of ``G`` takes choice
    ``floor(t + g / G)``: every gene is at the same ratio or one step (3 %) above it, and ``t`` is the
    greatest that fits. Raises `UserError` if not even the smallest structure fits.
    """
    genes, choices = len(budget.space.genes), budget.space.choices
    positions = torch.arange((choices - 1) * genes + 1, device=budget.device)[:, None]
    ladder_PG = ((positions + torch.arange(genes, device=budget.device)) // genes).clamp(max=choices - 1)
    fits = (budget.costs(ladder_PG) <= budget.high_C).all(1)
    if not bool(fits.any()):
        raise UserError(f"no uniform structure has {budget.show()}")
    return ladder_PG[int(fits.nonzero().max())][None]
