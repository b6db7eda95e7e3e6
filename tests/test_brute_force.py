# SPDX-License-Identifier: Apache-2.0
"""
Every result equals the sum over all choices of particle, written out.

Random small models and guides, and hand-written ones for what the generator does not make. Wrong
estimators have to fail the same checks.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_evidence, check_moment, check_samples, check_weights
from models import random_case
from oracles import BruteForce, Problem, Program, brute_force, log_mixture
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import init_to_value
from pyro.poutine.runtime import InferDict
from torch import Tensor
from wrong_programs import (
    given_generative_parents,
    with_ancestral_ratio,
    with_first_component,
    with_one_particle_per_plate,
    without_proposal_weight,
)

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.factor_graph import order

NUM_CASES = 40
NUM_SLOW_CASES = 160
NUM_JOINT_SAMPLES = 20_000


pytestmark = pytest.mark.usefixtures("float64")


def run(
    model: Program,
    guide: Program | None = None,
    *args: object,
    num_samples: int = 3,
    groups: list[tuple[str, ...]] | None = None,
    shared: dict[str, list[str]] | None = None,
    seed: int = 0,
) -> tuple[MPImportance, BruteForce]:
    """Run the package, and the brute force on its particles."""
    pyro.set_rng_seed(seed)
    options: dict[str, Any] = {"groups": groups} if groups else {}
    posterior = MPImportance(model, guide, num_samples=num_samples, **options).run(*args)
    particles = {name: marginal.samples for name, marginal in posterior.marginals().items()}
    return posterior, brute_force(
        Problem(model, guide, particles, args, groups or [], shared or {})
    )


@cache
def run_case(seed: int) -> tuple[MPImportance, BruteForce]:
    case = random_case(seed)
    return run(case.model, case.guide, num_samples=case.num_samples, groups=case.groups, seed=seed)


def number(value: Tensor) -> Tensor:
    """A scalar that all elements of one value of a site enter."""
    value = value.to(torch.get_default_dtype()).reshape(-1)
    return (value * torch.arange(1.0, 1.0 + len(value))).sum()


def product(*values: Tensor) -> Tensor:
    return torch.stack([number(value) for value in values]).prod()


def pairs_of_sites(exact: BruteForce) -> list[tuple[str, str]]:
    """Pairs of sites of which one is in all plates of the other, deeper or not."""
    batch_shapes = {name: exact.problem.unit(name).batch_shape for name in exact.problem.particles}
    plates = exact.problem.plates
    return [
        (x, y)
        for x, y in itertools.permutations(batch_shapes, 2)
        if plates[x] <= plates[y] or plates[y] <= plates[x]
    ]


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_evidence_of_random_program(seed: int) -> None:
    posterior, exact = run_case(seed)
    check_evidence(posterior.evidence(), exact)
    torch.testing.assert_close(posterior.evidence(log_scale=False).log(), posterior.evidence())


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_marginals_of_random_program(seed: int) -> None:
    posterior, exact = run_case(seed)
    check_all_marginals(posterior, exact)


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_moments_of_random_program(seed: int) -> None:
    posterior, exact = run_case(seed)
    check_all_moments(posterior, exact)


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_samples_of_random_program(seed: int) -> None:
    posterior, exact = run_case(seed)
    check_all_samples(posterior, exact)


@pytest.mark.parametrize(
    "seed", [s if s < 10 else pytest.param(s, marks=pytest.mark.slow) for s in range(NUM_CASES)]
)
def test_random_programs_in_rounds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the order of eliminations that otherwise only programs of many sites get."""
    monkeypatch.setattr(order, "MANY_DIMS", 1)
    case = random_case(seed)
    check_all(
        *run(case.model, case.guide, num_samples=case.num_samples, groups=case.groups, seed=seed)
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_CASES, NUM_CASES + NUM_SLOW_CASES))
def test_more_random_programs(seed: int) -> None:
    case = random_case(seed)
    check_all(
        *run(case.model, case.guide, num_samples=case.num_samples, groups=case.groups, seed=seed)
    )


def check_all_marginals(posterior: MPImportance, exact: BruteForce) -> None:
    marginals = posterior.marginals()
    assert set(marginals) == set(exact.problem.particles)
    for name, marginal in marginals.items():
        check_weights(marginal.log_weights, exact, name)
        alone = posterior.marginals(name)
        assert torch.equal(alone.samples, marginal.samples)
        check_weights(alone.log_weights, exact, name)
    pairs = pairs_of_sites(exact)
    for x, y in pairs:
        joint = posterior.marginals(x, y)
        check_weights(joint.log_weights, exact, x, y)
        support = exact.support(x, y)
        for name, value in joint.unpack(joint.samples).items():
            # Concatenated with others, integers may have become floating point numbers.
            torch.testing.assert_close(value, support[name], rtol=0, atol=0, check_dtype=False)
    if len(pairs) > 2 and len(exact.problem.particles) > 2:
        x, y = pairs[0]
        for z in set(exact.problem.particles) - {x, y}:
            if (x, z) in pairs and (y, z) in pairs:
                check_weights(posterior.marginals(x, y, z).log_weights, exact, x, y, z)


