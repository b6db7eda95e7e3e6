# SPDX-License-Identifier: Apache-2.0
"""
Random choices of a particle for each element of each plate, and what the programs say there.

A factor has one particle for all elements of a plate at a time. Where elements have particles of
their own, a density shows which of them it reads; see :mod:`~pyro_mpis.particles.checks`.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import pyro
import torch
from torch import Tensor

from pyro_mpis.particles.evaluation import Evaluated, wanted_of_guide, wanted_of_model
from pyro_mpis.particles.proposals import Particles
from pyro_mpis.particles.sizing import number_of_densities
from pyro_mpis.programs.runs import Programs, evaluate
from pyro_mpis.programs.structure import Structure, levels_of
from pyro_mpis.programs.tensors import Mapped, Said

ROWS = 3  # random choices of a particle for each element, at least
MANY_ROWS = 16  # if two particles may have the same value, or if tensors are small
CHEAP = 2**16  # elements of the largest tensor, all rows: up to this size more rows cost nothing
ELEMENTS = 2**22  # of the largest tensor, all rows: fewer rows are taken where it would be larger
WORTH_A_RUN = 2**15  # densities that take as long as one more sample statement of a program


@dataclass(frozen=True)
class Mixture:
    """A random choice of particles, in some rows."""

    levels: list[list[str]]  # symbols of indices with all their particles on a level each
    chosen: Mapping[str, Tensor]  # all other indices: (rows, *plates), plates padded
    rows: int


def rows_beside(structure: Structure, particles: Particles) -> Mixture | None:
    """
    Choose rows that the programs evaluate together with the particles, for a check of all together.

    That takes no run of its own: each row is one more particle of every index.

    :return: None where that would be more work than a run.
    """
    size_of = particles.sizes
    number = _rows_wanted(structure, particles)
    more = {symbol: size + number for symbol, size in size_of.items()}
    work = number_of_densities(structure, more) - number_of_densities(structure, size_of)
    if work > WORTH_A_RUN * (len(structure.model) + len(structure.guide)):
        return None
    return Mixture([], _chosen(structure, size_of, structure.by_symbol, number), number)


def with_rows(structure: Structure, particles: Particles, mixture: Mixture) -> Particles:
    """Add the rows of a mixture to the particles, one particle of every index for each."""
    mixed = _mixed_values(structure, particles, mixture)
    values = {name: torch.cat([value, mixed[name]]) for name, value in particles.values.items()}
    sizes = {symbol: size + mixture.rows for symbol, size in particles.sizes.items()}
    return replace(particles, sizes=sizes, values=values)


def without_rows(
    evaluated: Evaluated, particles: Particles, rows: int
) -> tuple[Evaluated, tuple[Said, Said]]:
    """
    Take apart what the programs say at the particles, and at the rows that were added to them.

    :return: the first, and the densities of guide and model at the second.
    """
    sizes = [particles.sizes[level[0]] for level in evaluated.levels]

    def of_particles(mapped: Mapped) -> Mapped:
        return replace(mapped, tensor=mapped.tensor[tuple(slice(sizes[n]) for n in mapped.levels)])

    def of_rows(mapped: Mapped) -> Mapped:
        at = tuple(torch.arange(sizes[n], sizes[n] + rows) for n in mapped.levels)
        return Mapped(mapped.tensor[at], (0,)) if at else mapped

    both = evaluated.guide, evaluated.model
    first, second = (
        {
            name: {key: of_particles(part) for key, part in parts.items()}
            for name, parts in s.items()
        }
        for s in both
    )
    of_guide, of_model = (
        {
            name: {"log_prob": of_rows(parts["log_prob"])}
            for name, parts in said.items()
            if "log_prob" in parts
        }
        for said in both
    )
    return replace(evaluated, guide=first, model=second), (of_guide, of_model)


def mixture_of(
    structure: Structure, particles: Particles, *, together: bool, again: bool = False
) -> Mixture:
    """
    Choose particles at random; draws from a generator of its own.

    :param together: whether indices outside of plates take random particles too.
    :param again: whether it is a further look, for which one row is enough: the first has looked
        at the same particles of the indices outside of plates.
    """
    size_of = particles.sizes
    outside = {index.symbol for index in structure.indices if not index.plates}
    apart = set() if together else outside
    levels = [[s for s in level if s in apart] for level in levels_of(structure, size_of)]
    largest = combined = 1
    for site in structure.model.values():
        elements = math.prod(structure.plates[s].size for s in site.factor_plates)
        elements *= site.event_size
        read = math.prod(size_of[s] for s in structure.indices_read(site) & apart)
        largest, combined = max(largest, elements), max(combined, elements * read)
    rows = min(_rows_wanted(structure, particles), max(2, ELEMENTS // largest))
    rows = 1 if again else max(rows, min(MANY_ROWS, CHEAP // combined))
    chosen = _chosen(structure, size_of, structure.by_symbol.keys() - apart, rows)
    return Mixture([level for level in levels if level], chosen, rows)


def said_at(
    structure: Structure, particles: Particles, programs: Programs, mixture: Mixture
) -> tuple[Said, Said]:
    """
    Run the programs at a mixture.

    :return: what guide and model say.
    :raises NotMappableError: if torch cannot map the programs.
    """
    levels = [
        {name: particles.values[name] for s in level for name in structure.by_symbol[s].sites}
        for level in mixture.levels
    ]
    mixed = _mixed_values(structure, particles, mixture)
    with pyro.validation_enabled(False):
        return evaluate(
            programs,
            [*levels, mixed] if mixed else levels,
            guide=wanted_of_guide(structure, validate=False),
            model=wanted_of_model(structure, validate=False, nan_is_zero=programs.is_learned),
            shapes=structure.latent_shapes,
        )


def _rows_wanted(structure: Structure, particles: Particles) -> int:
    """Return in how many rows any two elements have different particles at least once."""
    plated = (name for name, index in structure.index_of.items() if index.plates)
    if any(
        structure.index_of[name].enumerated or not particles.values[name].is_floating_point()
        for name in plated
    ):
        return MANY_ROWS  # two particles may have the same value
    groups = _of_one_size(structure, particles.sizes, structure.by_symbol)
    digits = [_digits(sum(numbers.values()), size) for size, numbers in groups.items()]
    return max(ROWS, *digits) if digits else ROWS


def _of_one_size(
    structure: Structure, sizes: Mapping[str, int], symbols: Collection[str]
) -> dict[int, dict[str, int]]:
    """Return the indices of each number of particles, and how many elements each has."""
    groups: dict[int, dict[str, int]] = {}
    for index in structure.indices:
        if index.symbol in symbols:
            elements = math.prod(structure.plates[s].size for s in index.plates)
            groups.setdefault(sizes[index.symbol], {})[index.symbol] = elements
    return groups


def _digits(elements: int, size: int) -> int:
    """Return how many digits the numbers of elements have, one for each of ``size`` particles."""
    digits = 1
    while 1 < size**digits < elements and digits < MANY_ROWS:
        digits += 1
    return digits


def _chosen(
    structure: Structure, sizes: Mapping[str, int], symbols: Collection[str], rows: int
) -> dict[str, Tensor]:
    """Choose a particle for each element of some indices: ``(rows, *plates)``, by symbol."""
    generator = torch.Generator("cpu").manual_seed(0)
    chosen = {}
    for size, elements in _of_one_size(structure, sizes, symbols).items():
        numbers = _telling_apart(sum(elements.values()), size, rows, generator)
        parts = numbers.split(list(elements.values()), dim=1)
        for symbol, part in zip(elements, parts, strict=True):
            shape = [1] * structure.max_plate_nesting
            for plate in structure.by_symbol[symbol].plates:
                shape[structure.plates[plate].dim] = structure.plates[plate].size
            chosen[symbol] = part.reshape((rows, *shape))
    return chosen


def _telling_apart(elements: int, size: int, rows: int, generator: torch.Generator) -> Tensor:
    """
    Choose particles such that any two elements have different ones in some row.

    The particles of an element are the digits of its number, one digit a row. When the digits are
    used up, elements are numbered anew; with too few rows, most pairs of elements are told apart.

    :param size: number of particles.
    :return: ``(rows, elements)``.
    """
    digits = min(_digits(elements, size), rows)
    numberings = -(-rows // digits)
    numbers = torch.rand((numberings, 1, elements), generator=generator, device="cpu").argsort(-1)
    places = size ** torch.arange(digits, device="cpu")
    found = (numbers // places.unsqueeze(-1) % size).flatten(0, 1)[:rows]
    renamed = torch.rand((rows, size), generator=generator, device="cpu").argsort(-1)
    return renamed.gather(-1, found)


def _mixed_values(
    structure: Structure, particles: Particles, mixture: Mixture
) -> dict[str, Tensor]:
    """Return the values of sites at the chosen particles: ``(rows, *shape)``."""
    values = {}
    for name, index in structure.index_of.items():
        if index.symbol in mixture.chosen:
            value, site = particles.values[name], structure.proposal_site(name)
            chosen = mixture.chosen[index.symbol].to(value.device)
            batch = chosen.shape[chosen.dim() - len(site.batch_shape) :]
            chosen = chosen.reshape((mixture.rows, *batch, *(1,) * site.event_dim))
            values[name] = torch.take_along_dim(value, chosen, 0)
    return values
