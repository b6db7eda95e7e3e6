# SPDX-License-Identifier: Apache-2.0
"""
Try a learned guide: runs with fresh particles, their evidences, and the moments of its noise.

How many particles each index gets, and how many runs are worth it, follows from the number of
densities to evaluate, not from a clock: a seed then fixes the result.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.layout import Block, depth_of
from pyro_mpis.adaptation.matching import Noise, pooled
from pyro_mpis.blocks import run_plan
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.factor_graph.source_terms import joint_weights
from pyro_mpis.options import Options
from pyro_mpis.particles.drawing import draw_particles
from pyro_mpis.particles.memory import gc_paused
from pyro_mpis.particles.proposals import weigh
from pyro_mpis.planning import Plan, plan_of
from pyro_mpis.programs.environment import Environment
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import Structure
from pyro_mpis.queries import joint_weights_of
from pyro_mpis.replicate import Replicate
from pyro_mpis.workers import Workers

GLOBALS = (300, 2000)  # particles of the index outside of plates: usually, and of small models
LOCALS = (10, 6, 6)  # of indices in plates, by the number of blocks around them
FEW_ELEMENTS, FEW_NUMBERS = 10, 2  # of a plate whose many small elements have more particles each
MORE_LOCALS = 2.0  # times as many at most
EVEN = 0.1  # variance of the log evidence, in nats, that indices in plates may add
UNEVEN = 4.0  # times that of the index outside, above which one in plates gets more particles
LINKED = 20  # of latents that form chains or trees
OTHERS = 30  # of latents that the guide lacks
WORK = 9e7  # densities of all final runs together
SMALL_RUN, LARGEST_RUN = 1e6, WORK / 8  # densities of a run
TRIALS, MOST_TRIALS = 3, 9  # runs of a trial
ENOUGH = 3.0  # ESS of all runs of a trial, for each number outside of plates
WIDE_SPREAD = 1.0  # sd of their log evidences, in nats
OVERHEAD = 5e5  # densities that take as long as all else in a run
REPLICATES = (4, 60)
MANY_OF_SMALL = 20  # replicates at least, of small runs: three trials hardly show a heavy tail
SMALL_ERROR = 0.02  # of the log evidence, in nats
LARGE_ESS = 1500.0  # of a trial's particles, over all final runs


@dataclass(frozen=True)
class Trial:
    """Some runs of a guide, each with fresh particles."""

    log_evidences: Tensor  # (runs,), float64
    noise: dict[int, Noise]  # of the blocks
    ess: Tensor  # (runs,), of the first block, which has the fewest plates
    unevenness: dict[int, float] = field(default_factory=dict)  # of blocks: median over runs

    @property
    def pooled_ess(self) -> float:
        """The ESS of the first block's particles of all runs; one of large weight makes it low."""
        shares = self.log_evidences[self.log_evidences.isfinite()].softmax(0)
        return float(1 / (shares.square() / self.ess.to(shares)).sum()) if self.noise else 0.0

    @property
    def typical_ess(self) -> float:
        """The ESS of the first block's particles of a run: the geometric mean over runs."""
        return float(self.ess.double().log().mean().exp())

    def wanted_runs(self, guide: AutoPlateNormal) -> float:
        """Return the factor of more runs that good moments of the first block would take."""
        return ENOUGH * guide.blocks[0].size / max(1.0, self.pooled_ess)

    @property
    def variance(self) -> float:
        """
        The variance of the mean log evidence, in square nats.

        A few runs may agree by chance, so it is no smaller than what the ESS of all lets expect.
        """
        found = float(self.log_evidences.var()) / len(self.log_evidences)
        return max(found, 1 / max(1.0, self.pooled_ess))

    def is_better(self, other: "Trial") -> bool:
        """
        Whether a move of the guide helped: by the ESS, or by evidences that are clearly higher.

        One particle of large weight makes the ESS of all runs together low, which may be chance.
        The typical ESS of a run ignores such a particle, which may be wrong. So their product
        counts. Where it is higher, evidences may be lower by no more than chance: the worse a
        proposal is, the lower is the log evidence on average.
        """
        both = torch.cat([self.log_evidences, other.log_evidences])
        if not bool(both.isfinite().all()):
            return False
        higher = float(self.log_evidences.mean() - other.log_evidences.mean())
        error = math.sqrt(self.variance + other.variance)
        of_self, of_other = (t.pooled_ess * t.typical_ess for t in (self, other))
        return higher > (-2 * error if of_self >= of_other else error)

    @property
    def log_evidence(self) -> float:
        """The log of the mean evidence."""
        return float(self.log_evidences.logsumexp(0)) - math.log(len(self.log_evidences))

    @property
    def spread(self) -> float:
        """The sd of the runs' log evidences."""
        return float(self.log_evidences.std()) if len(self.log_evidences) > 1 else math.inf

    def is_good(self, low_ess: float) -> bool:
        """Whether the runs agree, and rest on more than a few particles."""
        return self.spread < WIDE_SPREAD and float(self.ess.median()) > low_ess