def check_all_moments(posterior: MPImportance, exact: BruteForce) -> None:
    means = posterior.moments()
    assert set(means) == set(exact.problem.particles)
    functions: dict[str, Any] = {}
    for name, mean in means.items():
        check_moment(mean, exact.moment(lambda value: value.to(torch.get_default_dtype()), name))
        functions[f"outer {name}"] = (lambda v: torch.outer(v.reshape(-1), v.reshape(-1)), name)
        functions[f"exp {name}"] = (lambda v: (0.3 * number(v)).exp(), name)
    for x, y in pairs_of_sites(exact):
        functions[f"{x} {y}"] = (product, x, y)
    moments = posterior.moments(functions)
    for key, (fn, *sites) in functions.items():
        expected = exact.moment(fn, *sites)
        check_moment(moments[key].to(expected.dtype), expected)
    fn, *sites = functions[key]
    check_moment(posterior.moments(fn, *sites), exact.moment(fn, *sites))


def check_all_samples(posterior: MPImportance, exact: BruteForce) -> None:
    pyro.set_rng_seed(1)
    samples = posterior.sample(NUM_JOINT_SAMPLES)
    problem = exact.problem
    for name, particle in problem.at_particle(0).items():
        assert samples[name].shape == (NUM_JOINT_SAMPLES, *particle.shape)
        assert samples[name].dtype == particle.dtype
    check_samples({name: samples[name] for name in problem.particles}, exact)


def check_all(posterior: MPImportance, exact: BruteForce) -> None:
    check_evidence(posterior.evidence(), exact)
    check_all_marginals(posterior, exact)
    check_all_moments(posterior, exact)
    check_all_samples(posterior, exact)


# Written by hand.


def chain(y: float = 2.5) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(y))


def chain_guide(y: float = 2.5) -> None:
    a = pyro.sample("a", dist.Normal(0.5, 1.2))
    pyro.sample("b", dist.Normal(0.5 * a + 0.8, 1.3))


def backward_chain_guide(y: float = 2.5) -> None:
    b = pyro.sample("b", dist.Normal(1.5, 1.3))
    pyro.sample("a", dist.Normal(0.5 * b, 1.1))


def collider() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(a + b, 0.5), obs=torch.tensor(1.0))


def plated_collider() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 2):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(a * c + b, 0.3), obs=torch.tensor([1.0, -0.5]))


def plate_of_one() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("outer", 1), pyro.plate("inner", 1):
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor([[0.7]]))


def vector_plate_of_one() -> None:
    with pyro.plate("data", 1):
        a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(a, torch.ones(1)).to_event(1))
        pyro.sample("x", dist.Normal(b.squeeze(-1), 1.0), obs=torch.tensor([0.7]))


def hierarchy() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", 2, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        phi = pyro.sample("phi", dist.Normal(theta, 0.5))
        with pyro.plate("data", 3, dim=-1):
            data = torch.tensor([[0.1, 1.0, 0.3], [-1.0, -0.4, 0.2]])
            pyro.sample("x", dist.Normal(theta + phi, tau), obs=data)


def hierarchy_guide() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.2))
    tau = pyro.sample("tau", dist.LogNormal(0.1 * mu, 0.6))
    with pyro.plate("groups", 2, dim=-2):
        phi = pyro.sample("phi", dist.Normal(0.5 * mu, 1.3))
        pyro.sample("theta", dist.Normal(0.6 * mu + 0.2 * phi, tau))


def kept_dim_hierarchy() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(theta, 0.5), obs=torch.tensor([0.3, 1.5]))


def local_first_guide() -> None:
    """Read all of a plate from outside it."""
    with pyro.plate("data", 2):
        theta = pyro.sample("theta", dist.Normal(torch.tensor([0.3, 1.0]), 1.1))
    pyro.sample("mu", dist.Normal(0.6 * theta.mean(-1, keepdim=True), 1.0))


def parallel() -> InferDict:
    return {"enumerate": "parallel"}


def mixture() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(weights), infer=parallel())
        chosen = torch.nn.functional.one_hot(z, 3).to(loc.dtype)
        x_loc = (chosen * loc).sum(-1)
        pyro.sample("x", dist.Normal(x_loc, 0.5), obs=torch.tensor([-0.8, 0.9, 1.2]))


