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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from pyro.params.param_store import StateDict
from torch import Tensor

from pyro_mpis import _progress, _threads
from pyro_mpis._text import quoted
from pyro_mpis.costs import number_of_runs
from pyro_mpis.factor_graph.evidence import log_evidence
from pyro_mpis.factor_graph.graph import FactorGraph, SiteValue
from pyro_mpis.factor_graph.sampling import forward_pass
from pyro_mpis.particles.drawing import Drawn, draw_particles
from pyro_mpis.particles.evaluation import (
    MAX_LEVELS,
    MissedReadError,
    reads_found,
)
from pyro_mpis.particles.looked_at import (
    drawn_plainly,
    latents_looked_at,
    taken_one_by_one,
    work_of_runs,
)
from pyro_mpis.particles.masked import same_masks
from pyro_mpis.particles.memory import MUCH_WORK, gc_paused
from pyro_mpis.particles.ordinary import Run, run_one_by_one, weighed_together
from pyro_mpis.particles.probes import SiteReads
from pyro_mpis.particles.proposals import (
    weigh,
)
from pyro_mpis.particles.together import ReadTogether
from pyro_mpis.pieces import Ranges, split, with_values
from pyro_mpis.planning import Plan
from pyro_mpis.programs.analysis import with_implicit_plates
from pyro_mpis.programs.environment import seeded
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import UNIQUE_LEVELS, Structure
from pyro_mpis.replicate import BlockSum, Replicate
from pyro_mpis.workers import Workers

KEPT_BYTES = 2**28  # of all replicates' factors: else queries evaluate them again
# Bytes of messages, and their share of the memory limit: more are found again for samples.
KEPT_MESSAGES, SHARE_OF_MESSAGES = 2**27, 8


def run_plan(plan: Plan, workers: Workers, like: Replicate | None = None) -> BlockSum:
    """
    Draw particles and evaluate them block by block; draws random numbers.

    :param like: a replicate of the same plan that ran before: what its sites read is known then.
    """
    with (
        plan.environment.entered(),
        gc_paused(plan.cut.whole),
        _progress.showing(workers.show_progress),
        _threads.several(plan.is_large),
    ):
        obstacle = plan.structure.obstacle
        if obstacle is not None:
            return _ordinary(plan, NotMappableError(obstacle.what, obstacle.remedy), workers)
        if like is not None:
            plan = replace(plan, switched=like.plan.switched)
        for patched in (False, True) if like is None else (like.programs.patched,):
            plan = replace(plan, programs=replace(plan.programs, patched=patched))
            try:
                drawn = draw_particles(
                    plan.structure, plan.programs, stratified=plan.options.stratified
                )
                return _evaluated(plan, drawn, workers, None if like is None else like.reads)
            except NotMappableError as error:
                if like is not None:
                    return run_plan(plan, workers)
                if patched:
                    return _ordinary(plan, error, workers)
        raise AssertionError


def _evaluated(
    plan: Plan, drawn: Drawn, workers: Workers, reads: SiteReads | None = None
) -> BlockSum:
    """
    Evaluate particles; where the programs turn out to be other than planned, by another plan.

    Each change is made once, or takes an index away, so that this ends.

    :param reads: what the sites read, if that is known; forgotten where it turns out to be wrong.
    """
    followed = False
    while True:
        try:
            particles = weigh(
                plan.structure,
                plan.programs,
                drawn,
                validate=plan.environment.validate,
                from_factors=plan.cut.whole,
                memory_limit=plan.memory_limit,
            )
            blocks = split(particles.sizes, plan.cut.blocks)
            return evaluate(Replicate(plan, particles, reads), blocks, drawn, workers)
        except ReadTogether as found:
            if reads is not None:
                reads = None
                continue
            if found.by_index and found.by_index not in plan.switched:
                plan = replace(plan, switched=(*plan.switched, found.by_index))
                continue
            if found.differs and not followed and _may_have_missed(plan.structure):
                followed = True
                plan, drawn = _followed(plan, drawn)
            elif not found.symbols:
                raise NotMappableError(f"{found.reason}, which cannot be followed") from None
            else:
                plan = plan.sharing(found.symbols, found.plates, found.reason)
                drawn = drawn.chosen_anew(plan.structure)
        except MissedReadError as error:
            if followed:
                raise NotMappableError(f"what site '{error}' reads cannot be followed") from None
            followed = True
            plan, drawn = _followed(plan, drawn)


