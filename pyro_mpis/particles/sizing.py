# SPDX-License-Identifier: Apache-2.0
"""What each part of a run takes, with any numbers of particles, from sizes alone."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from pyro_mpis._text import quoted
from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.sizes import Contraction, Shape, Shapes, contraction_of
from pyro_mpis.particles.footprint import Footprint
from pyro_mpis.programs.structure import Site, Structure

# A log_prob, the value that it is computed from and one temporary live at once.
TENSORS_AT_ONCE = 3
# What operations write while a mapped run deals with a site, whatever the sizes; and how much of
# an evaluation's time may go into running the programs once more for each piece.
BYTES_OF_SITE, SHARE_OF_RUNS = 2**20, 0.25

Sizes = Mapping[str, int]  # symbol of an index -> number of particles


@dataclass(frozen=True)
class Need:
    """An amount of memory, and what most of it is for."""

    bytes: int
    what: str  # a part of a sentence
    symbols: Ordinal  # the indices that it grows with
    plates: Ordinal = frozenset()
    site: str | None = None


class Sizing:
    """
    What the parts of a run take with any numbers of particles.

    :param footprint: of the programs; None if sizes are so small that it does not matter.
    """

    def __init__(self, structure: Structure, footprint: Footprint | None, device: str) -> None:
        self.structure = structure
        self.footprint = footprint
        self.device = device
        self.itemsize = torch.get_default_dtype().itemsize

    def evaluation(self, sizes: Sizes) -> Need:
        """Return what the programs hold while they are evaluated."""
        site = largest_site(self.structure, sizes)
        need = Need(0, "", frozenset())
        if site is not None:
            need = self._of_site(site, bytes_of(self.structure, site, sizes))
        if self.footprint is not None:
            held, name, symbols = self.footprint.peak(self.structure, sizes)
            if held > need.bytes:
                need = self._of_programs(held, name, symbols)
        return need

    def largest_tensor(self, sizes: Sizes) -> Need:
        """Return what a piece is to be cut by: the largest tensor, as often as it is there."""
        site = largest_site(self.structure, sizes)
        if site is None:
            return Need(0, "", frozenset())
        need = self._of_site(site, bytes_of(self.structure, site, sizes))
        if self.footprint is not None:
            largest, name, symbols = self.footprint.largest_tensor(self.structure, sizes)
            largest *= TENSORS_AT_ONCE
            if largest > need.bytes:
                return self._of_programs(largest, name, symbols)
        return need

    def runs_that_pay(self, sizes: Sizes) -> float:
        """Return how many runs of the programs take little of the time of an evaluation."""
        if self.footprint is None:
            return math.inf
        sites = len(self.structure.guide) + len(self.structure.model)
        work = self.footprint.work(self.structure, sizes)
        return work * SHARE_OF_RUNS / (BYTES_OF_SITE * max(1, sites))

    def drawing(self, sizes: Sizes) -> Need:
        """Return what the particles take while they are drawn, all on one level."""
        structure = self.structure
        if self.footprint is None or not structure.index_of:
            return Need(0, "", frozenset())
        number = self.footprint.peak_of_draws(structure, sizes)
        largest = max(structure.random.values(), key=lambda site: site.shape.numel())
        symbols = frozenset({structure.index_of[largest.name].symbol})
        return Need(number, f"the draws of site '{largest.name}'", symbols, largest.plates)

    def particles(self, sizes: Sizes) -> int:
        """Return the bytes of the particles, and of the densities that they were drawn from."""
        return (
            2
            * self.itemsize
            * sum(
                sizes[index.symbol] * self.structure.proposal_site(name).shape.numel()
                for name, index in self.structure.index_of.items()
            )
        )

    def shapes(self, sizes: Sizes) -> Shapes:
        """Return the factors of a block, summed over the plates that hold no index."""
        return replace(self._shapes, sizes={**sizes, **self._shapes.sizes})

    @functools.cached_property
    def _shapes(self) -> Shapes:
        """The factors, and the sizes of plates alone."""
        structure = self.structure
        occupied = structure.plates_of_indices
        ragged: dict[Ordinal, Ordinal] = {}
        factors = []
        for index in structure.indices:
            dims = index.symbol + "".join(sorted(index.plates))
            name = " and ".join(index.sites)
            factors.append(Shape(name, dims, index.plates, self.itemsize))
        guide = [structure.guide[n] for n in (*structure.guide_factors, *structure.carried)]
        for site in (*guide, *structure.model.values()):
            if not site.silent:
                factors.append(self._shape(site, occupied, ragged))
        for index in structure.indices:  # source terms
            dims = index.symbol + "".join(sorted(index.plates))
            factors.append(Shape("source", dims, index.plates, self.itemsize))
        return Shapes(
            factors=tuple(factors),
            sizes={symbol: plate.size for symbol, plate in structure.plates.items()},
            index_plates={index.symbol: index.plates for index in structure.indices},
            ragged=ragged,
            on_cpu=self.device == "cpu",
        )

    @staticmethod
    def bytes_of(shape: Shape, shapes: Shapes) -> int:
        """Return what one factor takes."""
        return math.prod(shapes.sizes[s] for s in shape.dims) * shape.itemsize

    def factors(self, shapes: Shapes) -> Need:
        """Return what the factors of a block take."""
        largest, total = Need(0, "", frozenset()), 0
        for shape in shapes.factors:
            number = self.bytes_of(shape, shapes)
            total += number
            if number > largest.bytes:
                site = self.structure.model.get(shape.name)
                largest = (
                    self._of_proposal(shape, number)
                    if site is None
                    else self._of_site(site, number)
                )
        return Need(total, largest.what, largest.symbols, largest.plates, largest.site)

    def contraction(self, shapes: Shapes) -> Contraction | None:
        """Return what the queries take besides; None where it is not known."""
        return contraction_of(shapes)

    def queries(self, sizes: Sizes, limit: float | None) -> Need:
        """
        Return what the factors of a block and the most expensive query take together.

        :param limit: in bytes; messages are looked at only where they decide. None for always.
        """
        shapes = self.shapes(sizes)
        factors = self.factors(shapes)
        decided = limit is not None and (
            _bound(shapes) + factors.bytes <= limit or factors.bytes > limit
        )
        if decided:
            return factors
        found = contraction_of(shapes)
        if found is None:
            return factors
        total = factors.bytes + found.needed
        if found.largest.bytes <= self.itemsize * _bound_of_largest(shapes):
            return Need(total, factors.what, factors.symbols, factors.plates, factors.site)
        symbols = frozenset(found.largest.dims)
        inside = self.structure.by_symbol.keys() & symbols
        what = "the sum over all other latents"
        return Need(total, what, frozenset(inside), symbols - inside)

    def _shape(self, site: Site, occupied: Ordinal, ragged: dict[Ordinal, Ordinal]) -> Shape:
        structure = self.structure
        reads = structure.indices_read(site)
        of_indices = frozenset[str]().union(*(structure.by_symbol[s].plates for s in reads))
        own = site.factor_plates & occupied
        foreign = of_indices - site.factor_plates
        plates = own
        if foreign and own and own <= of_indices:
            ragged[own] = ragged.get(own, frozenset()) | foreign
        elif foreign:
            plates = of_indices
        summed = bool(site.factor_plates - plates)
        dims = "".join(sorted(reads)) + "".join(sorted(plates))
        itemsize = torch.double.itemsize if summed else self.itemsize
        return Shape(site.name, dims, plates, itemsize)

    def _of_proposal(self, shape: Shape, number: int) -> Need:
        dims = frozenset(shape.dims)
        symbols = frozenset(self.structure.by_symbol.keys() & dims)
        names = quoted(self.structure.named(symbols))
        return Need(number, f"the proposal of {names}", symbols, dims - symbols)

    def _of_site(self, site: Site, number: int) -> Need:
        symbols = self.structure.indices_read(site)
        return Need(number, f"site '{site.name}'", symbols, site.plates, site.name)

    def _of_programs(self, number: int, name: str | None, symbols: Ordinal) -> Need:
        """Return the need of what programs hold, as that of a site where it is its density's."""
        site = None if name is None else self.structure.model.get(name)
        if site is not None and symbols <= self.structure.indices_read(site):
            return self._of_site(site, number)
        return Need(number, "what the programs compute", symbols)


