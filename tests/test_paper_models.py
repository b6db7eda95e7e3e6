# SPDX-License-Identifier: Apache-2.0
"""
The programs of ``benchmarks.paper.published`` have the paper's log densities.

The check values are log densities at fixed latents, computed from the formulas in plain PyTorch,
without Pyro, in float64 on the training tensors; they agree with the published program's to
float32 accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from benchmarks.paper import published
from benchmarks.paper.experiment import Arrays, Experiment, read_by_index
from pyro_mpis import MPImportance

needs_data = pytest.mark.skipif(
    published.data_dir() is None,
    reason="PYRO_MPIS_DATA, the folder of the published tensors, is not set or is no folder",
)

# model, point: log P(x | z), log P(z), log Q(z)
LOG_DENSITIES = {
    ("bus_breakdown", "A"): (-9523.3050, -67.0825, -67.0825),
    ("bus_breakdown", "B"): (-35249.6768, -80.7075, -76.2075),
    ("bus_breakdown", "C"): (-7860.3763, -70.8743, -68.8024),
    ("chimpanzees", "A"): (-291.1218, -56.9820, -56.9820),
    ("chimpanzees", "B"): (-398.7106, -84.9793, -64.3510),
    ("chimpanzees", "C"): (-276.7031, -72.9997, -58.8156),
    ("movielens", "A"): (-1039.7208, -4995.3499, -4995.3499),
    ("movielens", "B"): (-2373.7275, -7699.8499, -5674.8499),
    ("movielens", "C"): (-1041.7774, -5225.9328, -5117.6691),
    ("occupancy", "A"): (-49906.5970, -10086.0784, -10086.0784),
    ("occupancy", "B"): (-49878.6287, -301.8880, -297.3880),
    ("occupancy", "C"): (-226907.9561, -17850.3300, -17837.2879),
}
SAMPLED = sorted({name for name, _ in LOG_DENSITIES})  # every latent of the model in the guide
ROUNDING = 6e-5  # the values above have four decimals


@cache
def load(name: str) -> Experiment:
    return published.load(name, torch.float64)


def run(program: Callable[..., None], data: Arrays) -> poutine.Trace:
    trace = poutine.trace(program).get_trace(**data)
    trace.compute_log_prob()
    return trace


def latent_values(trace: poutine.Trace) -> Arrays:
    """Map each latent site to its value."""
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and type(site["fn"]).__name__ != "_Subsample"
        and isinstance(site["value"], Tensor)
    }


def total_log_prob(trace: poutine.Trace, sites: Iterable[str]) -> float:
    return sum(float(trace.nodes[site]["log_prob"].sum()) for site in sites)


def point_value(point: str, name: str, like: Tensor) -> Tensor:
    """Latent ``name`` at a check point, entries counted in C order."""
    i = torch.arange(like.numel(), dtype=torch.float64)
    if name == "z" and like.shape[0] == 12:  # occupancy's presence, binary
        flat = (i % 2 == 0).to(i) if point == "C" else torch.ones_like(i)
    else:
        flat = {"A": 0 * i, "B": 0 * i + 0.5, "C": 0.3 * i.cos()}[point]
        if name in ("sigma_actor", "sigma_block"):
            flat = flat.exp()
    return flat.reshape(like.shape)


@needs_data
@pytest.mark.parametrize(("name", "point"), LOG_DENSITIES)
def test_log_densities_at_the_check_points(name: str, point: str) -> None:
    paper = load(name)
    prior = latent_values(run(paper.model, paper.train))
    values = {site: point_value(point, site, value) for site, value in prior.items()}

    model = run(poutine.condition(paper.model, values), paper.train)
    guide = run(poutine.condition(paper.guide, values), paper.train)

    assert {model.nodes[site]["log_prob"].dtype for site in [*values, "obs"]} == {torch.float64}
    found = tuple(
        total_log_prob(trace, sites)
        for trace, sites in ((model, ["obs"]), (model, values), (guide, values))
    )
    assert found == pytest.approx(LOG_DENSITIES[name, point], abs=ROUNDING, rel=0)


@needs_data
@pytest.mark.parametrize("name", SAMPLED)
def test_guide_has_exactly_the_models_latents(name: str) -> None:
    paper = load(name)
    model, guide = (
        {site: value.shape for site, value in latent_values(run(program, paper.train)).items()}
        for program in (paper.model, paper.guide)
    )
    assert model == guide


@needs_data
@pytest.mark.parametrize("name", SAMPLED)
def test_particles_run_together_as_they_run_one_by_one(name: str) -> None:
    """Three particles in a dim left of the plates, against three ordinary runs."""
    paper = load(name)
    pyro.set_rng_seed(0)
    particles = pyro.plate("particles", 3, dim=-1 - paper.max_plate_nesting)
    guide = run(particles(paper.guide), paper.train)
    model = run(poutine.replay(particles(paper.model), guide), paper.train)

    plain = latent_values(run(paper.guide, paper.train))
    drawn = latent_values(guide)
    for k in range(3):
        values = {site: drawn[site][k].reshape(value.shape) for site, value in plain.items()}
        for program, together, sites in (
            (paper.guide, guide, [*plain]),
            (paper.model, model, [*plain, "obs"]),
        ):
            alone = run(poutine.condition(program, values), paper.train)
            for site in sites:
                expected = alone.nodes[site]["log_prob"].sum()
                torch.testing.assert_close(together.nodes[site]["log_prob"][k].sum(), expected)


def test_read_by_index_keeps_particles_left_of_the_plates() -> None:
    weights = torch.randn(4, 2, 1, 1, 5)  # two particle dims, two plates not its own
    index = torch.tensor([[0, 4, 2], [1, 1, 3]])
    found = read_by_index(weights, index)
    assert found.shape == (4, 2, 2, 3)
    assert torch.equal(found[3, 1], weights[3, 1, 0, 0][index])
    assert torch.equal(read_by_index(weights[0, 0, 0, 0], index), weights[0, 0, 0, 0][index])


@needs_data
def test_presence_summed_out_is_the_sum_over_both_values() -> None:
    """With one particle the estimate is log p(x, rest) - log q(rest), the sum over z by hand."""
    summed = load("occupancy_summed")
    pyro.set_rng_seed(0)
    posterior = MPImportance(summed.model, summed.guide, num_samples=1).run(**summed.train)
    values = {name: value[0] for name, value in posterior.sample(1).items() if name != "z"}

    def log_joint(presence: float) -> tuple[Tensor, Tensor]:
        z = torch.full((12, 6, 200, 1), presence, dtype=torch.float64)
        at = poutine.condition(load("occupancy").model, values | {"z": z})
        sites = run(at, summed.train).nodes
        by_route = sites["z"]["log_prob"] + sites["obs"]["log_prob"].sum(-1, keepdim=True)
        return by_route, torch.stack([sites[name]["log_prob"].sum() for name in values]).sum()

    (absent, rest), (present, _) = log_joint(0.0), log_joint(1.0)
    proposal = run(poutine.condition(summed.guide, values), summed.train)
    expected = torch.logaddexp(absent, present).sum() + rest
    expected = expected - total_log_prob(proposal, values)
    torch.testing.assert_close(posterior.evidence(), expected)
