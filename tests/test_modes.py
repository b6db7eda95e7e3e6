# SPDX-License-Identifier: Apache-2.0
"""Guides of several Gaussians at orders of labels that are not equally good."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_mpis import AutoPlateNormal, MPImportance, MPISWarning
from pyro_mpis.adaptation import learner, orders
from pyro_mpis.adaptation.adapting import started
from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.images import IMAGE_SITE, MODE_SITE, Images, Modes, signs_of, which_image
from pyro_mpis.adaptation.mixture import spread_correction
from pyro_mpis.adaptation.modes import Spread, told_of_orders
from pyro_mpis.adaptation.natural import Fitted
from pyro_mpis.adaptation.orders import near_orders
from pyro_mpis.adaptation.start import Start
from pyro_mpis.options import Options
from pyro_mpis.programs.messages import statements

WHOLE = torch.ones((), dtype=torch.bool)
DATA = torch.tensor([-2.3, -1.9, -1.2, 1.1, 2.0, 2.4, 2.6, 1.7])
GRID = torch.linspace(-12, 12, 1201, dtype=torch.double)


def plane() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(x.square().sum(), 1.0), obs=torch.tensor(3.0))


def begun(model: object) -> Start:
    return started(model, (), {}, Options(num_samples=2))  # type: ignore[arg-type]


def two(images: Images | None = None) -> AutoPlateNormal:
    """Two Gaussians that overlap, of different shapes."""
    gaussians = [
        Gaussian(
            [torch.tensor(mean, dtype=torch.double)], [torch.tensor(scale, dtype=torch.double)], {}
        )
        for mean, scale in [
            ([0.5, 1.0], [[0.9, 0.0], [0.3, 0.7]]),
            ([-1.0, 0.4], [[0.5, 0.0], [-0.2, 1.1]]),
        ]
    ]
    guide = begun(plane).guide(gaussians[0], frozenset(), tails=False)
    if images is not None:
        guide = guide.with_images(images)
    return guide.with_modes(Modes(tuple(gaussians), 0, WHOLE))


TURNED = Images(2, 0, WHOLE, signs=signs_of([frozenset({"x"})]))


@pytest.mark.parametrize("images", [None, TURNED])
def test_density_is_that_of_all_modes(images: Images | None) -> None:
    pyro.set_rng_seed(0)
    guide = two(images)
    normals = [
        dist.MultivariateNormal(g.means[0].flatten(), scale_tril=g.scales[0].reshape(2, 2))
        for g in map(guide.gaussian, range(2))
    ]
    seen = set()
    for _ in range(20):
        trace = poutine.trace(guide).get_trace()
        sites = statements(trace)
        x = sites["x"]["value"].detach()
        seen.add(int(which_image(sites[MODE_SITE]["value"], 2)))
        places = [x] if images is None else [x, -x]
        terms = torch.stack([normal.log_prob(at) for normal in normals for at in places])
        expected = float(terms.detach().logsumexp(0)) - math.log(len(terms))
        found = float(torch.as_tensor(trace.log_prob_sum()).detach())
        assert found == pytest.approx(expected, abs=1e-4)
    assert seen == {0, 1}


def log_evidence_of_plane() -> float:
    log_p = dist.Normal(0.0, 2.0).log_prob(GRID)
    log_p = log_p + log_p.unsqueeze(-1)
    squares = GRID.square() + GRID.square().unsqueeze(-1)
    log_p = log_p + dist.Normal(squares, 1.0).log_prob(torch.tensor(3.0))
    return float(log_p.logsumexp((0, 1))) + 2 * math.log(0.02)


def ratios(guide: AutoPlateNormal, runs: int) -> Tensor:
    """Run with few particles, many times: P / p."""
    numbers: dict[str | None, int] = {None: 5}
    numbers.update(guide.choices(is_final=False))
    posterior = MPImportance(
        plane, guide, num_samples=numbers, num_replicates=runs, disable_progbar=True
    ).run()
    return (posterior._replicates() - log_evidence_of_plane()).exp()


@pytest.mark.slow
def test_evidence_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Rejects a right program once in 15,000; the wrong one adds up densities of modes.

    The evidences of the modes, each by itself, add up to the same.
    """
    pyro.set_rng_seed(0)
    guide = two(TURNED)

    def z_of(found: Tensor) -> float:
        return float((found.mean() - 1) / (found.std() / math.sqrt(len(found))))

    assert abs(z_of(ratios(guide, 120))) < 4
    alone = ratios(guide.at_mode(0), 120) + ratios(guide.at_mode(1), 120)
    assert abs(z_of(alone)) < 4
    monkeypatch.setattr(
        "pyro_mpis.adaptation.guide.spread_correction",
        lambda *of: spread_correction(*of) + math.log(2),
    )
    assert abs(z_of(ratios(guide, 60))) > 4