def mixture_guide() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 1.5)))
    loc = torch.tensor([-0.5, 0.0, 0.5]) + weights
    pyro.sample("loc", dist.Normal(loc, 1.2).to_event(1))


def enumerated_chain() -> None:
    rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    z = pyro.sample("z", dist.Bernoulli(rate), infer=parallel())
    w = pyro.sample("w", dist.Bernoulli(0.2 + 0.5 * z), infer=parallel())
    with pyro.plate("data", 2):
        v = pyro.sample("v", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), infer=parallel())
        pyro.sample("x", dist.Normal(w + v, 1.0), obs=torch.tensor([0.5, 2.0]))


def several_observations() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Gamma(2.0, 2.0))
    pyro.sample("x", dist.Normal(a, b), obs=torch.tensor(0.5))
    pyro.sample("y", dist.Poisson(b), obs=torch.tensor(3.0))
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(a, 2.0), obs=torch.tensor([0.0, 1.0, 2.0, 3.0]))
    pyro.sample("w", dist.Normal(0.0, 2.0), obs=torch.tensor(1.0))  # reads no latent site


def sequential_plate() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    data = torch.tensor([0.3, -1.0, 1.2])
    for i, x in zip(pyro.plate("data", 3), data, strict=True):
        b = pyro.sample(f"b_{i}", dist.Normal(a, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(b, 0.7), obs=x)


def markov_chain() -> None:
    z = torch.tensor(0.0)
    data = torch.tensor([0.3, 0.9, 1.2, 0.4, -0.3])
    for i in pyro.markov(range(5)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.8 * z, 0.6))
        pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=data[i])


def markov_chain_guide() -> None:
    z = torch.tensor(0.0)
    for i in pyro.markov(range(5)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.4 * z + 0.2, 0.8))


def plated_markov_chain() -> None:
    with pyro.plate("data", 2):
        z = torch.tensor(0.0)
        for i in pyro.markov(range(3)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.8 * z, 0.6))
            pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=torch.tensor([0.3, -0.5]))


def masked() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        with poutine.mask(mask=cast(torch.BoolTensor, torch.tensor([True, False, True, True]))):
            data = torch.tensor([0.3, 100.0, 1.0, -1.0])
            pyro.sample("x", dist.Normal(a, 1.0), obs=data)
    with pyro.plate("other", 2):
        b = pyro.sample("b", dist.Normal(a, 1.0))
        fn = dist.Normal(b, 1.0).mask(torch.tensor([True, False]))
        pyro.sample("y", fn, obs=torch.tensor([0.5, 100.0]))


def masked_chain() -> None:
    transition = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    with pyro.plate("data", 2):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        z = torch.zeros(2, dtype=torch.long)
        for i in range(3):
            with poutine.mask(mask=i < torch.tensor([3, 1])):  # type: ignore[call-overload]
                z = pyro.sample(f"z_{i}", dist.Categorical(transition[z]), infer=parallel())
                fn = dist.Normal(z.to(scale.dtype), scale)
                pyro.sample(f"x_{i}", fn, obs=torch.tensor([0.3, 1.5]))


def scaled() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=2.5), pyro.plate("data", 2):
        pyro.sample("x", dist.Normal(a * b, 1.0), obs=torch.tensor([0.3, 1.0]))


def with_factors() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.factor("close", -((a - b) ** 2))
    with pyro.plate("data", 2):
        c = pyro.sample("c", dist.Normal(a, 1.0))
        pyro.factor("bounded", -((c * torch.tensor([0.5, 2.0])) ** 2))
    pyro.factor("constant", torch.tensor(-1.3))
    pyro.deterministic("sum", a + b)


def steep() -> None:
    """Log factors that differ by thousands of nats between particles, whose maxima do not meet."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(a + b, 0.02), obs=torch.tensor(1.5))
    pyro.sample("y", dist.Normal(b - c, 0.02), obs=torch.tensor(-1.5))


COUNTY = [0, 2, 2, 0]  # of each datum; the second county has none
STATE = [1, 0, 1]  # of each county
INDEXED_DATA = (0.2, 0.5, 1.0, -1.0)


def indexed() -> None:
    """Effects of one plate that the data's plate reads by an index."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("x", dist.Normal(alpha[..., COUNTY], 0.7), obs=torch.tensor(INDEXED_DATA))


def indexed_guide() -> None:
    mu = pyro.sample("mu", dist.Normal(0.1, 1.1))
    with pyro.plate("county", 3):
        pyro.sample("alpha", dist.Normal(0.5 * mu + torch.tensor([0.1, 0.0, -0.2]), 1.1))