def numbers_of(guide: AutoPlateNormal, share: float = 1.0) -> dict[str, int]:
    """
    Return how many particles to draw of each noise site.

    :param share: of the usual number, for trials.
    """
    result = {}
    more = {block.number: _more(block) for block in guide.blocks}
    for block, name in zip(guide.blocks, guide.noise_sites, strict=True):
        depth = depth_of(block, guide.blocks)
        if block.is_outer:
            number = GLOBALS[0] / math.prod(more.values())
        elif not block.plates:
            number = LINKED
        else:
            number = LOCALS[min(max(depth, 1), len(LOCALS)) - 1] * more[block.number]
        result[name] = max(4, round(number * share))
    return result


def _more(block: Block) -> float:
    """
    Return how many times as many particles the index of an outermost plate gets as usual.

    The errors of a plate's elements add up. Evenly spread particles of one or two numbers have
    errors that fall faster than those of the index outside, so they are worth more.
    """
    if not block.plates or len(block.parents) > 1 or block.size > FEW_NUMBERS:
        return 1.0
    return min(MORE_LOCALS, max(1.0, math.sqrt(block.elements / FEW_ELEMENTS)))


def work_of(structure: Structure, numbers: Mapping[str, int]) -> float:
    """Return the number of densities that a run evaluates."""
    sizes = {
        index.symbol: index.support or max(numbers.get(name, OTHERS) for name in index.sites)
        for index in structure.indices
    }
    work = 0.0
    for site in structure.model.values():
        read = structure.indices_read(site)
        combinations = math.prod(sizes[s] for s in read)
        if any(structure.by_symbol[s].plates - site.plates for s in read):
            combinations *= 2  # read by an index array, and brought to its elements
        densities = structure.elements(replace(site, event_size=1))  # pyro.factor's has none
        work += combinations * densities * max(1, site.event_size)
    return work


def fitting(
    programs: Programs,
    options: Options,
    guide: AutoPlateNormal,
    share: float = 1.0,
    own: Mapping[str, int] | None = None,
) -> tuple[Plan, dict[str, int]]:
    """
    Plan a run of a guide, with as many particles as a run is worth; draws random numbers.

    :param own: numbers of some noise sites, see :func:`shared_out`.
    """
    programs = replace(programs, guide=guide)
    numbers = {**numbers_of(guide, share), **(own or {})}
    images = guide.choices(is_final=share == 1)
    plan, _, _ = plan_of(programs, with_numbers(options, numbers | images))
    work = work_of(plan.structure, numbers | images)
    limit = LARGEST_RUN * share
    if work > limit:
        depth = 1 + max(len(block.parents) for block in guide.blocks)
        factor = (limit / work) ** (1 / depth)
        numbers = {name: max(4, int(number * factor)) for name, number in numbers.items()}
        plan, _, _ = plan_of(programs, with_numbers(options, numbers | images))
    elif work < SMALL_RUN * share:
        numbers = _of_small(guide, numbers, SMALL_RUN * share / work)
        plan, _, _ = plan_of(programs, with_numbers(options, numbers | images))
    return plan, numbers | images


