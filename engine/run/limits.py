"""The options that say what a search may cost and what it is for, checked and shown before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from engine.errors import UserError
from engine.run.command import Options
from engine.sampling import check_feasible
from engine.space.budget import KINDS, Budget, Limit, Quantity, parse_limit
from engine.space.space import Space

NEEDS_TABLE = "needs --latency-table: make one with python -m engine.latency build"


@dataclass(frozen=True, kw_only=True)
class LimitOptions(Options):
    """Budgets and objectives of a search."""

    flops: str | None = None
    """Budget in MACs: 300M, 1.2G, or 50% of the full network; 280M:300M is a band."""
    params: str | None = None
    """Budget in parameters: 2M, 50%, or a band."""
    memory_peak: str | None = None
    """Budget in bytes of activations alive at once, for one image in fp32: 1.5MB, 50%, or a band."""
    latency: str | None = None
    """Budget in time: 8ms, 50%, or a band; needs --latency-table."""
    latency_table: Path | None = None
    """Table of engine.latency build: what a structure takes on the device it was measured on."""
    divisor: int = 1
    """Widths are multiples of this, for hardware that wants it."""
    objectives: str = "accuracy"
    """accuracy, or a Pareto front of accuracy and costs: accuracy,flops[,params,memory_peak,latency]."""

    def folder(self) -> str:
        """The name of the output folder: all budgets, and the objectives where there are several."""
        parts = [] if self.objectives == "accuracy" else [self.objectives.replace(",", "-")]
        for name, kind in KINDS.items():
            if text := getattr(self, name):
                parts.append(text if name == "flops" else f"{kind.option.strip('-')}-{text}")
        return "-".join(["search", *parts]).replace("%", "pct").replace(":", "to")

    def costs(self, known: Mapping[str, Quantity]) -> tuple[Quantity, ...]:
        """The costs that are objectives beside accuracy. Raises `UserError` unless accuracy comes first."""
        first, *others = self.objectives.split(",")
        if "latency" in others and "latency" not in known:
            raise UserError(f"--objectives {self.objectives}: latency {NEEDS_TABLE}")
        if first != "accuracy" or not set(others) <= set(known) or len(set(others)) < len(others):
            legal = f"accuracy, then any of {', '.join(known)}, separated by commas"
            raise UserError(f"--objectives {self.objectives}: {legal}")
        return tuple(known[name] for name in others)

    def limits(self, known: Mapping[str, Quantity]) -> dict[str, Limit]:
        """The limits asked for, by name of the cost. Raises `UserError` if there is none, and no other objective."""
        asked = {name: getattr(self, name) for name in KINDS if getattr(self, name) is not None}
        if "latency" in asked and "latency" not in known:
            raise UserError(f"--latency {NEEDS_TABLE}")
        if not asked and not self.costs(known):
            names = ", ".join(kind.option for kind in KINDS.values())
            raise UserError(f"give a budget: one or more of {names}; or --objectives accuracy,flops for a Pareto front")
        return {name: parse_limit(text, known[name]) for name, text in asked.items()}


def checked_budget(limits: Mapping[str, Limit], space: Space, device: torch.device) -> Budget:
    """The budget of these limits. Raises `UserError` with what is legal if no structure meets them all."""
    budget = Budget(space, device, tuple(limit.check() for limit in limits.values()))
    check_feasible(budget)
    return budget


def feasibility(known: Mapping[str, Quantity], limits: Mapping[str, Limit]) -> Table:
    """What a space offers of every cost, beside what is asked."""
    table = Table(title=f"what {known['flops'].subject} offers")
    for heading in ("", "least", "middle", "full", "budget", "satisfiable"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, quantity in known.items():
        kind, limit = quantity.kind, limits.get(name)
        asked = ("", "") if limit is None else (limit.show(), "yes" if limit.in_range else "no")
        offered = (kind.show(value) for value in (quantity.least, quantity.middle, quantity.full))
        table.add_row(kind.heading, *offered, *asked)
    return table
