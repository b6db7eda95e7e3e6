# SPDX-License-Identifier: Apache-2.0
"""Programs, and losses written out in plain loops, that the tests of objectives share."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

Program = Callable[..., object]

Y = torch.tensor([0.3, -1.2, 2.1], dtype=torch.float64)
ALL = [("mu", "theta")]  # one group


def param(name: str, value: float, *, positive: bool = False) -> Tensor:
    constraint = constraints.positive if positive else constraints.real
    result: Tensor = pyro.param(name, torch.tensor(value).double(), constraint=constraint)
    return result


def model(y: Tensor = Y) -> None:
    mu = pyro.sample("mu", dist.Normal(param("prior", 0.2), 1.5))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, param("width", 0.8, positive=True)))
        pyro.sample("y", dist.Normal(theta, 0.7), obs=y)


def guide(y: Tensor = Y) -> None:
    """The proposal of theta reads mu."""
    mu = pyro.sample("mu", dist.Normal(param("a", 0.4), param("b", 1.2, positive=True)))
    with pyro.plate("group", len(y)):
        pyro.sample("theta", dist.Normal(0.5 * mu + param("c", 0.3), param("d", 1.1)))


def independent_guide(y: Tensor = Y) -> None:
    pyro.sample("mu", dist.Normal(param("a", 0.4), param("b", 1.2, positive=True)))
    with pyro.plate("group", len(y)):
        pyro.sample("theta", dist.Normal(param("c", 0.3), param("d", 1.1)))


def unconstrained(name: str) -> Tensor:
    value: Any = pyro.get_param_store()[name]
    result: Tensor = value.unconstrained()
    return result


def gradients(
    loss: object, model: Program, guide: Program, *args: object, seed: int = 0
) -> tuple[object, dict[str, Tensor]]:
    """Return a loss and its derivatives in the unconstrained parameters."""
    pyro.set_rng_seed(seed)
    with poutine.trace(param_only=True) as tracer:
        value = loss.loss_and_grads(model, guide, *args)  # type: ignore[attr-defined]
    found = {}
    for name in (n for n, node in tracer.trace.nodes.items() if node["type"] == "param"):
        value_of = unconstrained(name)
        grad = value_of.grad
        found[name] = torch.zeros_like(value_of) if grad is None else grad.clone()
        value_of.grad = None
    return value, found


def derivatives(loss: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the derivatives of a tensor in unconstrained parameters."""
    params = [unconstrained(name) for name in names]
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    pairs = zip(names, params, grads, strict=True)
    return {n: torch.zeros_like(p) if grad is None else grad for n, p, grad in pairs}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10)


def noise(num_samples: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the standard normal numbers that the guide's draws are made of."""
    pyro.set_rng_seed(seed)
    zero = torch.zeros((), dtype=torch.float64)
    mu = dist.Normal(zero, 1.0).expand([num_samples])()
    return mu, dist.Normal(zero, 1.0).expand([num_samples, size])()


def log_evidence_by_loops(
    mu: Tensor,
    theta: Tensor,
    y: Tensor = Y,
    *,
    scale: float = 1.0,
    log_q: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """
    Sum :func:`model` over all combinations of its particles, one by one.

    :param mu: (K,).
    :param theta: (K, size).
    :param scale: of the plate.
    :param log_q: of mu, theta given the parent, at (mu, theta_i, parent); the guide's by default.
    """
    k, size = theta.shape
    prior, width = param("prior", 0.2), param("width", 0.8, positive=True)
    log_q = log_q or guide_density
    if scale != 1.0:  # each element's sum is raised to a power
        rows = []
        for j in range(k):
            row = dist.Normal(prior, 1.5).log_prob(mu[j]) - log_q(mu[j], theta[0, 0], mu[0])[0]
            for i in range(size):
                terms = [term(mu, theta, y, j, m, i, width, log_q) for m in range(k)]
                row = row + scale * (torch.stack(terms).logsumexp(0) - math.log(k))
            rows.append(row)
        return torch.stack(rows).logsumexp(0) - math.log(k)
    totals = []
    for j in range(k):
        for chosen in itertools.product(range(k), repeat=size):
            total = dist.Normal(prior, 1.5).log_prob(mu[j]) - log_q(mu[j], theta[0, 0], mu[0])[0]
            for i, m in enumerate(chosen):
                total = total + term(mu, theta, y, j, m, i, width, log_q)
            totals.append(total)
    return torch.stack(totals).logsumexp(0) - (1 + size) * math.log(k)


def term(
    mu: Tensor,
    theta: Tensor,
    y: Tensor,
    j: int,
    m: int,
    i: int,
    width: Tensor,
    log_q: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Return log f of element i at particle m, given mu at particle j."""
    mixture = torch.stack([log_q(mu[0], theta[m, i], parent)[1] for parent in mu])
    own: Tensor = dist.Normal(mu[j], width).log_prob(theta[m, i])
    own = own + dist.Normal(theta[m, i], 0.7).log_prob(y[i])
    return own - mixture.logsumexp(0) + math.log(len(mu))


def guide_density(mu: Tensor, theta: Tensor, parent: Tensor) -> tuple[Tensor, Tensor]:
    of_mu = dist.Normal(param("a", 0.4), param("b", 1.2, positive=True)).log_prob(mu)
    of_theta = dist.Normal(0.5 * parent + param("c", 0.3), param("d", 1.1)).log_prob(theta)
    return of_mu, of_theta


def draws(num_samples: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the particles of :func:`guide`, differentiable in its parameters."""
    of_mu, of_theta = noise(num_samples, size, seed)
    mu = param("a", 0.4) + param("b", 1.2, positive=True) * of_mu
    theta = (0.5 * mu + param("c", 0.3)).unsqueeze(-1) + param("d", 1.1) * of_theta
    return mu, theta
