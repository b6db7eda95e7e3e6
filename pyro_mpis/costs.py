# SPDX-License-Identifier: Apache-2.0
"""
What a run would take: entries, memory and seconds at several K, and which change would help.

Sizes come from the structure (:mod:`~pyro_mpis.particles.sizing`). Seconds are these sizes times
what an operation takes on the machine at hand, which is measured.

Which change would help is found by trying: for each way to group the latents that the largest
tensor reads, the number of particles that fits into the same memory and time. An index of ``d``
values with ``K`` particles adds about ``SPREAD ** d / K`` to the relative variance of the evidence:
the weights of a proposal spread by a factor for each dimension. So a group pays where the particles
that it makes room for are more than its dimensions need.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from pyro.poutine.trace_struct import Trace

from pyro_mpis._text import quoted
from pyro_mpis.factor_graph.logspace import log_matmul, logsumexp
from pyro_mpis.particles import memory
from pyro_mpis.particles.footprint import Footprint, run_at_one
from pyro_mpis.particles.sizing import Sizes, Sizing, number_of_densities
from pyro_mpis.programs.messages import statements
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import Index, Structure
from pyro_mpis.run_plan import Advice, Cost, RunPlan

SPREAD = 4.0  # of the weights, for each dimension of a proposal like a prior
SECONDS = 10.0  # that the advice is to fit into
NUMBERS = (10, 30, 100, 300, 1000)  # K of the table, besides that of the run
CANDIDATES = 8  # indices that groups are tried of
WORTH = 1.5  # times lower a variance, for an advice
NEW = 1.5  # times as long as to write to a tensor: to write to a new one, in pieces
PASSES = 6  # over all log_probs, to check them and to sum them over plates
MOST = 10**7  # particles that anybody would draw
CHOICES = (10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 3000, 5000, 10_000)
OUTSIDE = (1, 2, 4, 8)  # times as many particles outside of plates as inside


@dataclass(frozen=True)
class Machine:
    """What operations take here, in seconds."""

    byte: float  # one that an operation on tensors writes
    multiplication: float  # in a product of matrices in log space
    sum: float  # an entry that is added to another and summed in log space
    run: float  # of the programs at a single particle


# A core of 2020, one thread. Numbers of particles are chosen by it and not by the machine at hand:
# the same seed is to give the same result on any machine, whatever else that is busy with.
USUAL = Machine(byte=3e-10, multiplication=2e-10, sum=6e-9, run=0.0)
SECONDS_OF_SITE = 2e-4  # in a mapped run of the programs
SECONDS_OF_DENSITY = 2e-8  # with the sum over it
SECONDS_ALONE = 6e-4  # in a run for a single particle, with what is done around it


def number_that_fits(
    structure: Structure,
    footprint: Footprint,
    *,
    seconds: float,
    memory_limit: int | None,
    device: str,
) -> int:
    """
    Return the most particles of each index, of :data:`CHOICES`, that fit into time and memory.

    :param seconds: that a run may take on a usual machine.
    :param memory_limit: bytes for a run and its queries, without cutting it.
    """
    sites = len(structure.guide) + len(structure.model)
    machine = replace(USUAL, run=SECONDS_OF_SITE * sites)
    model = _CostModel(structure, footprint, machine, memory_limit, device)
    limit = math.inf if memory_limit is None else memory_limit
    best = CHOICES[0]
    for number in CHOICES:
        sizes = model.sizes(number, 1)
        if model.seconds(sizes) > seconds or model.bytes(sizes) > limit:
            break
        best = number
    return best


def number_of_runs(structure: Structure, seconds: float) -> int:
    """
    Return how many runs of the programs fit into a time, of :data:`CHOICES`.

    Each at single values, or, where that may be, with one particle of some latents and all of
    the others.
    """
    sites = len(structure.guide) + len(structure.model)

    def fits(number: int) -> bool:
        work = 0
        if structure.obstacle is None:
            sizes = structure.with_num_samples(number).num_particles
            work = number * number_of_densities(structure, sizes)
        return number * SECONDS_ALONE * sites + work * SECONDS_OF_DENSITY <= seconds

    return max([CHOICES[0], *filter(fits, CHOICES)])


def run_plan_of(
    structure: Structure,
    programs: Programs,
    traces: tuple[Trace, Trace],
    footprint: Footprint | None,
    *,
    num_samples: int,
    memory_limit: int | None,
    device: str,
) -> RunPlan:
    """
    Say what a run would take; draws nothing.

    :param footprint: of the programs; None if torch cannot map them.
    """
    if footprint is None:
        return RunPlan((), "the programs run once for each particle", (), memory_limit)
    machine = _machine(structure, programs, traces)
    model = _CostModel(structure, footprint, machine, memory_limit, device)
    numbers = sorted({*NUMBERS, num_samples})
    costs = tuple(model.cost(number) for number in numbers)
    sizes = structure.num_particles
    need = max(
        model.sizing.queries(sizes, None),
        model.sizing.evaluation(sizes),
        key=lambda need: need.bytes,
    )
    named = structure.named(need.symbols)
    names = quoted(sorted(named, key=list(structure.model).index))
    largest = f"{need.what}, for each combination of {names}" if names else need.what
    advice = [*_groups(model, need.symbols), *_enumerable(structure, traces, num_samples)]
    counts = {index.num_samples for index in structure.indices if not index.enumerated}
    given = model.cost_of(structure) if len(counts) > 1 else None
    return RunPlan(costs, largest, tuple(advice), memory_limit, given)


class _CostModel:
    """What a run takes, with any structure made of the same programs."""

    def __init__(
        self,
        structure: Structure,
        footprint: Footprint,
        machine: Machine,
        memory_limit: int | None,
        device: str,
    ) -> None:
        self.structure = structure
        self.footprint = footprint
        self.machine = machine
        self.memory_limit = memory_limit
        self.device = device
        self.sizing = Sizing(structure, footprint, device)

    def with_structure(self, structure: Structure) -> "_CostModel":
        """Return the model of another structure."""
        return _CostModel(structure, self.footprint, self.machine, self.memory_limit, self.device)

    def cost(self, num_samples: int) -> Cost:
        """Return what a run with K particles of each index takes."""
        return self.cost_of(self.structure.with_num_samples(num_samples))

    def cost_of(self, structure: Structure) -> Cost:
        """Return what a run takes with the numbers of particles that a structure has."""
        sizes = structure.num_particles
        num_samples = max((index.num_samples for index in structure.indices), default=1)
        try:
            cut = memory.fit(structure, self.memory_limit, self.device, self.footprint)
            blocks = {**sizes, **cut.blocks}
            parts = memory.number_of_parts(sizes, {**blocks, **cut.pieces})
        except memory.TooLargeError:
            parts = 0
        return Cost(
            num_samples,
            number_of_densities(self.structure, sizes),
            self.bytes(sizes),
            parts,
            self.seconds(sizes, parts),
        )

    def bytes(self, sizes: Sizes) -> int:
        """Return the bytes that a run and its queries take if nothing is cut."""
        queries = self.sizing.queries(sizes, None).bytes
        factors = self.sizing.factors(self.sizing.shapes(sizes)).bytes
        evaluation = factors + self.sizing.evaluation(sizes).bytes
        return max(queries, evaluation) + self.sizing.particles(sizes)

    def seconds(self, sizes: Sizes, parts: int = 1) -> float:
        """Return about how long a run takes."""
        contraction = self.sizing.contraction(self.sizing.shapes(sizes))
        work, sums = (0, 0) if contraction is None else (contraction.work, contraction.sums)
        densities = number_of_densities(self.structure, sizes) * self.sizing.itemsize
        return (
            self.machine.run * (3 + max(1, parts))
            + self.machine.byte * (self.footprint.work(self.structure, sizes) + PASSES * densities)
            + self.machine.multiplication * work
            + self.machine.sum * sums
        )

    def most(self, ratio: int = 1) -> dict[str, int]:
        """
        Return the most particles of each index that fit into memory and ``SECONDS``.

        :param ratio: times as many of indices outside of plates as of others.
        """
        limit = math.inf if self.memory_limit is None else self.memory_limit
        best = self.sizes(1, ratio)
        number = 2
        while number <= MOST:
            sizes = self.sizes(number, ratio)
            if self.seconds(sizes) > SECONDS or self.bytes(sizes) > limit:
                break
            best, number = sizes, math.ceil(number * 1.3)
        return best

    def sizes(self, number: int, ratio: int) -> dict[str, int]:
        """Return numbers of particles: a number in plates, ``ratio`` times as many outside."""
        return {
            index.symbol: index.support or number * (1 if index.plates else ratio)
            for index in self.structure.indices
        }

    def variance(self, sizes: Sizes) -> float:
        """Return about the relative variance of the evidence, up to a factor."""
        total = 0.0
        for index in self.structure.indices:
            if not index.enumerated:
                elements = math.prod(self.structure.plates[s].size for s in index.plates)
                total += (
                    elements * SPREAD ** _dimensions(self.structure, index) / sizes[index.symbol]
                )
        return total


def _dimensions(structure: Structure, index: Index) -> float:
    """Return the number of values of an index, for an element of its plates."""
    elements = math.prod(structure.plates[s].size for s in index.plates)
    return min(sum(structure.proposal_site(n).shape.numel() for n in index.sites) / elements, 100)


def _groups(model: _CostModel, symbols: frozenset[str]) -> list[Advice]:
    """Group latents two by two, as long as it lowers the variance; and say how many particles."""
    as_it_stands = model.most()
    first = lowest = model.variance(as_it_stands)
    best, found = model, as_it_stands
    while True:
        tried: list[tuple[float, float, int, _CostModel, dict[str, int]]] = []
        same = {s: max(10, number) for s, number in found.items()}
        for pair in _pairs(best.structure, symbols):
            other = best.with_structure(best.structure.merging(*pair))
            sizes = other.most()
            seconds = other.seconds({s: same[s] for s in sizes})  # decides where K is the same
            tried.append((other.variance(sizes), seconds, len(tried), other, sizes))
        if not tried or min(tried)[0] >= lowest:
            break
        lowest, _, _, best, found = min(tried)
    uneven = min((best.most(ratio) for ratio in OUTSIDE), key=best.variance)
    if best.variance(uneven) < lowest / WORTH:
        found, lowest = uneven, best.variance(uneven)
    groups = tuple(index.sites for index in best.structure.indices if len(index.sites) > 1)
    sampled = [s for s, index in model.structure.by_symbol.items() if not index.enumerated]
    if not sampled or not found or first < lowest * WORTH:
        return []
    particles = {
        name: found[index.symbol]
        for index in best.structure.indices
        if not index.enumerated
        for name in index.sites
    }
    numbers = sorted(set(particles.values()))
    if len(numbers) == 1:
        how_many = f"num_samples={numbers[0]}"
    else:
        by_site = ", ".join(f"{name!r}: {number}" for name, number in particles.items())
        how_many = f"num_samples={{{by_site}}}"
    alone = min(as_it_stands[symbol] for symbol in sampled)
    listed = ", ".join(str(group) for group in groups)
    text = f"groups=[{listed}] with {how_many}" if groups else how_many
    text += (
        f" fits into {SECONDS:g} s and the memory limit. As it stands, only {alone} particles of "
        f"each latent fit. The change makes the variance of the evidence about "
        f"{float(f'{first / lowest:.1g}'):,.0f} times lower."
    )
    number = numbers[0] if len(numbers) == 1 else None
    return [Advice(text, groups=groups, num_samples=number, particles=particles)]


def _pairs(structure: Structure, symbols: frozenset[str]) -> list[tuple[Index, Index]]:
    """Return the indices that may be merged, of those that the largest tensor reads."""
    indices = [
        index for index in structure.indices if index.symbol in symbols and not index.enumerated
    ][:CANDIDATES]
    return [
        (one, other)
        for one, other in itertools.combinations(indices, 2)
        if one.plates == other.plates and structure.detour((*one.sites, *other.sites)) is None
    ]


def _enumerable(
    structure: Structure, traces: tuple[Trace, Trace], num_samples: int
) -> list[Advice]:
    """Say which sites are drawn that have fewer values than particles."""
    names = []
    in_model = statements(traces[1])
    for name, index in structure.index_of.items():
        if index.enumerated or name not in in_model:
            continue
        fn = in_model[name]["fn"]
        if fn is None or not getattr(fn, "has_enumerate_support", False):
            continue
        try:
            values = len(fn.enumerate_support(expand=False))
        except (NotImplementedError, RuntimeError):
            continue
        if values <= num_samples:
            names.append(name)
    if not names:
        return []
    text = (
        f"{quoted(names)}: fewer values than particles. infer={{'enumerate': 'parallel'}} sums "
        "over all of them, which is exact and takes less."
    )
    return [Advice(text, enumerate=tuple(names))]


def _machine(structure: Structure, programs: Programs, traces: tuple[Trace, Trace]) -> Machine:
    """Measure what operations take."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        for patched in (False, True):
            try:
                run_at_one(structure, replace(programs, patched=patched), traces)
                break
            except NotMappableError:
                continue
        times.append(time.perf_counter() - start)
    return Machine(*_rates(), min(times))


@functools.lru_cache(maxsize=1)
def _rates() -> tuple[float, float, float]:
    """Return seconds for a byte that is written, for a multiplication, and for an entry summed."""
    x = torch.linspace(-1.0, 1.0, 2**20).reshape(64, -1)  # as large as tensors of a piece
    y = torch.empty_like(x)  # a new one is mapped anew at some times, and three times as slow then
    a = torch.linspace(-1.0, 1.0, 2**18).reshape(4, 256, 256)

    def usual(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            function(*tensors)
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    with torch.no_grad():
        exp = usual(partial(torch.exp, out=y), x)
        add = usual(partial(torch.add, out=y), x, x)
        byte = NEW * (exp + add) / 2 / (x.element_size() * x.numel())
        multiplication = usual(log_matmul, a, a) / (a.numel() * 256)
        entry = usual(lambda x: logsumexp(x + x), x) / x.numel()
    return byte, multiplication, entry
