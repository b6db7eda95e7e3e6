# SPDX-License-Identifier: Apache-2.0
r"""
Hold a factor graph against densities at combinations that mix the elements of plates.

A factor has one particle for all elements of a plate at a time, so it cannot show whether each
element reads its own element of a latent, or that of an index array at every combination. Here each
element of a plated latent takes a particle of its own, at random. If the graph is right, every
density must be the entry of its factor at the particles of the elements that it reads.

There are two ways. **Together**: indices outside of plates take random particles too, in a few
rows. That also finds a read which the plain run missed, where indices share a level. **Apart**:
indices outside of plates take all their particles, so that an element which is read only at some
of them is found. That is for factors that read by an index array.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import pyro
import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.particles.evaluation import Evaluated, wanted_of_guide, wanted_of_model
from pyro_mpis.particles.memory import number_of_densities
from pyro_mpis.particles.probes import NONE, ElementReads, SiteReads, unravel
from pyro_mpis.particles.proposals import Particles
from pyro_mpis.programs.runs import Programs, evaluate
from pyro_mpis.programs.structure import Structure, levels_of
from pyro_mpis.programs.tensors import Mapped, Said

ROWS = 3  # random choices of a particle for each element, at least
MANY_ROWS = 16  # if two particles may have the same value, or if tensors are small
CHEAP = 2**16  # elements of the largest tensor, all rows: up to this size more rows cost nothing
ELEMENTS = 2**22  # of the largest tensor, all rows: fewer rows are taken where it would be larger
WORTH_A_RUN = 2**15  # densities that take as long as one more sample statement of a program
SMALL = 2**10  # entries of factors that are compared in one tensor
# Two entries differ if they are further apart than eps to this power, relative to one plus the
# entry. Rounding does not explain more.
TOLERANCE = 0.4


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


def differing(
    graph: FactorGraph, reads: SiteReads, mixture: Mixture, said: tuple[Said, Said]
) -> list[LogFactor]:
    """
    Return the factors that are not the densities of the programs, one of each site.

    :param graph: of the particles that the mixture chooses from, not regrouped.
    :param reads: which elements are read by index arrays.
    :param said: by guide and model, at the mixture.
    """
    said_by_guide, said_by_model = said
    found = {name: said["log_prob"] for name, said in said_by_model.items() if "log_prob" in said}
    found |= {
        f"{name} (guide)": _negative(said["log_prob"]) for name, said in said_by_guide.items()
    }
    factors = [factor for factor in graph.factors if factor.name in found]
    expected = [_at_mixture(graph, factor, reads, mixture) for factor in factors]
    actual = [_aligned(graph, factor, found[factor.name], mixture) for factor in factors]
    return _different(factors, actual, expected)


def _different(
    factors: Sequence[LogFactor], actual: Sequence[Tensor], expected: Sequence[Tensor]
) -> list[LogFactor]:
    """Return the factors whose entries differ; compares small ones together."""
    small: dict[torch.dtype, list[int]] = {}
    wrong = []
    for number, (x, y) in enumerate(zip(actual, expected, strict=True)):
        if x.shape == y.shape and x.numel() < SMALL and x.dtype == y.dtype:
            small.setdefault(x.dtype, []).append(number)
        elif not _same(x, y):
            wrong.append(factors[number])
    for numbers in small.values():
        flat = [torch.cat([side[n].reshape(-1) for n in numbers]) for side in (actual, expected)]
        if not _same(*flat):
            wrong += [factors[n] for n in numbers if not _same(actual[n], expected[n])]
    return wrong


def _negative(mapped: Mapped) -> Mapped:
    return Mapped(-mapped.tensor, mapped.levels)


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
    generator = torch.Generator().manual_seed(0)
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
    numbers = torch.rand((numberings, 1, elements), generator=generator).argsort(-1)
    places = size ** torch.arange(digits)
    found = (numbers // places.unsqueeze(-1) % size).flatten(0, 1)[:rows]
    renamed = torch.rand((rows, size), generator=generator).argsort(-1)
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


def _in_rows_alone(graph: FactorGraph, factor: LogFactor, mixture: Mixture) -> bool:
    """Whether a factor has no plates, reads none, and has all its indices in the rows."""
    return all(s in mixture.chosen and not graph.index_plates[s] for s in factor.dims)


def _at_mixture(
    graph: FactorGraph,
    factor: LogFactor,
    reads: SiteReads,
    mixture: Mixture,
) -> Tensor:
    """Look a factor up at the chosen particles: ``(*levels, rows, *plates)``."""
    if _in_rows_alone(graph, factor, mixture):
        return factor.tensor[tuple(mixture.chosen[symbol].reshape(-1) for symbol in factor.dims)]
    plates = "".join(symbol for symbol in factor.dims if symbol not in graph.index_plates)
    apart = [s for s in factor.dims if s in graph.index_plates and s not in mixture.chosen]
    dims = [*apart, "", *plates]  # "" is that of the rows
    selection = []
    for symbol in factor.dims:
        shape = [1] * len(dims)
        if symbol not in mixture.chosen:
            shape[dims.index(symbol)] = graph.sizes[symbol]
            selection.append(torch.arange(graph.sizes[symbol]).reshape(shape))
            continue
        ordinal = graph.index_plates[symbol]
        chosen = mixture.chosen[symbol]
        if ordinal <= factor.plates:
            chosen = graph.to_plates(chosen, plates, left=1)
        else:
            chosen = _read_by_index(graph, reads[factor.name], ordinal, mixture, chosen, plates)
        site = reads.get(factor.name)
        if site is not None and site.switch in apart and chosen.dim() > len(plates) + 1:
            for position, other in enumerate(apart):  # (particles of the switch, rows, *plates)
                chosen = chosen if other == site.switch else chosen.unsqueeze(position)
        else:
            chosen = chosen.reshape([1] * len(apart) + list(chosen.shape))
        selection.append(chosen)
    selected: tuple[Tensor, ...] = tuple(index.to(factor.tensor.device) for index in selection)
    return factor.tensor[selected] if selected else factor.tensor


def _read_by_index(
    graph: FactorGraph,
    site: ElementReads,
    ordinal: Ordinal,
    mixture: Mixture,
    chosen: Tensor,
    plates: str,
) -> Tensor:
    """
    Return the particle of the element that each plate element reads: ``(rows, *plates)``.

    Where another index switches between elements, and has all its particles: ``(particles of it,
    rows, *plates)``.
    """
    elements = site.elements[ordinal].to(chosen.device)
    elements = elements.masked_fill(elements == NONE, 0)
    ordinal_dims = "".join(sorted(ordinal))
    position = unravel(graph, elements, ordinal)
    of_elements = graph.to_plates(chosen, ordinal_dims, left=1)
    inner = site.inner.replace(site.switch, "") if site.switch else site.inner
    order = [inner.index(symbol) for symbol in plates]
    at: tuple[slice | Tensor, ...]
    if site.switch and site.switch in mixture.chosen:  # each row has a particle of its own
        rows = torch.arange(mixture.rows).reshape((-1,) + (1,) * len(inner))
        switch = mixture.chosen[site.switch].reshape(-1)
        at = (rows, *(position[s][switch] for s in ordinal_dims))
        return of_elements[at].permute((0, *(1 + dim for dim in order)))
    at = (slice(None), *(position[s] for s in ordinal_dims))
    result = of_elements[at]
    if site.switch:
        return result.permute((1, 0, *(2 + dim for dim in order)))
    return result.permute((0, *(1 + dim for dim in order)))


def _aligned(graph: FactorGraph, factor: LogFactor, log_prob: Mapped, mixture: Mixture) -> Tensor:
    """Bring a density of the mapped run to ``(*levels, rows, *plates)``."""
    if _in_rows_alone(graph, factor, mixture) and log_prob.tensor.numel() == mixture.rows:
        return log_prob.tensor.reshape(-1) if factor.dims else log_prob.tensor.reshape(-1)[0]
    plates = "".join(symbol for symbol in factor.dims if symbol not in graph.index_plates)
    apart = [s for s in factor.dims if s in graph.index_plates and s not in mixture.chosen]
    tensor, levels = log_prob.tensor, list(log_prob.levels)
    batch = tensor.dim() - len(levels)
    wanted = [next(n for n, level in enumerate(mixture.levels) if s in level) for s in apart]
    wanted.append(len(mixture.levels))
    extra = [level for level in levels if level not in wanted]
    if extra:  # of an index with one particle, or that was missed
        for level in extra:
            tensor = tensor.select(levels.index(level), 0)
            levels.remove(level)
    for position, level in enumerate(wanted):
        if level not in levels:
            tensor = tensor.unsqueeze(position)
            levels.insert(position, level)
    tensor = tensor.permute((*(levels.index(n) for n in wanted), *range(len(wanted), tensor.dim())))
    missing = graph.max_plate_nesting - batch
    lead, rest = tensor.shape[: len(wanted)], tensor.shape[len(wanted) :]
    tensor = tensor.reshape((*lead, *(1,) * missing, *rest))
    return graph.to_plates(tensor, plates, left=len(wanted))


def _same(actual: Tensor, expected: Tensor) -> bool:
    """
    Whether two tensors agree entry by entry.

    The check has not looked at supports and arguments: an entry that they rule out agrees with
    any density.
    """
    tolerance = expected.abs().add_(1.0).mul_(torch.finfo(actual.dtype).eps ** TOLERANCE)
    close = (actual - expected).abs_() <= tolerance
    if bool(close.all()):
        return True
    return bool((close | (actual == expected) | (expected == -torch.inf)).all())
