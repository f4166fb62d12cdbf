"""A generation of a search as one function of tensors on the device: score, select, propose, filter, drop duplicates.

    generation = Generation(net, images, memory, settings, budget)
    generation.start(state)                  scores what is pending, and proposes the generation after it
    outcome = generation.outcome()           waits: the one synchronisation of a generation

Shapes are fixed and nothing is read back: on a GPU the first generation is run, the second captured as a CUDA graph,
and this one and all later ones are replayed, each with its own streams of random numbers (`engine.random.Keys`). On a
CPU the same function is called. Either way the search is that of `ask` and `tell`, genome by genome.

`ask` goes on proposing until a generation is full, and how often depends on the genomes. Here one round of proposals
is made; where `ask` would make another, ``asked`` of the outcome is None, and it has to be asked. Random genomes, which
are steered into the budget, are left to it altogether.

Proven by running the function on a CPU and on meta tensors; not run on a GPU.

Shape suffixes: P population, G genes, V genomes visited so far, K genomes proposed, N images.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine import stages
from engine.errors import UserError
from engine.evolution import (
    OVERSAMPLING,
    Offspring,
    Origin,
    Parents,
    SearchSettings,
    SearchState,
    cross,
    is_new,
    mutate,
    proposal_key,
    ranking,
    tell,
)
from engine.population import Scores, ScoringImages, score
from engine.pruningnet import PruningNet
from engine.random import DeviceKey, Keys
from engine.space.budget import Budget
from engine.stages import stage

# The genes of a genome that is not there.
NOBODY = -1


@dataclass(frozen=True)
class Outcome:
    """A generation on the host: the scores of its genomes, the state told of them, and that asked next.

    ``right_PN``, bool, says which images each genome is right about.
    """

    right_PN: Tensor
    told: SearchState
    asked: SearchState | None


class Generation:
    """The genomes of a search and their scores on the device of its budget, for as many generations as there are."""

    def __init__(
        self, net: PruningNet, images: ScoringImages, memory: int, settings: SearchSettings, budget: Budget
    ) -> None:
        self.net, self.images, self.memory, self.settings, self.budget = net, images, memory, settings, budget
        device, genes, population = budget.device, len(budget.space.genes), settings.population
        visited = settings.generations * population
        self.genome_VG = torch.full((visited, genes), NOBODY, dtype=torch.int64, device=device)
        self.correct_V = torch.zeros(visited, dtype=torch.int64, device=device)
        self.loss_V = torch.full((visited,), torch.nan, dtype=torch.float64, device=device)
        self.told = torch.zeros((), dtype=torch.int64, device=device)
        self.pending_PG = torch.zeros(population, genes, dtype=torch.int64, device=device)
        self.parent_P2 = torch.zeros(population, 2, dtype=torch.int64, device=device)
        self.full = torch.zeros((), dtype=torch.bool, device=device)
        self.right_PN = torch.zeros(population, len(images.subset), dtype=torch.bool, device=device)
        self.keys = Keys(device)
        # What the device holds, while it is at work and until something else was told.
        self.state: SearchState | None = None
        self.at_work = False
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.why_not_captured = ""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @staticmethod
    def serves(settings: SearchSettings, images: ScoringImages) -> bool:
        """Whether the generations of such a search can be run here: without random ones, on images on the device."""
        return settings.mutants + settings.crossovers == settings.population and images.subset.resident

    def takes(self, state: SearchState) -> bool:
        """Whether the pending genomes of a state are as many as every generation has."""
        return len(state.pending) == self.settings.population

    def start(self, state: SearchState) -> None:
        """Begin to score what is pending in a state, unless that is what the device is at; a GPU is not waited for."""
        if self.at_work and state is self.state:
            return
        with self._on_stream():
            if state is not self.state:
                self._load(state)
            self._name_streams(state)
            self._run()
        self.state, self.at_work = state, True

    def outcome(self) -> Outcome:
        """What came of it: waits until all of it is there."""
        assert self.state is not None
        with self._on_stream():
            found = [
                _to_host(tensor)
                for tensor in (
                    self.right_PN, self._last_told(self.correct_V), self._last_told(self.loss_V), self.pending_PG,
                    self.parent_P2, self.full,
                )
            ]  # fmt: skip
            if self.stream is not None:
                self.stream.synchronize()
        right_PN, correct_P, loss_P, asked_PG, parent_P2, full = found
        images_P = torch.full_like(correct_P, right_PN.shape[1])
        told = tell(self.state.to("cpu"), correct_P, loss_P, images_P)
        self.state = self._asked(told, asked_PG, parent_P2) if full else None
        self.at_work = False
        return Outcome(right_PN, told, self.state)

    def _asked(self, told: SearchState, asked_PG: Tensor, parent_P2: Tensor) -> SearchState:
        origins = [Origin.MUTATION] * self.settings.mutants + [Origin.CROSSOVER] * self.settings.crossovers
        origin_P = told.origin_V.new_tensor(origins)
        return replace(
            told,
            genome_VG=torch.cat([told.genome_VG, asked_PG]),
            origin_V=torch.cat([told.origin_V, origin_P]),
            generation_V=torch.cat([told.generation_V, torch.full_like(origin_P, told.generation)]),
            parent_V2=torch.cat([told.parent_V2, parent_P2]),
        )

    def _load(self, state: SearchState) -> None:
        """Copy a state to the device."""
        told = len(state.correct)
        self.genome_VG.fill_(NOBODY)[:told] = state.genome_VG[:told].to(self.genome_VG.device)
        self.loss_V.fill_(torch.nan)[:told] = state.loss.to(self.loss_V.device)
        self.correct_V[:told] = state.correct.to(self.correct_V.device)
        self.told.fill_(told)
        self.pending_PG.copy_(state.pending)

    def _name_streams(self, state: SearchState) -> None:
        """The streams that `ask` will draw the generation from which comes after the pending one."""
        then = replace(state, generation=state.generation + 1)
        named = {
            origin.name: proposal_key(then, origin, before)
            for origin, before in ((Origin.MUTATION, 0), (Origin.CROSSOVER, self.settings.mutants))
        }
        self.keys.set(named)

    def _run(self) -> None:
        """Take a step: by itself the first time, which compiles and copies what is needed once; then as a graph."""
        self.steps += 1
        if self.stream is not None and self.steps == 2 and not stages.is_recorded():
            self._capture(self.stream)
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def _capture(self, stream: torch.cuda.Stream) -> None:
        """Record a step without taking it; if that fails, say why, and go on taking them one operation at a time."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.step()
        except (RuntimeError, UserError) as error:
            self.why_not_captured = str(error).splitlines()[0]
        else:
            self.graph = graph

    @torch.no_grad()
    def step(self) -> None:
        """Score the pending genomes, tell, and propose others in their place: what is captured."""
        scores = score(self.net, self.pending_PG, self.images, self.memory)
        with stage("selection"):
            self._tell(scores)
            parents = self.parents()
        self.propose(parents)

    def _tell(self, scores: Scores) -> None:
        position_P = self.told + torch.arange(len(self.pending_PG), device=self.told.device)
        self.genome_VG.index_copy_(0, position_P, self.pending_PG)
        self.correct_V.index_copy_(0, position_P, scores.correct)
        self.loss_V.index_copy_(0, position_P, scores.loss)
        self.right_PN.copy_(scores.right_PN & scores.seen_PN)
        self.told += len(position_P)

    def parents(self) -> Parents:
        """The best told: who failed, or is not there, has no loss, and comes last."""
        best_P = ranking(self.correct_V, self.loss_V)[: self.settings.parents]
        count = (~self.loss_V[best_P].isnan()).sum()
        return Parents(self.genome_VG[best_P], best_P, count=count)

    def propose(self, parents: Parents) -> None:
        """Mutants and crossovers, the first round of `ask`; ``full`` if it needs no other."""
        budget, settings = self.budget, self.settings
        assert parents.count is not None
        chosen_PG, parent_P2, full = [self.genome_VG[:0]], [self.parent_P2[:0]], parents.count.bool()
        for origin, wanted in ((Origin.MUTATION, settings.mutants), (Origin.CROSSOVER, settings.crossovers)):
            key: DeviceKey = self.keys[origin.name]
            with stage("proposals"):
                if origin == Origin.MUTATION:
                    offspring: Offspring = mutate(
                        key, parents, OVERSAMPLING * wanted, budget, settings.mutation_probability
                    )
                else:
                    offspring = cross(key, parents, OVERSAMPLING * wanted)
            genome_KG, parent_K2 = offspring
            with stage("costs and filter"):
                fits_K = budget.fits(genome_KG)
            with stage("duplicates"):
                # Equal genomes cost the same: the first of them that fits is the first of them.
                kept_K = fits_K & is_new(torch.cat([self.genome_VG, *chosen_PG]), genome_KG, budget.space.choices)
                first = (~kept_K).argsort(stable=True)[:wanted]
                chosen_PG.append(genome_KG[first])
                parent_P2.append(parent_K2[first])
                full = full & (kept_K.sum() >= wanted)
        self.pending_PG.copy_(torch.cat(chosen_PG))
        self.parent_P2.copy_(torch.cat(parent_P2))
        self.full.copy_(full)

    def _last_told(self, value_V: Tensor) -> Tensor:
        assert self.state is not None
        last = len(self.state.correct)
        return value_V[last : last + self.settings.population]

    def _on_stream(self) -> AbstractContextManager[object]:
        """On a GPU a stream of its own, after what was begun in the current one: graphs are captured in such a one."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the host: of what is on a GPU, as soon as that is waited for."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
