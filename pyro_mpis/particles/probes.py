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
component): then several are. In the first slot of each row nothing is changed: there the density
must be that of the factor graph.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import pyro
import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal, SampleMessage
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.particles.factors import summed_over
from pyro_mpis.particles.proposals import Particles
from pyro_mpis.programs.mapped import log_prob_of
from pyro_mpis.programs.messages import counted
from pyro_mpis.programs.runs import Collect, NotMappableError, Programs, Wanted, evaluate
from pyro_mpis.programs.structure import Structure

NONE, SEVERAL = -1, -2  # in place of an element
# Largest tensor of a probing run, event dims aside: PROBE_ELEMENTS, at MIN_ROWS combinations or
# more, when we must find which element is read; VERIFY_ELEMENTS, at one or more, when we only
# verify that elements of a plate read their own.
PROBE_ELEMENTS = 2**22
VERIFY_ELEMENTS = 2**16
MIN_ROWS = 4
# Fewest bits of an element's number when we only verify; in a larger plate elements share numbers.
MIN_BITS = 2


@dataclass(frozen=True)
class ElementReads:
    """Which element of the plates of an index each element of a site's plates reads."""

    inner: str  # the site's plates
    elements: Mapping[Ordinal, Tensor]  # plates of an index -> flat element, NONE or SEVERAL


SiteReads = Mapping[str, ElementReads]
Numbers = Mapping[Ordinal, tuple[Tensor, int]]  # of the elements of an ordinal, and their bits


@dataclass(frozen=True)
class Probe:
    """What a probing run found."""

    reads: SiteReads
    rows: Mapping[str, Tensor]  # symbol of the index -> its particle in each row
    log_probs: Mapping[str, Tensor]  # unchanged densities of the model's sites: (rows, *plates)


