# SPDX-License-Identifier: Apache-2.0
r"""
The sum over all combinations, in blocks that fit into memory.

Cutting the particles of indices outside of all plates into blocks splits the sum (18) of [1] into
independent sums :math:`P = \sum_b P_b`, each evaluated by the same code from its own particles:
nothing of the model's needs to know. Weights are those of the blocks, each times
:math:`P_b / P`; joint draws come from block :math:`b` with that probability. Independent
replicates, each with particles of its own, are combined alike: :math:`P = R^{-1} \sum_r P_r`.

Blocks and replicates are units of work that any executor may run: pure, and picklable if model and
guide are.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import pyro
import torch
from pyro.params.param_store import StateDict
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from tqdm.auto import tqdm

from pyro_mpis.dependencies import Structure
from pyro_mpis.factor_graph.evidence import log_evidence, reduced
from pyro_mpis.factor_graph.graph import FactorGraph, SiteValue
from pyro_mpis.factor_graph.sampling import sample_sites
from pyro_mpis.factor_graph.source_terms import joint_weights
from pyro_mpis.factors import build_graph
from pyro_mpis.handlers import Programs, isolated
from pyro_mpis.indexing import SiteReads, check_provenance, find_reads, regroup_indexed
from pyro_mpis.memory import Cut, uncollected
from pyro_mpis.proposals import Particles, check_arguments, draw_particles
from pyro_mpis.spot_check import check_combinations

Ranges = Mapping[str, slice]  # symbol of an index -> its particles in a block
Result = TypeVar("Result")
Item = TypeVar("Item")
Job = Callable[[], Result]

_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Environment:
    """The global state that programs run in, as it is when this is made."""

    params: StateDict = field(default_factory=lambda: pyro.get_param_store().get_state())
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    validate: bool = field(default_factory=is_validation_enabled)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Restore that state, without gradients or outer handlers; leave no trace in this one."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with (
                isolated(),
                torch.no_grad(),
                pyro.validation_enabled(self.validate),
                pyro.get_param_store().scope(self.params),
            ):
                yield
        finally:
            torch.set_default_dtype(dtype)


@dataclass(frozen=True)
class Builder:
    """Evaluates the factors of a block of particles; can be pickled if the programs can."""

    structure: Structure
    particles: Particles
    programs: Programs
    environment: Environment
    pieces: Mapping[str, int] = field(default_factory=dict)  # see memory.Cut
    reads: SiteReads | None = None  # found once, the same for all blocks

    def __call__(self, ranges: Ranges) -> FactorGraph:
        """Evaluate a block, piece by piece."""
        block, parts = self.cut(ranges)
        return _put_together(map(reduced, self.evaluated(block, parts)), parts, block.sizes)

    def started(self, ranges: Ranges) -> "tuple[Builder, FactorGraph]":
        """Evaluate the first block, and find what holds for all."""
        block, parts = self.cut(ranges)
        first = block.block(self.structure, parts[0])
        graph = build_graph(self.structure, first, self.programs)
        check = self.environment.validate
        if not self.structure.unique_dims:
            check_provenance(graph, self.structure, first, self.programs)
        if check:
            check_combinations(graph, self.structure, first, self.programs)
        # at all particles: a few may agree on an element that a latent decides
        reads = find_reads(graph, self.structure, self.particles, self.programs, check=check)
        graph = regroup_indexed(graph, reads)
        builder = replace(self, reads=reads)
        graphs = itertools.chain([graph], builder.evaluated(block, parts[1:]))
        return builder, _put_together(map(reduced, graphs), parts, block.sizes)

    def cut(self, ranges: Ranges) -> tuple[Particles, tuple[Ranges, ...]]:
        """Return the particles of a block, and how it is cut into pieces."""
        block = self.particles.block(self.structure, ranges)
        return block, split(block.sizes, self.pieces, smallest=2)

    def evaluated(self, block: Particles, parts: Iterable[Ranges]) -> Iterator[FactorGraph]:
        """Evaluate pieces of a block one after the other."""
        assert self.reads is not None
        for part in parts:
            particles = block.block(self.structure, part)
            graph = build_graph(self.structure, particles, self.programs)
            yield regroup_indexed(graph, self.reads)


@dataclass(frozen=True)
class BlockSum:
    """The evidence of one set of particles as a sum over blocks."""

    builder: Builder
    blocks: tuple[Ranges, ...]
    whole: FactorGraph  # sizes and values of all particles; factors only of a single block
    log_evidences: Tensor  # (blocks,), float64

    @property
    def log_evidence(self) -> Tensor:
        """The log evidence: a scalar, float64."""
        return self.log_evidences.logsumexp(0)

    def job(self, number: int, function: Callable[[FactorGraph], Result]) -> Job[Result]:
        """Return the application of a function to the graph of a block, to be called or sent."""
        if self.whole.factors:
            return partial(function, self.whole)
        return partial(_apply, self.builder, self.blocks[number], function)


@dataclass(frozen=True)
class Workers:
    """Where jobs run: here, one after the other, or where an executor sends them."""

    executor: Executor | None = None
    show_progress: bool = True

    def run(self, jobs: Sequence[Job[Result]]) -> list[Result]:
        """Run jobs and return their results in order; shows a bar in a terminal."""
        if self.executor is None or len(jobs) == 1:
            return [job() for job in self._progress(jobs)]
        futures = [self.executor.submit(_alone, job) for job in jobs]
        return [future.result() for future in self._progress(futures)]

    def _progress(self, items: Sequence[Item]) -> Iterable[Item]:
        disable = None if self.show_progress and len(items) > 1 else True  # None: in a terminal
        bar: Iterable[Item] = tqdm(items, desc="blocks", disable=disable, leave=False)
        return bar


def _alone(job: Job[Result]) -> Result:
    """
    Run a job while no other thread of this process runs one.

    Pyro's handlers and parameters and torch's generator are those of a process: threads, which
    Dask's workers have several of too, would act on each other's programs.
    """
    with _ONE_AT_A_TIME:
        return job()


def _apply(builder: Builder, ranges: Ranges, function: Callable[[FactorGraph], Result]) -> Result:
    with builder.environment.entered():
        return function(builder(ranges))


def split(
    particles: Mapping[str, int], block_sizes: Mapping[str, int], smallest: int = 1
) -> tuple[Ranges, ...]:
    """
    Cut the particles of some indices into blocks, as even as can be.

    :param particles: number of particles of each index.
    :param block_sizes: number in a block, of the indices to cut.
    :param smallest: number below which no block is cut.
    :return: the ranges of each block; one without any where nothing is to be cut.
    """
    cuts = []
    for symbol, size in block_sizes.items():
        whole = particles[symbol]
        number = max(1, min(math.ceil(whole / size), whole // smallest))
        ends = [whole * step // number for step in range(number + 1)]
        cuts.append([(symbol, slice(*ends)) for ends in itertools.pairwise(ends)])
    return tuple(dict(combination) for combination in itertools.product(*cuts))


def _put_together(
    graphs: Iterable[FactorGraph], parts: Sequence[Ranges], sizes: Mapping[str, int]
) -> FactorGraph:
    """
    Put the pieces of a block together.

    :param parts: the particles of each piece, two or more of each index that is cut: dims of size
        one are not there to tell whether a factor has them.
    :param sizes: numbers of particles of the block.
    """
    graphs = iter(graphs)
    whole = next(graphs)
    if len(parts) == 1:
        return whole
    sizes = {**whole.sizes, **sizes}
    factors = [
        replace(factor, tensor=_room(factor.tensor, factor.dims, sizes)) for factor in whole.factors
    ]
    values: dict[str, SiteValue] = {}
    for graph, part in zip(itertools.chain([whole], graphs), parts, strict=True):
        for factor, piece in zip(factors, graph.factors, strict=True):
            factor.tensor[_part(piece.dims, part)] = piece.tensor
        values = _with_values(values, sizes, graph.values, part)
    return replace(whole, factors=tuple(factors), sizes=sizes, values=values)


def impossible_elements(total: BlockSum) -> dict[str, Tensor]:
    """
    Return where each factor makes the evidence zero, in the first block.

    :return: for each factor whether it is -inf for all particles: ``(*plates)``.
    """
    builder = total.builder
    best: dict[str, Tensor] = {}
    with builder.environment.entered():
        block, parts = builder.cut(total.blocks[0])
        for graph in builder.evaluated(block, parts):
            for factor in graph.factors:
                dims = [n for n, symbol in enumerate(factor.dims) if symbol in graph.index_plates]
                highest = factor.tensor.amax(dims) if dims else factor.tensor
                best[factor.name] = torch.maximum(best.get(factor.name, highest), highest)
    return {name: highest == -torch.inf for name, highest in best.items()}


def _room(tensor: Tensor, dims: str, sizes: Mapping[str, int]) -> Tensor:
    return tensor.new_empty([sizes[symbol] for symbol in dims])


@dataclass(frozen=True)
class Plan:
    """What an independent replicate of a run needs."""

    structure: Structure
    programs: Programs
    num_samples: int
    cut: Cut
    environment: Environment = field(default_factory=Environment)

    def run(self, workers: Workers) -> BlockSum:
        """Draw particles and evaluate them block by block; draws random numbers."""
        with self.environment.entered(), uncollected(self.cut.whole):
            particles = draw_particles(self.structure, self.programs, self.num_samples)
            builder = Builder(
                self.structure, particles, self.programs, self.environment, self.cut.pieces
            )
            total = evaluate(builder, split(particles.sizes, self.cut.blocks), workers)
            if self.environment.validate:
                check_arguments(self.structure, self.programs, particles)
        return total


def run_replicates(plan: Plan, num_replicates: int, workers: Workers) -> list[BlockSum]:
    """
    Run independent replicates, each with a seed drawn from the global generator.

    Each is a unit of work for an executor; a single one sends its blocks instead.
    """
    if num_replicates == 1:
        return [plan.run(workers)]
    seeds = torch.randint(2**31 - 1, (num_replicates,)).tolist()
    return workers.run([partial(_replicate, plan, seed) for seed in seeds])


def _replicate(plan: Plan, seed: int) -> BlockSum:
    with seeded(seed):
        total = plan.run(Workers(show_progress=False))
    # the factors are many times the particles: they are not kept for every replicate, nor sent
    return replace(total, whole=replace(total.whole, factors=()))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generator, and restore its state afterwards."""
    state = pyro.util.get_rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)


