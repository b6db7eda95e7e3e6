# SPDX-License-Identifier: Apache-2.0
r"""
Which element of a plate each density reads, found by changing elements.

The programs run once more, mapped over one level of **slots**. A slot is one combination of
particles, with some elements of the plated latents changed. Element ``e`` of a latent is changed in
slot ``b`` where bit ``b`` of ``e`` is set, and in slot ``B + b`` where it is not: a density that
reads one element changes in exactly one slot of each such pair. So the number of slots is
logarithmic in the size of the plate.

A continuous element is set to nan. A discrete one is given another particle's value, and if nan
makes the model fail, continuous ones are too. All this is done at many combinations of particles
(**rows**), since which element is read may depend on a latent (a change point, a mixture's
component): then several are. Rare combinations may be missed; the factors that come of it are held
against the programs at all of them (:mod:`~pyro_mpis.particles.checks`).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import pyro
import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal, SampleMessage
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.particles.evaluation import summed_over
from pyro_mpis.particles.proposals import Particles
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.messages import counted
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.rewritten import NoNanAsIndex
from pyro_mpis.programs.runs import Collect, Programs, Wanted, evaluate
from pyro_mpis.programs.structure import Structure

NONE, SEVERAL = -1, -2  # in place of an element; below SEVERAL, the plates that it is several of
# Largest tensor of a probing run, event dims aside, at MIN_ROWS combinations or more.
PROBE_ELEMENTS = 2**22
MIN_ROWS = 4


@dataclass(frozen=True)
class ElementReads:
    """Which element of the plates of an index each element of a site's plates reads."""

    inner: str  # the site's plates; first the index that switches between elements, if one does
    elements: Mapping[Ordinal, Tensor]  # plates of an index -> flat element, NONE or below
    switch: str = ""  # an index outside of plates on whose particle it depends what is read

    def at(self, ranges: Mapping[str, slice]) -> "ElementReads":
        """Return what is read at a part of the particles."""
        if self.switch not in ranges:
            return self
        part = ranges[self.switch]
        return replace(self, elements={p: element[part] for p, element in self.elements.items()})

    def of_one_particle(self) -> "ElementReads":
        """Return what is read at the first particle of the index that switches."""
        inner = self.inner.replace(self.switch, "")
        return ElementReads(inner, {plates: e[0] for plates, e in self.elements.items()})


SiteReads = Mapping[str, ElementReads]


@dataclass(frozen=True)
class Numbers:
    """
    Numbers of the elements of some plates.

    The bits of the position in one plate follow those of the position in another, so that a density
    that reads several elements tells which plates it reads several of.

    :ivar of_elements: in the batch dims of the plates, padded.
    :ivar bits: how many bits the position in each plate has; the lowest first.
    :ivar sizes: of the plates.
    """

    of_elements: Tensor
    bits: Mapping[str, int]
    sizes: Mapping[str, int]

    @property
    def num_bits(self) -> int:
        """How many bits a number has."""
        return sum(self.bits.values())


def numbered(graph: FactorGraph, plates: Ordinal) -> Numbers:
    """Give a number to each element of some plates."""
    number = torch.zeros([1] * graph.max_plate_nesting, dtype=torch.long, device=graph.device)
    bits: dict[str, int] = {}
    for symbol in sorted(plates, reverse=True):
        position = flat_elements(graph, frozenset(symbol))
        number = number + position * 2 ** sum(bits.values())
        bits[symbol] = num_bits(graph.sizes[symbol])
    return Numbers(number, bits, {symbol: graph.sizes[symbol] for symbol in plates})


