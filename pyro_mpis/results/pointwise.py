# SPDX-License-Identifier: Apache-2.0
r"""
Log likelihoods of single observations, summed over the enumerated latents that they read.

Given a draw of the other latents, an observation that reads an enumerated latent z has the
likelihood that leave-one-out cross-validation is about,

.. math:: p(y_i \mid y_{-i}, \theta) = \frac{\sum_z p(z, y \mid \theta)}
          {\sum_z p(z, y_{-i} \mid \theta)},

where :math:`y_{-i}` are the other observations that read the same z; without any, this is
:math:`\sum_z p(z \mid \theta)\, p(y_i \mid z, \theta)`. The likelihood at a drawn value of z would
be another number: z was drawn in view of the observation.

Enumerated latents that depend on each other are summed together, one plate element at a time. That
is possible where all of them are in the same plates, and everything that reads them is in these
plates too. A hidden Markov model has too many states together: see :func:`components`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal, SampleMessage
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.mapped import Mapped
from pyro_mpis.programs.messages import counted
from pyro_mpis.programs.runs import Collect, Programs, Said, Wanted, evaluate
from pyro_mpis.programs.structure import Structure

MAX_VALUES = 2**12  # joint values of the enumerated latents that are summed together


@dataclass(frozen=True)
class Component:
    """Enumerated latents of the same plates that depend on each other, and what reads them."""

    latents: tuple[str, ...]
    readers: tuple[str, ...]  # all sites whose density reads them, they themselves included
    plates: Ordinal

    def num_values(self, structure: Structure) -> int:
        """Return how many joint values the latents have."""
        return math.prod(structure.index_of[name].size for name in self.latents)


def components(structure: Structure) -> tuple[list[Component], list[str]]:
    """
    Put the enumerated latents together that are to be summed together.

    :return: those that can be, and the observed sites that read others.
    """
    enumerated = [name for name, origin in structure.origins.items() if origin == "enumerated"]
    read = {
        name: (site.reads | {name}) & set(enumerated)
        for name, site in structure.model.items()
        if not site.silent
    }
    together: list[set[str]] = []
    for names in filter(None, read.values()):
        apart = [group for group in together if not group & names]
        together = [*apart, set(names).union(*(group for group in together if group & names))]
    found, left = [], list[str]()
    for group in together:
        readers = tuple(name for name, names in read.items() if names & group)
        plates = structure.model[min(group)].plates
        values = math.prod(structure.index_of[name].size for name in group)
        local = all(
            structure.model[name].plates == structure.index_of[name].plates == plates
            for name in group
        ) and all(plates <= structure.model[name].plates for name in readers)
        if local and values <= MAX_VALUES:
            latents = tuple(name for name in enumerated if name in group)
            found.append(Component(latents, readers, plates))
        else:
            left += [name for name in readers if name not in structure.origins]
    return found, left


def log_likelihoods(
    structure: Structure,
    programs: Programs,
    draws: Mapping[str, Tensor],
    supports: Mapping[str, Tensor],
    found: Sequence[Component],
) -> dict[str, Tensor]:
    """
    Return the log likelihoods of observed sites that read enumerated latents.

    :param draws: ``{site: (draws, *shape)}``.
    :param supports: of the enumerated latents, ``(values, *shape)``.
    :param found: the latents to sum over; others have their drawn values.
    :return: ``{site: (draws, *batch)}``, without scale and mask.
    :raises NotMappableError: if torch cannot map the model.
    """
    latents = [name for component in found for name in component.latents]
    drawn = {name: draw for name, draw in draws.items() if name not in latents}
    levels = [*([drawn] if drawn else []), *({name: supports[name]} for name in latents)]
    readers = {name for component in found for name in component.readers}
    with pyro.validation_enabled(False):
        _, said = evaluate(
            programs,
            levels,
            model=Wanted({name: _collecting(structure, name) for name in readers}),
            shapes=structure.latent_shapes,
        )
    number = len(next(iter(draws.values()))) if draws else 1
    result: dict[str, Tensor] = {}
    for component in found:
        order = [0] if drawn else []
        order += [bool(drawn) + latents.index(name) for name in component.latents]
        result |= _of_component(structure, component, said, order, bool(drawn))
    return {n: t.expand((number, *t.shape[1:])) for n, t in result.items()}


def _collecting(structure: Structure, name: str) -> Collect:
    checked = structure.model[name].checked

    def collect(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        log_prob = density_of(site["fn"], site["value"], validate=checked)
        return {"log_prob": log_prob, "counted": counted(site, log_prob)}

    return collect


def _of_component(
    structure: Structure, component: Component, said: Said, order: Sequence[int], drawn: bool
) -> dict[str, Tensor]:
    """
    Sum over the joint values of one component.

    :param order: the levels: that of the draws, if there are any, and those of the latents.
    """
    nesting = structure.max_plate_nesting
    kept = {structure.plates[symbol].dim for symbol in component.plates}
    outside = [dim for dim in range(-nesting, 0) if dim not in kept]
    counted = {
        name: _aligned(said[name]["counted"], order, nesting, drawn) for name in component.readers
    }
    finite, impossible = torch.zeros(()).double(), torch.zeros(()).double()
    for log_prob in counted.values():
        none = log_prob == -torch.inf
        some = log_prob.masked_fill(none, 0.0)
        finite = finite + (some.sum(outside, keepdim=True) if outside else some)
        impossible = impossible + (none.sum(outside, keepdim=True) if outside else none)
    joint = tuple(range(1, 1 + len(component.latents)))
    result = {}
    for name in component.readers:
        if name in structure.origins:
            continue
        none = counted[name] == -torch.inf
        others = finite - counted[name].masked_fill(none, 0.0)
        others = others.masked_fill(impossible - none.double() > 0, -torch.inf)
        own = _aligned(said[name]["log_prob"], order, nesting, drawn)
        log_prob = (others + own).logsumexp(joint) - others.logsumexp(joint)
        batch = len(structure.model[name].batch_shape)
        shape = log_prob.shape[1:][nesting - batch :]
        result[name] = log_prob.reshape((len(log_prob), *shape)).to(
            said[name]["log_prob"].tensor.dtype
        )
    return result


def _aligned(mapped: Mapped, order: Sequence[int], nesting: int, drawn: bool) -> Tensor:
    """Bring a density to ``(draws, *joint values, *batch)``, all plates' dims there; float64."""
    tensor, levels = mapped.tensor.double(), list(mapped.levels)
    batch = tensor.dim() - len(levels)
    for position, level in enumerate(order):
        if level not in levels:
            tensor = tensor.unsqueeze(position)
            levels.insert(position, level)
    dims = [levels.index(level) for level in order]
    tensor = tensor.permute((*dims, *range(len(levels), tensor.dim())))
    lead, rest = tensor.shape[: len(order)], tensor.shape[len(order) :]
    tensor = tensor.reshape((*lead, *(1,) * (nesting - batch), *rest))
    return tensor if drawn else tensor.unsqueeze(0)
