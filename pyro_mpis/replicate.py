# SPDX-License-Identifier: Apache-2.0
"""
A plan with its particles, and what its programs say at a block of them.

A block's factors are evaluated piece by piece; what the sites read is found at the first block, and
holds for all.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis import _progress
from pyro_mpis._text import quoted
from pyro_mpis.factor_graph.evidence import reduced
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.factor_graph.sampling import ForwardPass
from pyro_mpis.particles.crossing import check_crossing
from pyro_mpis.particles.drawing import Drawn
from pyro_mpis.particles.evaluation import Evaluated, evaluate_programs
from pyro_mpis.particles.factors import build_graph
from pyro_mpis.particles.indexed import check_graph, regroup_indexed
from pyro_mpis.particles.mixtures import (
    Mixture,
    mixture_of,
    rows_beside,
    said_at,
    with_rows,
    without_rows,
)
from pyro_mpis.particles.probes import SiteReads
from pyro_mpis.particles.proposals import Particles, at_supports, weigh_from_factors
from pyro_mpis.particles.reads import find_reads, least_shared
from pyro_mpis.particles.together import ReadTogether
from pyro_mpis.pieces import Ranges, put_together, split
from pyro_mpis.planning import Plan
from pyro_mpis.programs.environment import Environment
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import UNIQUE_LEVELS, Structure
from pyro_mpis.programs.tensors import Said
from pyro_mpis.workers import Job, Result

Beside: TypeAlias = tuple[Mixture, tuple[Said, Said]]  # what a check chose, and its densities


@dataclass(frozen=True)
class Replicate:
    """A plan with its particles; evaluates a block of them. Can be pickled if the programs can."""

    plan: Plan
    particles: Particles
    reads: SiteReads | None = None  # found once, the same for all blocks; maybe by another one

    @property
    def structure(self) -> Structure:
        """The structure of the programs."""
        return self.plan.structure

    @property
    def programs(self) -> Programs:
        """Model and guide."""
        return self.plan.programs

    @property
    def environment(self) -> Environment:
        """The global state that the programs run in."""
        return self.plan.environment

    def __call__(self, ranges: Ranges, *, check: bool = False) -> FactorGraph:
        """
        Evaluate a block, piece by piece.

        :param check: whether to hold factors that read by an index array against the programs.
        :raises ReadTogether: if they are not right.
        """
        block, parts = self.cut(ranges)
        graphs = self.evaluated(block, ranges, parts, check=check)
        return put_together(map(reduced, graphs), parts, block.sizes)

    def evaluate_first(
        self, ranges: Ranges, drawn: Drawn, *, piece: bool = False
    ) -> "tuple[Replicate, FactorGraph]":
        """
        Evaluate the first block, and find what holds for all.

        :param piece: whether to leave it at the block's first piece.
        :raises ReadTogether: if elements of a plate cannot have an index each.
        """
        structure, validate = self.structure, self.environment.validate
        block, parts = self.cut(ranges)
        parts = parts[:1] if piece else parts
        first = block.block(structure, parts[0])
        fixed = None if self.reads is not None else self.at_supports(drawn)
        if self.reads is None and fixed is None and not (parts[0] or ranges):
            evaluated, beside = self._evaluate_with_rows(first)
        else:
            evaluated, beside = self._evaluate(first), None
        if self.plan.cut.whole:
            first = weigh_from_factors(structure, first, evaluated)
            self = replace(self, particles=first)
        graph = build_graph(structure, first, evaluated)
        reads = self.reads
        if reads is None and fixed is not None:
            reads = self.find_reads(*fixed)
            self._check_first(reads, *fixed)
        elif reads is None:
            # All particles, not this block's: a few may all decide alike which element is read.
            reads = self.find_reads(graph, self.particles)
            self._check_first(reads, graph, first, beside)
        of_first = _reads_at(_reads_at(reads, ranges), parts[0])
        if validate and reads:
            self._check(of_first, graph, first, together=False)
        graph = regroup_indexed(graph, of_first)
        check_crossing(graph)
        replicate = replace(self, reads=reads)
        others = replicate.evaluated(block, ranges, parts[1:], check=validate, checked=parts[0])
        graphs = itertools.chain([graph], others)
        return replicate, put_together(map(reduced, graphs), parts, block.sizes)

    def at_supports(self, drawn: Drawn) -> tuple[FactorGraph, Particles] | None:
        """Return particles that are not random, and their graph; None if those drawn will do."""
        particles = at_supports(self.structure, self.particles, drawn)
        if particles is None:
            return None
        return build_graph(self.structure, particles, self._evaluate(particles)), particles

    def find_reads(self, graph: FactorGraph, particles: Particles) -> SiteReads:
        """
        Find which elements sites read.

        :param particles: all of them; those of the graph may be a part.
        """
        drawn, switched = self.particles, self.plan.switched
        return find_reads(graph, self.structure, particles, self.programs, drawn, switched)

    def _evaluate(self, particles: Particles) -> Evaluated:
        return evaluate_programs(
            self.structure,
            particles.values,
            particles.sizes,
            self.programs,
            validate=self.environment.validate,
        )

    def _evaluate_with_rows(self, particles: Particles) -> tuple[Evaluated, Beside | None]:
        """Evaluate particles and, in the same run, what the first check is to look at."""
        mixture = None
        if self._is_to_check(reads={}) and not self.programs.one_by_one:
            mixture = rows_beside(self.structure, particles)
        if mixture is None:
            return self._evaluate(particles), None
        evaluated = self._evaluate(with_rows(self.structure, particles, mixture))
        evaluated, said = without_rows(evaluated, particles, mixture.rows)
        return evaluated, (mixture, said)

    def _is_to_check(self, reads: SiteReads) -> bool:
        """Whether to hold the first graph against mixed particles of all indices."""
        structure = self.structure
        if len(structure.indices) > UNIQUE_LEVELS:  # some share a level: a read may be missed
            return True
        plated = any(index.plates for index in structure.indices)
        return self.environment.validate and plated and not reads

    def _check_first(
        self,
        reads: SiteReads,
        graph: FactorGraph,
        particles: Particles,
        beside: Beside | None = None,
    ) -> None:
        """Hold the first graph against mixed particles, evaluated beside it or by a run."""
        if beside is not None:
            check_graph(graph, reads, *beside, self._least_shared(graph, particles))
        elif self._is_to_check(reads):
            self._check(reads, graph, particles, together=True)

    def _check(
        self,
        reads: SiteReads,
        graph: FactorGraph,
        particles: Particles,
        *,
        together: bool,
        again: bool = False,
    ) -> None:
        mixture = mixture_of(self.structure, particles, together=together, again=again)
        said = said_at(self.structure, particles, self.programs, mixture)
        check_graph(graph, reads, mixture, said, self._least_shared(graph, particles))

    def _least_shared(
        self, graph: FactorGraph, particles: Particles
    ) -> Callable[[LogFactor], ReadTogether | None]:
        """Return what finds the least that a site makes share."""
        return partial(least_shared, graph, self.structure, particles, self.programs)

    def cut(self, ranges: Ranges) -> tuple[Particles, tuple[Ranges, ...]]:
        """Return the particles of a block, and how it is cut into pieces."""
        block = self.particles.block(self.structure, ranges)
        return block, split(block.sizes, self.plan.cut.pieces, smallest=2)

    def evaluated(
        self,
        block: Particles,
        ranges: Ranges,
        parts: Collection[Ranges],
        *,
        check: bool = False,
        checked: Ranges | None = None,
    ) -> Iterator[FactorGraph]:
        """
        Evaluate pieces of a block one after the other.

        :param ranges: the particles of the block, of all of them.
        :param parts: those of each piece, of the block's.
        :param checked: a piece that has been looked at before.
        """
        assert self.reads is not None
        of_block = _reads_at(self.reads, ranges)
        seen = [] if checked is None else [self._outside(checked)]
        for part in _progress.bar(parts, "densities"):
            particles = block.block(self.structure, part)
            graph = build_graph(self.structure, particles, self._evaluate(particles))
            reads = _reads_at(of_block, part)
            if check and reads:
                outside = self._outside(part)
                self._check(reads, graph, particles, together=False, again=outside in seen)
                seen.append(outside)
            yield regroup_indexed(graph, reads)

    def _outside(self, part: Ranges) -> Ranges:
        """Return the particles of the indices outside of plates."""
        by_symbol = self.structure.by_symbol
        return {symbol: cut for symbol, cut in part.items() if not by_symbol[symbol].plates}


def _reads_at(reads: SiteReads, ranges: Ranges) -> SiteReads:
    """Return what is read at a part of the particles."""
    return {name: site.at(ranges) for name, site in reads.items()}


@dataclass(frozen=True)
class BlockSum:
    """The evidence of one set of particles as a sum over blocks."""

    replicate: Replicate
    blocks: tuple[Ranges, ...]
    whole: FactorGraph  # sizes and values of all particles; factors only of a single block
    log_evidences: Tensor  # (blocks,), float64
    traces: tuple[Trace, ...] = ()  # of the model, where it ran once for each particle
    forward: ForwardPass | None = None  # of a single block, where it is kept

    def __getstate__(self) -> dict[str, object]:
        """Leave out the forward pass, whose terms are the factors once more."""
        return {**vars(self), "forward": None}

    @property
    def log_evidence(self) -> Tensor:
        """The log evidence: a scalar, float64."""
        return self.log_evidences.logsumexp(0)

    @property
    def is_one_by_one(self) -> bool:
        """Whether the programs ran once for each particle, of some latents or of all."""
        return bool(self.traces or self.replicate.programs.one_by_one)

    def job(self, number: int, function: Callable[[FactorGraph], Result]) -> Job[Result]:
        """Return the application of a function to the graph of a block, to be called or sent."""
        if self.whole.factors:
            return partial(function, self.whole)
        return partial(_apply, self.replicate, self.blocks[number], function)


def _apply(
    replicate: Replicate, ranges: Ranges, function: Callable[[FactorGraph], Result]
) -> Result:
    with replicate.environment.entered():
        return function(replicate(ranges))


def impossible(total: BlockSum) -> ValueError:
    """Say why the evidence of a run is zero: which site makes it so, or which do together."""
    for name, impossible in impossible_elements(total).items():
        if bool(impossible.any()):
            return ValueError(
                f"site '{name}': probability zero for all particles at {int(impossible.sum())} of "
                f"{impossible.numel()} plate elements, so the evidence is zero. Check the data "
                "against the distribution's support, or use a guide that reaches where the data "
                "have positive probability."
            )
    with total.replicate.environment.entered():
        factors = total.whole.factors or total.replicate(total.blocks[0]).factors
    names = {factor.name for factor in factors if bool((factor.tensor == -torch.inf).any())}
    return ValueError(
        f"the evidence is zero: no combination of particles has positive probability at all of "
        f"{quoted(names)} together. Draw more particles, or use a guide nearer to the posterior."
    )


def impossible_elements(total: BlockSum) -> dict[str, Tensor]:
    """
    Return where each factor makes the evidence zero, in the first block.

    :return: for each factor whether it is -inf for all particles: ``(*plates)``.
    """
    best: dict[str, Tensor] = {}
    with total.replicate.environment.entered():
        for graph in _graphs(total):
            for factor in graph.factors:
                dims = [n for n, symbol in enumerate(factor.dims) if symbol in graph.index_plates]
                highest = factor.tensor.amax(dims) if dims else factor.tensor
                best[factor.name] = torch.maximum(best.get(factor.name, highest), highest)
    return {name: highest == -torch.inf for name, highest in best.items()}


def _graphs(total: BlockSum) -> Iterable[FactorGraph]:
    """Return the graphs of the pieces of the first block, not summed over any plate."""
    if total.traces:
        return [total.whole]
    block, parts = total.replicate.cut(total.blocks[0])
    return total.replicate.evaluated(block, total.blocks[0], parts)
