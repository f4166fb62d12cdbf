"""Where a structure comes from: its ancestors, and which genes changed on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.run.searched import Candidates
from engine.space import Space

CHANGES_SHOWN = 6


def ancestors(candidates: Candidates, row: int) -> list[int]:
    """A row and all rows it descends from, youngest first."""
    found, open_rows = {row}, [row]
    while open_rows:
        for parent in candidates.parents[open_rows.pop()]:
            if parent not in found:
                found.add(parent)
                open_rows.append(parent)
    return sorted(found, reverse=True)


def main_line(candidates: Candidates, row: int) -> list[int]:
    """A row, the parent it shares most genes with, that one's, and so on to a random founder."""
    line = [row]
    while parents := candidates.parents[line[-1]]:
        own_G = candidates.genome_VG[line[-1]]
        line.append(max(parents, key=lambda parent: int((candidates.genome_VG[parent] == own_G).sum())))
    return line


def changes(candidates: Candidates, row: int, space: Space) -> str:
    """In words, what a row took from its parents and which genes have another width than any parent's."""
    parents = list(dict.fromkeys(candidates.parents[row]))
    if not parents:
        return "drawn at random"
    genome_VG = candidates.genome_VG
    same_PG = genome_VG[parents] == genome_VG[row]
    new_G = ~same_PG.any(0)
    parts = []
    if len(parents) > 1:
        from_both = int(same_PG.all(0).sum())
        for parent, same_G in zip(parents, same_PG, strict=True):
            parts.append(f"{int((same_G & (same_PG.sum(0) == 1)).sum())} genes from #{parent}")
        parts.append(f"{from_both} alike in both")
    if bool(new_G.any()):
        widths_2G = space.gene_widths(genome_VG[[parents[0], row]])
        parts.append(_widths(space, widths_2G, new_G.nonzero()[:, 0].tolist()))
    return "; ".join(parts) or "as its parent"


def _widths(space: Space, widths_2G: Tensor, genes: list[int]) -> str:
    shown = [f"{space.genes[g].name} {int(widths_2G[0, g])} → {int(widths_2G[1, g])}" for g in genes[:CHANGES_SHOWN]]
    more = [f"and {len(genes) - CHANGES_SHOWN} more"] if len(genes) > CHANGES_SHOWN else []
    return ", ".join(shown + more)


def diversity(genome_PG: Tensor, choices: int) -> float:
    """Mean distance of two of P genomes: ``mean |a - b| / (choices - 1)`` over pairs and genes; 0 for a single one.

    Sorted, the i-th of P values is added ``i`` times and subtracted ``P - 1 - i`` times in the sum over all pairs.
    """
    P, genes = genome_PG.shape
    if P < 2:
        return 0.0
    times_P = 2 * torch.arange(P) - (P - 1)
    total = int((genome_PG.sort(0).values * times_P[:, None]).sum())
    return total / (P * (P - 1) / 2 * genes * (choices - 1))