def _bound(shapes: Shapes) -> int:
    """Return bytes that no contraction exceeds: each step, over all indices and plates at once."""
    everything = math.prod(shapes.sizes.values()) * torch.double.itemsize
    return 8 * everything * len(shapes.factors) + 2**24


def _bound_of_largest(shapes: Shapes) -> int:
    """Return the entries of the largest factor."""
    return max(math.prod(shapes.sizes[s] for s in shape.dims) for shape in shapes.factors)


def number_of_densities(structure: Structure, sizes: Sizes) -> int:
    """Return the number of densities that a run evaluates, events' elements counted one by one."""
    return sum(_elements_of_all(structure, sizes))


def largest_site(structure: Structure, sizes: Sizes) -> Site | None:
    """Return the site of the model whose log_prob is computed from most elements."""
    numbers = _elements_of_all(structure, sizes)
    return structure.densities[numbers.index(max(numbers))][0] if numbers else None


def _elements_of_all(structure: Structure, sizes: Sizes) -> list[int]:
    """Return the number of elements that each log_prob of the model is computed from."""
    size_of = sizes.__getitem__
    return [number * math.prod(map(size_of, read)) for _, number, read in structure.densities]


def bytes_of(structure: Structure, site: Site, sizes: Sizes) -> int:
    """Return the bytes that evaluating a site's log_prob takes, if it has nothing hidden."""
    elements = structure.elements(site) * math.prod(sizes[s] for s in structure.indices_read(site))
    return elements * torch.get_default_dtype().itemsize * TENSORS_AT_ONCE
