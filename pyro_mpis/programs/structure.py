# SPDX-License-Identifier: Apache-2.0
r"""
The static structure of a model and its guide: plates, sites, who reads whom, particle indices.

Words used throughout the package:

* a **random site** is a latent site that draws: sampled in the guide, proposed from the model's
  prior because the guide lacks it, or summed over its whole support;
* a site of the model that the guide gives a ``Delta`` has no particles of its own and is
  **carried** by the random sites that its value was computed from (autoguides work so);
* an **index** is one :math:`k_i` of (18)-(25): the particle of one random site, or of a group of
  them, one for each element of the plates it sits in;
* an **undeclared** dim of a site is a batch dim for which the site is in no plate. It counts as an
  event dim: one particle index for all of it, densities summed over it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch

from pyro_mpis._typing import Ordinal

Origin: TypeAlias = Literal["guide", "prior", "enumerated", "guide_delta", "model_delta"]


@dataclass(frozen=True)
class Plate:
    """
    A vectorised ``pyro.plate``, or a batch dim that is treated as one.

    Its size is above one, unless it selects one element of several.
    """

    name: str
    dim: int
    size: int
    symbol: str
    scale: float = 1.0  # size of the whole / size, where it selects a minibatch


@dataclass(frozen=True)
class Obstacle:
    """Why a site can only be evaluated by a run for each particle."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Site:
    """What a plain run says of one sample site of guide or model."""

    name: str
    event_dim: int
    batch_shape: torch.Size  # of its log_prob
    shape: torch.Size  # of its value
    plates: Ordinal
    reads: frozenset[str]  # random sites
    silent: bool  # adds nothing to the density, as pyro.deterministic
    event_size: int = 1  # number of elements of an event
    undeclared: tuple[int, ...] = ()  # batch dims without a plate, from the left
    checked: bool = True  # whether values outside of the support count as impossible
    obstacle: Obstacle | None = None
    implicit: Ordinal = frozenset()  # undeclared dims that are treated as plates
    held: int = 0  # number of elements of the tensors that its distribution holds

    @property
    def factor_plates(self) -> Ordinal:
        """The plates of its ``log_prob``."""
        return self.plates | self.implicit


@dataclass(frozen=True)
class Index:
    """One particle index: :math:`k_i`."""

    symbol: str
    sites: tuple[str, ...]  # random sites that share it
    plates: Ordinal  # in which it is another for each element
    support: int | None = None  # number of values, if summed over its whole support
    num_samples: int = 1  # K, the number of particles where it is sampled

    @property
    def enumerated(self) -> bool:
        """Whether the index runs over the support of a site, not over particles."""
        return self.support is not None

    @property
    def size(self) -> int:
        """The number of particles, or of values."""
        return self.support or self.num_samples


