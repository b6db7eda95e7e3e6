# SPDX-License-Identifier: Apache-2.0
"""A guide that is spread over exact images of the posterior: its density, and unbiased evidence."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_mpis import MPImportance
from pyro_mpis.adaptation.adapting import started
from pyro_mpis.adaptation.alike import _moves, alike
from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.images import (
    IMAGE_SITE,
    Images,
    orders_of,
    signs_of,
    which_image,
)
from pyro_mpis.adaptation.labels import Labels
from pyro_mpis.adaptation.layout import by_plates, by_site
from pyro_mpis.adaptation.mixture import spread_correction
from pyro_mpis.adaptation.numbers import Numbers, by_latent, by_own_site
from pyro_mpis.adaptation.start import Start
from pyro_mpis.adaptation.symmetries import Symmetries
from pyro_mpis.options import Options
from pyro_mpis.programs.messages import statements

WHOLE = torch.ones((), dtype=torch.bool)


def components() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    fn = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", fn, obs=torch.tensor([-4.0, 0.0, 4.0]))


def two_components() -> None:
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    weights = torch.stack([p, 1 - p])
    fn = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, scale))
    with pyro.plate("data", 6):
        pyro.sample("y", fn, obs=torch.tensor([-2.5, -2.1, 1.5, 2.0, 2.2, 2.9]))


def two_named() -> None:
    """The same, with latents of a name each."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    loc = torch.stack([pyro.sample(f"loc{n}", dist.Normal(0.0, 3.0)) for n in range(2)])
    scale = torch.stack([pyro.sample(f"scale{n}", dist.LogNormal(0.0, 0.5)) for n in range(2)])
    weights = torch.stack([p, 1 - p])
    fn = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, scale))
    with pyro.plate("data", 6):
        pyro.sample("y", fn, obs=torch.tensor([-2.5, -2.1, 1.5, 2.0, 2.2, 2.9]))


def states() -> None:
    """Two hidden states, each with a location and a row of the transitions of its own."""
    loc = [pyro.sample(f"loc{n}", dist.Normal(0.0, 3.0)) for n in range(2)]
    row = dist.Dirichlet(torch.tensor([2.0, 2.0]))
    to = [pyro.sample(f"to{n}", row) for n in range(2)]
    probs = torch.tensor([0.5, 0.5])
    for t in range(4):
        x = pyro.sample(f"x_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
        fn = dist.Normal(torch.stack(loc)[x], 1.0)
        pyro.sample(f"y_{t}", fn, obs=torch.tensor([-2.0, 2.0, 2.5, -1.5])[t])
        probs = torch.stack(to)[x]


def signed() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(x * w, 0.5).to_event(1), obs=torch.tensor([1.0, -0.5]))


GROUPS = {
    components: Images(
        6,
        0,
        WHOLE,
        orders={("weights", -1): orders_of(3, [0, 1, 2]), ("loc", -1): orders_of(3, [0, 1, 2])},
    ),
    two_components: Images(
        2,
        0,
        WHOLE,
        orders={("loc", -1): orders_of(2, [0, 1]), ("scale", -1): orders_of(2, [0, 1])},
        shares={"p": torch.tensor([False, True])},
    ),
    signed: Images(2, 0, WHOLE, signs=signs_of([frozenset({"x", "w"})])),
    states: Images(
        2,
        0,
        WHOLE,
        orders={(f"to{n}", -1): orders_of(2, [0, 1]) for n in range(2)},
        alike={
            ("loc0", "loc1"): orders_of(2, [0, 1]),
            ("to0", "to1"): orders_of(2, [0, 1]),
        },
    ),
}


def begun(model: Callable[[], None], *, alone: bool = False) -> Start:
    start = started(model, (), {}, Options(num_samples=2))
    return Start(**{**vars(start), "blocks": start.blocks_by(by_site if alone else by_plates)})