def _may_have_missed(structure: Structure) -> bool:
    """Whether a site may read an index that shares its level with another."""
    return UNIQUE_LEVELS < len(structure.indices) <= MAX_LEVELS


def _followed(plan: Plan, drawn: Drawn) -> tuple[Plan, Drawn]:
    """Return a plan for what the sites are found to read by a level for each index."""
    values = {name: draw.value for name, draw in drawn.draws.items()}
    structure = reads_found(plan.structure, values, plan.programs)
    plan = plan.with_structure(with_implicit_plates(structure))
    return plan, drawn.chosen_anew(plan.structure)


def _ordinary(plan: Plan, error: NotMappableError, workers: Workers) -> BlockSum:
    """Run the programs once for each particle, as ordinary importance sampling does."""
    number, seconds = plan.num_samples, plan.options.time_limit
    if seconds is not None:
        number = min(number, number_of_runs(plan.structure, seconds))
    runs = run_one_by_one(plan.programs, number)
    partly = _partly_combined(plan, error, runs, workers)
    if partly is not None:
        return partly
    structure, particles, graph, traces = weighed_together(plan.structure, runs)
    notice = (
        "the programs run once for each particle, as in pyro.infer.Importance: all latents share "
        "one particle index, and this is ordinary importance sampling, which needs more particles. "
        f"What cannot run at many values at once: {error}. To combine particles: {error.remedy}."
    )
    if plan.options.numbers:
        notice += f" All have as many particles as the site with most: {plan.num_samples}."
    plan = replace(plan, structure=structure, notices=(notice,))  # others were of another plan
    replicate = Replicate(plan, particles, reads={})
    return BlockSum(replicate, ({},), graph, log_evidence(graph).double().unsqueeze(0), traces)


def _partly_combined(
    plan: Plan, error: NotMappableError, runs: Sequence[Run], workers: Workers
) -> BlockSum | None:
    """
    Let those latents alone share an index whose values the programs look at.

    :param runs: which have drawn the particles.
    :return: None if these are all latents, if it cannot be found out, or if it would take long.
    """
    if plan.structure.obstacle is not None or plan.options.numbers:
        return None
    structure = plan.structure.with_num_samples(len(runs))
    masks = plan.programs.masks
    if not all(same_masks(masks, run.model) for run in runs):  # they count differently in each
        return None
    drawn = drawn_plainly(structure, masks, [(run.guide, run.model) for run in runs])
    if drawn is None:
        return None
    names = latents_looked_at(structure, plan.programs, drawn)
    if names is None:
        return None
    structure = taken_one_by_one(structure, names)
    if work_of_runs(structure, names) > MUCH_WORK:
        return None
    shares = len(names) > 1 or any(plan.structure.index_of[name].plates for name in names)
    accuracy = (
        ", and all their values share one particle index, so more particles are needed for the "
        "same accuracy"
        if shares
        else ""
    )
    notice = (
        f"the programs run once for each particle of {quoted(names)}: this takes longer{accuracy}. "
        f"All other latents keep particle indices of their own. What cannot run at many values at "
        f"once: {error}. To combine particles: {error.remedy}."
    )
    plan = replace(
        plan,
        programs=replace(plan.programs, one_by_one=names),
        notices=(),
        footprint=None,
    )
    plan = plan.with_structure(structure, notice)
    if plan.structure.obstacle is not None:
        return None
    try:
        return _evaluated(plan, drawn, workers)
    except NotMappableError:
        return None


def run_replicates(
    plan: Plan, num_replicates: int, workers: Workers, *, keep: bool = False, known: bool = False
) -> list[BlockSum]:
    """
    Run independent replicates, each with a seed drawn from the global generator.

    Each is a unit of work for an executor; a single one sends its blocks instead.

    :param keep: whether to keep factors that are small, so that queries take less time.
    :param known: whether programs and data have been checked by runs before: what the first
        replicate finds the sites to read then holds for the others. Reads by an index array are
        held against the programs in each all the same.
    """
    if num_replicates == 1:
        return [run_plan(plan, workers)]
    seeds = torch.randint(2**31 - 1, (num_replicates,)).tolist()
    kept = KEPT_BYTES // num_replicates if keep and workers.executor is None else 0
    first: list[BlockSum] = []
    if known and workers.executor is None:
        first = [_with_programs(_replicate(plan, seeds[0], kept), plan)]
    like = first[0].replicate if first and _is_as_planned(first[0], plan) else None
    seeds = seeds[len(first) :]
    jobs = [partial(_replicate, plan, seed, kept, like) for seed in seeds]
    totals = workers.run(jobs, "replicates")
    return first + [_with_programs(total, plan) for total in totals]


