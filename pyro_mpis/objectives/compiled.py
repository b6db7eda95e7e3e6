# SPDX-License-Identifier: Apache-2.0
"""
Programs whose structure is known: a step runs them, and makes the graph, without looking again.

The first call analyses the programs as :meth:`MPImportance.run` does, with all of its checks, and
so does the first with arguments of other shapes. Later ones draw particles, evaluate them in one
mapped run and regroup what is read by index, nothing else.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import is_validation_enabled

from pyro_mpis._text import quoted
from pyro_mpis._typing import Program
from pyro_mpis._warnings import warn
from pyro_mpis.blocks import run_plan
from pyro_mpis.factor_graph.evidence import reduced
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.objectives.signature import Arguments, arguments_of
from pyro_mpis.options import Options, checked_groups, number_of_dims
from pyro_mpis.particles.drawing import Drawn, draw_particles
from pyro_mpis.particles.evaluation import (
    Evaluated,
    MissedReadError,
    carried_by_one,
    evaluate_programs,
)
from pyro_mpis.particles.factors import build_graph
from pyro_mpis.particles.indexed import regroup_indexed
from pyro_mpis.particles.masked import find_masks
from pyro_mpis.particles.memory import gc_paused
from pyro_mpis.particles.probes import SiteReads
from pyro_mpis.particles.proposals import Particles, weigh, weigh_from_factors
from pyro_mpis.particles.together import ReadTogether
from pyro_mpis.planning import Plan, plan_of, programs_of
from pyro_mpis.programs.agreement import check_same_site
from pyro_mpis.programs.environment import rng_state, set_rng_state, training
from pyro_mpis.programs.handlers import ScaleProposals
from pyro_mpis.programs.masks import Masks
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.runs import Programs, run_plainly
from pyro_mpis.programs.structure import Structure
from pyro_mpis.replicate import Replicate
from pyro_mpis.workers import Workers

MAX_KEPT = 16  # analyses, as of the batches of data of several sizes

Check = Callable[[Structure, Drawn], None]  # of what was drawn


@dataclass(frozen=True)
class Weighed:
    """Particles, and all that guide and model said of them, with its derivatives."""

    structure: Structure
    particles: Particles
    evaluated: Evaluated
    reads: SiteReads

    def graph(self, *, checked: bool = False) -> FactorGraph:
        """
        Return the graph of log factors, summed over the plates that hold no index.

        :param checked: whether to look at the factors. It is needed where their sum is not finite.
        :raises ValueError: names the site whose density is nan or infinite.
        """
        graph = build_graph(self.structure, self.particles, self.evaluated, for_sum=not checked)
        return reduced(regroup_indexed(graph, self.reads))


@dataclass
class Compiled:
    """What is known of programs."""

    plan: Plan
    reads: SiteReads  # by index, with these arguments
    arguments: Arguments
    params: tuple[str, ...]  # in the param store

    def weighed(self, arguments: Arguments, programs: Programs, check: Check) -> "Weighed":
        """
        Draw particles and evaluate them; draws random numbers.

        :param arguments: of this call.
        :param programs: those of the plan, with these arguments.
        :param check: raises if what was drawn cannot be used.
        """
        structure, validate = self.plan.structure, is_validation_enabled()
        if programs.subsamples is not None:
            programs.subsamples.renew()
        has_others = self._has_other_data(arguments, programs)
        if has_others and programs.masks.seen:
            programs = replace(programs, masks=_found_masks(structure, programs))
            self.plan = replace(self.plan, programs=programs)
        carried = carried_by_one(structure, validate=validate)
        drawn = draw_particles(
            structure, programs, stratified=self.plan.options.stratified, carried=carried
        )
        check(structure, drawn)
        particles = weigh(
            structure,
            programs,
            drawn,
            validate=validate,
            from_factors=True,
            memory_limit=self.plan.memory_limit,
        )
        evaluated = evaluate_programs(
            structure,
            particles.values,
            particles.sizes,
            programs,
            validate=validate,
            carried=drawn.carried,
        )
        particles = weigh_from_factors(structure, particles, evaluated)
        if self.reads and (has_others or self.plan.switched):
            graph = build_graph(structure, particles, evaluated)
            self.reads = _found_reads(self.plan, programs, graph, particles, drawn)
        if has_others:
            self.arguments = arguments
        return Weighed(structure, particles, evaluated, self.reads)

    def _has_other_data(self, arguments: Arguments, programs: Programs) -> bool:
        """Whether index arrays, or masks of latents, may be other than they were."""
        if not (self.reads or programs.masks.seen):
            return False
        return programs.subsamples is not None or not arguments.has_data_of(self.arguments)


def _found_masks(structure: Structure, programs: Programs) -> Masks:
    """
    Find how masks of latents count with these arguments, by a plain run.

    Random numbers are left as they were, unless a subsample is drawn: particles must not depend on
    the numbers that it was made of.
    """
    programs = replace(programs, masks=Masks())
    state = rng_state()
    with torch.no_grad():
        traces = run_plainly(programs, check_same_site)
        masks = find_masks(programs, structure, *traces)
    if programs.subsamples is None:
        set_rng_state(state)
    return masks


def _found_reads(
    plan: Plan, programs: Programs, graph: FactorGraph, particles: Particles, drawn: Drawn
) -> SiteReads:
    """Find which elements sites read."""
    replicate = Replicate(replace(plan, programs=programs), particles)
    with torch.no_grad():
        return replicate.find_reads(*(replicate.at_supports(drawn) or (graph, particles)))


def options_of(
    num_samples: int,
    groups: Sequence[Sequence[str]],
    shared_plates: Sequence[str],
    max_plate_nesting: float,
    memory_limit: int | None,
) -> Options:
    """Return the options of an objective's analysis, from what its user gives."""
    return Options(
        num_samples,
        groups=checked_groups(groups),
        shared_plates=tuple(shared_plates),
        max_plate_nesting=number_of_dims(max_plate_nesting),
        memory_limit=memory_limit,
        stratified=False,
    )