def gaussian_of(start: Start, shift: float, sd: float) -> Gaussian:
    """One that has correlations, and a mean that no image leaves where it is."""
    means, scales = [], []
    for block in start.blocks:
        size = block.size
        lower = torch.eye(size) + 0.2 * torch.tril(torch.ones(size, size), -1)
        means.append((shift + torch.linspace(0, 1, size)).expand(*block.shape, size).double())
        scales.append((sd * lower).expand(*block.shape, size, size).double())
    return Gaussian(means, scales, {})


@pytest.mark.parametrize("model", GROUPS)
def test_density_is_that_of_the_mixture(model: Callable[[], None]) -> None:
    """Against Gaussian densities of the images' unconstrained numbers, one by one."""
    pyro.set_rng_seed(0)
    start, images = begun(model), GROUPS[model]
    gaussian = gaussian_of(start, 0.3, 0.5)
    guide = start.guide(gaussian, frozenset(), tails=False).with_images(images)
    names = [part.name for part in start.blocks[0].parts]
    supports = {name: start.sites[name]["fn"].support for name in names}
    normal = dist.MultivariateNormal(
        gaussian.means[0].flatten(), scale_tril=gaussian.scales[0].reshape(guide.blocks[0].size, -1)
    )
    seen = set()
    for _ in range(20):
        trace = poutine.trace(guide).get_trace()
        found = float(torch.as_tensor(trace.log_prob_sum()).detach())
        sites = statements(trace)
        values = {name: sites[name]["value"].detach() for name in names}
        seen.add(int(which_image(sites[IMAGE_SITE]["value"], images.number)))
        terms = []
        for which in range(images.number):
            log_q, numbers = torch.zeros(()).double(), []
            for name, value in images.of(values, which).items():
                transform = biject_to(supports[name])
                free = transform.inv(value.double())
                numbers.append(free.flatten())
                log_q = log_q - transform.log_abs_det_jacobian(free, value.double()).sum()
            terms.append(log_q + normal.log_prob(torch.cat(numbers)))
        expected = float(torch.stack(terms).logsumexp(0)) - math.log(images.number)
        assert found == pytest.approx(expected, abs=2e-3)
    assert len(seen) == images.number


def test_what_changes_places_with_alike_latents() -> None:
    """Elements of all of them or of none: else one exchange after another would be a third map."""
    start = begun(states)
    groups = alike(start)
    assert groups == [("loc0", "loc1"), ("to0", "to1")]
    moves = list(_moves(start, groups, groups[0]))
    rows = ((("to0", -1),), (("to1", -1),))
    assert (tuple(groups), rows) in moves
    assert all(axes in ((), rows) for sites, axes in moves if groups[1] in sites)
    assert ((groups[0],), rows[:1]) in moves


@pytest.mark.parametrize("alone", [False, True])
def test_alike_latents_share_an_index(alone: bool) -> None:
    """Else what is drawn of one would depend on the particles of another."""
    start = begun(states, alone=alone)
    guide = start.guide(gaussian_of(start, 0.4, 0.9), frozenset(), tails=False)
    labels = Labels((0, 1), 2, (), (("loc0", "loc1"),))
    assert Symmetries(start)._share_an_index(labels, guide) is not alone


def ratios(model: Callable[[], None], guide: AutoPlateNormal, log_p: float, runs: int) -> Tensor:
    """Run with few particles, many times: P / p."""
    numbers: dict[str | None, int] = {None: 3, IMAGE_SITE: 1}
    posterior = MPImportance(
        model, guide, num_samples=numbers, num_replicates=runs, disable_progbar=True
    ).run()
    return (posterior._replicates() - log_p).exp()


