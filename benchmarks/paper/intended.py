# SPDX-License-Identifier: Apache-2.0
"""
The four models as the paper's text has them (appendix C), on data prepared from their sources.

They differ from those of ``published`` in the likelihood of the delays, in spreads, which are
variances, and in data: see ``docs/paper.md``. Proposals are the paper's: the prior of global
latents, standard normals in plates, the prior for presence.

One thing is not the text's: the weights of the bus companies, and those of the types of journey,
are one vector latent each. As a latent for each company they would be read by index from another
plate than that of the boroughs' effects, which crosses it, and the exact sum is intractable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
from pyro.infer import config_enumerate
from torch import Tensor

from . import sources
from .experiment import Experiment, Program, read_by_index
from .published import bus_guide, movielens_guide, occupancy_guide
from .sources import Splits


def bus_model(
    delay_minutes: Tensor,
    bus_company: Tensor,
    run_type: Tensor,
    num_bus_companies: Tensor,
    num_run_types: Tensor,
) -> None:
    one = delay_minutes.new_ones(())
    years, boroughs, journeys = delay_minutes.shape
    psi = pyro.sample("psi", dist.Normal(0 * one, one).expand([int(num_run_types)]).to_event(1))
    phi = pyro.sample("phi", dist.Normal(0 * one, one).expand([int(num_bus_companies)]).to_event(1))
    log_var_beta = pyro.sample("sigma_beta", dist.Normal(0 * one, one))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0 * one, one))
    with pyro.plate("year", years, dim=-3):
        beta = pyro.sample("beta", dist.Normal(mu_beta, (log_var_beta / 2).exp()))
        log_var_alpha = pyro.sample("sigma_alpha", dist.Normal(0 * one, one))
        with pyro.plate("borough", boroughs, dim=-2):
            alpha = pyro.sample("alpha", dist.Normal(beta, (log_var_alpha / 2).exp()))
            with pyro.plate("journey", journeys, dim=-1):
                company = read_by_index(phi, bus_company.long())
                journey_type = read_by_index(psi, run_type.long())
                delay = dist.NegativeBinomial(131 * one, logits=alpha + company + journey_type)
                pyro.sample("obs", delay, obs=delay_minutes)


def chimpanzees_model(pulled_left: Tensor, prosocial_left: Tensor, condition: Tensor) -> None:
    one = pulled_left.new_ones(())
    actors, blocks, repeats = pulled_left.shape
    var_block = pyro.sample("var_block", dist.HalfCauchy(one))
    var_actor = pyro.sample("var_actor", dist.HalfCauchy(one))
    wide = dist.Normal(0 * one, 10**0.5 * one)
    beta_PC = pyro.sample("beta_PC", wide)
    beta_P = pyro.sample("beta_P", wide)
    alpha = pyro.sample("alpha", wide)
    with pyro.plate("actor", actors, dim=-3):
        alpha_actor = pyro.sample("alpha_actor", dist.Normal(0 * one, var_actor.sqrt()))
        with pyro.plate("block", blocks, dim=-2):
            alpha_block = pyro.sample("alpha_block", dist.Normal(0 * one, var_block.sqrt()))
            with pyro.plate("repeat", repeats, dim=-1):
                prosocial = (beta_P + beta_PC * condition) * prosocial_left
                logits = alpha + alpha_actor + alpha_block + prosocial
                pyro.sample("obs", dist.Bernoulli(logits=logits), obs=pulled_left)


def chimpanzees_guide(pulled_left: Tensor, prosocial_left: Tensor, condition: Tensor) -> None:
    one = pulled_left.new_ones(())
    actors, blocks, _ = pulled_left.shape
    for name in ("var_block", "var_actor"):
        pyro.sample(name, dist.HalfCauchy(one))
    for name in ("beta_PC", "beta_P", "alpha"):
        pyro.sample(name, dist.Normal(0 * one, 10**0.5 * one))
    with pyro.plate("actor", actors, dim=-3):
        pyro.sample("alpha_actor", dist.Normal(0 * one, one))
        with pyro.plate("block", blocks, dim=-2):
            pyro.sample("alpha_block", dist.Normal(0 * one, one))


def movielens_model(liked: Tensor, film_features: Tensor) -> None:
    one = liked.new_ones(())
    users, films = liked.shape
    standard = dist.Normal(0 * one, one).expand([film_features.shape[-1]]).to_event(1)
    mu_z = pyro.sample("mu_z", standard)
    psi_z = pyro.sample("psi_z", standard)
    with pyro.plate("user", users, dim=-2):
        z = pyro.sample("z", dist.Normal(mu_z, (psi_z / 2).exp()).to_event(1))
        with pyro.plate("film", films, dim=-1):
            logits = (film_features @ z.transpose(-1, -2)).squeeze(-1)  # z: (.., users, 1, 18)
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=liked)


def occupancy_model(detected: Tensor, weather: Tensor, quality: Tensor) -> None:
    one = detected.new_ones(())
    standard = dist.Normal(0 * one, one)
    years, birds, routes, replicates = detected.shape
    weather, quality = (x.transpose(0, 1).unsqueeze(-1) for x in (weather, quality))
    means, log_vars = {}, {}
    for name in ("bird_mean", "alpha", "beta"):
        means[name] = pyro.sample(f"{name}_mean", standard)
        log_vars[name] = pyro.sample(f"{name}_log_var", standard)
    with pyro.plate("bird", birds, dim=-4):
        of_bird = {
            name: pyro.sample(name, dist.Normal(means[name], (log_vars[name] / 2).exp()))
            for name in means
        }
        with pyro.plate("year", years, dim=-3):
            bird_year_mean = pyro.sample("bird_year_mean", dist.Normal(of_bird["bird_mean"], one))
            with pyro.plate("route", routes, dim=-2):
                logits = bird_year_mean * weather * of_bird["beta"]
                z = pyro.sample("z", dist.Bernoulli(logits=logits))
                with pyro.plate("replicate", replicates, dim=-1):
                    logits = of_bird["alpha"] * quality * z + (1 - z) * (-10)
                    pyro.sample("obs", dist.Bernoulli(logits=logits), obs=detected.transpose(0, 1))


BUS_GUIDE: Program = functools.partial(bus_guide, unused=False)
LOCAL_SAMPLES = 10  # of latents of the test set alone
Loader = Callable[..., Splits]
SUMMED: Program = config_enumerate(occupancy_model, "parallel")
WITHOUT_PRESENCE: Program = functools.partial(occupancy_guide, presence=False)

# name: data, model, guide, number of plate dims, latents of the test set alone
_EXPERIMENTS: dict[str, tuple[Loader, Program, Program, int, tuple[str, ...]]] = {
    "bus_breakdown": (sources.load_bus, bus_model, BUS_GUIDE, 3, ()),
    "chimpanzees": (sources.load_chimpanzees, chimpanzees_model, chimpanzees_guide, 3, ()),
    "movielens": (sources.load_movielens, movielens_model, movielens_guide, 2, ("z",)),
    "movielens_100k": (sources.load_movielens_100k, movielens_model, movielens_guide, 2, ("z",)),
    "occupancy": (sources.load_birds, occupancy_model, occupancy_guide, 4, ("z",)),
    "occupancy_summed": (sources.load_birds, SUMMED, WITHOUT_PRESENCE, 4, ("z",)),
}

NAMES = tuple(_EXPERIMENTS)


def load(name: str, *, download: bool = True) -> Experiment:
    """
    Return one of the paper's models, ``name`` in ``NAMES``, with its data.

    :param download: whether the data may be downloaded, where they are not here.
    :raises Unavailable: if the data are not to be had; the message says what to do.
    """
    loader, model, guide, max_plate_nesting, new_latents = _EXPERIMENTS[name]
    train, test = loader(download=download)
    nesting, draws = max_plate_nesting, LOCAL_SAMPLES
    return Experiment(name, model, guide, train, test, nesting, new_latents, draws)