def run_probe(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    numbers: Mapping[Ordinal, Numbers],
    switch: str = "",
    only: Ordinal | None = None,
) -> SiteReads:
    """
    Change elements of the latents by the bits of their numbers, and see what else changes.

    :param numbers: of the elements of each ordinal.
    :param switch: an index outside of plates to look at each particle of, one by one.
    :param only: the indices whose elements to change; all by default.
    """
    largest = max(
        math.prod(graph.sizes[symbol] for symbol in site.factor_plates)
        for site in structure.model.values()
    )
    slots: dict[Ordinal, slice] = {}
    total = 1  # the first slot changes nothing
    for plates, of_plates in numbers.items():
        slots[plates] = slice(total, total + 2 * of_plates.num_bits)
        total = slots[plates].stop
    patterns = {}
    for name, index in structure.index_of.items():
        if index.plates in numbers and (only is None or index.symbol in only):
            of_plates = numbers[index.plates]
            code = _code(of_plates.of_elements, of_plates.num_bits)
            pattern = code.new_zeros((total, *code.shape[1:]))
            pattern[slots[index.plates]] = code
            patterns[name] = pattern
    largest *= particles.sizes[switch] if switch else 1
    fitting = max(1, PROBE_ELEMENTS // (largest * total))
    num_rows = min(max(particles.sizes.values(), default=1), max(fitting, MIN_ROWS))
    num_rows = 1 if switch else num_rows  # which is held against the programs afterwards
    order = _rows(structure, particles, num_rows)
    apart = structure.by_symbol[switch].sites if switch else ()
    changed: dict[str, list[Tensor]] = {}
    for first in range(0, num_rows, fitting):
        rows = {s: particle[first : first + fitting] for s, particle in order.items()}
        found = _log_probs(structure, particles, programs, patterns, rows, apart)
        for name, log_prob in found.items():
            inner = "".join(sorted(structure.model[name].factor_plates))
            differs = differs_from(log_prob, log_prob[:1])
            part = graph.to_plates(differs, inner, left=3)
            changed.setdefault(name, []).append(part if switch else part.squeeze(2))
    reads = {}
    for name, parts in changed.items():
        site = structure.model[name]
        ordinals = {structure.by_symbol[s].plates for s in structure.indices_read(site)}
        together = torch.cat(parts, 1)
        elements = {
            plates: _elements(together[slots[plates]], numbers[plates])
            for plates in slots
            if plates in ordinals
        }
        inner = "".join(sorted(site.factor_plates))
        if not switch:
            reads[name] = ElementReads(inner, elements)
        elif switch in structure.indices_read(site):
            reads[name] = ElementReads(switch + inner, elements, switch)
    return reads


def _rows(structure: Structure, particles: Particles, num_rows: int) -> dict[str, Tensor]:
    """Return the particle of each index in each row: random ones, the same in every run."""
    generator = torch.Generator("cpu").manual_seed(0)
    order = {}
    for index in structure.indices:
        size = particles.sizes[index.symbol]
        shuffled = partial(torch.randperm, size, generator=generator, device="cpu")
        numbers = torch.cat([shuffled() for _ in range(math.ceil(num_rows / size))])
        order[index.symbol] = numbers[:num_rows]
    return order


def _log_probs(
    structure: Structure,
    particles: Particles,
    programs: Programs,
    patterns: Mapping[str, Tensor],
    order: Mapping[str, Tensor],
    apart: Collection[str],
) -> dict[str, Tensor]:
    """Change latents to nan, or, where that stops the model, to another particle's value."""
    run = partial(_probing_run, structure, particles, programs, patterns, order, apart)
    try:
        with NoNanAsIndex():
            return run(with_nan=True)
    except (NotMappableError, ValueError, RuntimeError):  # as a Cholesky factor does
        return run(with_nan=False)


def _probing_run(
    structure: Structure,
    particles: Particles,
    programs: Programs,
    patterns: Mapping[str, Tensor],
    order: Mapping[str, Tensor],
    apart: Collection[str],
    *,
    with_nan: bool,
) -> dict[str, Tensor]:
    """
    Evaluate the model with some of its latents' elements changed.

    :param patterns: for the sites to change, the elements that each slot changes,
        ``(slots, *plates)``, plates padded; the first slot changes none.
    :param order: the particle of each index in each row.
    :param apart: sites to take all particles of, in every slot and row.
    :param with_nan: whether to change continuous latents to nan; otherwise, and discrete ones
        always, to the value of the next particle.
    :return: the log_prob of every site: ``(slots, rows, particles of the sites apart or 1,
        *plates)``, plates padded.
    """
    slots = max((len(pattern) for pattern in patterns.values()), default=1)
    rows = len(next(iter(order.values()), torch.zeros(1)))
    values = {}
    for name, index in structure.index_of.items():
        if name in apart:
            continue
        known = particles.values[name]
        chosen = order[index.symbol].to(known.device)
        value = known[chosen].unsqueeze(0)  # (1, rows, *shape)
        if name in patterns:
            other = known[(chosen + 1) % len(known)].unsqueeze(0)
            if with_nan and value.is_floating_point():
                other = torch.full_like(value, torch.nan)
            site = structure.proposal_site(name)
            pattern = patterns[name].to(value.device)
            batch = pattern.shape[pattern.dim() - len(site.batch_shape) :]
            pattern = pattern.reshape((slots, 1, *batch, *(1,) * site.event_dim))
            value = torch.where(pattern, other, value)
        values[name] = value.expand((slots, *value.shape[1:])).flatten(0, 1)
    by_itself = {name: particles.values[name] for name in apart}
    names = [name for name, site in structure.model.items() if not site.silent]
    names = [name for name in names if structure.origins.get(name) != "model_delta"]
    with pyro.validation_enabled(False):
        _, said = evaluate(
            programs,
            [level for level in (values, by_itself) if level],
            guide=Wanted({}, frozenset(structure.guide)) if structure.carried else None,
            model=Wanted(
                {name: _collecting(structure, name) for name in names}, frozenset(structure.model)
            ),
            shapes=structure.latent_shapes,
        )
    nesting = structure.max_plate_nesting
    result = {}
    for name in names:
        tensor = said[name]["log_prob"].along(0, 1)
        lead, batch = tensor.shape[:2], tensor.shape[2:]
        tensor = tensor.reshape((*lead, *(1,) * (nesting - len(batch)), *batch))
        tensor = tensor.expand((slots * rows, *tensor.shape[1:]))
        result[name] = tensor.reshape((slots, rows, *tensor.shape[1:]))
    return result


def _collecting(structure: Structure, name: str) -> Collect:
    dims = structure.summed_dims(structure.model[name])

    def collect(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        log_prob = counted(site, density_of(site["fn"], site["value"], validate=False))
        return {"log_prob": summed_over(log_prob, dims)}

    return collect


def differs_from(x: Tensor, y: Tensor) -> Tensor:
    """Return where entries differ by more than rounding; nan differs from everything else."""
    noise = 100.0 * torch.finfo(y.dtype).eps * (1.0 + y.abs())
    same = (x == y) | ((x - y).abs() <= noise) | (x.isnan() & y.isnan())
    return ~same


def flat_elements(graph: FactorGraph, plates: Ordinal) -> Tensor:
    """Return the number of each element of some plates, in the batch dims of the plates."""
    shape = [1] * graph.max_plate_nesting
    for symbol in plates:
        shape[graph.plate_dims[symbol]] = graph.sizes[symbol]
    number = torch.zeros(shape, dtype=torch.long)
    for symbol in sorted(plates):
        along = [1] * graph.max_plate_nesting
        along[graph.plate_dims[symbol]] = graph.sizes[symbol]
        number = number * graph.sizes[symbol] + torch.arange(graph.sizes[symbol]).reshape(along)
    return number.to(graph.device)


def unravel(graph: FactorGraph, elements: Tensor, plates: Ordinal) -> dict[str, Tensor]:
    """Split flat elements of some plates into one element of each; NONE stays NONE."""
    result = {}
    none = elements == NONE
    for symbol in sorted(plates, reverse=True):
        result[symbol] = (elements % graph.sizes[symbol]).masked_fill(none, NONE)
        elements = elements // graph.sizes[symbol]
    return result


def own_elements(graph: FactorGraph, reads: ElementReads, symbol: str) -> Tensor:
    """Return the number of each element of a plate, in the dims of what a site reads."""
    plates = reads.inner.replace(reads.switch, "") if reads.switch else reads.inner
    elements = graph.to_plates(flat_elements(graph, frozenset(symbol)), plates, left=0)
    if reads.switch:
        elements = elements.expand((graph.sizes[reads.switch], *elements.shape))
    return elements


def agree(x: Tensor, y: Tensor) -> bool:
    """Whether two maps have the same elements wherever both have one."""
    return bool(((x == y) | (x == NONE) | (y == NONE)).all())


def num_bits(size: int) -> int:
    """Return how many bits tell ``size`` numbers apart, one or more."""
    return max(1, math.ceil(math.log2(size)))


def several_of(elements: Tensor, plates: Ordinal) -> Ordinal:
    """Return which of the plates of an index several elements are read of, in some place."""
    several = elements[elements < SEVERAL].unique()
    return frozenset(
        symbol
        for bit, symbol in enumerate(sorted(plates))
        if bool((SEVERAL - several).bitwise_right_shift(bit).bitwise_and(1).any())
    )


def _code(numbers: Tensor, bits: int) -> Tensor:
    """Return in which slots each number is changed: (2 bits, *shape)."""
    shifts = torch.arange(bits, device=numbers.device).reshape((-1,) + (1,) * numbers.dim())
    is_set = numbers.bitwise_right_shift(shifts).bitwise_and(1).bool()
    return torch.cat([is_set, ~is_set])


def _elements(changed: Tensor, numbers: Numbers) -> Tensor:
    """
    Read off which element matters.

    :param changed: ``(slots, rows, *inner)``.
    :return: the flat element, ``(*inner)``; NONE, or what :func:`several_of` takes.
    """
    ones, zeros = changed.chunk(2)
    positions, first = {}, 0
    for symbol, bits in numbers.bits.items():
        part = slice(first, first + bits)
        positions[symbol] = _decode(ones[part], zeros[part], numbers.sizes[symbol])
        first += bits
    nothing = torch.stack([position == NONE for position in positions.values()]).all(0)
    element = torch.zeros_like(nothing, dtype=torch.long)
    several = torch.zeros_like(element)
    for bit, symbol in enumerate(sorted(positions)):
        element = element * numbers.sizes[symbol] + positions[symbol]
        several += (positions[symbol] < 0).long() * 2**bit
    element = torch.where(several > 0, SEVERAL - several, element)
    return element.masked_fill(nothing, NONE)


def _decode(ones: Tensor, zeros: Tensor, size: int) -> Tensor:
    """
    Read off which position along one plate matters.

    :param ones: what changes with the elements that have a bit: ``(bits, rows, *inner)``.
    :param zeros: with those that have not.
    :return: the position, ``(*inner)``; NONE, or SEVERAL where rows differ too.
    """
    bits = len(ones)
    weights = 2 ** torch.arange(bits, device=ones.device)
    element = (ones.long() * weights.reshape((-1,) + (1,) * (ones.dim() - 1))).sum(0)
    nothing = ~(ones | zeros).any(0)
    single = (ones ^ zeros).all(0) & (element < size)
    highest = element.masked_fill(nothing, NONE).amax(0)
    lowest = element.masked_fill(nothing, int(2**bits)).amin(0)
    several = (~single & ~nothing).any(0) | ((lowest != highest) & (highest != NONE))
    return highest.masked_fill(several, SEVERAL)