def _is_as_planned(total: BlockSum, plan: Plan) -> bool:
    """
    Whether a run found the programs to be as planned, and at all particles alike.

    A latent that switches between elements has other particles in another run, if it is drawn.
    """
    found, by_symbol = total.replicate, total.replicate.structure.by_symbol
    reads = (found.reads or {}).values()
    return (
        not total.traces
        and found.structure == plan.structure
        and not any(site.switch and not by_symbol[site.switch].enumerated for site in reads)
    )


def _replicate(plan: Plan, seed: int, kept: int, like: Replicate | None = None) -> BlockSum:
    """Run a replicate; ``kept`` is how many bytes of factors to keep."""
    with seeded(seed):
        total = run_plan(plan, Workers(show_progress=False), like)
    total = replace(_with_programs(total, None), forward=None)
    if total.traces:
        return replace(total, traces=())
    if 0 < sum(factor.tensor.nbytes for factor in total.whole.factors) <= kept:
        return total
    # large factors are many times the particles: they are not kept for every replicate, nor sent
    return replace(total, whole=replace(total.whole, factors=()))


def _with_programs(total: BlockSum, plan: Plan | None) -> BlockSum:
    """Put programs, data and parameters back into what a worker sends without them, or out."""
    found = total.replicate.plan
    if plan is None:
        programs = Programs(_not_sent, _not_sent)
        params: StateDict = {"params": {}, "constraints": {}}
        environment = replace(found.environment, params=params, values={})
    else:
        programs, environment = plan.programs, plan.environment
    programs = replace(
        programs, patched=found.programs.patched, one_by_one=found.programs.one_by_one
    )
    found = replace(found, programs=programs, environment=environment)
    return replace(total, replicate=replace(total.replicate, plan=found))


def _not_sent() -> None:
    raise AssertionError


def evaluate(
    replicate: Replicate, blocks: Sequence[Ranges], drawn: Drawn, workers: Workers
) -> BlockSum:
    """Evaluate every block once: evidences, and the values of the sites at all particles."""
    sent = workers.sends(len(blocks)) and len(replicate.cut(blocks[0])[1]) > 1
    replicate, graph = replicate.evaluate_first(blocks[0], drawn, piece=sent)
    if len(blocks) == 1:
        limit = replicate.plan.memory_limit or KEPT_MESSAGES * SHARE_OF_MESSAGES
        most = min(KEPT_MESSAGES, limit // SHARE_OF_MESSAGES)
        log_p, forward = forward_pass(graph, most)
        return BlockSum(
            replicate, tuple(blocks), graph, log_p.double().unsqueeze(0), forward=forward
        )
    results = [] if sent else [_first_pass(graph)]
    whole = replace(
        graph, factors=(), sizes={**graph.sizes, **replicate.particles.sizes}, values={}
    )
    del graph
    others = blocks[len(results) :]
    jobs = [partial(_block, replicate, part, part is blocks[0]) for part in others]
    results += workers.run(jobs, "blocks")
    for (_, values), ranges in zip(results, blocks, strict=True):
        whole = replace(whole, values=with_values(whole.values, whole.sizes, values, ranges))
    log_evidences = torch.stack([log_p for log_p, _ in results])
    return BlockSum(replicate, tuple(blocks), whole, log_evidences)


def _block(
    replicate: Replicate, ranges: Ranges, all_values: bool
) -> tuple[Tensor, Mapping[str, SiteValue]]:
    """Return the evidence of a block, and the values of all sites or of those that it cuts."""
    with replicate.environment.entered():
        log_p, values = _first_pass(replicate(ranges, check=True))
    cut = {name: site for name, site in values.items() if set(site.indices) & set(ranges)}
    return log_p, values if all_values else cut


def _first_pass(graph: FactorGraph) -> tuple[Tensor, Mapping[str, SiteValue]]:
    return log_evidence(graph).double(), graph.values