class Compiler:
    """
    Analyses programs once for arguments of the same shapes, and evaluates them.

    :param options: of the analysis; see :class:`~pyro_mpis.MPImportance`.
    :param alternative: what to use for programs that run once for each particle.
    :param detached: whether particles are cut off from what they are drawn from.
    """

    def __init__(self, options: Options, alternative: str, *, detached: bool = False) -> None:
        self.options = options
        self.alternative = alternative
        self.detached = detached
        self._known: OrderedDict[object, Compiled] = OrderedDict()

    def weighed(
        self,
        model: Program,
        guide: Program | None,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        check: Check,
    ) -> Weighed:
        """Draw particles and evaluate them; draws random numbers."""
        arguments = arguments_of(args, kwargs)
        key = (_identity(model), _identity(guide), arguments.signature)
        compiled = self._known.get(key)
        is_new = compiled is None
        if compiled is None:
            compiled = self._analysed(model, guide, arguments, args, kwargs)
        try:
            result = _weighed(compiled, arguments, args, kwargs, check)
        except (NotMappableError, MissedReadError, ReadTogether):
            if is_new:
                raise
            # other than when they were analysed, as if a program's own data had changed
            compiled = self._analysed(model, guide, arguments, args, kwargs)
            result = _weighed(compiled, arguments, args, kwargs, check)
        self._known[key] = compiled
        self._known.move_to_end(key)
        if len(self._known) > MAX_KEPT:
            self._known.popitem(last=False)
        return result

    def _analysed(
        self,
        model: Program,
        guide: Program | None,
        arguments: Arguments,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> Compiled:
        """Analyse programs; leaves random numbers, parameters and handlers as they were."""
        state = rng_state()
        try:
            programs = programs_of(model, guide, args, kwargs)
            plan, *traces = plan_of(programs, self.options)
            params = _made_params(programs, traces)
            scaled, ours = ScaleProposals(), plan.programs
            model, guide = scaled(ours.model), scaled(ours.guide)
            ours = replace(ours, model=model, guide=guide, detached=self.detached)
            plan = replace(plan, programs=ours)
            total = run_plan(plan, Workers(show_progress=False))
        finally:
            set_rng_state(state)
        found = total.replicate.plan
        if total.is_one_by_one:
            raise NotImplementedError(f"{found.notices[-1]} Or use {self.alternative}.")
        if found.cut.blocks:
            sites = quoted(
                s for symbol in found.cut.blocks for s in found.structure.by_symbol[symbol].sites
            )
            raise MemoryError(
                f"the particles of {sites} would have to be taken in blocks, but a derivative "
                "needs all combinations at once. Draw fewer particles, or let latents share a "
                "particle index: groups=[(...), ...]."
            )
        for notice in dict.fromkeys(found.notices):
            warn(notice)
        return Compiled(found, total.replicate.reads or {}, arguments, params)


def _weighed(
    compiled: Compiled,
    arguments: Arguments,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    check: Check,
) -> Weighed:
    programs = replace(compiled.plan.programs, args=args, kwargs=kwargs)
    if not all(name in pyro.get_param_store() for name in compiled.params):  # it has been cleared
        _run_once(programs)
    with training(), gc_paused():
        return compiled.weighed(arguments, programs, check)


def _made_params(programs: Programs, traces: Iterable[Trace]) -> tuple[str, ...]:
    """
    Make the parameters that programs ask for: it cannot be done in a mapped run.

    :return: those that the param store has. Modules may keep theirs.
    """
    names = [n for trace in traces for n, node in trace.nodes.items() if node["type"] == "param"]
    store = pyro.get_param_store()
    if not all(name in store for name in names):
        _run_once(programs)
    return tuple(name for name in dict.fromkeys(names) if name in store)


def _run_once(programs: Programs) -> None:
    """Run guide and model as they are; leaves random numbers as they were."""
    state = rng_state()
    with training():
        guide_trace = poutine.trace(programs.guide).get_trace(*programs.args, **programs.kwargs)
        poutine.replay(programs.model, trace=guide_trace)(*programs.args, **programs.kwargs)
    set_rng_state(state)


def _identity(program: Program | None) -> object:
    """Return what tells programs apart: bound methods are made anew at each access."""
    try:
        hash(program)
    except TypeError:
        return id(program)
    return program
