# SPDX-License-Identifier: Apache-2.0
r"""
Massively parallel importance sampling by brute force: the sum over all choices, written out.

Nothing here is shared with the package. A *unit* is a site, or a group of sites, that has one
particle index; a *cell* is a unit at one plate element; a *choice* is one particle for every cell.
For the particles :math:`z` of a run, as ``posterior.marginals()`` has them, and each choice
:math:`k` (the numbers are the equations of Bowyer, Heap and Aitchison, 2024),

.. math::
    \log r_k(z) &= \log p(x, z^k) - \sum_{\mathrm{cells}\ c} \log Q_c(z_c^{k_c}) \quad (19) \\
    Q_c(z) &= \frac{1}{K} \sum_{j=1}^K q(z \mid \text{sites outside the unit at particle } j) \\
    P(z) &= K^{-n} \sum_k r_k(z) \quad (18) \\
    P_z(k) &= r_k(z) \Big/ \sum_{k'} r_{k'}(z) \quad (25)

:math:`Q` comes from a plain run of the guide (of the model, for sites that the guide lacks) with
every site set to particle :math:`j`, one :math:`j` at a time. Sites that the model marks for
parallel enumeration take every value of their support, with neither :math:`Q` nor :math:`1/K`.
A unit that **shares** a plate has one particle for all of the plate's elements: one cell for all of
them, whose :math:`Q_c` is the density of the elements together.

All choices are laid out in one batch dim left of the plates, where the model's joint density is
evaluated for all of them at once; a few of them are compared with a plain run of the model. A model
that is written for single values runs once for each choice.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Program = Callable[..., object]
Element = tuple[int, ...]  # an index into a batch shape: one plate element


@dataclass(frozen=True)
class Unit:
    """Sites that share one particle index."""

    sites: tuple[str, ...]
    batch_shape: Element
    index_shape: Element  # the batch shape, but one in the dims of plates that share the particle
    num_particles: int
    enumerated: bool

    def all_of(self, element: Element) -> tuple[int | slice, ...]:
        """The part of a batch shape that is one element of the index shape."""
        sizes = zip(element, self.batch_shape, self.index_shape, strict=True)
        return tuple(slice(None) if size != ours else e for e, size, ours in sizes)


@dataclass
class Problem:
    """
    A model, a guide and the particles of one run.

    :ivar model: a program that is vectorised over batch dims left of its plates.
    :ivar guide: the proposal; ``None`` for the prior.
    :ivar particles: for every latent site of the model ``batch_shape + (K,) + event_shape``.
    :ivar groups: groups of sites that share one particle index.
    :ivar shared: by site, the names of the plates whose elements share its particle index.
    :ivar single_values: whether the model takes single values only, without any batch dim.
    """

    model: Program
    guide: Program | None
    particles: dict[str, Tensor]
    args: tuple[object, ...] = ()
    groups: Sequence[Sequence[str]] = ()
    shared: Mapping[str, Sequence[str]] = field(default_factory=dict)
    single_values: bool = False
    plates: dict[str, frozenset[str]] = field(init=False)
    units: list[Unit] = field(init=False)
    cells: list[tuple[Unit, Element]] = field(init=False)
    choices: Tensor = field(init=False)  # (choice, cell): the particle of the cell
    values: dict[str, Tensor] = field(init=False)  # choice + batch_shape + event_shape
    _runs: dict[tuple[int, Unit | None, int], list[dict[str, dict[str, Any]]]] = field(init=False)

    def __post_init__(self) -> None:
        sites = _sites(self.model, {}, self.args)
        self.plates = {
            name: frozenset(f.name for f in sites[name]["cond_indep_stack"] if f.vectorized)
            for name in self.particles
        }
        self.units = _find_units(self)
        self._runs = {}
        self.cells = [(unit, e) for unit in self.units for e in elements(unit.index_shape)]
        ranges = [range(unit.num_particles) for unit, _ in self.cells]
        rows = list(itertools.product(*ranges))
        self.choices = torch.tensor(rows, dtype=torch.long).reshape(len(rows), len(self.cells))
        self.values = {name: self._lay_out(name) for unit in self.units for name in unit.sites}

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if name in unit.sites)

    def column(self, unit: Unit, element: Element) -> int:
        return self.cells.index((unit, element))

    def particle(self, name: str, k: int) -> Tensor:
        """Particle ``k`` of a site at all plate elements: batch_shape + event_shape."""
        return self.particles[name].select(len(self.unit(name).batch_shape), k)

    def at_particle(self, j: int, unit: Unit | None = None, k: int = 0) -> dict[str, Tensor]:
        """All sites at particle ``j``, those of ``unit`` at ``k``, enumerated ones at any."""
        result = {}
        for u in self.units:
            index = 0 if u.enumerated else k if u == unit else j
            result.update({name: self.particle(name, index) for name in u.sites})
        return result

    def component(self, unit: Unit, j: int) -> Tensor:
        """Log proposal density of a unit's particles, all else at ``j``: index_shape + (K,)."""
        columns = []
        for k in range(unit.num_particles):
            # A lone site's proposal does not depend on its own value; a member of a group may.
            runs = self._runs_at(j, unit, k if len(unit.sites) > 1 else j)
            values = self.at_particle(j, unit, k)
            log_probs = [_log_proposal(runs, name, values[name]) for name in unit.sites]
            log_prob = torch.stack(log_probs).sum(0).reshape(unit.batch_shape)
            columns.append(log_prob.sum_to_size(unit.index_shape))
        return torch.stack(columns, -1)

    def _runs_at(self, j: int, unit: Unit, k: int) -> list[dict[str, dict[str, Any]]]:
        """Run the guide, then the model, at ``at_particle``; remember what stands in the runs."""
        key = (j, unit if j != k else None, k)
        if key not in self._runs:
            programs = [self.model] if self.guide is None else [self.guide, self.model]
            values = self.at_particle(*key)
            self._runs[key] = [_sites(program, values, self.args) for program in programs]
        return self._runs[key]

    def _lay_out(self, name: str) -> Tensor:
        unit, particles = self.unit(name), self.particles[name]
        shape = unit.index_shape
        event_shape = particles.shape[len(unit.batch_shape) + 1 :]
        columns = [
            particles[element][self.choices[:, self.column(unit, restrict(element, shape))]]
            for element in elements(unit.batch_shape)
        ]
        return torch.stack(columns, 1).reshape(-1, *unit.batch_shape, *event_shape)