def components(weights: Tensor, locs: Tensor) -> None:
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(locs, 3.0))
    with pyro.plate("data", len(DATA)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=DATA)


def unequal() -> None:
    components(torch.tensor([0.6, 0.4]), torch.tensor([-0.5, 0.5]))


def log_evidence_of(weights: Tensor, locs: Tensor) -> float:
    """By a grid over both locations."""
    log_p = dist.Normal(locs[0], 3.0).log_prob(GRID).unsqueeze(-1)
    log_p = log_p + dist.Normal(locs[1], 3.0).log_prob(GRID)
    for y in DATA:
        first = weights[0].log() + dist.Normal(GRID, 1.0).log_prob(y).unsqueeze(-1)
        log_p = log_p + torch.logaddexp(
            first, weights[1].log() + dist.Normal(GRID, 1.0).log_prob(y)
        )
    return float(log_p.logsumexp((0, 1))) + 2 * math.log(0.02)


def test_orders_that_matter_are_modes() -> None:
    """The better order has a share of 0.8; the other is not told, but found."""
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MPISWarning)
        posterior = MPImportance(unequal, disable_progbar=True).adapt()
    guide = posterior.guide
    assert isinstance(guide, AutoPlateNormal)
    assert guide.num_modes == 2
    assert guide.choices(is_final=True) == {MODE_SITE: 2}
    expected = log_evidence_of(torch.tensor([0.6, 0.4]), torch.tensor([-0.5, 0.5]))
    assert float(posterior.run().evidence()) == pytest.approx(expected, abs=0.03)
    one = MPImportance(posterior.model, guide.at_mode(1), num_samples=500, num_replicates=8)
    assert float(one.run().evidence()) < expected - 0.5  # a guide of one mode has that mode alone


def test_near_orders_of_labels_and_none_of_data() -> None:
    start = begun(unequal)
    gaussian = Gaussian([torch.tensor([-1.8, 1.9])], [0.4 * torch.eye(2)], {})
    guide = start.guide(gaussian, frozenset(), tails=True)
    (orders,) = near_orders(start, guide)
    assert list(orders.exchanges.orders) == [("loc", -1)]
    (_, gain) = orders.gains
    assert -2.5 < gain < 2.5

    def groups() -> None:
        with pyro.plate("group", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
            pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor([-5.0, 5.0]))

    start = begun(groups)
    means = torch.tensor([[-5.0], [5.0]])
    scales = torch.full((2, 1, 1), 0.5)
    guide = start.guide(Gaussian([means], [scales], {}), frozenset(), tails=True)
    assert near_orders(start, guide) == []


def test_an_order_without_a_barrier_is_no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements of a posterior with one mode, near enough that exchanged draws have some density."""

    def near() -> None:
        with pyro.plate("group", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor([-1.3, 1.3]))

    start = begun(near)
    means, scales = torch.tensor([[-1.3], [1.3]]), torch.ones(2, 1, 1)
    guide = start.guide(Gaussian([means], [scales], {}), frozenset(), tails=True)
    assert near_orders(start, guide) == []
    monkeypatch.setattr(orders, "BARRIER", -1.0)
    (found,) = near_orders(start, guide)
    assert len(found.gains) == 2


def test_orders_that_are_left_are_told() -> None:
    guide = two()
    assert told_of_orders(Spread(guide, 0.001, 24)) == []
    (told,) = told_of_orders(Spread(guide, 0.25, 24))
    assert "24 orders that matter" in told
    assert "about 25 % of the posterior is at the others" in told
    assert "0.29 too low" in told


def test_quantiles_are_those_of_all_modes() -> None:
    guide = two(TURNED)
    draws = guide.draws(4096, (), {})["x"]
    means = torch.stack([guide.gaussian(mode).means[0].flatten() for mode in range(2)])
    assert float(draws.mean(0).abs().max()) < 0.1  # over both images
    second = draws.square().mean(0)
    scales = torch.stack([guide.gaussian(mode).scales[0].reshape(2, 2) for mode in range(2)])
    expected = (means.square() + scales.square().sum(-1)).mean(0)
    assert torch.allclose(second, expected, rtol=0.1)
    assert guide.at_mode(1).choices(is_final=True) == {IMAGE_SITE: 2}


def test_a_fit_that_shrinks_to_a_point_is_no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = begun(plane)
    places = [(torch.zeros(b.size), torch.ones(b.size)) for b in begin.blocks]

    def ended_at(sd: float) -> Gaussian | None:
        gaussian = Gaussian(
            [mean for mean, _ in places], [sd * torch.eye(b.size) for b in begin.blocks], {}
        )
        found = Fitted(gaussian, 0.0, 0.1, True, [0.0], {})
        monkeypatch.setattr(learner, "fit", lambda *_, **__: found)
        return learner.refitted(begin, places, frozenset(), [], 4, lambda *_, **__: None)

    assert ended_at(0.01) is not None
    assert ended_at(1e-4) is None
