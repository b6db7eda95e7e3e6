# SPDX-License-Identifier: Apache-2.0
r"""
Massively parallel importance sampling by brute force, for programs that see single values.

As :mod:`oracles`, whose notation this has, but nothing is vectorised: model and guide run once for
each combination, with one value of each site, so a program may be written in any way that runs in
plain Pyro. Nothing here is shared with the package.

An **index** belongs to a random site, or to all of a group; a **cell** is an index at one element
of the index's plates; a **combination** is one particle number for each cell. The plates of an
index are those that model and guide have in common for its sites, without those that its elements
share. :math:`Q` of a cell is the mixture over the particles :math:`j` of all other sites, the same
:math:`j` of each. Sites that the guide gives a ``Delta`` are computed by the guide at each
combination, and their ``log_density`` counts as the proposal's.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Program = Callable[..., object]
Values = dict[str, Tensor]
Sites = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class OneIndex:
    """A particle index: its sites, and the plates with a number for each element: dim -> size."""

    sites: tuple[str, ...]
    plates: Mapping[int, int]
    size: int
    enumerated: bool

    @property
    def elements(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(size) for size in self.plates.values())))

    def numbers(self, chosen: Sequence[int], batch_shape: Sequence[int]) -> Tensor:
        """Lay the numbers of all cells out over a batch shape."""
        dims = max([len(batch_shape), *(-dim for dim in self.plates)])
        shape = [self.plates.get(dim, 1) for dim in range(-dims, 0)]
        order = sorted(self.plates)
        grid = torch.tensor(chosen).reshape([self.plates[dim] for dim in self.plates])
        grid = grid.permute([list(self.plates).index(dim) for dim in order]).reshape(shape)
        grid = grid.reshape(shape[dims - len(batch_shape) :])
        return grid.expand(tuple(batch_shape))


@dataclass
class Singles:
    """
    A model, a guide, and the particles of one run.

    :ivar drawn: for every random site its draws, ``(draws, *shape)``: its K particles by default.
    :ivar particles: those of them that are particles, ``(K, *shape)``, of sites where not all are.
    :ivar num_draws: how many draws the mixture of a site is over, where more than its particles.
    :ivar supports: for every site that is summed over its support its values, likewise.
    :ivar shared: plates, by name, that the elements of a site share an index in.
    """

    model: Program
    guide: Program | None
    drawn: Values
    supports: Values = field(default_factory=dict)
    shared: Mapping[str, Sequence[str]] = field(default_factory=dict)
    groups: Sequence[Sequence[str]] = ()
    args: tuple[object, ...] = ()
    particles: Values = field(default_factory=dict)
    num_draws: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = {name: value[0] for name, value in self.drawn.items()}
        self.guide_sites = self.run_guide(first)
        self.model_sites = self.run_model(first, self.guide_sites)
        self.latents = [name for name, site in self.model_sites.items() if is_latent(site)]
        self.carried = [
            name for name in self.latents if name in self.guide_sites and self._is_delta(name)
        ]
        self.particles = {**self.drawn, **self.particles}
        self.num_particles = len(next(iter(self.drawn.values()))) if self.drawn else 1
        self.unread = self._unread()
        computed = set().union(*self._carriers(first).values())  # the guide computes others of it
        self.left_out = {
            name
            for name in self.unread.keys() & self.guide_sites.keys()
            if name not in {*self.carried, *computed}
            and not self._is_marked(name)
            and self.guide_sites[name]["fn"].batch_shape == self.model_sites[name]["fn"].batch_shape
        }
        self.indices = self._indices(first)
        self.index_of = {name: index for index in self.indices for name in index.sites}

    # Plain runs.

    def run_guide(self, values: Values) -> Sites:
        return sites_at(self.guide, values, self.args) if self.guide is not None else {}

    def run_model(self, values: Values, guide_sites: Sites) -> Sites:
        """Run the model, with the values that the guide gives to its Delta sites."""
        given = dict(values)
        for name, site in guide_sites.items():
            if is_latent(site) and is_delta(site["fn"]):
                given[name] = site["value"]
        shapes = getattr(self, "model_sites", {})
        for name, value in given.items():  # the guide's may have more dims of size one
            if name in shapes and value.shape != shapes[name]["value"].shape:
                given[name] = value.reshape(shapes[name]["value"].shape)
        return sites_at(self.model, given, self.args)

    # Structure.

    def _is_delta(self, name: str) -> bool:
        return is_delta(self.guide_sites[name]["fn"])

    def _random(self) -> list[str]:
        in_guide = [
            name
            for name, site in self.guide_sites.items()
            if is_latent(site) and not self._is_delta(name)
        ]
        in_model = [
            name
            for name in self.latents
            if name not in self.guide_sites and not is_delta(self.model_sites[name]["fn"])
        ]
        return in_guide + in_model

    def proposal_site(self, name: str) -> dict[str, Any]:
        return self.guide_sites[name] if name in self.guide_sites else self.model_sites[name]

    def _carriers(self, first: Values) -> dict[str, set[str]]:
        """Find, by changing one random site after the other, what each Delta is computed from."""
        result: dict[str, set[str]] = {name: set() for name in self.carried}
        for source in self._random():
            if source not in self.guide_sites:
                continue
            fn = self.guide_sites[source]["fn"]
            others = list(self.drawn[source][1:])
            if fn.has_enumerate_support:  # particles may all be the same
                others += list(fn.enumerate_support(expand=True))
            for value in others:
                changed = self.run_guide({**first, source: value})
                for name in self.carried:
                    before, after = self.guide_sites[name], changed[name]
                    same = torch.equal(before["value"], after["value"])
                    if not same or not torch.equal(log_prob_of(before), log_prob_of(after)):
                        result[name].add(source)
        return result

    def _plates(self, name: str, carriers: Mapping[str, set[str]]) -> set[tuple[str, int, int]]:
        """Return name, dim and size of the plates that a site has in guide and model."""
        sites = [p[name] for p in (self.guide_sites, self.model_sites) if name in p]
        for carried, sources in carriers.items():
            if name in sources:
                sites += [self.guide_sites[carried], self.model_sites[carried]]
        frames = [
            {(f.name, f.dim, f.size) for f in site["cond_indep_stack"] if f.vectorized}
            for site in sites
        ]
        return {
            (plate, dim, size)
            for plate, dim, size in set.intersection(*frames)
            if plate not in self.shared.get(name, ()) and size > 1
        }

    def _indices(self, first: Values) -> list[OneIndex]:
        carriers = self._carriers(first)
        needed = set(self.latents).union(*carriers.values()) if carriers else set(self.latents)
        names = [name for name in self._random() if name in needed]
        groups = [
            {source for name in group for source in carriers.get(name, {name})}
            for group in self.groups
        ]
        indices: list[OneIndex] = []
        done: set[str] = set()
        for name in names:
            if name in done:
                continue
            group = next((group for group in groups if name in group), {name})
            sites = tuple(member for member in names if member in group)
            done |= set(sites)
            common = set.intersection(*(self._plates(site, carriers) for site in sites))
            plates = {dim: size for _, dim, size in sorted(common, key=lambda plate: plate[1])}
            enumerated = name in self.supports
            size = len(self.supports[name] if enumerated else self.particles[name])
            indices.append(OneIndex(sites, plates, size, enumerated))
        return indices

    # Proposals.

    def log_mixtures(self, index: OneIndex) -> Tensor:
        """Log Q of an index at its own particles: (K, cell)."""
        rows = []
        num_draws = self.num_draws.get(index.sites[0], index.size)
        for k in range(index.size):
            columns = []
            for j in range(num_draws):
                values = {name: value[j] for name, value in self.drawn.items()}
                if len(index.sites) > 1:
                    values |= {name: self.particles[name][k] for name in index.sites}
                guide_sites = self.run_guide(values)
                model_sites = self.run_model(values, guide_sites)
                total = torch.zeros(len(index.elements))
                for name in index.sites:
                    value = self.particles[name][k]
                    site = guide_sites.get(name) or model_sites[name]
                    log_prob = unmasked(site["fn"], value)
                    log_prob = torch.where(inside(site["fn"], value), log_prob, -math.inf)
                    if name in self.left_out:
                        log_prob = torch.where(self.unread[name], 0.0, log_prob)
                    total = total + self._by_cell(index, name, log_prob)
                columns.append(total)
            rows.append(torch.stack(columns).logsumexp(0) - math.log(num_draws))
        return torch.stack(rows)

    def _by_cell(self, index: OneIndex, name: str, log_prob: Tensor) -> Tensor:
        """Sum a site's log_prob over all elements of each cell of an index."""
        batch_shape = self.proposal_site(name)["fn"].batch_shape
        cells = index.numbers(range(len(index.elements)), batch_shape)
        log_prob = log_prob.expand(batch_shape)
        zeros = log_prob.new_zeros(len(index.elements))
        return zeros.index_add(0, cells.reshape(-1), log_prob.reshape(-1))

    # Combinations.

    def combinations(self) -> list[tuple[int, ...]]:
        ranges = [range(index.size) for index in self.indices for _ in index.elements]
        return list(itertools.product(*ranges))

    def split(self, combination: Sequence[int]) -> list[Sequence[int]]:
        """Split a combination into the numbers of each index."""
        result, start = [], 0
        for index in self.indices:
            end = start + len(index.elements)
            result.append(combination[start:end])
            start = end
        return result

    def values_at(self, combination: Sequence[int]) -> Values:
        values = {}
        for index, chosen in zip(self.indices, self.split(combination), strict=True):
            for name in index.sites:
                particles = (self.supports if index.enumerated else self.particles)[name]
                batch = self.proposal_site(name)["fn"].batch_shape
                numbers = index.numbers(chosen, batch)
                event_dim = particles.dim() - 1 - len(batch)
                numbers = numbers.reshape((1, *numbers.shape, *(1,) * event_dim))
                values[name] = torch.take_along_dim(particles, numbers, 0)[0]
        return values

    def log_ratio(self, values: Values) -> tuple[Tensor, Values]:
        """Return the joint density over the Deltas' ones, and the values of all latents."""
        for name in self.drawn:
            values.setdefault(name, self.drawn[name][0])  # has no index: nothing reads it
        guide_sites = self.run_guide(values)
        sites = self.run_model(values, guide_sites)
        total = torch.zeros(())
        densities = [
            self._masked(name, site) if name in self.unread else log_prob_of(site)
            for name, site in sites.items()
            if not self._is_silent(site)
        ]
        if any(bool(density == -math.inf) for density in densities):  # others may be nan there
            densities = [torch.tensor(-math.inf)]
        total = sum(densities, total)
        for name in self.carried:
            total = total - unmasked(guide_sites[name]["fn"], guide_sites[name]["value"]).sum()
        return total, {name: sites[name]["value"] for name in self.latents}

    def _masked(self, name: str, site: dict[str, Any]) -> Tensor:
        """Density of a masked latent: flat where it is read, as drawn where it is the model's."""
        log_prob = scale_and_mask(unmasked(site["fn"], site["value"]), site["scale"])
        possible = inside(site["fn"], site["value"])
        log_prob = torch.where(possible, log_prob, -math.inf)
        keep, hidden = mask_of(site), torch.where(possible, 0.0, -math.inf)
        if name in self.left_out:
            hidden = torch.where(self.unread[name], 0.0, hidden)
        else:
            keep = keep | self.unread[name]
        return torch.where(keep, log_prob, hidden).sum()

    def _unread(self) -> dict[str, Tensor]:
        """Find where latents are masked and nothing that counts reads them: one by one."""
        result = {}
        for name in self.latents:
            site = self.model_sites[name]
            if self._is_silent(site) or bool(mask_of(site).all()):
                continue
            result[name] = ~mask_of(site)
            own = mask_of({**site, "mask": None})
            if self._is_marked(name):  # as if no handler masked it
                result[name] = own.clone()
            for element in (~(own if self._is_marked(name) else mask_of(site))).nonzero():
                place = tuple(element.tolist())
                result[name][place] = not self._is_read(name, place)
        return result

    def _is_read(self, name: str, place: tuple[int, ...]) -> bool:
        """Whether any density but a site's own changes with one element, at any particle."""
        for values in ({n: v[k] for n, v in self.drawn.items()} for k in range(self.num_particles)):
            before = self.run_model(values, self.run_guide(values))
            known = {n: before[n]["value"] for n in self.latents}
            fn = before[name]["fn"]
            event = known[name][place]  # of its elements, each changes by another number
            steps = torch.arange(1.0, event.numel() + 1).reshape(event.shape)
            others = [event + size * steps for size in (1.0, -1.0, 0.2, -0.2, 2.5, -2.5)]
            if fn.has_enumerate_support:
                with suppress(NotImplementedError):  # counts that differ between elements
                    support = [value[place] for value in fn.enumerate_support(expand=True)]
                    others = support if len(support) > 1 else others
            for other in others:
                changed = known[name].clone()
                changed[place] = other
                free = {n: v for n, v in known.items() if not self._is_silent(before[n])}
                after = sites_at(self.model, {**free, name: changed}, self.args)
                for one, site in before.items():
                    if one != name and not self._is_silent(site):
                        densities = self._counted(one, site), self._counted(one, after[one])
                        if not torch.allclose(*densities, rtol=0.0, atol=0.0, equal_nan=True):
                            return True
        return False

    def _counted(self, name: str, site: dict[str, Any]) -> Tensor:
        """Density of each element of a site, with the masks that count."""
        return log_probs_of({**site, "mask": None} if self._is_marked(name) else site)

    def _is_marked(self, name: str) -> bool:
        """Whether a latent is to be summed: also if its plate shares an index, and it is drawn."""
        sites = self.model_sites.get(name), self.guide_sites.get(name)
        return any(site["infer"].get("enumerate") for site in sites if site is not None)

    @staticmethod
    def _is_silent(site: dict[str, Any]) -> bool:
        return is_latent(site) and is_delta(site["fn"])