@dataclass(frozen=True)
class Structure:
    """The static structure of a model and its guide: k and pa(i) of (15)-(17)."""

    max_plate_nesting: int  # batch dims that any site has
    plates: Mapping[str, Plate]  # by symbol
    guide: Mapping[str, Site]
    model: Mapping[str, Site]
    origins: Mapping[str, Origin]  # of the model's latent sites, in order
    indices: tuple[Index, ...]
    guide_factors: tuple[str, ...]  # pyro.factor in the guide: belongs to the proposal
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # site -> plates it shares

    @property
    def shared_dim(self) -> int:
        """The batch dim in which particles are drawn."""
        return -1 - self.max_plate_nesting

    @cached_property
    def index_of(self) -> dict[str, Index]:
        """The index of each random site that has one."""
        return {site: index for index in self.indices for site in index.sites}

    @cached_property
    def by_symbol(self) -> dict[str, Index]:
        """The indices by their symbols."""
        return {index.symbol: index for index in self.indices}

    @cached_property
    def plates_of_indices(self) -> Ordinal:
        """The plates that hold an index."""
        return frozenset[str]().union(*(index.plates for index in self.indices))

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """The model's sites whose values the guide computes from others."""
        return tuple(name for name, origin in self.origins.items() if origin == "guide_delta")

    @cached_property
    def random(self) -> dict[str, Site]:
        """The statement that each random site with an index is drawn from."""
        return {name: self.proposal_site(name) for name in self.index_of}

    @cached_property
    def obstacle(self) -> Obstacle | None:
        """Why the programs can only be run once for each particle; None if they need not be."""
        sites = (*self.guide.values(), *self.model.values())
        return next((site.obstacle for site in sites if site.obstacle is not None), None)

    @cached_property
    def latent_shapes(self) -> dict[str, torch.Size]:
        """The shapes of the values of the model's latent sites."""
        return {name: self.model[name].shape for name in self.origins}

    def proposal_site(self, name: str) -> Site:
        """Return the statement that a random site is drawn from: the guide's or the model's."""
        in_guide = name in self.guide and self.origins.get(name) != "prior"
        return self.guide[name] if in_guide else self.model[name]

    @cached_property
    def undeclared(self) -> dict[str, torch.Size]:
        """The model's sites with dims above size one that count as event dims, and shapes."""

        def counts(site: Site) -> bool:
            dims = site.undeclared if site.name in self.origins else self.summed_dims(site)
            return any(site.batch_shape[dim] > 1 for dim in dims)

        return {
            name: site.batch_shape
            for name, site in self.model.items()
            if not site.silent and counts(site)
        }

    @cached_property
    def num_particles(self) -> dict[str, int]:
        """The number of particles, or of values, of each index by symbol."""
        return {index.symbol: index.size for index in self.indices}

    def with_num_samples(self, number: int) -> "Structure":
        """Give all indices that are sampled the same number of particles."""
        indices = tuple(replace(index, num_samples=number) for index in self.indices)
        return replace(self, indices=indices)

    @cached_property
    def num_draws(self) -> dict[str, int]:
        """
        Of how many draws of each index by symbol its particles are K, chosen at random.

        Of as many as there are of any index that its proposals read. A particle's density is then
        a mixture over all particles of these, so that no weight is above the number of draws.
        """
        draws = {index.symbol: index.num_samples for index in self.indices}
        parents = {index.symbol: self._proposed_from(index) for index in self.indices}
        while True:
            more = {s: max(draws[other] for other in (s, *parents[s])) for s in draws}
            if more == draws:
                return draws
            draws = more

    def _proposed_from(self, index: Index) -> Ordinal:
        """Return the symbols of the indices that the proposals of an index read."""
        reads = {name for site in index.sites for name in self.proposal_site(site).reads}
        return frozenset(self.index_of[name].symbol for name in reads if name in self.index_of)

    def scale_of(self, plates: Ordinal) -> float:
        """Return what the product over some plates is multiplied by, in log space."""
        return math.prod(self.plates[symbol].scale for symbol in plates)

    def elements(self, site: Site) -> int:
        """Return the number of elements, of events too, that one particle's log_prob comes from."""
        plates = math.prod(self.plates[symbol].size for symbol in site.plates)
        undeclared = math.prod(site.batch_shape[dim] for dim in site.undeclared)
        return plates * undeclared * site.event_size

    @cached_property
    def densities(self) -> tuple[tuple[Site, int, Ordinal], ...]:
        """The model's sites, each with its number of elements and the indices that it reads."""
        return tuple((s, self.elements(s), self.indices_read(s)) for s in self.model.values())

    def summed_dims(self, site: Site) -> list[int]:
        """Return the batch dims of a site that its ``log_prob`` is to be summed over."""
        implicit = {self.plates[symbol].dim for symbol in site.implicit}
        return [dim for dim in site.undeclared if dim not in implicit]

    def indices_read(self, site: Site) -> Ordinal:
        """Return the symbols of the indices that a site depends on, that of its value included."""
        index_of = self.index_of
        names = site.reads | {site.name}
        return frozenset(index_of[name].symbol for name in names if name in index_of)

    def named(self, symbols: Ordinal) -> set[str]:
        """Return the model's sites whose particles have some indices, to name them in messages."""
        drawn = {site for symbol in symbols for site in self.by_symbol[symbol].sites}
        computed = {name for name in self.carried if self.indices_read(self.guide[name]) & symbols}
        return {site for site in drawn if site in self.model} | computed or drawn

    def sharing(self, symbols: Ordinal, plates: Ordinal) -> "Structure":
        """
        Let indices be the same for all elements of some plates.

        An index over a whole support becomes one of particles: the sum over all joint values of a
        plate's elements would be exponential in their number.
        """
        indices, origins, shared = [], dict(self.origins), dict(self.shared)
        for index in self.indices:
            if index.symbol in symbols and index.plates & plates:
                names = {self.plates[symbol].name for symbol in index.plates & plates}
                for site in index.sites:
                    shared[site] = tuple(sorted({*shared.get(site, ()), *names}))
                    if index.enumerated:
                        origins[site] = "guide" if site in self.guide else "prior"
                index = replace(index, plates=index.plates - plates, support=None)
            indices.append(index)
        return replace(self, indices=tuple(indices), origins=origins, shared=shared)

    def detour(self, sites: Iterable[str]) -> str | None:
        """
        Return a site outside of a group through which its members depend on each other.

        Such a group cannot share a particle index: one member would be proposed given a site that
        is itself proposed given another member.
        """
        group = set(sites)
        reads = {name for member in group for name in self.proposal_site(member).reads}
        pending, seen = sorted(reads - group), set[str]()
        while pending:
            name = pending.pop()
            if name in seen or name not in {**self.guide, **self.model}:
                continue
            seen.add(name)
            through = self.proposal_site(name).reads
            if through & group:
                return name
            pending += through
        return None

    def merging(self, one: Index, other: Index) -> "Structure":
        """Let two indices of the same plates be one, with the larger number of particles."""
        number = max(one.num_samples, other.num_samples)
        merged = replace(one, sites=(*one.sites, *other.sites), num_samples=number)
        indices = [merged if index is one else index for index in self.indices if index != other]
        return replace(self, indices=tuple(indices))


def levels_of(structure: Structure, sizes: Mapping[str, int]) -> list[list[str]]:
    """
    Put indices on the levels of a mapped run; two that are read together get different levels.

    Each level costs time at every operation, so indices share them if they have equal numbers of
    particles. Few indices have a level each: what a result is mapped at then says for certain what
    it reads.

    :param sizes: numbers of particles by symbol.
    """
    symbols = [index.symbol for index in structure.indices]
    if len(symbols) <= UNIQUE_LEVELS:
        return [[symbol] for symbol in symbols]
    conflicts: dict[str, set[str]] = {symbol: set() for symbol in symbols}
    for site in (*structure.model.values(), *structure.guide.values()):
        read = structure.indices_read(site)
        for symbol in read:
            conflicts[symbol] |= read
    levels: list[list[str]] = []
    level_of: dict[str, int] = {}
    for symbol in symbols:
        taken = {level_of[other] for other in conflicts[symbol] if other in level_of}
        for number, level in enumerate(levels):
            if number not in taken and sizes[level[0]] == sizes[symbol]:
                break
        else:
            number = len(levels)
            levels.append([])
        levels[number].append(symbol)
        level_of[symbol] = number
    return levels


UNIQUE_LEVELS = 4  # up to this many indices have a level each