def test_numbers_are_those_of_the_latents() -> None:
    """Images have a particle each, whatever is said of the latents."""
    pyro.set_rng_seed(0)
    guide = begun(signed).guide(gaussian_of(begun(signed), 0.4, 0.9), frozenset(), tails=False)
    guide = guide.with_images(GROUPS[signed])
    own: Numbers = {None: 30, "_mpis_noise_0": 50, IMAGE_SITE: 2}
    assert by_latent(guide, own) == {None: 30, "x": 50, "w": 50}
    assert by_own_site(guide, {None: 30, "w": 50}) == own
    assert by_own_site(guide, own) == own
    assert by_own_site(guide, 7) == {None: 7}
    assert by_own_site(signed, {"w": 50}) == {"w": 50}
    posterior = MPImportance(signed, guide, num_samples={"x": 40, "w": 40, None: 3}).run()
    indices = posterior._sums[0].replicate.structure.indices
    assert {index.sites[0]: index.num_samples for index in indices} == {
        "_mpis_noise_0": 40,
        IMAGE_SITE: 2,
    }
    with pytest.raises(ValueError, match=r"'x', 'w' share one.*'x': 40, 'w': 50"):
        MPImportance(signed, guide, num_samples={"x": 40, "w": 50}).run()


def steps() -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("column", 2):
        w = pyro.sample("w", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(w.abs(), 0.7), obs=torch.tensor([1.0, 0.5]))


def log_evidence_of_steps() -> float:
    grid = torch.linspace(-9, 9, 3601, dtype=torch.double)
    log_p = dist.Normal(0.0, 1.0).log_prob(grid)
    for y in (1.0, 0.5):
        of_w = dist.Normal(grid, 1.0).log_prob(grid.unsqueeze(-1))
        of_w = of_w + dist.Normal(grid.abs(), 0.7).log_prob(torch.tensor(y)).unsqueeze(-1)
        log_p = log_p + of_w.logsumexp(0) + math.log(0.005)
    return float(log_p.logsumexp(0)) + math.log(0.005)


TURNED = signs_of([frozenset({"m", "w"})])


@pytest.mark.parametrize(
    ("alone", "images"),
    [
        pytest.param(
            False,
            Images(2, 0, torch.ones(1, dtype=torch.bool), signs=TURNED),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            True, Images(2, 1, torch.tensor([False, True]), signs=TURNED), marks=pytest.mark.slow
        ),
    ],
)
def test_evidence_is_unbiased(alone: bool, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The images overlap, and the block that tells them apart is outside of plates or within.

    Rejects a right program once in 15,000. The wrong one adds up densities of
    images, where it is their mean.
    """
    pyro.set_rng_seed(0)
    start = begun(steps, alone=alone)
    guide = start.guide(gaussian_of(start, 0.4, 0.9), frozenset(), tails=False)
    guide = guide.with_images(images)
    log_p = log_evidence_of_steps()
    found = ratios(steps, guide, log_p, 150)
    z = (found.mean() - 1) / (found.std() / math.sqrt(len(found)))
    assert abs(float(z)) < 4
    monkeypatch.setattr(
        "pyro_mpis.adaptation.guide.spread_correction",
        lambda *of: spread_correction(*of) + math.log(2) * images.element,
    )
    wrong = ratios(steps, guide, log_p, 50)
    z = (wrong.mean() - 1) / (wrong.std() / math.sqrt(len(wrong)))
    assert abs(float(z)) > 4


@pytest.mark.parametrize("model", [two_components, two_named])
def test_labels_of_a_mixture(model: Callable[[], None]) -> None:
    """Both orders are as likely; the evidence is that of brute force."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, disable_progbar=True).adapt().run()
    assert isinstance(posterior.guide, AutoPlateNormal)
    assert posterior.guide.images is not None
    moments = posterior.moments()
    assert float(moments["p"]) == pytest.approx(0.5, abs=0.03)
    loc = moments["loc"] if "loc" in moments else [moments["loc0"], moments["loc1"]]
    assert float((loc[0] - loc[1]).abs()) < 0.2
    draws = 200_000
    torch.manual_seed(1)
    numbers = torch.randn(draws, 5, dtype=torch.double) * torch.tensor([0.7, 0.8, 0.8, 0.4, 0.4])
    other = torch.rand(draws, 1) < 0.5
    centre = torch.tensor([-0.6, -2.2, 2.1, -0.3, -0.3], dtype=torch.double)
    image = [0, 2, 1, 4, 3]
    turn = torch.tensor([-1.0, 1, 1, 1, 1], dtype=torch.double)
    at = centre + 1.3 * numbers
    at = torch.where(other, turn * at[:, image], at)
    proposal = dist.Normal(centre, 1.3 * torch.tensor([0.7, 0.8, 0.8, 0.4, 0.4])).to_event(1)
    log_q = torch.logaddexp(proposal.log_prob(at), proposal.log_prob(turn * at[:, image]))
    p, loc, scale = at[:, 0].sigmoid(), at[:, 1:3], at[:, 3:].exp()
    log_joint = dist.Beta(2.0, 2.0).log_prob(p) + (p * (1 - p)).log() + at[:, 3:].sum(-1)
    log_joint = log_joint + dist.Normal(0.0, 3.0).log_prob(loc).sum(-1)
    log_joint = log_joint + dist.LogNormal(0.0, 0.5).log_prob(scale).sum(-1)
    weights = torch.stack([p, 1 - p], -1).log()
    for y in (-2.5, -2.1, 1.5, 2.0, 2.2, 2.9):
        of_y = dist.Normal(loc, scale).log_prob(torch.tensor(y)) + weights
        log_joint = log_joint + of_y.logsumexp(-1)
    weight = log_joint - log_q + math.log(2)
    expected = float(weight.logsumexp(0)) - math.log(draws)
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.08)