def _of_small(guide: AutoPlateNormal, numbers: Mapping[str, int], factor: float) -> dict[str, int]:
    """Return more particles, for a run that evaluates few densities: first of those in plates."""
    numbers = dict(numbers)
    inside = [n for b, n in zip(guide.blocks, guide.noise_sites, strict=True) if b.plates]
    if inside:
        levels = 1 + max(len(block.parents) for block in guide.blocks)
        more = min(MORE_LOCALS, factor ** (1 / levels))
        numbers |= {name: int(numbers[name] * more) for name in inside}
        factor /= more ** max(1, levels - 1)
    if guide.blocks[0].is_outer:
        name = guide.noise_sites[0]
        numbers[name] = int(numbers[name] * min(factor, GLOBALS[1] / GLOBALS[0]))
    return numbers


def shared_out(guide: AutoPlateNormal, numbers: Mapping[str, int], trial: Trial) -> dict[str, int]:
    """
    Return numbers of particles that differ from the usual ones, as a trial says.

    An index in plates whose particles have nearly the same weights keeps the trial's number; more
    runs are then worth more. One that adds most of the variance gets twice as many particles, and
    the index outside of plates half.

    :param numbers: of the trial, half of the usual ones.
    """
    inside = [block for block in guide.blocks if block.plates]
    names = dict(zip((block.number for block in guide.blocks), guide.noise_sites, strict=True))
    added = {block.number: trial.unevenness.get(block.number, math.inf) for block in inside}
    result = {names[b]: numbers[names[b]] for b, variance in added.items() if variance < EVEN}
    outer = trial.unevenness.get(guide.blocks[0].number, 0.0)
    if not inside or not guide.blocks[0].is_outer or outer <= 0:
        return result
    most = max(inside, key=lambda block: added[block.number])
    variance, name = added[most.number], names[most.number]
    # what both add with the usual numbers; those of many elements have more already
    variance *= 1.0 if name in result else 0.5
    if math.isfinite(variance) and variance > UNEVEN * 0.5 * outer and _more(most) == 1:
        result[name] = 2 * result.get(name, 2 * numbers[name])
        result[names[0]] = numbers[names[0]]
    return result


def with_numbers(options: Options, numbers: Mapping[str, int]) -> Options:
    """Return options with numbers of particles of their own for some sites."""
    return replace(options, num_samples=OTHERS, numbers=dict(numbers))


def replicates_for(plan: Plan, numbers: Mapping[str, int], trial: Trial, modes: int = 1) -> int:
    """
    Return how many final runs are worth it: fewer where trial runs agree, or runs take long.

    :param trial: of fewer particles, or as many.
    :param modes: number of modes that a guide has, each with particles of its own.
    """
    few, many = REPLICATES
    work = work_of(plan.structure, numbers)
    if work <= 2 * SMALL_RUN:
        few = MANY_OF_SMALL if modes == 1 else MANY_OF_SMALL // 2
    spread = (trial.spread / SMALL_ERROR) ** 2 if math.isfinite(trial.spread) else many
    wanted = max(spread, LARGE_ESS / float(trial.ess.median().clamp(min=1)))
    worth = WORK / (work + OVERHEAD)
    return round(min(many, max(few, min(wanted, worth))))


Weighted = list[tuple[Tensor, Tensor]]  # of each block: (K, *batch dims), (K, *batch dims, D)