@dataclass
class Exact:
    """The sum over all combinations: (18) and (25)."""

    problem: Singles
    log_evidence: Tensor
    probs: Tensor  # (combination,)
    choices: Tensor  # (combination, cell)
    values: Values  # of all latents, carried ones too: (combination, *shape)

    def weights(self, name: str) -> Tensor:
        """Weights of a site's particles: (cell of its index, size)."""
        problem = self.problem
        position = problem.indices.index(problem.index_of[name])
        start = sum(len(index.elements) for index in problem.indices[:position])
        index = problem.indices[position]
        columns = self.choices[:, start : start + len(index.elements)]
        rows = [
            self.probs.new_zeros(index.size).index_add(0, column, self.probs)
            for column in columns.unbind(1)
        ]
        return torch.stack(rows)

    def mean(self, values: Tensor) -> Tensor:
        """Posterior mean of values at each combination."""
        flat = values.reshape(len(values), -1).to(self.probs.dtype)
        return (self.probs @ flat).reshape(values.shape[1:])


@torch.no_grad()
def exact(problem: Singles) -> Exact:
    """Run the programs at every combination and add up."""
    with pyro.validation_enabled(False):
        log_mixtures = {
            number: problem.log_mixtures(index)
            for number, index in enumerate(problem.indices)
            if not index.enumerated
        }
        combinations = problem.combinations()
        log_ratios, rows = [], []
        for combination in combinations:
            log_ratio, values = problem.log_ratio(problem.values_at(combination))
            for number, chosen in enumerate(problem.split(combination)):
                if number in log_mixtures:
                    for cell, k in enumerate(chosen):
                        log_ratio = log_ratio - log_mixtures[number][k, cell]
            log_ratios.append(log_ratio)
            rows.append(values)
    log_ratio = torch.stack(log_ratios)
    log_total = log_ratio.logsumexp(0)
    log_sizes = sum(
        len(index.elements) * math.log(index.size)
        for index in problem.indices
        if not index.enumerated
    )
    values = {name: torch.stack([row[name] for row in rows]) for name in problem.latents}
    return Exact(
        problem,
        log_total - log_sizes,
        (log_ratio - log_total).exp(),
        torch.tensor(combinations).reshape(len(combinations), -1),
        values,
    )


