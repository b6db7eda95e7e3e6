# SPDX-License-Identifier: Apache-2.0
"""Particles that are narrower than the posterior are called so; good ones are not."""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.results.narrowness import (
    ENOUGH,
    Curvature,
    Fit,
    curvature_of,
    noise_quantile,
    times_as_wide,
)
from pyro_mpis.results.width import (
    FALSE_ALARM,
    NARROW_CURVATURE,
    NARROW_DIRECTION,
    too_narrow,
)

pytestmark = pytest.mark.usefixtures("float64")


def scores(number: int) -> Tensor:
    normal = NormalDist()
    return torch.tensor([normal.inv_cdf((i + 0.625) / (number + 0.25)) for i in range(number)])


def of(samples: Tensor, heights: Tensor, num_replicates: int = 1) -> Curvature:
    return curvature_of(samples, heights.log_softmax(-1), num_replicates)


def called_narrow(low: Tensor) -> float:
    return float((low > NARROW_CURVATURE).double().mean())


# --- the fit


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),  # of printed tables
    [(0.05, 1, 6.314), (0.01, 2, 6.965), (0.01, 5, 3.365), (0.001, 10, 4.144), (0.025, 60, 2.000)],
)
def test_student(probability: float, degrees: int, expected: float) -> None:
    assert noise_quantile(probability, degrees) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("c", [-0.7, 0.0, 0.375])