def indexed_collider() -> None:
    """Two effects of one plate, read by the same index, one of them observed as well."""
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        beta = pyro.sample("beta", dist.Normal(alpha, 1.0))
        pyro.sample("y", dist.Normal(beta, 1.0), obs=torch.tensor([0.1, 0.2, -0.3]))
    with pyro.plate("data", 4):
        loc = alpha[..., COUNTY] + beta[..., COUNTY] * torch.tensor([1.0, 2.0, -1.0, 0.5])
        pyro.sample("x", dist.Normal(loc, 0.7), obs=torch.tensor(INDEXED_DATA))
    with pyro.plate("more data", 2):
        pyro.sample("w", dist.Normal(alpha[..., [1, 1]], 0.7), obs=torch.tensor([0.3, 0.4]))


def indexed_by_latent_plate() -> None:
    """The plate that reads by an index has latent sites of its own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
    with pyro.plate("data", 4):
        b = pyro.sample("b", dist.Normal(alpha[..., COUNTY], 1.0))
        pyro.sample("x", dist.Normal(b, 0.7), obs=torch.tensor(INDEXED_DATA))


def indexed_collider_of_plates() -> None:
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        loc = alpha[..., COUNTY] + b
        pyro.sample("x", dist.Normal(loc, 0.7), obs=torch.tensor(INDEXED_DATA))


def indexed_twice() -> None:
    """Counties in states, data in counties, which read both."""
    state = torch.tensor(STATE)
    with pyro.plate("state", 2):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(s[..., state], 1.0))
    with pyro.plate("data", 4):
        loc = alpha[..., COUNTY] + 0.5 * s[..., state[COUNTY]]
        pyro.sample("x", dist.Normal(loc, 0.7), obs=torch.tensor(INDEXED_DATA))


def nested_effects() -> None:
    """Pupils read the effects of their class and of its school; the last class has no pupil."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("class", 4):
        beta = pyro.sample("beta", dist.Normal(0.0, 0.7))
    with pyro.plate("school", 2):
        alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(alpha, 0.5), obs=torch.tensor([0.3, -1.0]))
    of_pupil = torch.tensor([0, 1, 1, 2, 0])
    with pyro.plate("pupil", 5):
        loc = alpha[..., torch.tensor([1, 0, 0])[of_pupil]] + beta[..., of_pupil]
        pyro.sample("x", dist.Normal(loc, 0.5), obs=torch.tensor([0.3, -0.8, 1.5, 0.1, 0.9]))


def discrete_markov_chain() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    transition = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    z = pyro.sample("z_0", dist.Categorical(transition[0]), infer=parallel())
    for i in pyro.markov(range(1, 4)):
        z = pyro.sample(f"z_{i}", dist.Categorical(transition[z]), infer=parallel())
        pyro.sample(f"x_{i}", dist.Normal(z.to(scale.dtype), scale), obs=torch.tensor(0.4 * i))


def partly_observed() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        known = torch.tensor([True, False, True])
        data = torch.tensor([0.2, 0.5, 1.0])
        b = pyro.sample("b", dist.Normal(a, 1.0), obs=data, obs_mask=cast(torch.BoolTensor, known))
        pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor([0.5, 1.0, -1.0]))


def discrete_events() -> None:
    shape = pyro.sample("shape", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
    with pyro.plate("data", 2):
        counts = pyro.sample("counts", dist.Multinomial(3, probs=0.1 + shape))
        loc = (counts * torch.tensor([-1.0, 0.0, 1.0])).sum(-1)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([1.0, -1.5]))