def run_probe(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    numbers: Numbers,
    *,
    max_slots: int,
    min_rows: int,
) -> Probe:
    """
    Change elements of the latents by the bits of their numbers, and see what else changes.

    :param numbers: of the elements of each ordinal, with their numbers of bits.
    :param max_slots: how many slots to take together, at as many combinations as fit.
    :param min_rows: at how many combinations at least, if there are as many particles.
    """
    slots: dict[Ordinal, tuple[int, int]] = {}
    total = 1  # the first slot changes nothing
    for plates, (_, bits) in numbers.items():
        slots[plates] = (total, bits)
        total += 2 * bits
    patterns = {}
    for name, index in structure.index_of.items():
        if index.plates and index.plates in numbers:
            start, bits = slots[index.plates]
            code = _code(numbers[index.plates][0], bits)[1:]
            pattern = code.new_zeros((total, *code.shape[1:]))
            pattern[start : start + 2 * bits] = code
            patterns[name] = pattern
    fitting, available = max(1, max_slots // total), max(particles.sizes.values(), default=1)
    num_rows = min(available, max(fitting, min_rows))
    order = _rows(structure, particles, num_rows, graph.sizes)
    unchanged: dict[str, list[Tensor]] = {}
    changed: dict[str, list[Tensor]] = {}
    for first in range(0, num_rows, fitting):
        part = {s: numbers[first : first + fitting] for s, numbers in order.items()}
        for name, log_prob in _log_probs(structure, particles, programs, patterns, part).items():
            unchanged.setdefault(name, []).append(log_prob[0])
            if total > 1:
                differs = differs_from(log_prob, log_prob[:1])
                inner = "".join(sorted(structure.model[name].factor_plates))
                changed.setdefault(name, []).append(graph.to_plates(differs, inner, left=2))
    reads = {}
    for name, parts in changed.items():
        site = structure.model[name]
        together = torch.cat(parts, 1)
        ordinals = {structure.by_symbol[s].plates for s in structure.indices_read(site)}
        elements = {p: _decode(together, *slots[p]) for p in slots if p in ordinals}
        reads[name] = ElementReads("".join(sorted(site.factor_plates)), elements)
    return Probe(reads, order, {name: torch.cat(parts) for name, parts in unchanged.items()})


def _rows(
    structure: Structure, particles: Particles, num_rows: int, first: Mapping[str, int]
) -> dict[str, Tensor]:
    """
    Return the particle of each index in each row: random ones, the same in every run.

    :param first: sizes of the first piece of the particles, which has those of the first rows.
    """
    generator = torch.Generator().manual_seed(0)
    order = {}
    for index in structure.indices:
        size = particles.sizes[index.symbol]
        shuffled = partial(torch.randperm, size, generator=generator, device="cpu")
        numbers = torch.cat([shuffled() for _ in range(math.ceil(num_rows / size))])[:num_rows]
        numbers[:MIN_ROWS] %= first[index.symbol]
        order[index.symbol] = numbers
    return order


def _log_probs(
    structure: Structure,
    particles: Particles,
    programs: Programs,
    patterns: Mapping[str, Tensor],
    order: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Change latents to nan, or, where that stops the model, to another particle's value."""
    try:
        return _probing_run(structure, particles, programs, patterns, order, with_nan=True)
    except (NotMappableError, ValueError, RuntimeError):  # as a Cholesky factor does
        return _probing_run(structure, particles, programs, patterns, order, with_nan=False)


def _probing_run(
    structure: Structure,
    particles: Particles,
    programs: Programs,
    patterns: Mapping[str, Tensor],
    order: Mapping[str, Tensor],
    *,
    with_nan: bool,
) -> dict[str, Tensor]:
    """
    Evaluate the model with some of its latents' elements changed.

    :param patterns: for the sites to change, the elements that each slot changes,
        ``(slots, *plates)``, plates padded; the first slot changes none.
    :param order: the particle of each index in each row.
    :param with_nan: whether to change continuous latents to nan; otherwise, and discrete ones
        always, to the value of the next particle.
    :return: the log_prob of every site: ``(slots, rows, *plates)``, plates padded.
    """
    slots = max((len(pattern) for pattern in patterns.values()), default=1)
    rows = len(next(iter(order.values()), torch.zeros(1)))
    values = {}
    for name, index in structure.index_of.items():
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
    names = [name for name, site in structure.model.items() if not site.silent]
    names = [name for name in names if structure.origins.get(name) != "model_delta"]
    with pyro.validation_enabled(False):
        _, said = evaluate(
            programs,
            [values] if values else [],
            guide=Wanted({}, frozenset(structure.guide)) if structure.carried else None,
            model=Wanted(
                {name: _collecting(structure, name) for name in names}, frozenset(structure.model)
            ),
            shapes=structure.latent_shapes,
        )
    nesting = structure.max_plate_nesting
    result = {}
    for name in names:
        mapped = said[name]["log_prob"]
        tensor = mapped.tensor if mapped.levels else mapped.tensor.unsqueeze(0)
        lead, batch = tensor.shape[:1], tensor.shape[1:]
        tensor = tensor.reshape((*lead, *(1,) * (nesting - len(batch)), *batch))
        tensor = tensor.expand((slots * rows, *tensor.shape[1:]))
        result[name] = tensor.reshape((slots, rows, *tensor.shape[1:]))
    return result


def _collecting(structure: Structure, name: str) -> Collect:
    dims = structure.summed_dims(structure.model[name])

    def collect(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        log_prob = counted(site, log_prob_of(site["fn"], site["value"]))
        return {"log_prob": summed_over(log_prob, dims)}

    return collect


def differs_from(x: Tensor, y: Tensor) -> Tensor:
    """Return where two tensors differ by more than rounding; nan differs from everything."""
    finite = y[y.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    noise = 100.0 * torch.finfo(y.dtype).eps * (1.0 + largest)
    return (x != y) & ~((x - y).abs() <= noise)


def num_bits(size: int) -> int:
    """Return how many bits tell ``size`` numbers apart, one or more."""
    return max(1, math.ceil(math.log2(size)))


def _code(numbers: Tensor, bits: int) -> Tensor:
    """Return in which slots each number is changed: (1 + 2 bits, *shape); in the first, none is."""
    shifts = torch.arange(bits, device=numbers.device).reshape((-1,) + (1,) * numbers.dim())
    is_set = numbers.bitwise_right_shift(shifts).bitwise_and(1).bool()
    return torch.cat([torch.zeros_like(is_set[:1]), is_set, ~is_set])


def _decode(changed: Tensor, start: int, bits: int) -> Tensor:
    """
    Read off which element matters.

    :param changed: ``(slots, rows, *inner)``.
    :return: the flat element, ``(*inner)``; NONE, or SEVERAL where rows differ too.
    """
    ones = changed[start : start + bits]
    zeros = changed[start + bits : start + 2 * bits]
    weights = 2 ** torch.arange(bits, device=changed.device)
    element = (ones.long() * weights.reshape((-1,) + (1,) * (ones.dim() - 1))).sum(0)
    nothing = ~(ones | zeros).any(0)
    single = (ones ^ zeros).all(0)
    highest = element.masked_fill(nothing, NONE).amax(0)
    lowest = element.masked_fill(nothing, int(2**bits)).amin(0)
    several = (~single & ~nothing).any(0) | ((lowest != highest) & (highest != NONE))
    return highest.masked_fill(several, SEVERAL)


def check_diagonals(graph: FactorGraph, probe: Probe) -> set[str]:
    """
    Hold factors against the unchanged densities of a probe, at its combinations of particles.

    They differ where a site reads an index that it was not seen to read, and which is on the level
    of another that it does read.

    :return: the names of sites that differ.
    """
    wrong = set()
    for factor in graph.factors:
        if factor.name not in probe.log_probs:
            continue
        inner = "".join(symbol for symbol in factor.dims if symbol not in graph.index_plates)
        expected = graph.to_plates(probe.log_probs[factor.name], inner, left=1)
        read = [symbol for symbol in factor.dims if symbol in graph.index_plates]
        layout = [factor.dims.index(symbol) for symbol in (*read, *inner)]
        tensor = factor.tensor.permute(layout)
        fits = torch.ones(len(expected), dtype=torch.bool)
        for symbol in read:
            fits &= probe.rows[symbol] < graph.sizes[symbol]  # in this piece of the particles
        rows = tuple(probe.rows[symbol][fits].to(tensor.device) for symbol in read)
        expected = expected[fits.to(expected.device)]
        at_rows = tensor[rows] if rows else tensor.unsqueeze(0)
        difference = torch.where(at_rows == expected, 0.0, (at_rows - expected).abs())
        finite = expected[expected.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        worst = float(difference.nan_to_num(0.0).max()) if difference.numel() else 0.0
        if worst > torch.finfo(expected.dtype).eps ** TOLERANCE * (1.0 + largest):
            wrong.add(factor.name)
    return wrong


TOLERANCE = 0.4  # power of the machine epsilon: what rounding explains