def four_signs() -> None:
    """Too many images for all of them, and too many numbers for draws from the prior."""
    xs = [pyro.sample(f"x{n}", dist.Normal(0.0, 2.0)) for n in range(4)]
    pyro.sample("rest", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    for n, x in enumerate(xs):
        pyro.sample(f"y{n}", dist.Normal(x.abs(), 0.2), obs=torch.tensor(2.0 + 0.3 * n))


def test_of_many_images_some_are_reached() -> None:
    pyro.set_rng_seed(0)
    start = begun(four_signs)
    mean = torch.cat([2.0 + 0.3 * torch.arange(4), torch.zeros(8)])
    scale = torch.diag(torch.cat([torch.full((4,), 0.2), torch.ones(8)]))
    guide = start.guide(Gaussian([mean], [scale], {}), frozenset(), tails=True)
    symmetries = Symmetries(start)
    (told,) = symmetries.told(guide, is_sure=True)
    assert "one of 16 of the same evidence. Add 4 times log 2 = 2.7724" in told
    guide = symmetries.spread(guide)
    (told,) = symmetries.told(guide, is_sure=True)
    assert "one of 2 of the same evidence. Add 1 times log 2 = 0.6931" in told
    assert guide.images is not None
    assert guide.images.number == 8
    numbers: dict[str | None, int] = {None: 500, IMAGE_SITE: 8}
    posterior = MPImportance(four_signs, guide, num_samples=numbers, num_replicates=4).run()
    grid = torch.linspace(0, 12, 12001, dtype=torch.double)
    expected = math.log(2) * 3
    for n in range(4):
        log_p = dist.Normal(0.0, 2.0).log_prob(grid)
        log_p = log_p + dist.Normal(grid, 0.2).log_prob(torch.tensor(2.0 + 0.3 * n))
        expected += float(log_p.logsumexp(0)) + math.log(0.001)
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.05)
    means = torch.stack([posterior.moments()[f"x{n}"] for n in range(4)])
    assert int((means.abs() < 0.1).sum()) == 3


def test_a_guide_stays_at_one_mode_of_an_uneven_posterior() -> None:
    def uneven() -> None:
        x = pyro.sample("x", dist.Normal(0.1, 2.0))
        pyro.sample("y", dist.Normal(x.square(), 0.2), obs=torch.tensor(4.0))

    start = begun(uneven)
    gaussian = Gaussian([torch.tensor([2.0])], [torch.tensor([[0.1]])], {})
    guide = start.guide(gaussian, frozenset(), tails=True)
    assert Symmetries(start).spread(guide).images is None