class Runs:
    """
    Runs of guides of one structure: the first makes all checks of the package, later ones none.

    :param plan: of runs of any such guide.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._first: Replicate | None = None

    def __call__(self, guide: AutoPlateNormal) -> tuple[Tensor, Weighted | None]:
        """
        Run a guide once, with fresh particles; draws random numbers.

        :return: the log evidence; the weights and values of each block's noise, or None where the
            evidence is zero or the programs ran one by one.
        """
        programs = replace(self.plan.programs, guide=guide)
        # a new environment: an old one keeps the parameters of the guide that last ran in it
        self.plan = replace(self.plan, programs=programs, environment=Environment())
        if self._first is not None:
            return self._again(self._first, guide)
        total = run_plan(self.plan, _ALONE)
        if not total.is_one_by_one:  # whose plan is of particles that it has drawn
            self.plan = total.replicate.plan
        log_p = total.log_evidence.double()
        if not bool(torch.isfinite(log_p)) or total.is_one_by_one:
            return log_p, None
        reads = total.replicate.reads or {}
        if len(total.blocks) == 1 and not any(site.switch for site in reads.values()):
            self._first = total.replicate
        (weights,) = joint_weights_of([total], _symbols(total.replicate, guide), _ALONE)
        return log_p, _by_block(guide, total.replicate, total.whole, weights)

    def _again(self, first: Replicate, guide: AutoPlateNormal) -> tuple[Tensor, Weighted | None]:
        """Run a guide, where it is known what the programs read."""
        plan = self.plan
        with plan.environment.entered(), gc_paused(plan.cut.whole):
            drawn = draw_particles(
                plan.structure, plan.programs, stratified=plan.options.stratified
            )
            particles = weigh(
                plan.structure, plan.programs, drawn, validate=False, from_factors=False
            )
            replicate = replace(first, plan=plan, particles=particles)
            graph = replicate({})
            log_p, weights = joint_weights(graph, _symbols(replicate, guide))
            if not bool(torch.isfinite(log_p)):
                return log_p.double(), None
            return log_p.double(), _by_block(guide, replicate, graph, weights)


_ALONE = Workers(None, show_progress=False)


def _symbols(replicate: Replicate, guide: AutoPlateNormal) -> list[str]:
    return [replicate.structure.index_of[name].symbol for name in guide.noise_sites]


def _by_block(
    guide: AutoPlateNormal,
    replicate: Replicate,
    graph: FactorGraph,
    weights: Mapping[str, Tensor],
) -> Weighted:
    """Bring weights and values of the noise to the layout of the blocks."""
    parts = []
    symbols = _symbols(replicate, guide)
    for block, name, symbol in zip(guide.blocks, guide.noise_sites, symbols, strict=True):
        plates = graph.tensor_plates(graph.index_plates[symbol])
        weight = graph.to_batch(weights[symbol], plates, block.shape, left=1)
        value = replicate.particles.values[name].double()
        parts.append((weight, value.reshape((len(value), *block.shape, block.size))))
    return parts


def tried(runs: Runs, guide: AutoPlateNormal, number: int, most: int | None = None) -> Trial:
    """
    Run a guide several times; draws random numbers.

    :param most: number of runs, up to which there are more if the ESS of the first block is low.
    :raises ValueError: if no run finds a combination of positive probability.
    """
    found = [runs(guide) for _ in range(number)]
    trial = _trial_of(guide, found)
    more = min(most or number, math.ceil(number * trial.wanted_runs(guide))) - number
    if more <= 0:
        return trial
    return _trial_of(guide, found + [runs(guide) for _ in range(more)])


def _trial_of(guide: AutoPlateNormal, found: Sequence[tuple[Tensor, Weighted | None]]) -> Trial:
    log_evidences = torch.stack([log_p.double() for log_p, _ in found])
    possible = [(log_p, parts) for log_p, parts in found if parts is not None]
    if not possible:
        return Trial(log_evidences, {}, torch.zeros(1))
    shares = torch.stack([log_p.double() for log_p, _ in possible]).softmax(0)
    noise = {
        block.number: pooled(shares, [parts[block.number] for _, parts in possible])
        for block in guide.blocks
    }
    ess = torch.stack([1 / parts[0][0].square().sum(0).max() for _, parts in possible])
    uneven = {
        block.number: statistics.median(
            _unevenness(parts[block.number][0]) for _, parts in possible
        )
        for block in guide.blocks
    }
    return Trial(log_evidences, noise, ess, uneven)


def _unevenness(weight: Tensor) -> float:
    """
    Return about how much an index adds to the variance of the log evidence, in square nats.

    A mean over K particles has the relative variance 1 / ESS - 1 / K; the logs of the means of all
    elements add up.

    :param weight: ``(K, *batch dims)``.
    """
    return float((weight.square().sum(0) - 1 / len(weight)).sum())