def evaluate(builder: Builder, blocks: Sequence[Ranges], workers: Workers) -> BlockSum:
    """Evaluate every block once: evidences, and the values of the sites at all particles."""
    builder, graph = builder.started(blocks[0])
    if len(blocks) == 1:
        return BlockSum(builder, tuple(blocks), graph, log_evidence(graph).double().unsqueeze(0))
    results = [_first_pass(graph)]
    whole = replace(graph, factors=(), sizes={**graph.sizes, **builder.particles.sizes}, values={})
    del graph
    results += workers.run([partial(_apply, builder, part, _first_pass) for part in blocks[1:]])
    for (_, values), ranges in zip(results, blocks, strict=True):
        whole = replace(whole, values=_with_values(whole.values, whole.sizes, values, ranges))
    log_evidences = torch.stack([log_p for log_p, _ in results])
    return BlockSum(builder, tuple(blocks), whole, log_evidences)


def _first_pass(graph: FactorGraph) -> tuple[Tensor, Mapping[str, SiteValue]]:
    return log_evidence(graph).double(), graph.values


def joint_weights_of(
    sums: Sequence[BlockSum], tuples: Sequence[str], workers: Workers
) -> list[dict[str, Tensor]]:
    """
    Compute :func:`joint_weights` over the blocks of several sums.

    :return: for each of the sums; weights add up to one in each.
    """
    shares = [(total.log_evidences - total.log_evidence).exp() for total in sums]
    units = [
        (replicate, int(block))
        for replicate, share in enumerate(shares)
        for block in (share > 0).nonzero().squeeze(-1).tolist()
    ]
    function = partial(joint_weights, tuples=tuple(tuples))
    found = workers.run([sums[replicate].job(block, function) for replicate, block in units])
    results: list[dict[str, Tensor]] = [{} for _ in sums]
    for (replicate, block), (log_p, weights) in zip(units, found, strict=True):
        total, result = sums[replicate], results[replicate]
        _check_unchanged(log_p, total.log_evidences[block])
        for symbols, weight in weights.items():
            if symbols not in result:
                sizes = [total.whole.sizes[symbol] for symbol in symbols]
                result[symbols] = weight.new_zeros((*sizes, *weight.shape[len(symbols) :]))
            result[symbols][_part(symbols, total.blocks[block])] += (
                shares[replicate][block] * weight
            )
    return results


