# SPDX-License-Identifier: Apache-2.0
"""
The four models of the paper's experiments (section 4 and appendix C) as Pyro programs.

They follow the program behind the published numbers where it and the text differ: spreads are
standard deviations, the bus delays are Binomial, company and journey-type weights are one vector
latent each. The tensors are the published splits, read from the folder that ``PYRO_MPIS_DATA``
names.

Every program runs with any number of batch dims left of its plates, so with particles in one
shared dim or each site's in a dim of its own.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch import Tensor

from .experiment import Arrays, Experiment, Program, read_by_index


def data_dir() -> Path | None:
    """Return the folder of the published tensors, or None where there is none."""
    folder = os.environ.get("PYRO_MPIS_DATA")
    if not folder or not Path(folder).is_dir():
        return None
    return Path(folder)


def load_arrays(name: str, dtype: torch.dtype, split: str = "train") -> Arrays:
    """Read the published arrays of one experiment, cast to ``dtype``."""
    folder = data_dir()
    if folder is None:
        raise FileNotFoundError(
            "The published arrays are in no public place in this form. Set PYRO_MPIS_DATA to a "
            f"folder with {name}/train.npz and {name}/test.npz."
        )
    with np.load(folder / name / f"{split}.npz", allow_pickle=False) as arrays:
        return {key: torch.as_tensor(arrays[key]).to(dtype) for key in arrays.files}


def _unit(like: Tensor) -> tuple[Tensor, Tensor]:
    """Zero and one in the dtype of the data, so that a float64 run is float64 throughout."""
    return like.new_zeros(()), like.new_ones(())


# --- NYC bus breakdown (C.1): years > boroughs > journeys ---------------------------------


def bus_model(
    delay_minutes: Tensor,
    bus_company: Tensor,
    run_type: Tensor,
    num_bus_companies: Tensor,
    num_run_types: Tensor,
) -> None:
    zero, one = _unit(delay_minutes)
    years, boroughs, journeys = delay_minutes.shape
    pyro.sample("log_sigma_phi_psi", dist.Normal(zero, one))  # read by nothing, as published
    psi = pyro.sample("psi", dist.Normal(zero, one).expand([int(num_run_types)]).to_event(1))
    phi = pyro.sample("phi", dist.Normal(zero, one).expand([int(num_bus_companies)]).to_event(1))
    sigma_beta = pyro.sample("sigma_beta", dist.Normal(zero, one))
    mu_beta = pyro.sample("mu_beta", dist.Normal(zero, one))
    with pyro.plate("year", years, dim=-3):
        beta = pyro.sample("beta", dist.Normal(mu_beta, sigma_beta.exp()))
        sigma_alpha = pyro.sample("sigma_alpha", dist.Normal(zero, one))
        with pyro.plate("borough", boroughs, dim=-2):
            alpha = pyro.sample("alpha", dist.Normal(beta, sigma_alpha.exp()))
            with pyro.plate("journey", journeys, dim=-1):
                company = read_by_index(phi, bus_company.long())
                journey_type = read_by_index(psi, run_type.long())
                pyro.sample(
                    "obs",
                    dist.Binomial(total_count=131 * one, logits=alpha + company + journey_type),
                    obs=delay_minutes,
                )


def bus_guide(
    delay_minutes: Tensor,
    bus_company: Tensor,
    run_type: Tensor,
    num_bus_companies: Tensor,
    num_run_types: Tensor,
    *,
    unused: bool = True,
) -> None:
    """``unused``: whether the model has the latent that nothing reads."""
    zero, one = _unit(delay_minutes)
    years, boroughs, _ = delay_minutes.shape
    if unused:
        pyro.sample("log_sigma_phi_psi", dist.Normal(zero, one))
    pyro.sample("psi", dist.Normal(zero, one).expand([int(num_run_types)]).to_event(1))
    pyro.sample("phi", dist.Normal(zero, one).expand([int(num_bus_companies)]).to_event(1))
    pyro.sample("sigma_beta", dist.Normal(zero, one))
    pyro.sample("mu_beta", dist.Normal(zero, one))
    with pyro.plate("year", years, dim=-3):
        pyro.sample("beta", dist.Normal(zero, one))
        pyro.sample("sigma_alpha", dist.Normal(zero, one))
        with pyro.plate("borough", boroughs, dim=-2):
            pyro.sample("alpha", dist.Normal(zero, one))


# --- Chimpanzees (C.2): actors > blocks > repeats -----------------------------------------


def chimpanzees_model(pulled_left: Tensor, prosocial_left: Tensor, condition: Tensor) -> None:
    zero, one = _unit(pulled_left)
    actors, blocks, repeats = pulled_left.shape
    sigma_block = pyro.sample("sigma_block", dist.HalfCauchy(one))
    sigma_actor = pyro.sample("sigma_actor", dist.HalfCauchy(one))
    beta_PC = pyro.sample("beta_PC", dist.Normal(zero, 10 * one))
    beta_P = pyro.sample("beta_P", dist.Normal(zero, 10 * one))
    alpha = pyro.sample("alpha", dist.Normal(zero, 10 * one))
    with pyro.plate("actor", actors, dim=-3):
        alpha_actor = pyro.sample("alpha_actor", dist.Normal(zero, sigma_actor))
        with pyro.plate("block", blocks, dim=-2):
            alpha_block = pyro.sample("alpha_block", dist.Normal(zero, sigma_block))
            with pyro.plate("repeat", repeats, dim=-1):
                prosocial = (beta_P + beta_PC * condition) * prosocial_left
                logits = alpha + alpha_actor + alpha_block + prosocial
                pyro.sample("obs", dist.Bernoulli(logits=logits), obs=pulled_left)


def chimpanzees_guide(pulled_left: Tensor, prosocial_left: Tensor, condition: Tensor) -> None:
    zero, one = _unit(pulled_left)
    actors, blocks, _ = pulled_left.shape
    pyro.sample("sigma_block", dist.HalfCauchy(one))
    pyro.sample("sigma_actor", dist.HalfCauchy(one))
    pyro.sample("beta_PC", dist.Normal(zero, 10 * one))
    pyro.sample("beta_P", dist.Normal(zero, 10 * one))
    pyro.sample("alpha", dist.Normal(zero, 10 * one))
    with pyro.plate("actor", actors, dim=-3):
        pyro.sample("alpha_actor", dist.Normal(zero, one))
        with pyro.plate("block", blocks, dim=-2):
            pyro.sample("alpha_block", dist.Normal(zero, one))


# --- MovieLens (C.3): users > films -------------------------------------------------------


def movielens_model(liked: Tensor, film_features: Tensor) -> None:
    zero, one = _unit(liked)
    users, films = liked.shape
    features = film_features.shape[-1]
    mu_z = pyro.sample("mu_z", dist.Normal(zero, one).expand([features]).to_event(1))
    psi_z = pyro.sample("psi_z", dist.Normal(zero, one).expand([features]).to_event(1))
    with pyro.plate("user", users, dim=-2):
        z = pyro.sample("z", dist.Normal(mu_z, psi_z.exp()).to_event(1))
        with pyro.plate("film", films, dim=-1):
            logits = (film_features @ z.transpose(-1, -2)).squeeze(
                -1
            )  # z: (.., users, 1, features)
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=liked)


def movielens_guide(liked: Tensor, film_features: Tensor) -> None:
    zero, one = _unit(liked)
    features = film_features.shape[-1]
    pyro.sample("mu_z", dist.Normal(zero, one).expand([features]).to_event(1))
    pyro.sample("psi_z", dist.Normal(zero, one).expand([features]).to_event(1))
    with pyro.plate("user", len(liked), dim=-2):
        pyro.sample("z", dist.Normal(zero, one).expand([features]).to_event(1))


# --- Occupancy (C.4): birds > years > routes > replicates ---------------------------------

_OCCUPANCY_GLOBALS = (
    "bird_mean_mean",
    "bird_mean_log_var",
    "alpha_mean",
    "alpha_log_var",
    "beta_mean",
    "beta_log_var",
)


def occupancy_model(detected: Tensor, weather: Tensor, quality: Tensor) -> None:
    zero, one = _unit(detected)
    years, birds, routes, replicates = detected.shape
    at = {name: pyro.sample(name, dist.Normal(zero, one)) for name in _OCCUPANCY_GLOBALS}
    with pyro.plate("bird", birds, dim=-4):
        bird_mean = pyro.sample(
            "bird_mean", dist.Normal(at["bird_mean_mean"], at["bird_mean_log_var"].exp())
        )
        alpha = pyro.sample("alpha", dist.Normal(at["alpha_mean"], at["alpha_log_var"].exp()))
        beta = pyro.sample("beta", dist.Normal(at["beta_mean"], at["beta_log_var"].exp()))
        with pyro.plate("year", years, dim=-3):
            bird_year_mean = pyro.sample("bird_year_mean", dist.Normal(bird_mean, one))
            with pyro.plate("route", routes, dim=-2):
                z = pyro.sample("z", _presence(bird_year_mean, beta, weather))
                with pyro.plate("replicate", replicates, dim=-1):
                    logits = alpha * _birds_first(quality) * z + (1 - z) * (-10)
                    pyro.sample("obs", dist.Bernoulli(logits=logits), obs=detected.transpose(0, 1))


def occupancy_guide(
    detected: Tensor, weather: Tensor, quality: Tensor, *, presence: bool = True
) -> None:
    """``presence``: whether to propose ``z``, which is summed out otherwise."""
    zero, one = _unit(detected)
    years, birds, routes, _ = detected.shape
    for name in _OCCUPANCY_GLOBALS:
        pyro.sample(name, dist.Normal(zero, one))
    with pyro.plate("bird", birds, dim=-4):
        pyro.sample("bird_mean", dist.Normal(zero, one))
        pyro.sample("alpha", dist.Normal(zero, one))
        beta = pyro.sample("beta", dist.Normal(zero, one))
        with pyro.plate("year", years, dim=-3):
            bird_year_mean = pyro.sample("bird_year_mean", dist.Normal(zero, one))
            if presence:
                with pyro.plate("route", routes, dim=-2):
                    pyro.sample("z", _presence(bird_year_mean, beta, weather))


def _birds_first(covariate: Tensor) -> Tensor:
    """(years, birds, routes) -> (birds, years, routes, 1), the order of the plates."""
    return covariate.transpose(0, 1).unsqueeze(-1)


def _presence(bird_year_mean: Tensor, beta: Tensor, weather: Tensor) -> dist.Bernoulli:
    return dist.Bernoulli(logits=bird_year_mean * _birds_first(weather) * beta)


# ------------------------------------------------------------------------------------------

# z is the only latent that it finds it can sum
SUMMED: Program = config_enumerate(occupancy_model, "parallel")
WITHOUT_PRESENCE = functools.partial(occupancy_guide, presence=False)

# name: folder of the data, model, guide, number of plate dims, latents of the test set alone
_EXPERIMENTS: dict[str, tuple[str, Program, Program, int, tuple[str, ...]]] = {
    "bus_breakdown": ("bus_breakdown", bus_model, bus_guide, 3, ()),
    "chimpanzees": ("chimpanzees", chimpanzees_model, chimpanzees_guide, 3, ()),
    "movielens": ("movielens", movielens_model, movielens_guide, 2, ()),
    "occupancy": ("occupancy", occupancy_model, occupancy_guide, 4, ("z",)),
    "occupancy_summed": ("occupancy", SUMMED, WITHOUT_PRESENCE, 4, ("z",)),
}

NAMES = tuple(_EXPERIMENTS)


def load(name: str, dtype: torch.dtype = torch.float32) -> Experiment:
    """
    Return one of the paper's models, ``name`` in ``NAMES``, with its data.

    ``occupancy_summed`` is ``occupancy`` with the presence of a bird on a route summed out.
    """
    folder, model, guide, max_plate_nesting, new_latents = _EXPERIMENTS[name]
    return Experiment(
        name,
        model,
        guide,
        train=load_arrays(folder, dtype),
        test=load_arrays(folder, dtype, "test"),
        max_plate_nesting=max_plate_nesting,
        new_latents=new_latents,
    )