def matrix_events() -> None:
    scale = torch.tensor([[0.5, 1.0], [1.0, 2.0]])
    with pyro.plate("data", 2):
        a = pyro.sample("a", dist.Normal(torch.zeros(2, 2), scale).to_event(2))
        b = pyro.sample("b", dist.Normal(a.sum(-1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=torch.tensor([1.0, -1.5]))


BY_HAND: dict[str, tuple[Program, Program | None, int, list[tuple[str, ...]]]] = {
    "prior chain": (chain, None, 4, []),
    "structured chain": (chain, chain_guide, 4, []),
    "backward chain": (chain, backward_chain_guide, 4, []),
    "one particle": (chain, chain_guide, 1, []),
    "one particle, plates": (hierarchy, hierarchy_guide, 1, []),
    "collider": (collider, None, 5, []),
    "plated collider": (plated_collider, None, 4, []),
    "plate of one": (plate_of_one, None, 3, []),
    "one plate of one particle": (plate_of_one, None, 1, []),
    "vector in a plate of one": (vector_plate_of_one, None, 4, []),
    "hierarchy": (hierarchy, hierarchy_guide, 3, []),
    "global group": (hierarchy, hierarchy_guide, 3, [("mu", "tau")]),
    "local group": (hierarchy, hierarchy_guide, 3, [("theta", "phi")]),
    "two groups": (hierarchy, hierarchy_guide, 4, [("theta", "phi"), ("tau", "mu")]),
    "prior group": (hierarchy, None, 4, [("mu", "tau")]),
    "local group of the prior": (hierarchy, None, 3, [("theta", "phi")]),
    "guide of locals first": (kept_dim_hierarchy, local_first_guide, 4, []),
    "mixture": (mixture, mixture_guide, 4, []),
    "mixture of the prior": (mixture, None, 4, []),
    "group with enumeration": (mixture, mixture_guide, 4, [("weights", "loc")]),
    "enumerated chain": (enumerated_chain, None, 4, []),
    "several observations": (several_observations, None, 4, []),
    "sequential plate": (sequential_plate, None, 4, []),
    "markov chain": (markov_chain, None, 3, []),
    "structured markov chain": (markov_chain, markov_chain_guide, 4, []),
    "plated markov chain": (plated_markov_chain, None, 3, []),
    "mask": (masked, None, 4, []),
    "masked enumerated chain": (masked_chain, None, 3, []),
    "scale": (scaled, None, 4, []),
    "factors": (with_factors, None, 4, []),
    "steep factors": (steep, None, 5, []),
    "indexed plate": (indexed, None, 4, []),
    "indexed plate with a guide": (indexed, indexed_guide, 4, []),
    "indexed plate of one particle": (indexed, indexed_guide, 1, []),
    "indexed collider": (indexed_collider, None, 3, []),
    "indexed group": (indexed_collider, None, 4, [("alpha", "beta")]),
    "indexed by a latent plate": (indexed_by_latent_plate, None, 3, []),
    "indexed collider of plates": (indexed_collider_of_plates, None, 3, []),
    "indexed twice": (indexed_twice, None, 3, []),
    "nested effects": (nested_effects, None, 3, []),
    "discrete markov chain": (discrete_markov_chain, None, 4, []),
    "partly observed": (partly_observed, None, 4, []),
    "discrete events": (discrete_events, None, 4, []),
    "matrix events": (matrix_events, None, 3, []),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_program_by_hand(name: str) -> None:
    model, guide, num_samples, groups = BY_HAND[name]
    check_all(*run(model, guide, num_samples=num_samples, groups=groups))


def crossed_indices() -> None:
    with pyro.plate("county", 2):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with pyro.plate("year", 2):
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        loc = alpha[..., [0, 1, 0, 1]] + beta[..., [0, 0, 1, 1]]
        pyro.sample("x", dist.Normal(loc, 0.7), obs=torch.tensor(INDEXED_DATA))


def crossed_plates() -> None:
    county, year = pyro.plate("county", 2, dim=-1), pyro.plate("year", 2, dim=-2)
    with county:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with year:
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with county, year:
        data = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
        pyro.sample("x", dist.Normal(alpha + beta, 0.7), obs=data)


def dependent_elements() -> None:
    """A plate whose elements are not independent."""
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., [1, 0]], 1.0), obs=torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("model", "site", "plate"),
    [
        (crossed_indices, "alpha", "county"),
        (crossed_plates, "alpha", "county"),
        (dependent_elements, "z", "data"),
    ],
)
def test_where_a_plated_sum_cannot_be_one_plate_shares(
    model: Program, site: str, plate: str
) -> None:
    """One particle index for all of a plate; asked for by name it is the same, without a word."""
    message = rf"'{site}' has one particle index for all of plate '{plate}'.*shared_plates=\["
    with pytest.warns(MPISWarning, match=message):
        posterior, exact = run(model, shared={site: [plate]})
    check_all(posterior, exact)
    pyro.set_rng_seed(0)
    asked = MPImportance(model, num_samples=3, shared_plates=[plate]).run()
    assert torch.equal(asked.evidence(), posterior.evidence())


def test_indices_for_each_element_are_no_index_for_all() -> None:
    """The oracle tells one from the other."""
    with pytest.warns(MPISWarning, match="one particle index"):
        posterior, exact = run(crossed_plates)
    with pytest.raises(AssertionError, match="relative error"):
        check_evidence(posterior.evidence(), exact)


def test_no_latent_site() -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor([1.0, 2.0]))

    posterior, exact = run(model)
    check_evidence(posterior.evidence(), exact)
    expected = dist.Normal(0.0, 1.0).log_prob(torch.tensor([1.0, 2.0])).sum()
    torch.testing.assert_close(exact.log_evidence, expected)
    assert posterior.marginals() == posterior.moments() == posterior.sample(3) == {}


def test_model_arguments() -> None:
    pyro.set_rng_seed(0)
    by_position = MPImportance(chain, chain_guide, num_samples=3).run(-1.0)
    pyro.set_rng_seed(0)
    by_name = MPImportance(chain, chain_guide, num_samples=3).run(y=-1.0)
    particles = {name: marginal.samples for name, marginal in by_position.marginals().items()}
    exact = brute_force(Problem(chain, chain_guide, particles, (-1.0,)))
    check_evidence(by_position.evidence(), exact)
    check_evidence(by_name.evidence(), exact)


