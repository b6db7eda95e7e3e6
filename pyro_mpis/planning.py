# SPDX-License-Identifier: Apache-2.0
"""
From programs and options to a plan: the structure, and what fits into memory.

A plan is all that a replicate of a run needs. What a run finds out later makes another plan of it:
that elements of a plate are read together (:meth:`Plan.sharing`), or that a site reads more than
was seen.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import is_validation_enabled

from pyro_mpis._text import first_line, quoted
from pyro_mpis._typing import Ordinal, Program
from pyro_mpis.costs import number_of_runs, number_that_fits, run_plan_of
from pyro_mpis.fitting import fitted
from pyro_mpis.options import DEFAULT_NUM_SAMPLES, Options
from pyro_mpis.particles import memory
from pyro_mpis.particles.footprint import Footprint, measured
from pyro_mpis.particles.masked import find_masks
from pyro_mpis.particles.sizing import number_of_densities
from pyro_mpis.programs.agreement import check_same_site
from pyro_mpis.programs.analysis import analyse, device_of, with_implicit_plates
from pyro_mpis.programs.by_site import by_site
from pyro_mpis.programs.environment import Environment, seeded
from pyro_mpis.programs.messages import statements
from pyro_mpis.programs.not_mappable import Name
from pyro_mpis.programs.numbers import unnumbered, with_numbers
from pyro_mpis.programs.runs import Programs, run_plainly, with_one_subsample
from pyro_mpis.programs.structure import Structure
from pyro_mpis.programs.subsampling import subsamples_of
from pyro_mpis.run_plan import RunPlan

# A run is large if it evaluates more densities, or its programs take longer at single values.
LARGE = 2**23
SLOW = 0.1  # seconds


@dataclass(frozen=True)
class Plan:
    """What an independent replicate of a run needs."""

    structure: Structure
    programs: Programs
    options: Options
    cut: memory.Cut
    device: str = "cpu"
    memory_limit: int | None = None  # bytes that a run may take; None where nothing is known
    environment: Environment = field(default_factory=Environment)
    notices: tuple[str, ...] = ()  # what the user is to be told
    # sites that read other elements at some particles than at others
    switched: tuple[str, ...] = ()
    footprint: Footprint | None = None  # what the programs hold, where it may matter
    seconds: float = 0.0  # that the programs took at single values

    @functools.cached_property
    def is_large(self) -> bool:
        """Whether a run or a query is so large that several threads may help."""
        number = number_of_densities(self.structure, self.structure.num_particles)
        return number > LARGE or self.seconds > SLOW

    @property
    def num_samples(self) -> int:
        """K, the largest number of particles of an index."""
        rest = self.options.num_samples or DEFAULT_NUM_SAMPLES
        return max((index.num_samples for index in self.structure.indices), default=rest)

    def with_structure(self, structure: Structure, *notices: str) -> "Plan":
        """Return a plan for another structure of the same programs."""
        structure, cut, more = fitted(
            structure, self.options, self.device, self.memory_limit, self.footprint
        )
        notices = (*self.notices, *notices, *more)
        return replace(self, structure=structure, cut=cut, notices=notices)

    def sharing(self, symbols: Ordinal, plates: Ordinal, reason: str) -> "Plan":
        """Return a plan in which indices are the same for all elements of some plates."""
        structure = self.structure
        names = {structure.plates[symbol].name for symbol in plates}
        sites = structure.named(symbols)
        word = "plate" if len(names) == 1 else "plates"
        have = "has" if len(sites) == 1 else "have"
        notice = (
            f"{reason}: {quoted(sites)} {have} one particle index for all of {word} "
            f"{quoted(names)}, in place of one for each element, so more particles are needed for "
            "the same accuracy. "
            "What helps: a guide near the posterior for these sites, or a larger num_samples. To "
            "choose the plate yourself, and silence this: shared_plates=[...]."
        )
        switched = tuple(  # what a site reads of an index that is shared, no index switches
            name
            for name in self.switched
            if not symbols & structure.indices_read(structure.model[name])
        )
        plan = replace(self, switched=switched)
        return plan.with_structure(structure.sharing(symbols, plates), notice)


def memory_limit(options: Options, device: str) -> int | None:
    """Return the bytes a run may take; None where nothing is known."""
    if options.memory_limit is not None:
        return options.memory_limit
    return memory.default_limit(device)


def plan_of(programs: Programs, options: Options) -> tuple[Plan, Trace, Trace]:
    """
    Run guide and model once, find their structure and what fits into memory.

    Draws random numbers; leaves the param store and the handlers' stack as they were.

    :return: the plan, and the traces of guide and model.
    :raises ValueError: if model, guide and options do not fit each other.
    """
    environment = Environment()
    with environment.entered(), memory.gc_paused():
        start = time.perf_counter()
        programs, structure, guide_trace, model_trace = analysed(programs, options)
        seconds = time.perf_counter() - start
        environment = environment.with_params()  # those too that the programs have just made
        device = device_of(model_trace).type
        not_given: list[str] = []
        if options.time_limit is None and options.num_samples is None:
            not_given = unnumbered(structure, options.numbers, DEFAULT_NUM_SAMPLES)
        traces = guide_trace, model_trace
        footprint = None
        sizes = structure.num_particles
        limit = memory_limit(options, device)
        is_open = options.time_limit is not None
        if structure.obstacle is None and (
            is_open or memory.is_worth_measuring(structure, sizes, limit)
        ):
            structure, footprint = measured(
                structure, programs, traces, validate=environment.validate
            )
        if is_open:
            structure, options = chosen(structure, footprint, options, limit, device)
        try:
            structure, cut, notices = fitted(structure, options, device, limit, footprint)
            notices = [*not_given, *notices]
        except memory.TooLargeError as error:
            costs = _costs(structure, programs, traces, footprint, options, limit, device)
            message = f"{error}\n{costs}"
            raise memory.TooLargeError(message, error.site, error.symbols) from None
        plan = Plan(
            structure,
            programs,
            options,
            cut,
            device,
            limit,
            environment,
            tuple(notices),
            footprint=footprint,
            seconds=seconds,
        )
    return plan, guide_trace, model_trace


def chosen(
    structure: Structure,
    footprint: Footprint | None,
    options: Options,
    limit: int | None,
    device: str,
) -> tuple[Structure, Options]:
    """
    Choose the number of particles, where there is a limit of time to choose it by.

    :param footprint: of the programs; None if they run once for each particle.
    :param limit: in bytes; None where nothing is known.
    :return: the structure with that number of each index, and the options with it.
    """
    seconds = options.time_limit
    if seconds is None:
        return structure, options
    if footprint is None:
        number = number_of_runs(structure, seconds)
    else:
        number = number_that_fits(
            structure, footprint, seconds=seconds, memory_limit=limit, device=device
        )
    return structure.with_num_samples(number), replace(options, num_samples=number)


def run_plan(programs: Programs, options: Options) -> RunPlan:
    """
    Say what a run would take, and what would help.

    Runs guide and model once, and at a single particle. Leaves random numbers, the param store and
    the handlers' stack as they were.
    """
    environment = Environment()
    with seeded(0), environment.entered(), memory.gc_paused():
        programs, structure, footprint, traces = _looked_at(programs, options, environment)
        device = device_of(traces[1]).type
        limit = memory_limit(options, device)
        structure, options = chosen(structure, footprint, options, limit, device)
        return _costs(structure, programs, traces, footprint, options, limit, device)


def structure_of(programs: Programs, options: Options) -> Structure:
    """
    Return the structure that a run would start from.

    Leaves random numbers, the param store and the handlers' stack as they were.
    """
    environment = Environment()
    with seeded(0), environment.entered(), memory.gc_paused():
        _, structure, footprint, traces = _looked_at(programs, options, environment)
        device = device_of(traces[1]).type
        limit = memory_limit(options, device)
        return chosen(structure, footprint, options, limit, device)[0]


def _looked_at(
    programs: Programs, options: Options, environment: Environment
) -> tuple[Programs, Structure, Footprint | None, tuple[Trace, Trace]]:
    """Find the structure, and what the programs hold unless torch cannot map them."""
    programs, structure, *traces = analysed(programs, options)
    both = traces[0], traces[1]
    footprint = None
    if structure.obstacle is None:
        structure, footprint = measured(structure, programs, both, validate=environment.validate)
    return programs, structure, footprint, both


def _costs(
    structure: Structure,
    programs: Programs,
    traces: tuple[Trace, Trace],
    footprint: Footprint | None,
    options: Options,
    limit: int | None,
    device: str,
) -> RunPlan:
    return run_plan_of(
        structure,
        programs,
        traces,
        footprint,
        num_samples=options.num_samples or DEFAULT_NUM_SAMPLES,
        memory_limit=limit,
        device=device,
    )


def analysed(programs: Programs, options: Options) -> tuple[Programs, Structure, Trace, Trace]:
    """
    Run guide and model once, and work out their structure.

    :return: the programs to go on with, the structure, the traces of guide and model.
    """
    guide = programs.guide
    try:
        guide_trace, model_trace = run_plainly(programs, check_same_site)
        if subsamples_of((guide_trace, model_trace)):
            programs = with_one_subsample(programs)
            guide_trace, model_trace = run_plainly(programs, check_same_site)
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise ValueError(
                f"{first_line(error)}. Guide and model run without gradients. Where they compute "
                "a derivative of their own, enclose it: with torch.enable_grad(): ..."
            ) from error
        if "Multiple sample sites" in str(error):
            raise ValueError(
                f"{first_line(error)}. Each sample statement needs a name of its own: in a loop, "
                "number them, as in pyro.sample(f'x_{i}', ...). If the program enters a "
                "plate twice, make it once: plate = pyro.plate(...), then with plate: ..."
            ) from error
        raise
    analysis = partial(
        analyse,
        guide=guide,
        groups=options.groups,
        max_plate_nesting=options.max_plate_nesting,
    )
    structure = analysis(guide_trace, model_trace)
    masks = find_masks(programs, structure, guide_trace, model_trace)
    if masks.seen:
        programs = replace(programs, masks=masks)
        for trace, counting in ((guide_trace, masks.of_guide), (model_trace, masks.of_model)):
            for site in statements(trace).values():
                site.update(counting(site))
        structure = analysis(guide_trace, model_trace)
    rest = options.num_samples or DEFAULT_NUM_SAMPLES
    structure = with_numbers(structure, rest, options.numbers)
    structure = _with_shared_plates(structure, options.shared_plates)
    if is_validation_enabled():  # which checks that a program has no sites beyond these
        met: dict[Name, frozenset[str]] = {
            "guide": frozenset(structure.guide),
            "model": frozenset(structure.model),
        }
        programs = replace(programs, sites=met)
    return programs, structure, guide_trace, model_trace


def _with_shared_plates(structure: Structure, names: Sequence[str]) -> Structure:
    """Let the indices of plates that the user named be the same for all of their elements."""
    by_name = {plate.name: symbol for symbol, plate in structure.plates.items()}
    for name in names:
        if name not in by_name:
            raise ValueError(
                f"shared_plates: the programs have no plate '{name}' of size above one. Their "
                f"plates are {quoted(set(by_name))}."
            )
        plates = frozenset(by_name[name])
        symbols = frozenset(i.symbol for i in structure.indices if i.plates & plates)
        structure = structure.sharing(symbols, plates)
    return with_implicit_plates(structure) if names else structure


def programs_of(
    model: Program,
    guide: Program | None,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> Programs:
    """Put a model, its guide and their arguments together."""
    return Programs(model, no_guide if guide is None else by_site(guide), args, kwargs)


def no_guide(*args: object, **kwargs: object) -> None:
    """Sample nothing: every latent is proposed from the prior."""
