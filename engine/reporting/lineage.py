"""Where a structure comes from: its ancestors, and which genes changed on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.reporting.text import NBSP
from engine.run.searched import Candidates
from engine.space import Space

CHANGES_SHOWN = 4


def ancestors(candidates: Candidates, row: int) -> list[int]:
    """A row and all rows it descends from, youngest first."""
    found, open_rows = {row}, [row]
    while open_rows:
        for parent in candidates.parents[open_rows.pop()]:
            if parent not in found:
                found.add(parent)
                open_rows.append(parent)
    return sorted(found, reverse=True)


def closest_parent(candidates: Candidates, row: int) -> int:
    """The parent a row shares most genes with, the first of those that share equally many."""
    own_G = candidates.genome_VG[row]
    return max(candidates.parents[row], key=lambda parent: int((candidates.genome_VG[parent] == own_G).sum()))


def main_line(candidates: Candidates, row: int) -> list[int]:
    """A row, its closest parent, that one's, and so on to a random founder."""
    line = [row]
    while candidates.parents[line[-1]]:
        line.append(closest_parent(candidates, line[-1]))
    return line


def changes(candidates: Candidates, row: int, space: Space) -> str:
    """In words, in which widths a row differs from its closest parent, and which of them another parent gave."""
    if not candidates.parents[row]:
        return "drawn at random"
    genome_VG, base = candidates.genome_VG, closest_parent(candidates, row)
    others = [parent for parent in dict.fromkeys(candidates.parents[row]) if parent != base]
    new_G, parts = genome_VG[row] != genome_VG[base], [f"as #{base}"] if others else []
    for parent in others:
        given_G = new_G & (genome_VG[parent] == genome_VG[row])
        if bool(given_G.any()):
            parts.append(f"from #{parent}: {_widths(candidates, base, row, given_G, space)}")
        new_G = new_G & ~given_G
    if bool(new_G.any()):
        parts.append(("new: " if others else "") + _widths(candidates, base, row, new_G, space))
    return "; ".join(parts) or f"as #{base}"


def _widths(candidates: Candidates, before: int, after: int, shown_G: Tensor, space: Space) -> str:
    genes = shown_G.nonzero()[:, 0].tolist()
    old, new = space.gene_widths(candidates.genome_VG[[before, after]]).tolist()
    words = [NBSP.join((space.genes[g].name, str(old[g]), "→", str(new[g]))) for g in genes[:CHANGES_SHOWN]]
    more = f" and {len(genes) - CHANGES_SHOWN} more" if len(genes) > CHANGES_SHOWN else ""
    return ", ".join(words) + more


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