def is_latent(site: dict[str, Any]) -> bool:
    return not site["is_observed"]


def is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def unmasked(fn: Any, value: Tensor) -> Tensor:
    """Log density without the masks of ``.mask()``, at the top or under ``.to_event()``."""
    event_dims = 0
    while isinstance(fn, dist.MaskedDistribution | dist.Independent):
        event_dims += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    log_prob = in_table(fn, value)
    return log_prob.sum(tuple(range(-event_dims, 0))) if event_dims else log_prob


def in_table(fn: Any, value: Tensor) -> Tensor:
    """Log density; a Categorical cannot look up what is not in its table, which inside() sees."""
    while isinstance(fn, ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, dist.Categorical):
        value = value.clamp(0, fn.logits.shape[-1] - 1)
    log_prob: Tensor = fn.log_prob(value)
    return log_prob


def inside(fn: Any, value: Tensor) -> Tensor:
    """Where a value lies in the support, over the batch shape; everywhere if there is no saying."""
    if type(fn) is dist.TransformedDistribution and not fn.event_shape:
        for transform in reversed(fn.transforms):  # an affine one says "anywhere" of itself
            value = transform.inv(value)
        return inside(fn.base_dist, value)
    if type(fn) in (dist.MaskedDistribution, ExpandedDistribution):
        return inside(fn.base_dist, value)
    try:
        check: Tensor = fn.support.check(value)
    except NotImplementedError:
        return torch.tensor(True)
    dims = check.dim() - len(fn.batch_shape)  # of some constraints the dims of the event
    return check.flatten(-dims).all(-1) if dims > 0 else check