def test_one_particle_is_plain_importance_sampling() -> None:
    posterior, exact = run(chain, chain_guide, num_samples=1)
    values = exact.problem.at_particle(0)
    model_trace = poutine.trace(poutine.condition(chain, values)).get_trace()
    guide_trace = poutine.trace(poutine.condition(chain_guide, values)).get_trace()
    expected = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
    torch.testing.assert_close(posterior.evidence(), expected)
    torch.testing.assert_close(exact.log_evidence, expected)


def test_group_joint_has_one_index() -> None:
    posterior, exact = run(hierarchy, hierarchy_guide, num_samples=3, groups=[("mu", "tau")])
    joint = posterior.marginals("mu", "tau")
    assert joint.log_weights.shape == (3,)
    assert posterior.marginals("mu", "theta", "tau").log_weights.shape == (2, 1, 9)
    check_weights(joint.log_weights, exact, "mu", "tau")
    check_weights(posterior.marginals("mu").log_weights, exact, "mu", "tau")


# Autoguides, compared with a guide that says the same in one distribution for each site.


def positive_hierarchy() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", 2):
        b = pyro.sample("b", dist.Normal(a, s))
        v = pyro.sample("v", dist.Gamma(2.0 * torch.ones(2), 1.0 / s.unsqueeze(-1)).to_event(1))
        pyro.sample("x", dist.Normal(b, v.sum(-1)), obs=torch.tensor([0.3, 1.5]))


def run_autoguide(
    model: Program, guide: Program, longhand: Program, groups: list[tuple[str, ...]]
) -> tuple[MPImportance, BruteForce]:
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=3).run()
    particles = {name: marginal.samples for name, marginal in posterior.marginals().items()}
    return posterior, brute_force(Problem(model, longhand, particles, (), groups))


def test_auto_normal() -> None:
    guide: Any = autoguide.AutoNormal(positive_hierarchy, init_scale=0.8)
    guide()

    def longhand() -> None:
        locs, scales = guide.locs, guide.scales
        pyro.sample("a", dist.Normal(locs.a, scales.a))
        pyro.sample("s", dist.LogNormal(locs.s, scales.s))
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Normal(locs.b, scales.b))
            pyro.sample("v", dist.LogNormal(locs.v, scales.v).to_event(1))

    check_all(*run_autoguide(positive_hierarchy, guide, longhand, []))


def test_auto_delta() -> None:
    """Part of the sites at a point; no particles, and no density."""
    guide: Any = autoguide.AutoGuideList(chain)
    init = init_to_value(values={"a": torch.tensor(0.7)})
    guide.append(autoguide.AutoDelta(poutine.block(chain, expose=["a"]), init_loc_fn=init))
    guide.append(autoguide.AutoNormal(poutine.block(chain, expose=["b"]), init_scale=0.8))
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a point estimate is no proposal
        posterior = MPImportance(chain, guide, num_samples=3).run()
    b = posterior.marginals("b").samples
    loc, scale = guide[1].locs.b, guide[1].scales.b
    log_ratio = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.7))
    log_ratio = log_ratio + dist.Normal(0.7, 1.0).log_prob(b) - dist.Normal(loc, scale).log_prob(b)
    log_ratio = log_ratio + dist.Normal(b, 1.0).log_prob(torch.tensor(2.5))
    expected = log_ratio.logsumexp(0) - math.log(3)
    torch.testing.assert_close(posterior.evidence(), expected.detach())


@pytest.mark.filterwarnings("ignore:the guide draws 2 sites as one vector")
def test_auto_multivariate_normal() -> None:
    guide: Any = autoguide.AutoMultivariateNormal(chain, init_scale=0.9)
    guide()
    with torch.no_grad():
        guide.scale_tril = torch.tensor([[1.0, 0.0], [0.4, 1.0]])

    def longhand() -> None:
        (loc_a, loc_b), (scale_a, scale_b) = guide.loc, guide.scale
        a = pyro.sample("a", dist.Normal(loc_a, scale_a))
        slope = 0.4 * scale_b / scale_a
        pyro.sample("b", dist.Normal(loc_b + slope * (a - loc_a), scale_b))

    check_all(*run_autoguide(chain, guide, longhand, [("a", "b")]))


@pytest.mark.parametrize(
    "make",
    [
        autoguide.AutoNormalMessenger,
        autoguide.AutoHierarchicalNormalMessenger,
        autoguide.AutoRegressiveMessenger,
    ],
)
@pytest.mark.parametrize("model", [chain, hierarchy])
def test_auto_messenger(make: Callable[..., Program], model: Program) -> None:
    """The guide itself serves as its longhand: it has one distribution for each site."""
    guide = make(model, init_scale=0.8)
    guide()
    check_all(*run_autoguide(model, guide, guide, []))


