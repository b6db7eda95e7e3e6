# SPDX-License-Identifier: Apache-2.0
r"""
Run a model and its guide: plainly, at values of their latent sites, to draw particles.

* :func:`run_plainly`: one ordinary run of guide and model, to learn the structure. The values
  carry their provenance, so that a site's ``log_prob`` tells which sites it read.
* :func:`run_at`: one ordinary run at given values.
* :func:`evaluate`: guide and model at many values, those of each level in combination with those
  of all others, by :mod:`~pyro_mpis.programs.mapped`. Programs see single values.
* :func:`draw`: one mapped run of guide and model that draws K particles of their latent sites.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_mpis._typing import Program, SampleMessage
from pyro_mpis.programs.by_site import is_ready
from pyro_mpis.programs.densities import memoise, refuse_invalid, taking_anything
from pyro_mpis.programs.environment import (
    rng_state,
    same_rng_state,
    set_rng_state,
    torch_rng_state,
)
from pyro_mpis.programs.handlers import (
    AllMet,
    Compare,
    DrawMapped,
    Replay,
    Stop,
    Substitute,
    Track,
    closing_plates,
)
from pyro_mpis.programs.mapped import run_mapped
from pyro_mpis.programs.masks import GuideMasks, Masks, ModelMasks
from pyro_mpis.programs.messages import is_delta, is_latent, statements
from pyro_mpis.programs.not_mappable import (
    Name,
    NotMappableError,
    check_same_sites,
    is_out_of_memory,
    not_mappable,
)
from pyro_mpis.programs.one_by_one import put_together
from pyro_mpis.programs.one_way import DrawBase
from pyro_mpis.programs.stratified import Strata
from pyro_mpis.programs.subsampling import OneSubsample, Subsamples, subsamples_of
from pyro_mpis.programs.tensors import Said, Values, unwrapped

# Takes a site's message and the single values of all given sites; returns what to keep, by name.
Collect: TypeAlias = Callable[[SampleMessage, Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Programs:
    """A model, its guide, and what both are called with."""

    model: Program
    guide: Program
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    sites: Mapping[Name, frozenset[str]] = field(default_factory=dict)  # that a plain run met
    patched: bool = False  # whether to rewrite operations that torch cannot map
    subsamples: Subsamples | None = None  # of plates that select a minibatch
    detached: bool = False  # whether particles are cut off from what they are drawn from
    masks: Masks = field(default_factory=Masks)  # how those of latents count
    one_by_one: frozenset[str] = frozenset()  # sites whose values cannot be mapped

    @property
    def is_learned(self) -> bool:
        """Whether adapt has made the guide: its tails reach where densities are no numbers."""
        return bool(getattr(self.guide, "is_learned", False))

    def program(self, name: Name) -> Program:
        """Return the model or the guide, with masks of latents as they count."""
        if name == "guide":
            return GuideMasks(self.masks)(DrawBase()(self.guide))
        return ModelMasks(self.masks)(self.model) if self.masks.seen else self.model

    def call(self, name: Name) -> object:
        """Run the model or the guide."""
        return self.program(name)(*self.args, **self.kwargs)


def with_one_subsample(programs: Programs) -> Programs:
    """Return programs that select the same minibatch, and leave its scale to the graph."""
    subsamples = Subsamples()
    model, guide = (OneSubsample(subsamples)(p) for p in (programs.model, programs.guide))
    return replace(programs, model=model, guide=guide, subsamples=subsamples)


def run_plainly(
    programs: Programs,
    compare: Callable[[SampleMessage, SampleMessage], None],
) -> tuple[Trace, Trace]:
    """
    Run the guide, then the model with the guide's values; draws random numbers.

    Values carry the names of the random sites that they were computed from.

    :param compare: called with the guide's and the model's message of each site that both sample;
        raises if they do not fit.
    :return: the traces of guide and model, the model's with masks as it has them.
    """
    if not is_ready(programs.guide):
        with poutine.block():
            programs.call("guide")
    state = rng_state()
    try:
        return _run_both(programs, compare, tracking=True)
    except Exception:  # some code takes no tensors with marks: what is read is then found otherwise
        set_rng_state(state)
    try:
        return _run_both(programs, compare, tracking=False)
    except ValueError as error:  # an argument is perhaps invalid at these values alone
        if not is_validation_enabled():
            raise
        set_rng_state(state)
        try:
            with taking_anything():
                traces = _run_both(programs, compare, tracking=True)
        except Exception:
            raise error from None
    for trace, name in zip(traces, ("guide", "model"), strict=True):
        refuse_invalid(trace, name)
    return traces


def _run_both(
    programs: Programs,
    compare: Callable[[SampleMessage, SampleMessage], None],
    *,
    tracking: bool,
) -> tuple[Trace, Trace]:
    with closing_plates(), Track(lambda site: tracking and not is_delta(site["fn"])):
        guide = poutine.trace(programs.program("guide"))
        guide_trace = guide.get_trace(*programs.args, **programs.kwargs)
    from_guide = {name: s for name, s in statements(guide_trace).items() if is_latent(s)}
    guide_values = guide_trace.copy()
    minibatches = subsamples_of([guide_trace])  # a plate of the model may leave its size to these
    for name in guide_trace.nodes:
        if name not in from_guide and name not in minibatches:
            guide_values.remove_node(name)
    with (
        closing_plates(),
        Compare(from_guide, compare),
        Track(
            lambda site: tracking and not is_delta(site["fn"]) and site["name"] not in from_guide
        ),
    ):
        replayed = Replay(trace=guide_values)(programs.model)
        model_trace = poutine.trace(replayed).get_trace(*programs.args, **programs.kwargs)
    return guide_trace, model_trace


def run_at(programs: Programs, name: Name, values: Mapping[str, Tensor]) -> Trace:
    """Run a program once, with values of some of its latent sites; others are drawn."""
    with Substitute(values):
        return poutine.trace(programs.program(name)).get_trace(*programs.args, **programs.kwargs)


def trace_at(programs: Programs, values: Mapping[str, Tensor]) -> Trace:
    """
    Run the model once at one value of each of its latent sites, and evaluate the densities.

    :return: an ordinary trace, return value included.
    """
    with taking_anything():
        trace = run_at(programs, "model", values)
    memoise(trace)
    return trace


def _traced(programs: Programs, name: Name, handler: Substitute, until: Collection[str]) -> Trace:
    """Run a program under a handler; an error after its last site does not matter."""
    tracer = poutine.trace()
    try:  # around the handlers, which then take away what the program opened by hand
        with (
            closing_plates(),
            handler,
            tracer,
            Stop(until) if until else contextlib.nullcontext(),
        ):
            programs.call(name)
    except AllMet:
        pass
    except Exception:  # a return value may take code that cannot be mapped
        if name not in programs.sites or not programs.sites[name] <= set(tracer.trace.nodes):
            raise
    return tracer.trace


@dataclass(frozen=True)
class Wanted:
    """Which sites of a program to keep what of."""

    collect: Mapping[str, Collect]
    all_sites: frozenset[str] = frozenset()  # which a run to the end has, and no others


def evaluate(
    programs: Programs,
    levels: Sequence[Values],
    *,
    guide: Wanted | None = None,
    model: Wanted | None = None,
    shapes: Mapping[str, torch.Size],
    given: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Said, Said]:
    """
    Run guide and model at all combinations of values, mapped over each level.

    The model takes the values of the guide's ``Delta`` sites from the guide's run. A level whose
    values cannot be mapped is taken value by value.

    :param levels: site -> ``(size, *shape)``, one size in each level; an ordinary run's shapes.
    :param guide: what to keep of the guide's sites; None if it is not to be run.
    :param model: likewise of the model's.
    :param shapes: of the model's latent sites, where the guide's may have other dims of size one.
    :param given: values that are the same at all combinations.
    :return: what was kept of the guide's and the model's sites.
    :raises NotMappableError: if torch cannot map a program; it names the line.
    """
    from_guide: Said = {}
    from_model: Said = {}
    for number, level in enumerate(levels):
        if programs.one_by_one & level.keys():
            others = [*levels[:number], *levels[number + 1 :]]
            run = partial(evaluate, programs, others, guide=guide, model=model, shapes=shapes)
            size = len(next(iter(level.values())))
            at_values = ({n: value[k] for n, value in level.items()} for k in range(size))
            said = [run(given={**given, **values}) for values in at_values]
            by_guide, by_model = zip(*said, strict=True)
            own = level.keys()
            return put_together(by_guide, number, own), put_together(by_model, number, own)

    def at_single_values(values: dict[str, Tensor]) -> None:
        values = {**given, **values}
        model_values = dict(values)
        if guide is not None:
            until = () if guide.all_sites else guide.collect
            trace = _at(programs, "guide", values, until, guide.all_sites)
            _keep(trace, guide, values, from_guide)
            model_values |= {
                name: site["value"]
                for name, site in statements(trace).items()
                if is_latent(site) and is_delta(site["fn"])
            }
        if model is None:
            return
        for name, shape in shapes.items():
            value = model_values.get(name)
            if value is not None and value.shape != shape:
                model_values[name] = value.reshape(shape)
        until = () if model.all_sites else model.collect
        trace = _at(programs, "model", model_values, until, model.all_sites)
        _keep(trace, model, values, from_model)

    state, versions = torch_rng_state(), _versions(levels)
    run_mapped(at_single_values, levels, patched=programs.patched)
    changed = [name for name, version in _versions(levels).items() if version != versions[name]]
    if changed:
        raise NotMappableError(
            f"the value of site '{changed[0]}' is changed in place, after it was drawn",
            "write x = x + 1 in place of x += 1",
        )
    if not same_rng_state(state, torch_rng_state()):
        first = {**from_guide}, {**from_model}
        run_mapped(at_single_values, levels, patched=programs.patched)  # with other numbers
        set_rng_state(state)
        if first == (from_guide, from_model):  # as those that a parameter was once made of
            return first
        raise NotMappableError(
            "the programs draw random numbers besides those of their sites, and depend on them",
            "draw all random numbers in sample statements that no handler hides, or as data before "
            "the run",
        )
    return from_guide, from_model


def draw(
    programs: Programs,
    num_samples: int,
    *,
    strata: Mapping[str, Strata],
    guide: Wanted,
    model: Wanted,
    shapes: Mapping[str, torch.Size],
) -> tuple[Said, Said]:
    """
    Draw particles of latent sites: one mapped run of guide and model; draws random numbers.

    Particle k of a site is drawn given particle k of all sites that it reads.

    :param strata: which particles are to be spread evenly, by site.
    :param guide: which of the guide's sites to draw, and what to keep of them.
    :param model: likewise of the model's; a site that the guide has takes its value from there.
    :param shapes: as for :func:`evaluate`.
    :raises NotMappableError: if torch cannot map a program; it names the line.
    """
    from_guide: Said = {}
    from_model: Said = {}

    def at_single_values(values: dict[str, Tensor]) -> None:
        number = values.pop(PARTICLE)
        trace = _drawn(programs, "guide", {}, guide, number, strata, from_guide)
        if not model.collect:
            return
        given = {
            name: site["value"].reshape(shapes[name])
            for name, site in statements(trace).items()
            if is_latent(site) and name in shapes
        }
        _drawn(programs, "model", given, model, number, strata, from_model)

    run_mapped(at_single_values, [{PARTICLE: torch.arange(num_samples)}], patched=programs.patched)
    return from_guide, from_model


def _versions(levels: Sequence[Values]) -> dict[str, int]:
    """Return how often the values of each site have been written into, where torch counts it."""
    return {
        name: 0 if value.is_inference() else value._version
        for level in levels
        for name, value in level.items()
    }


PARTICLE = "number of the particle"


def _drawn(
    programs: Programs,
    name: Name,
    given: Mapping[str, Tensor],
    wanted: Wanted,
    number: Tensor,
    strata: Mapping[str, Strata],
    said: Said,
) -> Trace:
    """Run a program within a mapped run, and draw some of its sites."""
    until = () if name == "guide" else wanted.collect
    with DrawMapped(wanted.collect, number, strata, detached=programs.detached):
        trace = _at(programs, name, given, until, wanted.all_sites)
    _keep(trace, wanted, {}, said)
    return trace


def _at(
    programs: Programs,
    name: Name,
    values: Mapping[str, Tensor],
    until: Collection[str],
    expected: frozenset[str],
) -> Trace:
    """Run a program at the single values of a mapped run."""
    handler = Substitute(values)
    try:
        trace = _traced(programs, name, handler, until)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise not_mappable(name, handler.last_site, error) from error
    if expected:
        sites = statements(trace).items()
        found = {n for n, site in sites if n in expected or is_latent(site) or name == "model"}
        check_same_sites(name, expected, found)
    return trace


def _keep(trace: Trace, wanted: Wanted, values: Values, said: Said) -> None:
    """Take what is wanted out of a mapped run."""
    sites = statements(trace)
    for name, collect in wanted.collect.items():
        try:
            parts = collect(sites[name], values).items()
            said[name] = {key: unwrapped(part) for key, part in parts}
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise not_mappable("model", name, error) from error
