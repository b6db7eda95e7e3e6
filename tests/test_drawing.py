# SPDX-License-Identifier: Apache-2.0
"""Particles are drawn by a mapped run: each from its own parents, and each by itself."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_mean
from compare import compare
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.options import Options
from pyro_mpis.particles.drawing import Drawn, draw_particles
from pyro_mpis.planning import plan_of, programs_of

pytestmark = pytest.mark.usefixtures("float64")

NARROW = 1e-7  # scale of what is to lie at its location


def drawn(model: Callable[[], None], num_samples: int) -> Drawn:
    pyro.set_rng_seed(0)
    plan, _, _ = plan_of(programs_of(model, None, (), {}), Options(num_samples=num_samples))
    return draw_particles(plan.structure, plan.programs, stratified=True)


class Own:
    """A user's distribution."""

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc

    def __call__(self) -> Tensor:
        return self.loc + NARROW * torch.rand(self.loc.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return 0.0 * (value - self.loc).sum()


class Recursive(dist.TorchDistribution):
    """One whose samples take a loop that depends on its arguments."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        value = torch.full(self.loc.shape, -10.0)
        while bool((value < self.loc).any()):
            value = torch.minimum(value + torch.rand(()), self.loc)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        return 0.0 * (value - self.loc).sum(-1)


CHILDREN: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda a: dist.Normal(a, NARROW).to_event(1),
    "expanded": lambda a: dist.Normal(a[0], NARROW).expand([2]).to_event(1),
    "unlike batch shapes": lambda a: dist.Normal(a, NARROW * torch.ones(3, 1)).to_event(2),
    "masked": lambda a: dist.Normal(a, NARROW).mask(torch.tensor(True)).to_event(1),
    "transformed": lambda a: dist.LogNormal(a, NARROW).to_event(1),
    "transform that reads": lambda a: dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), NARROW), [dist.transforms.AffineTransform(a, 1.0)]
    ).to_event(1),
    "MultivariateNormal": lambda a: dist.MultivariateNormal(a, NARROW**2 * torch.eye(2)),
    "LowRank": lambda a: dist.LowRankMultivariateNormal(
        a, NARROW * torch.ones(2, 1), NARROW**2 * torch.ones(2)
    ),
    "mixture": lambda a: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3)), dist.Normal(a[0] * torch.ones(3), NARROW)
    ),
    "Uniform": lambda a: dist.Uniform(a, a + NARROW).to_event(1),
    "Categorical": lambda a: dist.Categorical(logits=1e4 * torch.stack([-a[0], a[0]])),
    "Delta": lambda a: dist.Normal(dist.Delta(a)(), NARROW).to_event(1),
    "of the user's own": Own,
    "by rejection": Recursive,
}


@pytest.mark.parametrize("name", CHILDREN)
def test_each_particle_is_drawn_given_its_own_parent(name: str) -> None:
    """All of a child's randomness taken away, it is a function of the parent."""
    child = CHILDREN[name]

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("b", child(a))

    draws = drawn(model, 6).draws
    a, b = draws["a"].value, draws["b"].value
    assert draws["b"].reads_particles
    assert not draws["a"].reads_particles
    expected = torch.stack([child(parent)() for parent in a])
    torch.testing.assert_close(b, expected, rtol=0, atol=1e-5)
    for k in range(6):
        log_prob = child(a[k]).log_prob(b[k])
        torch.testing.assert_close(draws["b"].log_prob[k], log_prob)


@pytest.mark.parametrize("read", [False, True])
def test_particles_are_independent(read: bool) -> None:
    """Neither between particles nor between plate elements is a number used twice."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):
            pyro.sample("b", dist.Normal(0.0 * a if read else torch.tensor(0.0), 1.0))

    b = drawn(model, 2000).draws["b"].value  # (K, 3)
    assert len(b.flatten().unique()) == 6000
    check_mean(b.flatten(), 0.0)
    check_mean(b.flatten().square(), 1.0)
    check_mean(b[:, 0] * b[:, 1], 0.0)
    check_mean(b[1:, 0] * b[:-1, 0], 0.0)


def test_plates_in_programs_are_their_own() -> None:
    """A program sees its own dims only: no particles left of them."""
    shapes = []

    def model() -> None:
        with pyro.plate("p", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            shapes.append(a.shape)
            b = pyro.sample("b", dist.Normal(a[[2, 0, 1]], NARROW))
            shapes.append(b.shape)

    draws = drawn(model, 5).draws
    assert set(shapes) == {(3,)}
    a, b = draws["a"].value, draws["b"].value
    torch.testing.assert_close(b, a[:, [2, 0, 1]], rtol=0, atol=1e-5)


def test_supports_of_discrete_sites() -> None:
    def model() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        z = pyro.sample("z", dist.Bernoulli(p))
        with pyro.plate("n", 2):
            pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("of other totals", dist.Binomial(2 + z, torch.tensor(0.5)))

    draws = drawn(model, 4).draws
    assert draws["p"].support is None
    assert draws["of other totals"].support is None
    z, c = draws["z"].support, draws["c"].support
    assert z is not None
    assert z.tolist() == [0.0, 1.0]
    assert c is not None
    assert c.tolist() == [[0, 0], [1, 1], [2, 2]]


def mixing() -> None:
    """With particles in a batch dim each would read all of the others."""
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.2).to_event(1))
    pyro.sample("b", dist.Normal(0.5 * a.sum() + a.mean(), 1.2))


def stacked() -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.2).to_event(1))
    assert a.shape == (2,)
    pyro.sample("b", dist.Normal(0.5 * torch.stack([a[0], a[-1]]).sum(0), 1.2))


@pytest.mark.parametrize("guide", [None, mixing, stacked])
def test_guides_for_single_values(guide: Callable[[], None] | None) -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(a.sum(), 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(0.5))

    compare(model, guide, num_samples=5)


@pytest.mark.parametrize("num_samples", [None, 4])
def test_what_a_transform_remembers_is_no_argument(num_samples: int | None) -> None:
    """A transform with a cache holds values of an earlier run, at other particles."""

    def model(cache_size: int) -> None:
        double = dist.transforms.AffineTransform(torch.zeros(()), torch.tensor(2.0), 0, cache_size)
        transforms.setdefault(cache_size, double)
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        noise = dist.Normal(torch.zeros(2), 1.0)
        x = dist.TransformedDistribution(noise, [transforms[cache_size]]).to_event(1)
        x = pyro.sample("x", x)
        pyro.sample("y", dist.Normal(x.sum() + a, 1.0), obs=torch.tensor(2.0))

    transforms: dict[int, Any] = {}
    found = []
    for cache_size in (0, 1):
        pyro.set_rng_seed(0)
        posterior = MPImportance(model, num_samples=num_samples).run(cache_size)
        assert len(posterior._sums[0].replicate.structure.indices) == 2
        found.append(posterior.evidence())
    assert found[0] == found[1]