def test_auto_structured() -> None:
    """A site that is computed from two others has a point for each pair of their particles."""
    guide: Any = autoguide.AutoStructured(
        chain,
        conditionals={"a": "normal", "b": "normal"},
        dependencies={"b": {"a": "linear"}},
        init_scale=0.9,
    )
    guide()
    with torch.no_grad():
        guide.deps.b.a.weight.fill_(0.4)
    pyro.set_rng_seed(0)
    posterior = MPImportance(chain, guide, num_samples=3).run()
    a, b = posterior.marginals("a").samples, posterior.marginals("b").samples.reshape(3, 3)
    noise = b - 0.4 * a[:, None]
    if not torch.allclose(noise, noise[:1]):
        b = b.T
        noise = b - 0.4 * a[:, None]
    torch.testing.assert_close(noise, noise[:1].expand(3, 3))
    q_a = dist.Normal(guide.locs.a, guide.scales.a)
    q_b = dist.Normal(guide.locs.b + 0.4 * (a[:, None] - guide.locs.a), guide.scales.b)
    log_ratio = dist.Normal(0.0, 1.0).log_prob(a)[:, None] - q_a.log_prob(a)[:, None]
    log_ratio = log_ratio + dist.Normal(a[:, None], 1.0).log_prob(b) - q_b.log_prob(b)
    log_ratio = (log_ratio + dist.Normal(b, 1.0).log_prob(torch.tensor(2.5))).detach()
    torch.testing.assert_close(posterior.evidence(), log_ratio.exp().mean().log())
    weights = log_ratio.exp() / log_ratio.exp().sum()
    torch.testing.assert_close(posterior.moments()["b"], (weights * b).sum())
    torch.testing.assert_close(
        posterior.moments(torch.mul, "a", "b"), (weights * a[:, None] * b).sum()
    )
    torch.testing.assert_close(posterior.marginals("a").log_weights.exp(), weights.sum(1))
    drawn = posterior.sample(NUM_JOINT_SAMPLES)
    rows = (drawn["a"][:, None] == a).long().argmax(1)
    columns = (drawn["b"][:, None] - b[rows]).abs().argmin(1)
    counts = (3 * rows + columns).bincount(minlength=9)
    expected = NUM_JOINT_SAMPLES * weights.reshape(-1)
    kept = expected > 20.0
    statistic = ((counts - expected) ** 2 / expected)[kept].sum()
    assert float(statistic) < 50.0  # chi-square of at most 9 degrees of freedom: 1e-7


# The checks reject wrong programs. Each is made from the particles of a correct run.


def test_checks_accept_the_brute_force() -> None:
    _, exact = run(plated_collider, None, num_samples=3)
    check_evidence(exact.log_evidence, exact)
    check_weights(exact.weights("a", "b").log(), exact, "a", "b")
    check_samples(samples_of_choices(exact, exact.probs), exact)


def samples_of_choices(exact: BruteForce, probs: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)
    rows = probs.multinomial(NUM_JOINT_SAMPLES, replacement=True)
    return {name: value[rows] for name, value in exact.problem.values.items()}


WRONG_SUMS: dict[str, tuple[Callable[[Problem], BruteForce], Program, Program, list[str]]] = {
    "no 1/K": (without_proposal_weight, chain, chain_guide, []),
    "ancestral ratio": (with_ancestral_ratio, chain, chain_guide, ["a", "b"]),
    "ancestral ratio, plates": (with_ancestral_ratio, hierarchy, hierarchy_guide, ["mu", "theta"]),
    "first component": (with_first_component, chain, chain_guide, ["b"]),
    "one particle per plate": (with_one_particle_per_plate, hierarchy, hierarchy_guide, ["theta"]),
}


@pytest.mark.parametrize("name", WRONG_SUMS)
def test_wrong_sum_is_rejected(name: str) -> None:
    wrong_sum, model, guide, sites = WRONG_SUMS[name]
    _, exact = run(model, guide, num_samples=3)
    wrong = wrong_sum(exact.problem)
    with pytest.raises(AssertionError):
        check_evidence(wrong.log_evidence, exact)
    for site in sites:
        with pytest.raises(AssertionError):
            check_weights(wrong.weights(site).log(), exact, site)
        with pytest.raises(AssertionError):
            check_moment(wrong.moment(number, site), exact.moment(number, site))
    if sites:
        with pytest.raises(AssertionError):
            check_samples(samples_of_choices(exact, wrong.probs), exact)