def test_a_parabola_has_its_curvature_in_any_coordinate(c: float) -> None:
    """Of particles in any order, and of any monotone function of them."""
    u = scores(20)
    heights = 0.3 * u + c * u.square()
    order = torch.randperm(20, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    for samples in (u, 5 * u.exp() - 3, u.pow(3)):
        found = of(samples[order], heights[order])
        for fit in (found.of_all, found.of_heavy):
            assert float(fit.value) == pytest.approx(c)
            assert float(fit.error) == pytest.approx(0.0, abs=1e-10)
        torch.testing.assert_close(found.at_least(1e-6), torch.tensor([c]))


def test_replicates_have_constants_of_their_own() -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    order = torch.randperm(30, generator=generator)
    u = scores(30)[order]
    constants = torch.tensor([0.0, -3.0, 5.0]).repeat_interleave(10)
    heights = 0.2 * u.square() + constants
    found = of(u, heights, num_replicates=3)
    assert float(found.of_all.value) == pytest.approx(0.2)
    assert float(found.of_heavy.value) == pytest.approx(0.2)
    assert float(found.of_all.error) == pytest.approx(0.0, abs=1e-10)
    assert float(found.of_all.degrees) == 30 - 3 - 2
    assert float(of(u, heights).of_all.error) > 0.3  # one constant for all


def test_least_squares() -> None:
    """Value and error are those of torch's solver, for all particles and for those with weight."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    heights = torch.randn(4, 12, generator=generator)
    u = scores(12).expand(4, 12)
    found = of(u, heights)
    design = torch.stack([torch.ones_like(u), u, u.square()], -1)
    share = (ENOUGH * 12 * heights.softmax(-1)).clamp(max=1.0)
    for fit, shares in ((found.of_all, torch.ones_like(share)), (found.of_heavy, share)):
        root = shares.sqrt().unsqueeze(-1)
        solution = torch.linalg.lstsq(root * design, root * heights.unsqueeze(-1)).solution
        residual = (root * (heights.unsqueeze(-1) - design @ solution)).square().sum((-1, -2))
        degrees = shares.sum(-1) - 3
        inverse = torch.linalg.inv((root * design).mT @ (root * design))
        error = (residual / degrees * inverse[:, 2, 2]).sqrt()
        torch.testing.assert_close(fit.value[:, 0], solution[:, 2, 0])
        torch.testing.assert_close(fit.error[:, 0], error)
        torch.testing.assert_close(fit.degrees[:, 0], degrees)


def test_nothing_is_said_of_some() -> None:
    """Of integers, of one value, and of as few particles as the parabola has numbers."""
    u = scores(20)
    for samples in (u.round(), torch.ones(20)):
        assert of(samples, u.square()).number == 0
    assert of(scores(3), torch.arange(3.0)).number == 0
    assert of(scores(8), torch.arange(8.0), num_replicates=8).number == 0
    vector = torch.stack([u, u.round(), torch.ones(20)], -1)
    assert of(vector, u).value.isnan().tolist() == [False, True, True, False]
    assert not bool((of(vector[:, 1:], u).at_least(0.01) > -math.inf).any())


def test_particles_that_are_impossible() -> None:
    """Count as far below the others: one of them does not silence a fit."""
    u = scores(20)
    heights = (0.375 * u.square()).index_fill(0, torch.tensor([9]), -math.inf)
    found = of(u, heights)
    assert found.number == 1
    assert float(found.of_heavy.value) == pytest.approx(0.375, abs=0.01)


def test_scalars_of_a_vector_are_seen_together() -> None:
    """Each is noise to the others: of six, none is narrow for sure, and all together are."""
    samples = torch.randn(
        100, 30, 6, generator=torch.Generator(torch.get_default_device()).manual_seed(3)
    )
    found = of(samples, 0.375 * samples.square().sum(-1))
    low = found.of_all.at_least(0.01 / 7)
    assert called_narrow(low[:, :6]) < 0.3
    assert called_narrow(low[:, 6]) > 0.9


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (0.5, False)])
def test_noise_is_called_curved_as_often_as_is_said(factor: float, accepted: bool) -> None:
    """Normal noise: of 4000, one in twenty, with a false alarm of 1e-6; not at half the error."""
    heights = 0.7 * torch.randn(
        4000, 10, generator=torch.Generator(torch.get_default_device()).manual_seed(4)
    )
    fit = of(scores(10).expand(4000, 10), heights).of_all
    share = float((fit.value - factor * (fit.value - fit.at_least(0.05)) > 0).double().mean())
    slack = -NormalDist().inv_cdf(5e-7) * math.sqrt(0.05 * 0.95 / 4000)
    assert (abs(share - 0.05) < slack) == accepted


STEP = (lambda z: torch.where(z < -0.84, 0.0, -20.0), "of_all")
CUT = (lambda z: torch.where(z.abs() < 1.0, z.square() / 2, -1e4), "of_heavy")


@pytest.mark.parametrize(("heights", "fooled"), [STEP, CUT])
def test_a_parabola_that_fits_a_step_is_not_enough(
    heights: Callable[[Tensor], Tensor], fooled: str
) -> None:
    """A posterior in the tail of a prior, and one that ends inside of the guide: one fit errs."""
    z = torch.randn(200, 50, generator=torch.Generator(torch.get_default_device()).manual_seed(5))
    found = of(z, heights(z))
    assert called_narrow(getattr(found, fooled).at_least(FALSE_ALARM)) > 0.5
    assert called_narrow(found.at_least(FALSE_ALARM)) == 0.0


def test_times_as_wide() -> None:
    found = times_as_wide(torch.tensor([0.0, 0.375, 0.5, 0.7, -1.5]))
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, math.inf, math.inf, 0.5]))


# --- programs

Y = torch.tensor([0.3, -1.2, 0.9, 2.5, 0.1, -0.4], dtype=torch.float64)


def model() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("n", 6):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y)


def posterior() -> tuple[Tensor, Tensor]:
    """Mean and covariance of (mu, z), by conditioning of normals."""
    prior = torch.full((7, 7), 4.0)
    prior[1:, 1:] += torch.eye(6)
    gain = torch.linalg.solve(prior[1:, 1:] + torch.eye(6), prior[1:]).mT
    return gain @ Y, prior - gain @ prior[1:]


def truth() -> float:
    covariance = 4.0 + 2 * torch.eye(6)
    return float(dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(Y))


def guide(factor: float, scales: Callable[[Tensor], Tensor] = lambda c: c.diagonal().sqrt()) -> Any:
    def normals() -> None:
        mean, covariance = posterior()
        scale = factor * scales(covariance)
        pyro.sample("mu", dist.Normal(mean[0], scale[0]))
        with pyro.plate("n", 6):
            pyro.sample("z", dist.Normal(mean[1:], scale[1:]))

    return normals


def mean_field(covariance: Tensor) -> Tensor:
    """The scales that minimise KL(q, p) of independent normals."""
    scales: Tensor = torch.linalg.inv(covariance).diagonal().rsqrt()
    return scales


def conditional() -> None:
    """The posterior itself."""
    mean, covariance = posterior()
    mu = pyro.sample("mu", dist.Normal(mean[0], covariance[0, 0].sqrt()))
    with pyro.plate("n", 6):
        pyro.sample("z", dist.Normal((mu + Y) / 2, 0.5**0.5))


def narrow(posterior: MPImportance) -> str:
    """What is said of narrow particles, or nothing."""
    problems = posterior.diagnose(show=False).problems
    return " ".join(str(p) for p in problems if "outermost" in p.found)


def runs(guide: Any, number: int, **options: Any) -> list[str]:
    found = []
    for seed in range(number):
        pyro.set_rng_seed(seed)
        found.append(narrow(MPImportance(model, guide, **options).run()))
    return found


NARROW = {  # guide, particles; the posterior is 1.4 times as wide as the mean field
    "half": (guide(0.5), 30),
    "fifth": (guide(0.2), 30),
    "mean field": (guide(1.0, mean_field), 60),
}
GOOD = {
    "exact": conditional,
    "marginals": guide(1.0),
    "wider": guide(1.4),
    "twice": guide(2.0),
    "mean field, twice": guide(2.0, mean_field),
    "prior": None,
}


@pytest.mark.parametrize("name", NARROW)
def test_a_narrow_guide_is_found(name: str) -> None:
    """At least three in four times."""
    program, number = NARROW[name]
    assert sum(map(bool, runs(program, 12, num_samples=number))) >= 9


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("options", [{"num_samples": 30}, {"num_samples": 8, "num_replicates": 4}])
def test_good_proposals_are_not(name: str, options: dict[str, int]) -> None:
    """At a rate of 1 % each, two or more of 12 have a probability of 0.6 %."""
    assert sum(map(bool, runs(GOOD[name], 12, **options))) <= 1


def test_it_is_seen_where_nothing_else_is_poor_and_what_it_says_helps() -> None:
    """A tenth of the width: often the weights are nearly even, and the evidence is far too low."""
    alone = []
    for seed in range(20):
        pyro.set_rng_seed(seed)
        run = MPImportance(model, guide(0.1), num_samples=30).run()
        assert float(run.evidence()) < truth() - 5
        problems = run.diagnose(show=False).problems
        if len(problems) == 1 and "outermost" in problems[0].found:
            alone.append(problems[0])
    assert len(alone) >= 3
    for problem in alone:
        found = problem.found
        assert re.match(r"\d of 7 marginals have weights that rise towards their outermost", found)
        assert re.search(r"most: (mu|z\[n=\d\]), whose posterior is \d.* as wide as its", found)
        assert re.match(r"Widen the guide \('(z|mu)' by \d", problem.helps[0])
        assert "leave these sites out of the guide" in problem.helps[2]
    wider = MPImportance(model, guide(0.4), num_samples=30).run()
    assert float(wider.evidence()) > float(run.evidence()) + 3
    widest = MPImportance(model, guide(1.6), num_samples=30).run()
    assert not narrow(widest)
    assert float(widest.evidence()) == pytest.approx(truth(), abs=0.5)


def test_a_vector_that_is_narrow_in_several_scalars_is_one_marginal() -> None:
    def vectors() -> None:
        with pyro.plate("n", 2):
            pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(1))

    def narrow_guide() -> None:
        with pyro.plate("n", 2):
            pyro.sample("w", dist.Normal(torch.zeros(2, 3), 0.4).to_event(1))

    pyro.set_rng_seed(0)
    run = MPImportance(vectors, narrow_guide, num_samples=300).run()
    (site,) = run.diagnose(show=False).sites
    assert int((site.curvature.at_least(0.01 / 8) > NARROW_CURVATURE).sum()) > 4
    assert "2 of 2 marginals have weights that rise" in narrow(run)
    (direction,) = run.diagnose(show=False).directions
    assert bool(direction.is_narrow(NARROW_DIRECTION, FALSE_ALARM).any())  # said once, not again
    assert narrow(run).count("rise towards") == 1


def test_the_element_that_is_named_is_one_that_is_narrow_for_sure() -> None:
    """Not one with a higher curvature that may be noise."""

    def elements() -> None:
        with pyro.plate("n", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(0)
    (site,) = MPImportance(elements, num_samples=30).run().diagnose(show=False).sites
    value = torch.tensor([[0.2], [0.3], [0.45]])
    fit = Fit(value, torch.tensor([[0.01], [0.01], [0.5]]), torch.full((3, 1), 60.0))
    ((found, _),) = too_narrow([replace(site, curvature=Curvature(fit, fit))], [])
    assert "2 of 3 marginals" in found
    assert "most: z[n=1], whose posterior is 1.6 times as wide" in found


def test_a_prior_with_the_posterior_in_its_tails() -> None:
    def tails() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", 0.45 * a.square())

    said = []
    for seed in range(6):
        pyro.set_rng_seed(seed)
        said.append(narrow(MPImportance(tails, num_samples=50).run()))
    assert sum(map(bool, said)) >= 4  # not where one particle has all the weight
    for found in filter(None, said):
        assert "'a': drawn from the prior, but the posterior lies in the prior's tails." in found
        assert "Widen the guide" not in found


@pytest.mark.parametrize("is_early", [True, False])
def test_a_guide_whose_training_was_stopped_early(is_early: bool) -> None:
    """
    An AutoNormal after 60 steps from narrow scales on, and the one that training ends at.

    Of the latter, two or more of ten runs are called narrow with a probability of 0.4 %.
    """

    def coins() -> None:
        with pyro.plate("n", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    end = init_to_value(values={"z": Y / 2})
    trained = AutoNormal(coins, init_loc_fn=end, init_scale=0.02 if is_early else 0.5**0.5)
    svi = SVI(coins, trained, ClippedAdam({"lr": 0.01}), Trace_ELBO())
    for _ in range(60 if is_early else 0):
        svi.step()
    exact = float(dist.Normal(0.0, 2**0.5).log_prob(Y).sum())
    said = []
    for seed in range(10):
        pyro.set_rng_seed(seed)
        run = MPImportance(coins, trained, num_samples=30).run()
        said.append(bool(narrow(run)))
        assert (abs(float(run.evidence()) - exact) > 2) == is_early
    assert sum(said) == 10 if is_early else sum(said) <= 1


@pytest.mark.parametrize("alone", [True, False])
def test_a_posterior_much_narrower_than_the_particles(alone: bool) -> None:
    """
    A mode of sd 0.02, alone or beside a wide one, where the prior has an sd of 10.

    Alone it is always seen, by the ESS. Beside a wide one, it is as soon as a particle is near it.
    """
    y = torch.tensor(3.0)

    def spike() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        log_p = dist.Normal(a, 0.02).log_prob(y)
        wide = dist.Normal(a, 5.0).log_prob(y)
        pyro.factor("y", log_p if alone else torch.logaddexp(log_p, wide) - math.log(2))

    found = {True: 0, False: 0}
    for seed in range(20):
        pyro.set_rng_seed(seed)
        run = MPImportance(spike, num_samples=100).run()
        nearest = float((run.marginals("a").samples - y).abs().min())
        if alone or nearest < 0.03 or nearest > 0.1:
            poor = bool(run.diagnose(show=False).problems)
            assert poor == (alone or nearest < 0.03)
            found[nearest < 0.03] += 1
    assert min(found.values()) > 2


def test_a_mode_without_particles_is_not_seen() -> None:
    """As the documentation says: half of the evidence is missing, and nothing tells."""

    def two_modes() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(a.abs(), 0.5), obs=torch.tensor(6.0))

    def one() -> None:
        pyro.sample("a", dist.Normal(5.9, 0.6))

    pyro.set_rng_seed(0)
    run = MPImportance(two_modes, one, num_samples=100).run()
    exact = dist.Normal(0.0, 25.25**0.5).log_prob(torch.tensor(6.0)) + math.log(2)
    assert float(run.evidence()) == pytest.approx(float(exact) - math.log(2), abs=0.1)
    diagnosis = run.diagnose(show=False)
    assert not diagnosis.problems
    assert "a mode of the posterior that no particle is in" in str(diagnosis).replace("\n", " ")


# --- the error of the evidence


def error_warnings(posterior: MPImportance) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior.evidence_error()
    assert len(caught) <= 1
    return " ".join(str(warning.message) for warning in caught)


def test_an_error_that_cannot_be_trusted_says_so() -> None:
    pyro.set_rng_seed(0)
    assert not error_warnings(MPImportance(model, guide(1.4), 30, num_replicates=8).run())
    few = MPImportance(model, guide(1.4), 30, num_replicates=3).run()
    text = error_warnings(few)
    assert text.startswith("evidence_error: ")
    assert "is not to be trusted. Evidences are skewed, and 3 replicates rarely" in text
    assert "off by 50 % or more" in text
    assert "outermost" not in text
    assert not error_warnings(few)  # once a run
    assert error_warnings(few.run())
    assert "not to be trusted" in str(few.diagnose(show=False))
    tight = MPImportance(model, guide(0.2), 30, num_replicates=8).run()
    assert "weights that rise towards their outermost particles" in error_warnings(tight)
    assert tight.evidence_error() < 3 < truth() - float(tight.evidence())  # so it should


def test_an_error_of_one_heavy_replicate_or_a_heavy_tail() -> None:
    def far() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 0.1), obs=torch.tensor(4.0))

    pyro.set_rng_seed(0)
    text = error_warnings(MPImportance(far, num_samples=10, num_replicates=10).run())
    share = re.search(r"One replicate has (\d+) % of the evidence of all 10", text)
    assert share is not None
    assert int(share[1]) > 50
    assert "k-hat above 0.7" in text


def test_the_warning_points_at_the_caller() -> None:
    pyro.set_rng_seed(0)
    run = MPImportance(model, num_samples=5, num_replicates=2).run()
    with pytest.warns(MPISWarning) as caught:
        run.evidence_error()
    assert caught[0].filename == __file__