@dataclass(frozen=True)
class BruteForce:
    """
    A distribution over the choices of a problem.

    :ivar log_evidence: the log of equation (18).
    :ivar probs: equation (25), one for each row of ``problem.choices``.
    """

    problem: Problem
    log_evidence: Tensor
    probs: Tensor

    def weights(self, *sites: str) -> Tensor:
        """
        Probability of each combination of the particles of some sites.

        :return: batch shape of the deepest site + the number of combinations, the first site's
            particle slowest; sites of one group have one index between them.
        """
        problem = self.problem
        units = list(dict.fromkeys(problem.unit(name) for name in sites))
        batch_shape = torch.broadcast_shapes(*(unit.batch_shape for unit in units))
        size = math.prod(unit.num_particles for unit in units)
        result = self.probs.new_zeros((*batch_shape, size))
        for element in elements(batch_shape):
            combination = torch.zeros(len(problem.choices), dtype=torch.long)
            for unit in units:
                own = restrict(element, unit.batch_shape)
                column = problem.column(unit, restrict(own, unit.index_shape))
                combination = combination * unit.num_particles + problem.choices[:, column]
            result[element] = result[element].index_add(0, combination, self.probs)
        return result

    def support(self, *sites: str) -> dict[str, Tensor]:
        """Value of each site in each combination: batch_shape + (combinations,) + event_shape."""
        problem = self.problem
        units = list(dict.fromkeys(problem.unit(name) for name in sites))
        batch_shape = torch.broadcast_shapes(*(unit.batch_shape for unit in units))
        combinations = list(itertools.product(*(range(unit.num_particles) for unit in units)))
        result = {}
        for name in sites:
            unit = problem.unit(name)
            index = torch.tensor([row[units.index(unit)] for row in combinations])
            particles = problem.particles[name]
            event_shape = particles.shape[len(unit.batch_shape) + 1 :]
            value = particles.new_empty((*batch_shape, len(index), *event_shape))
            for element in elements(batch_shape):
                value[element] = particles[restrict(element, unit.batch_shape)][index]
            result[name] = value
        return result

    def moment(self, fn: Callable[..., Tensor], *sites: str) -> Tensor:
        """Posterior mean of a function of one value of each site, at every plate element."""
        weights, support = self.weights(*sites), self.support(*sites)
        means = []
        for element in elements(weights.shape[:-1]):
            terms = [
                weight * fn(*(support[name][element][i] for name in sites))
                for i, weight in enumerate(weights[element])
            ]
            means.append(torch.stack(terms).sum(0))
        return torch.stack(means).reshape(weights.shape[:-1] + means[0].shape)

    def frequencies(self, samples: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """
        Count joint samples by their value.

        :param samples: for every site a tensor (N, *batch_shape, *event_shape).
        :return: the number of samples of each joint value, and its probability. Particles of equal
            value are the same value.
        """
        problem = self.problem
        num_samples = len(next(iter(samples.values())))
        code = torch.zeros(len(problem.choices), dtype=torch.long)
        drawn = torch.zeros(num_samples, dtype=torch.long)
        for column, (unit, element) in enumerate(problem.cells):
            equal = torch.ones(unit.num_particles, unit.num_particles, dtype=torch.bool)
            match = torch.ones(num_samples, unit.num_particles, dtype=torch.bool)
            for name in unit.sites:
                part = (slice(None), *unit.all_of(element))
                points = problem.particles[name].movedim(len(element), 0)[part]
                points = points.reshape(unit.num_particles, 1, -1)
                draws = samples[name][part].reshape(num_samples, 1, -1)
                equal &= (points == points.transpose(0, 1)).all(-1)
                match &= (draws == points.transpose(0, 1)).all(-1)
            assert match.any(-1).all(), f"{unit.sites}{element}: a sample is none of the particles"
            first = equal.long().argmax(-1)  # particles of equal value have the same first
            code = code * unit.num_particles + first[problem.choices[:, column]]
            drawn = drawn * unit.num_particles + match.long().argmax(-1)
        names, index = torch.cat([code, drawn]).unique(return_inverse=True)
        probs = self.probs.new_zeros(len(names)).index_add(0, index[: len(code)], self.probs)
        counts = index[len(code) :].bincount(minlength=len(names))
        return counts, probs


@torch.no_grad()
def brute_force(problem: Problem) -> BruteForce:
    """Equations (18), (19) and (25) with the mixture proposal."""
    log_ratio = log_joint(problem, problem.model)
    for column, (unit, element) in enumerate(problem.cells):
        if not unit.enumerated:
            log_proposal = log_mixture(problem, unit)[element]
            log_ratio = log_ratio - log_proposal[problem.choices[:, column]]
    return normalise(problem, log_ratio)


def normalise(problem: Problem, log_ratio: Tensor) -> BruteForce:
    """Equations (18) and (25) from the log of (19) at every choice."""
    log_total = log_ratio.logsumexp(0)
    log_num_choices = sum(math.log(u.num_particles) for u, _ in problem.cells if not u.enumerated)
    return BruteForce(problem, log_total - log_num_choices, (log_ratio - log_total).exp())


@torch.no_grad()
def log_joint(problem: Problem, program: Program) -> Tensor:
    """Log of a program's joint density at every choice."""
    guided = _sites(problem.guide, {}, problem.args) if problem.guide is not None else {}
    own = problem.values.keys() - guided.keys()

    def alone(row: int) -> Tensor:
        single = {name: value[row] for name, value in problem.values.items()}
        log_probs = _log_probs(program, single, problem.args, own)
        return torch.stack([p.sum() for p in log_probs]).sum()

    if problem.single_values:
        return torch.stack([alone(row) for row in range(len(problem.choices))])
    sites = _sites(program, {}, problem.args).values()
    num_dims = max(
        [len(site["fn"].batch_shape) for site in sites]
        + [-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
        + [0]
    )
    num_choices = len(problem.choices)
    values = {}
    for name, value in problem.values.items():
        ones = (1,) * (num_dims - len(problem.unit(name).batch_shape))
        values[name] = value.reshape(num_choices, *ones, *value.shape[1:])
    result = torch.zeros(num_choices)
    for log_prob in _log_probs(program, values, problem.args, own):
        if log_prob.dim() > num_dims:
            assert len(log_prob) == num_choices
            result = result + log_prob.reshape(num_choices, -1).sum(-1)
        else:
            result = result + log_prob.sum()
    for row in {0, num_choices // 3, num_choices - 1}:
        torch.testing.assert_close(result[row], alone(row))
    return result


def log_mixture(problem: Problem, unit: Unit) -> Tensor:
    """Log of the mixture proposal density of a unit at its own particles: index_shape + (K,)."""
    components = [problem.component(unit, j) for j in range(unit.num_particles)]
    return torch.stack(components).logsumexp(0) - math.log(len(components))


def elements(batch_shape: Sequence[int]) -> Iterator[Element]:
    """Every index into a batch shape; one empty index if it is empty."""
    return itertools.product(*(range(size) for size in batch_shape))


def restrict(element: Element, batch_shape: Sequence[int]) -> Element:
    """Find the element of a smaller batch shape that a broadcast element comes from."""
    rightmost = element[len(element) - len(batch_shape) :]
    return tuple(0 if size == 1 else i for i, size in zip(rightmost, batch_shape, strict=True))


def _find_units(problem: Problem) -> list[Unit]:
    sites = _sites(problem.model, {}, problem.args)
    latent = [name for name, site in sites.items() if not site["is_observed"]]
    assert set(latent) == set(problem.particles), (latent, list(problem.particles))
    guided = _sites(problem.guide, {}, problem.args) if problem.guide is not None else {}
    units = []
    for name in latent:
        members = next((tuple(group) for group in problem.groups if name in group), (name,))
        if name != members[0]:
            continue
        fn = sites[name]["fn"]
        batch_shape = tuple(getattr(fn, "batch_shape", ()))
        shapes = [getattr(sites[member]["fn"], "batch_shape", ()) for member in members]
        assert all(tuple(shape) == batch_shape for shape in shapes)
        enumerated = sites[name]["infer"].get("enumerate") == "parallel" and name not in guided
        size = problem.particles[name].shape[len(batch_shape)]
        if enumerated:
            values = fn.enumerate_support(expand=True)  # (size, *batch_shape, *event_shape)
            values = values.movedim(0, len(batch_shape))
            torch.testing.assert_close(problem.particles[name], values)
        shared = {
            frame.dim
            for member in members
            for frame in sites[member]["cond_indep_stack"]
            if frame.name in problem.shared.get(member, ())
        }
        dims = range(-len(batch_shape), 0)
        index_shape = tuple(1 if dim in shared else batch_shape[dim] for dim in dims)
        units.append(Unit(members, batch_shape, index_shape, size, enumerated))
    return units


def _log_proposal(runs: list[dict[str, dict[str, Any]]], name: str, value: Tensor) -> Tensor:
    """
    Log density in the guide's distribution, or in the model's where the guide has none.

    What was drawn counts, masked or not. A scale is the model's.
    """
    site = next(run[name] for run in runs if name in run)
    return _unmasked_log_prob(site["fn"], value)


def _unmasked_log_prob(fn: Any, value: Tensor) -> Tensor:
    """Log density without the masks of ``.mask()``, at the top or under ``.to_event()``."""
    event_dims = 0
    while isinstance(fn, dist.MaskedDistribution | dist.Independent):
        event_dims += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    log_prob: Tensor = fn.log_prob(value)
    return log_prob.sum(tuple(range(-event_dims, 0))) if event_dims else log_prob


def _log_probs(
    program: Program, values: Mapping[str, Tensor], args: tuple[object, ...], own: Set[str]
) -> list[Tensor]:
    """Log densities of a program's sites; those of ``own``, which it draws itself, unmasked."""
    result = []
    for name, site in _sites(program, values, args).items():
        fn, value, scale = site["fn"], site["value"], site["scale"]
        if name in own:
            result.append(scale_and_mask(_unmasked_log_prob(fn, value), scale))
        else:
            result.append(scale_and_mask(fn.log_prob(value), scale, site["mask"]))
    return result


def _sites(
    program: Program, values: Mapping[str, Tensor], args: tuple[object, ...]
) -> dict[str, dict[str, Any]]:
    """Run a program at the given values; the record of each of its sample sites."""
    trace = poutine.trace(poutine.condition(program, data=dict(values))).get_trace(*args)
    return {
        name: dict(node)
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }
