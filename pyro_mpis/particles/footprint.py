# SPDX-License-Identifier: Apache-2.0
"""
What the programs hold at any number of particles, found by a mapped run at a single one.

That run counts whatever the programs allocate (:mod:`~pyro_mpis.programs.meter`): categories,
components, covariances, the points of a quadrature. Its levels also say what each site reads, also
where the plain run lost track.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyro
from pyro.ops.provenance import detach_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis._typing import Ordinal, SampleMessage
from pyro_mpis.particles.evaluation import wanted_of_guide, wanted_of_model, with_reads
from pyro_mpis.programs.analysis import with_implicit_plates
from pyro_mpis.programs.messages import statements
from pyro_mpis.programs.meter import Bytes, Meter
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.runs import Collect, Programs, Wanted, evaluate
from pyro_mpis.programs.structure import Structure, levels_of
from pyro_mpis.programs.tensors import Said, vmap_alone

OWN_LEVELS = 12  # up to this many indices have a level each: then what is read is certain
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Moment:
    """What is held at one moment: bytes for one combination of the values on some levels."""

    site: str | None  # whose density is computed; None while the programs run
    held: Bytes


@dataclass(frozen=True)
class Footprint:
    """What an evaluation of the programs holds, for any number of particles of each index."""

    levels: tuple[tuple[str, ...], ...]  # random sites on each level
    moments: tuple[Moment, ...]
    made: Bytes  # by all operations
    largest: Mapping[tuple[int, ...], tuple[int, str | None]]  # bytes of one tensor, and the site

    def peak(self, structure: Structure, sizes: Sizes) -> tuple[int, str | None, Ordinal]:
        """
        Return the most bytes held at any moment.

        :return: the bytes, the site whose density is computed, and the indices that most of them
            grow with.
        """
        combinations = self._combinations(structure, sizes)
        most, site = 0, None
        grown: tuple[int, ...] = ()
        for moment in self.moments:
            held = {levels: n * combinations(levels) for levels, n in moment.held.items()}
            total = sum(held.values())
            if total > most:
                most, site, grown = total, moment.site, max(held, key=held.__getitem__)
        return most, site, self._symbols(structure, grown)

    def peak_of_draws(self, structure: Structure, sizes: Sizes) -> int:
        """Return about the most bytes held in a run with all particles on one level."""
        number = max(sizes.values(), default=1)
        return max(
            (
                sum(n * (number if levels else 1) for levels, n in moment.held.items())
                for moment in self.moments
            ),
            default=0,
        )

    def largest_tensor(self, structure: Structure, sizes: Sizes) -> tuple[int, str | None, Ordinal]:
        """
        Return the bytes of the largest tensor.

        :return: the bytes, the site whose density needs it, and the indices that it grows with.
        """
        combinations = self._combinations(structure, sizes)
        most, site = 0, None
        grown: tuple[int, ...] = ()
        for levels, (number, needs_it) in self.largest.items():
            if number * combinations(levels) > most:
                most, site, grown = number * combinations(levels), needs_it, levels
        return most, site, self._symbols(structure, grown)

    def work(self, structure: Structure, sizes: Sizes) -> int:
        """Return the bytes that all operations make together."""
        combinations = self._combinations(structure, sizes)
        return sum(number * combinations(levels) for levels, number in self.made.items())

    def _combinations(self, structure: Structure, sizes: Sizes) -> Callable[[tuple[int, ...]], int]:
        """Return the number of combinations of the values on some levels."""
        known: dict[tuple[int, ...], int] = {}
        symbols = [self._symbols(structure, (level,)) for level in range(len(self.levels))]

        def combinations(levels: tuple[int, ...]) -> int:
            if levels not in known:
                read = {symbols[level] for level in levels}  # several of one index count once
                known[levels] = math.prod(
                    max((sizes[s] for s in level), default=1) for level in read
                )
            return known[levels]

        return combinations

    def _symbols(self, structure: Structure, levels: tuple[int, ...]) -> Ordinal:
        """Return the indices on some levels."""
        index_of = structure.index_of
        names = (name for level in levels for name in self.levels[level])
        return frozenset(index_of[name].symbol for name in names if name in index_of)


def measured(
    structure: Structure, programs: Programs, traces: tuple[Trace, Trace], *, validate: bool
) -> tuple[Structure, Footprint | None]:
    """
    Find what the programs hold, and what they read that the plain run did not see.

    :param traces: of the plain run.
    :return: the structure, with these reads; the footprint, None if torch cannot map the programs.
    """
    found = footprint_of(structure, programs, traces, validate=validate)
    if found is None:
        return structure, None
    footprint, said = found
    if said is not None:
        more = with_reads(structure, said, footprint.levels)
        if more != structure:
            structure = with_implicit_plates(more)
    return structure, footprint


def footprint_of(
    structure: Structure, programs: Programs, traces: Sequence[Trace], *, validate: bool
) -> tuple[Footprint, tuple[Said, Said] | None] | None:
    """
    Run the programs at a single particle, and note what they allocate; draws nothing.

    :param traces: of the plain runs, which the values are taken from.
    :param validate: whether to look at supports and arguments.
    :return: the footprint; and what was said, where each index had a level of its own. None if
        torch cannot map the programs.
    """
    levels, by_level = _levels(structure, traces)
    for patched in (False, True):
        meter = Meter(len(by_level))
        try:
            with pyro.validation_enabled(False), meter, vmap_alone():
                said = evaluate(
                    replace(programs, patched=patched),
                    by_level,
                    guide=_noting(meter, wanted_of_guide(structure, validate=validate)),
                    model=_noting(meter, wanted_of_model(structure, validate=validate)),
                    shapes=structure.latent_shapes,
                )
        except NotMappableError:
            continue
        meter.finish()
        moments = tuple(Moment(site, held) for site, held in _highest(meter.moments))
        sites = tuple(tuple(level) for level in by_level)
        footprint = Footprint(sites, moments, meter.made, meter.largest)
        apart = all(len(level) == 1 for level in levels)
        return footprint, said if apart else None
    return None


def run_at_one(structure: Structure, programs: Programs, traces: Sequence[Trace]) -> None:
    """
    Run the programs at a single particle, as an evaluation does; draws nothing.

    :raises NotMappableError: if torch cannot map the programs.
    """
    _, by_level = _levels(structure, traces)
    with pyro.validation_enabled(False):
        evaluate(
            programs,
            by_level,
            guide=wanted_of_guide(structure, validate=True),
            model=wanted_of_model(structure, validate=True),
            shapes=structure.latent_shapes,
        )


def _levels(
    structure: Structure, traces: Sequence[Trace]
) -> tuple[list[list[str]], list[dict[str, Tensor]]]:
    """Return the indices on each level, and the values of their sites in the plain runs."""
    values = _values(structure, traces)
    if len(structure.indices) <= OWN_LEVELS:
        levels = [[index.symbol] for index in structure.indices]
    else:
        levels = levels_of(structure, structure.with_num_samples(2).num_particles)
    by_level = [
        {name: values[name] for s in level for name in structure.by_symbol[s].sites}
        for level in levels
    ]
    return levels, by_level


def _values(structure: Structure, traces: Sequence[Trace]) -> dict[str, Tensor]:
    """Return the value of each random site in a plain run: (1, *shape)."""
    guide_trace, model_trace = traces
    in_guide, in_model = statements(guide_trace), statements(model_trace)
    values = {}
    for name, site in structure.random.items():
        found = in_guide if structure.guide.get(name) is site else in_model
        values[name] = (
            detach_provenance(found[name]["value"]).detach().expand(site.shape).unsqueeze(0)
        )
    return values


def _noting(meter: Meter, wanted: Wanted | None) -> Wanted | None:
    """Tell the meter whose density is computed."""
    if wanted is None:
        return None

    def noting(name: str, collect: Collect) -> Collect:
        def noted(site: SampleMessage, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            meter.site = name
            try:
                return collect(site, values)
            finally:
                meter.finish()  # what the programs do next is no site's
                meter.site = None

        return noted

    collect = {name: noting(name, function) for name, function in wanted.collect.items()}
    return replace(wanted, collect=collect)


def _highest(moments: Sequence[tuple[str | None, Bytes]]) -> list[tuple[str | None, Bytes]]:
    """Leave out moments at which no more is held than at another, whatever the sizes."""
    result: list[tuple[str | None, Bytes]] = []
    for site, held in moments:
        held = {levels: number for levels, number in held.items() if number > 0}
        if result and _no_more(result[-1][1], held):
            result.pop()
        if not any(_no_more(held, other) for _, other in result[-KEPT:]):
            result.append((site, held))
    return result


KEPT = 16  # moments that each is compared with


def _no_more(one: Bytes, other: Bytes) -> bool:
    return all(number <= other.get(levels, 0) for levels, number in one.items())
