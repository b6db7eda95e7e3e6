# SPDX-License-Identifier: Apache-2.0
"""
Draw the particles: K of every random site.

One run of a program draws them all, in a batch dim left of its plates. Where the program is not
written for that, K ordinary runs draw them.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis._typing import SampleMessage
from pyro_mpis.programs.messages import drawn_from, event_shape_of, is_latent, statements
from pyro_mpis.programs.runs import Name, OtherSitesError, Programs, run_at, run_in_plate
from pyro_mpis.programs.structure import Site, Structure


@dataclass(frozen=True)
class Draw:
    """The particles of one random site."""

    value: Tensor  # (K, *shape), the shape of an ordinary run
    log_prob: Tensor  # (K, *batch shape): the density that each was drawn with
    reads_particles: bool  # whether the proposal was seen to differ between particles
    support: Tensor | None = None  # (values, *shape), of a site that is to be summed over it


@dataclass(frozen=True)
class Drawn:
    """K particles of every random site, before they are weighed."""

    num_samples: int
    draws: Mapping[str, Draw]


def draw_particles(structure: Structure, programs: Programs, num_samples: int) -> Drawn:
    """
    Draw K particles of every random site; draws random numbers.

    One run of the guide and, if the guide lacks some latent, one of the model; both vectorised
    over the shared dim, or K plain runs of both.
    """
    try:
        return Drawn(num_samples, _drawn_together(structure, programs, num_samples))
    except Exception:  # also for want of memory: shapes may grow where code is not vectorised
        return draw_one_by_one(structure, programs, num_samples)


def _from_guide(structure: Structure) -> list[str]:
    """Return the random sites that the guide draws, those without an index of their own too."""
    return [
        name
        for name in structure.guide
        if name not in structure.guide_factors
        and name not in structure.carried
        and (name in structure.origins or name not in structure.model)
    ]


def _from_prior(structure: Structure, from_guide: Collection[str]) -> list[str]:
    return [
        name
        for name, origin in structure.origins.items()
        if origin == "prior" or (origin == "enumerated" and name not in from_guide)
    ]


def _drawn_together(structure: Structure, programs: Programs, num_samples: int) -> dict[str, Draw]:
    """Draw in one run of each program, with the particles in a shared dim left of the plates."""

    def run(name: Name, given: Mapping[str, Tensor]) -> tuple[Trace, Mapping[str, torch.Size]]:
        return run_in_plate(
            programs,
            name,
            num_samples=num_samples,
            dim=structure.shared_dim,
            given=given,
            shapes=structure.shapes_of(name),
        )

    trace, shapes = run("guide", {})
    sites = statements(trace)
    names = _from_guide(structure)
    draws = {name: _draw(structure.guide[name], sites, shapes, num_samples) for name in names}
    from_prior = _from_prior(structure, names)
    if "prior" in structure.origins.values() or any(
        name not in draws and origin == "enumerated" for name, origin in structure.origins.items()
    ):
        given = {
            name: _padded(structure, name, sites[name]["value"], num_samples)
            for name in structure.origins
            if name in sites and is_latent(sites[name])
        }
        trace, shapes = run("model", given)
        sites = statements(trace)
        draws |= {
            name: _draw(structure.model[name], sites, shapes, num_samples) for name in from_prior
        }
    return draws


def _padded(structure: Structure, name: str, value: Tensor, num_samples: int) -> Tensor:
    """Bring a value of the guide's to the shape of the model's site, particles left of all dims."""
    site = structure.model[name]
    if value.numel() == site.shape.numel() and num_samples > 1:  # the same for all particles
        return value.reshape(site.shape)
    nesting = structure.max_plate_nesting - len(site.batch_shape)
    return value.reshape((num_samples, *(1,) * nesting, *site.shape))


def _draw(
    site: Site,
    sites: Mapping[str, SampleMessage],
    batch_shapes: Mapping[str, torch.Size],
    num_samples: int,
) -> Draw:
    """Take a site's particles out of a run with a shared dim; raises if they do not fit."""
    message = sites[site.name]
    fn, value = message["fn"], message["value"]
    if event_shape_of(fn, value) != site.shape[len(site.batch_shape) :]:
        raise ValueError(f"site '{site.name}': its event shape differs between runs")
    shared = value.dim() - len(site.shape)
    if shared < 1 or value.shape[0] != num_samples or value.shape[shared:] != site.shape:
        raise ValueError(f"site '{site.name}': its shape with particles is another")
    log_prob = drawn_from(message, fn.log_prob(value))
    batch = batch_shapes[site.name]
    return Draw(
        value=value.reshape((num_samples, *site.shape)),
        log_prob=log_prob.expand(value.shape[: value.dim() - site.event_dim]).reshape(
            (num_samples, *site.batch_shape)
        ),
        reads_particles=len(batch) == len(site.batch_shape) + shared and batch[0] > 1,
        support=_support(site, message),
    )


def _support(site: Site, message: SampleMessage) -> Tensor | None:
    """Return all values that a site can take, one of each for all plate elements."""
    fn = message["fn"]
    if not getattr(fn, "has_enumerate_support", False):
        return None
    try:
        support = fn.enumerate_support(expand=False)
    except NotImplementedError:  # as of a Binomial of several totals
        return None
    ones = (1,) * len(site.batch_shape)
    event = site.shape[len(ones) :]
    return support.reshape((len(support), *ones, *event)).expand((len(support), *site.shape))


def draw_one_by_one(structure: Structure, programs: Programs, num_samples: int) -> Drawn:
    """Draw the particles by ordinary runs, one for each; draws random numbers."""
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    supports: dict[str, Tensor | None] = {}
    from_guide = _from_guide(structure)
    from_prior = _from_prior(structure, from_guide)

    def take(program: Name, trace: Trace, names: Iterable[str]) -> None:
        sites = statements(trace)
        of_program = structure.guide if program == "guide" else structure.model
        for name in names:
            site = of_program[name]
            if name not in sites or sites[name]["value"].shape != site.shape:
                raise OtherSitesError(
                    f"site '{name}' of the {program} is missing, or of another shape, in some runs"
                )
            value = sites[name]["value"]
            log_prob = drawn_from(sites[name], sites[name]["fn"].log_prob(value))
            rows.setdefault(name, []).append((value, log_prob.expand(site.batch_shape)))
            if name not in supports:
                supports[name] = _support(site, sites[name])

    with pyro.validation_enabled(False):
        for _ in range(num_samples):
            trace = run_at(programs, "guide", {})
            take("guide", trace, from_guide)
            if from_prior:
                given = {
                    name: site["value"].reshape(structure.model[name].shape)
                    for name, site in statements(trace).items()
                    if is_latent(site) and name in structure.origins
                }
                take("model", run_at(programs, "model", given), from_prior)
    draws = {}
    for name, row in rows.items():
        values, log_probs = (torch.stack(parts) for parts in zip(*row, strict=True))
        draws[name] = Draw(values, log_probs, True, supports[name])
    return Drawn(num_samples, draws)