def mask_of(site: dict[str, Any]) -> Tensor:
    """Where a site counts, over its batch shape; masks within an event have to be of all of it."""
    fn, keep = site["fn"], torch.as_tensor(True if site["mask"] is None else site["mask"])
    dims = 0
    while isinstance(fn, dist.MaskedDistribution | dist.Independent):
        if isinstance(fn, dist.MaskedDistribution):
            mask = torch.as_tensor(fn._mask).expand(fn.batch_shape)
            assert not dims or bool(
                (
                    mask == mask.flatten(-dims)[..., :1].reshape((*mask.shape[:-dims], *[1] * dims))
                ).all()
            )
            keep = keep & (mask.flatten(-dims)[..., 0] if dims else mask)
        dims += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    return keep.expand(site["fn"].batch_shape)


def log_prob_of(site: dict[str, Any]) -> Tensor:
    """Log density of a site as its program counts it: zero outside of the support."""
    return log_probs_of(site).sum()


def log_probs_of(site: dict[str, Any]) -> Tensor:
    """Log density of each element."""
    log_prob = in_table(site["fn"], site["value"])
    shown = inside(site["fn"], site["value"]) | ~mask_of(site)
    log_prob = torch.where(shown, log_prob, -math.inf)
    return torch.as_tensor(scale_and_mask(log_prob, site["scale"], site["mask"]))


def sites_at(program: Program, values: Mapping[str, Tensor], args: tuple[object, ...]) -> Sites:
    """Run a program plainly at values of its latent sites; the record of each sample site."""
    trace = poutine.trace(poutine.condition(program, data=dict(values))).get_trace(*args)
    return {
        name: dict(node, is_observed=node["is_observed"] and name not in values)
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }
