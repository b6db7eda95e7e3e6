# SPDX-License-Identifier: Apache-2.0
"""
Small random models and guides, made from a seed, for comparison with brute force.

A program is a list of site specifications in the order of sampling. A site's location is an
intercept of its own for every plate element plus a nonlinear function of its parents, whose plates
are among its own. Every program is vectorised over batch dims left of its plates.
"""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.runtime import InferDict
from torch import Tensor

MAX_CHOICES = 20_000
MAX_ENUMERATED = 9  # joint values of one enumerated site
EVENT_SIZE = 2  # of vector sites
NUM_CATEGORIES = 3

CONTINUOUS = ("normal", "lognormal", "vector", "mvn")
DISCRETE = ("bernoulli", "categorical")
OBSERVED = ("normal", "vector", "bernoulli", "poisson")
EVENT_DIMS = {"vector": 1, "mvn": 1}
SUPPORT_SIZES = {"bernoulli": 2, "categorical": NUM_CATEGORIES}
GUIDES = ("prior", "factorised", "structured", "partial")
MOTIFS = ("chain", "fork", "collider", "random")

# Of every layout the plates' dims and the sets of plates, outermost first, that a site may be in.
LAYOUTS: dict[str, tuple[dict[str, int], list[tuple[str, ...]]]] = {
    "flat": ({}, [()]),
    "one": ({"outer": -1}, [(), ("outer",)]),
    "nested": ({"outer": -2, "inner": -1}, [(), ("outer",), ("outer", "inner")]),
    "inside out": ({"outer": -1, "inner": -2}, [(), ("outer",), ("outer", "inner")]),
    "siblings": ({"left": -1, "right": -1}, [(), ("left",), ("right",)]),
    "cousins": (
        {"outer": -2, "left": -1, "right": -1},
        [(), ("outer",), ("outer", "left"), ("outer", "right")],
    ),
}


@dataclass(frozen=True)
class Site:
    """A sample site; ``weights`` are of the parents, ``intercept`` is shaped as its batch."""

    name: str
    kind: str
    plates: tuple[str, ...]
    parents: tuple[str, ...]
    weights: tuple[float, ...]
    intercept: Tensor
    scale: float
    enumerated: bool = False
    obs: Tensor | None = None


@dataclass(frozen=True)
class RandomProgram:
    """A model or guide made from site specifications; call it to run it."""

    sites: tuple[Site, ...]
    dims: Mapping[str, int]
    sizes: Mapping[str, int]
    kinds: Mapping[str, str]

    def __call__(self) -> None:
        plates = {name: pyro.plate(name, self.sizes[name], dim=d) for name, d in self.dims.items()}
        values: dict[str, Tensor] = {}
        for site in self.sites:
            parents = [_scalar(self.kinds[name], values[name]) for name in site.parents]
            loc = site.intercept + sum(w * v for w, v in zip(site.weights, parents, strict=True))
            if len(parents) == 2:
                loc = loc + 0.5 * torch.tanh(parents[0] * parents[1])
            infer: InferDict = {"enumerate": "parallel"} if site.enumerated else {}
            with ExitStack() as stack:
                for name in site.plates:
                    stack.enter_context(plates[name])
                fn = _distribution(site.kind, loc, site.scale)
                values[site.name] = pyro.sample(site.name, fn, obs=site.obs, infer=infer)


@dataclass(frozen=True)
class Case:
    """A model with a proposal and the number of particles to draw."""

    model: RandomProgram
    guide: RandomProgram | None
    num_samples: int
    groups: list[tuple[str, ...]]

    @property
    def latent(self) -> tuple[Site, ...]:
        return tuple(site for site in self.model.sites if site.obs is None)

    @property
    def num_choices(self) -> int:
        sizes = {
            tuple(next((g for g in self.groups if s.name in g), (s.name,))): (
                SUPPORT_SIZES[s.kind] if s.enumerated else self.num_samples
            )
            ** s.intercept.numel()
            for s in self.latent
        }
        return math.prod(sizes.values())


def random_case(seed: int) -> Case:
    """
    Make a model, a guide and a number of particles, with at most ``MAX_CHOICES`` choices.

    The global random state is left alone.
    """
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        motif, guide_kind = MOTIFS[seed % 4], GUIDES[seed // 4 % 4]
        dims, plate_sets = LAYOUTS[rng.choice(list(LAYOUTS))]
        sizes = {name: rng.choice([1, 2, 2, 3]) for name in dims}
        latent = _random_latent(rng, motif, dims, sizes, plate_sets)
        observed = _random_observed(rng, motif, latent, dims, sizes, plate_sets)
        guided = _random_guide(rng, guide_kind, latent)
        latent = _enumerate_some(rng, latent, {site.name for site in guided})
        guided = _forget_enumerated(guided, latent)
        model = _observe(_program([*latent, *observed], dims, sizes))
        guide = _program(guided, dims, sizes) if guide_kind != "prior" else None
        groups = _random_groups(rng, latent, guided)
    cases = [Case(model, guide, K, groups) for K in (4, 3, 2, 1)]
    allowed = [case for case in cases if case.num_choices <= MAX_CHOICES]
    return rng.choice(allowed[:2] if rng.random() < 0.9 else allowed[-1:])


def _distribution(kind: str, loc: Tensor, scale: float) -> TorchDistributionMixin:
    offsets = torch.linspace(-0.4, 0.6, EVENT_SIZE)
    result: TorchDistributionMixin
    if kind == "normal":
        result = dist.Normal(loc, scale)
    elif kind == "lognormal":
        result = dist.LogNormal(0.5 * loc, scale)
    elif kind == "vector":
        result = dist.Normal(loc.unsqueeze(-1) + offsets, scale).to_event(1)
    elif kind == "mvn":
        scale_tril = scale * (torch.eye(EVENT_SIZE) + 0.5 * torch.ones(2, 2).tril(-1))
        result = dist.MultivariateNormal(loc.unsqueeze(-1) - offsets, scale_tril=scale_tril)
    elif kind == "bernoulli":
        result = dist.Bernoulli(logits=loc)
    elif kind == "categorical":
        slopes = torch.linspace(-1.0, 1.0, NUM_CATEGORIES)
        result = dist.Categorical(logits=loc.unsqueeze(-1) * slopes - 0.3 * slopes**2)
    elif kind == "poisson":
        result = dist.Poisson(torch.nn.functional.softplus(loc))
    else:
        raise AssertionError(kind)
    return result


def _scalar(kind: str, value: Tensor) -> Tensor:
    """Summarise a site's value for its children: a scalar for each batch element."""
    if kind == "lognormal":
        return value.log()
    if kind in EVENT_DIMS:
        return value[..., 0] - 0.5 * value[..., 1]
    return value.to(torch.get_default_dtype())


def _random_site(
    rng: random.Random,
    name: str,
    kind: str,
    plates: tuple[str, ...],
    parents: Sequence[str],
    dims: Mapping[str, int],
    sizes: Mapping[str, int],
) -> Site:
    batch_shape = [1] * max((-dims[plate] for plate in plates), default=0)
    for plate in plates:
        batch_shape[dims[plate]] = sizes[plate]
    weights = tuple(rng.choice([-1, 1]) * rng.uniform(0.5, 1.2) for _ in parents)
    intercept = 0.7 * torch.randn(batch_shape)
    return Site(name, kind, plates, tuple(parents), weights, intercept, rng.uniform(0.6, 1.3))


def _random_latent(
    rng: random.Random,
    motif: str,
    dims: Mapping[str, int],
    sizes: Mapping[str, int],
    plate_sets: list[tuple[str, ...]],
) -> list[Site]:
    result: list[Site] = []
    for name in "abcde"[: rng.choice([2, 3, 3, 4])]:
        plates = rng.choice(plate_sets)
        readable = [site.name for site in result if set(site.plates) <= set(plates)]
        parents: list[str] = []
        if motif == "chain":
            parents = readable[-1:]
        elif motif == "fork":
            parents = readable[:1]
        elif motif == "random":
            parents = rng.sample(readable, min(len(readable), rng.choice([0, 1, 2])))
        kind = rng.choice(CONTINUOUS + DISCRETE)
        result.append(_random_site(rng, name, kind, plates, parents, dims, sizes))
    return result


def _random_observed(
    rng: random.Random,
    motif: str,
    latent: list[Site],
    dims: Mapping[str, int],
    sizes: Mapping[str, int],
    plate_sets: list[tuple[str, ...]],
) -> list[Site]:
    result = []
    for i in range(rng.choice([1, 2, 3])):
        plates = plate_sets[-1] if i == 0 else rng.choice(plate_sets)
        readable = [site.name for site in latent if set(site.plates) <= set(plates)]
        num_parents = 2 if motif == "collider" else rng.choice([1, 2])
        # The last latent sites are the deepest in the graph, so prefer them.
        parents = rng.sample(readable[-3:], min(len(readable[-3:]), num_parents))
        kind = rng.choice(OBSERVED)
        result.append(_random_site(rng, f"x{i}", kind, plates, parents, dims, sizes))
    return result


def _random_guide(rng: random.Random, guide_kind: str, latent: list[Site]) -> list[Site]:
    if guide_kind == "prior":
        return []
    order = rng.sample(latent, len(latent))
    if guide_kind == "structured":
        order.sort(key=lambda site: len(site.plates))  # so that locals can read globals
    if guide_kind == "partial":
        order = order[: max(1, len(latent) // 2)]
    result: list[Site] = []
    for site in order:
        readable = [other.name for other in result if set(other.plates) <= set(site.plates)]
        parents: list[str] = []
        if guide_kind != "factorised":
            parents = rng.sample(readable, min(len(readable), 2))
        weights = tuple(rng.uniform(-0.9, 0.9) for _ in parents)
        intercept = 0.5 * site.intercept + 0.3 * torch.randn(site.intercept.shape)
        proposal = replace(site, parents=tuple(parents), weights=weights, intercept=intercept)
        result.append(replace(proposal, scale=1.3 * site.scale))
    return result


def _enumerate_some(rng: random.Random, latent: list[Site], guided: set[str]) -> list[Site]:
    """Mark discrete sites, where no site that the prior proposes reads one."""
    result = []
    for site in latent:
        children = [child.name for child in latent if site.name in child.parents]
        allowed = (
            site.kind in DISCRETE
            and SUPPORT_SIZES[site.kind] ** site.intercept.numel() <= MAX_ENUMERATED
            and all(child in guided for child in children)
        )
        result.append(replace(site, enumerated=allowed and rng.random() < 0.5))
    return result


def _forget_enumerated(guided: list[Site], latent: list[Site]) -> list[Site]:
    enumerated = {site.name for site in latent if site.enumerated}
    result = []
    for site in guided:
        if site.name not in enumerated:
            pairs = zip(site.parents, site.weights, strict=True)
            kept = [(name, weight) for name, weight in pairs if name not in enumerated]
            parents, weights = tuple(n for n, _ in kept), tuple(w for _, w in kept)
            result.append(replace(site, parents=parents, weights=weights))
    return result


def _random_groups(
    rng: random.Random, latent: list[Site], guided: list[Site]
) -> list[tuple[str, ...]]:
    """Pick a pair in the same plates, unless the proposal goes from one to the other outside."""
    proposal = {site.name: site.parents for site in latent} | {s.name: s.parents for s in guided}
    pairs = [
        (a.name, b.name)
        for a, b in itertools.combinations(latent, 2)
        if a.plates == b.plates and not a.enumerated and not b.enumerated
    ]
    pairs = [pair for pair in pairs if not _meet_outside(proposal, pair)]
    return [rng.choice(pairs)] if pairs and rng.random() < 0.4 else []


def _meet_outside(parents: Mapping[str, Sequence[str]], group: tuple[str, ...]) -> bool:
    """Whether a site outside the group is below one member and above another."""
    outside = [name for name in parents if name not in group]
    return any(
        any(member in _ancestors(parents, name) for member in group)
        and any(name in _ancestors(parents, member) for member in group)
        for name in outside
    )


def _ancestors(parents: Mapping[str, Sequence[str]], name: str) -> set[str]:
    return set(parents[name]).union(*(_ancestors(parents, parent) for parent in parents[name]))


def _program(
    sites: Sequence[Site], dims: Mapping[str, int], sizes: Mapping[str, int]
) -> RandomProgram:
    return RandomProgram(tuple(sites), dims, sizes, {site.name: site.kind for site in sites})


def _observe(program: RandomProgram) -> RandomProgram:
    """Fix the values of the sites named x to draws from the program itself."""
    trace = poutine.trace(program).get_trace()
    sites = [
        replace(site, obs=trace.nodes[site.name]["value"]) if site.name[0] == "x" else site
        for site in program.sites
    ]
    return replace(program, sites=tuple(sites))