@pytest.mark.parametrize(
    ("model", "parents", "accepted"),
    [
        (chain, {"a": [], "b": ["a"]}, True),
        (collider, {"a": [], "b": ["a"]}, True),
        (collider, {"a": [], "b": []}, False),
    ],
)
def test_sampling_given_generative_parents(
    model: Program, parents: dict[str, list[str]], accepted: bool
) -> None:
    particles = {name: torch.linspace(-2.0, 2.0, 5) for name in parents}
    exact = brute_force(Problem(model, None, particles))
    samples = samples_of_choices(exact, given_generative_parents(exact, parents))
    if accepted:
        check_samples(samples, exact)
    else:
        with pytest.raises(AssertionError):
            check_samples(samples, exact)


def test_samples_of_independent_plate_elements_are_rejected() -> None:
    """Draw every plate element of a site from its own marginal."""
    _, exact = run(hierarchy, hierarchy_guide, num_samples=3)
    probs = torch.ones(len(exact.problem.choices))
    for column in range(exact.problem.choices.shape[1]):
        choice = exact.problem.choices[:, column]
        probs *= torch.zeros(3).index_add(0, choice, exact.probs)[choice]
    with pytest.raises(AssertionError):
        check_samples(samples_of_choices(exact, probs), exact)


def test_transposed_joint_is_rejected() -> None:
    _, exact = run(chain, chain_guide, num_samples=3)
    transposed = exact.weights("a", "b").reshape(3, 3).T.reshape(-1)
    with pytest.raises(AssertionError):
        check_weights(transposed.log(), exact, "a", "b")


def test_particles_out_of_order_are_rejected() -> None:
    posterior, exact = run(chain, chain_guide, num_samples=3)
    particles = exact.problem.particles | {"b": exact.problem.particles["b"].roll(1)}
    rolled = brute_force(Problem(chain, chain_guide, particles))
    check_evidence(posterior.evidence(), rolled)  # all choices are summed, in any order
    with pytest.raises(AssertionError):
        check_weights(posterior.marginals("b").log_weights, rolled, "b")


def test_brute_force_of_chain_longhand() -> None:
    particles = {"a": torch.tensor([0.3, -0.5, 1.0]), "b": torch.tensor([1.2, 0.1, 2.0])}
    exact = brute_force(Problem(chain, chain_guide, particles))
    a, b = particles["a"][:, None], particles["b"][None, :]
    mixture = dist.Normal(0.5 * a + 0.8, 1.3).log_prob(b).logsumexp(0) - math.log(3)
    log_ratio = (
        dist.Normal(0.0, 1.0).log_prob(a)
        + dist.Normal(a, 1.0).log_prob(b)
        + dist.Normal(b, 1.0).log_prob(torch.tensor(2.5))
        - dist.Normal(0.5, 1.2).log_prob(a)
        - mixture
    )
    torch.testing.assert_close(exact.log_evidence, log_ratio.exp().mean().log())
    weights = log_ratio.exp() / log_ratio.exp().sum()
    torch.testing.assert_close(exact.weights("a"), weights.sum(1))
    torch.testing.assert_close(exact.weights("b"), weights.sum(0))
    torch.testing.assert_close(exact.weights("a", "b"), weights.reshape(-1))
    torch.testing.assert_close(exact.moment(torch.mul, "a", "b"), (weights * a * b).sum())


def test_brute_force_of_plate_longhand() -> None:
    data = torch.tensor([0.3, 1.5])
    a = torch.tensor([0.3, -0.5, 1.0])
    b = torch.tensor([[0.2, 0.5, -0.1], [1.2, 0.7, 1.9]])  # plate, particle
    exact = brute_force(Problem(kept_dim_hierarchy, None, {"mu": a, "theta": b}))
    prior = dist.Normal(a[:, None, None], 1.0).log_prob(b)  # mu, plate, theta
    log_mixture_of_b = prior.logsumexp(0) - math.log(3)
    log_ratio = prior - log_mixture_of_b + dist.Normal(b, 0.5).log_prob(data[:, None])
    expected = log_ratio.exp().mean(-1).prod(-1).mean()  # the plate's sums factorise
    torch.testing.assert_close(exact.log_evidence.exp(), expected)


def test_mixture_of_a_root_is_its_density() -> None:
    _, exact = run(chain, chain_guide, num_samples=3)
    problem = exact.problem
    expected = dist.Normal(0.5, 1.2).log_prob(problem.particles["a"])
    torch.testing.assert_close(log_mixture(problem, problem.unit("a")), expected)
    locs = 0.5 * problem.particles["a"] + 0.8
    components = dist.Normal(locs, 1.3).log_prob(problem.particles["b"][:, None])
    expected = components.logsumexp(-1) - math.log(3)
    torch.testing.assert_close(log_mixture(problem, problem.unit("b")), expected)