def _check_unchanged(log_p: Tensor, known: Tensor) -> None:
    """Refuse a block that has another evidence than it had when it was first evaluated."""
    if not torch.allclose(log_p.double(), known, rtol=1e-6, atol=1e-3):
        raise RuntimeError(
            "the model or its parameters have changed since .run: particles that were weighed at "
            f"log evidence {float(known):.4f} are now at {float(log_p):.4f}. Run again."
        )


def sample_of(sums: Sequence[BlockSum], num_draws: int, workers: Workers) -> dict[str, Tensor]:
    """
    Draw joint samples over the blocks of several sums of equal prior weight.

    Draws random numbers: from the global generator alone, and from seeds drawn from it if there
    are several blocks or sums, wherever they run.
    """
    units = [
        (replicate, block)
        for replicate, total in enumerate(sums)
        for block in range(len(total.blocks))
    ]
    if len(units) == 1:
        job = sums[0].job(0, partial(sample_sites, num_draws=num_draws))
        ((log_p, sample),) = workers.run([job])
        _check_unchanged(log_p, sums[0].log_evidences[0])
        return sample
    log_evidences = torch.cat([total.log_evidences for total in sums])
    chosen = log_evidences.softmax(0).multinomial(num_draws, replacement=True)
    counts = chosen.bincount(minlength=len(units)).tolist()
    seeds = torch.randint(2**31 - 1, (len(units),)).tolist()
    drawn = [number for number, count in enumerate(counts) if count]
    jobs = []
    for number in drawn:
        replicate, block = units[number]
        function = partial(_seeded_sample, num_draws=counts[number], seed=seeds[number])
        jobs.append(sums[replicate].job(block, function))
    found = workers.run(jobs)
    for number, (log_p, _) in zip(drawn, found, strict=True):
        _check_unchanged(log_p, log_evidences[number])
    parts = [sample for _, sample in found]
    order = chosen.argsort(stable=True).argsort()  # the draws' own order, not the blocks'
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def _seeded_sample(
    graph: FactorGraph, num_draws: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    with seeded(seed):
        return sample_sites(graph, num_draws)


def evidence_error(log_evidences: Tensor) -> float:
    """
    Return the standard error of the log of the mean evidence of several replicates.

    By the delta method: that of the mean evidence, relative to it.

    :param log_evidences: ``(replicates,)``; -inf is an evidence of zero.
    """
    number = len(log_evidences)
    ratios = (log_evidences - log_evidences.logsumexp(0)).exp() * number  # of mean one
    return float(ratios.std()) / math.sqrt(number)


def _part(symbols: str, ranges: Ranges) -> tuple[slice, ...]:
    return tuple(ranges.get(symbol, slice(None)) for symbol in symbols)


def _with_values(
    values: Mapping[str, SiteValue],
    sizes: Mapping[str, int],
    found: Mapping[str, SiteValue],
    ranges: Ranges,
) -> dict[str, SiteValue]:
    """Put a block's values of the sites into their places among all particles."""
    values = dict(values)
    for name, site in found.items():
        if not set(site.indices) & set(ranges):
            values.setdefault(name, site)
            continue
        if name not in values:
            shape = [sizes[symbol] for symbol in site.indices]
            rest = site.tensor.shape[len(shape) :]
            values[name] = replace(site, tensor=site.tensor.new_empty((*shape, *rest)))
        values[name].tensor[_part(site.indices, ranges)] = site.tensor
    return values
