# SPDX-License-Identifier: Apache-2.0
"""Labels that can be exchanged are found, and a guide that has them in one order is told of it."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.adaptation.adapting import started
from pyro_mpis.adaptation.alike import MOST_NAMES, alike
from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.labels import Point, _exchangeable, _log_joint, axes_of
from pyro_mpis.adaptation.modes import Place, _share, at_other_orders
from pyro_mpis.adaptation.orders import Orders
from pyro_mpis.adaptation.symmetries import Symmetries
from pyro_mpis.options import Options

DATA = torch.tensor([-2.0, -1.8, 1.9, 2.2, -2.2])
START = torch.tensor([0.5, 0.5])


def chain(start: torch.Tensor = START) -> None:
    """Two hidden states: their locations, and transitions from and to them."""
    with pyro.plate("state", 2):
        to = pyro.sample("to", dist.Dirichlet(torch.tensor([2.0, 2.0])))
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    probs = start
    for t in pyro.markov(range(len(DATA))):
        x = pyro.sample(f"x_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(loc[x], 1.0), obs=DATA[t])
        probs = to[x]


def uneven() -> None:
    chain(torch.tensor([0.6, 0.4]))


def components() -> None:
    """A mixture of vectors; a third vector of the same size has nothing to do with labels."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    pyro.sample("other", dist.Normal(torch.arange(3.0), 1.0).to_event(1))
    fn = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0))
    with pyro.plate("data", len(DATA)):
        pyro.sample("y", fn, obs=DATA)


def regression() -> None:
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    inputs = torch.stack([DATA, DATA.cos()], 1)
    pyro.sample("y", dist.Normal(inputs @ slopes, 0.1).to_event(1), obs=3 * DATA - 3 * DATA.cos())


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        (chain, 2, ((("to", -2), ("loc", -1)), (("to", -1),))),
        (uneven, 2, ()),
        (components, 3, ((("weights", -1),), (("loc", -1),))),
        (regression, 2, ()),
    ],
)
def test_what_is_exchanged_together(model: object, size: int, expected: object) -> None:
    pyro.set_rng_seed(0)
    start = started(config_enumerate(model), (), {}, Options(num_samples=2))
    values = {name: start.sites[name]["value"].detach() for name in start.priors}
    point = Point(values, _log_joint(start, values))
    assert _exchangeable(start, point, axes_of(start)[size], [(0, 1)]) == expected


def test_joint_density_is_summed_over_states() -> None:
    """Against the forward algorithm."""
    start = started(chain, (), {}, Options(num_samples=2))
    to, loc = torch.tensor([[0.3, 0.7], [0.6, 0.4]]), torch.tensor([-1.0, 2.0])
    alpha = START.log()
    for y in DATA:
        alpha = ((alpha + dist.Normal(loc, 1.0).log_prob(y)).unsqueeze(1) + to.log()).logsumexp(0)
    prior = dist.Dirichlet(torch.tensor([2.0, 2.0])).log_prob(to).sum()
    prior += dist.Normal(0.0, 3.0).log_prob(loc).sum()
    found = _log_joint(start, {"to": to, "loc": loc})
    assert found == pytest.approx(float(prior + alpha.logsumexp(0)), abs=1e-4)


def test_a_guide_in_one_order_is_told_of_the_other() -> None:
    start = started(chain, (), {}, Options(num_samples=2))
    (block,) = start.blocks  # with particles of its own for each state
    means = torch.tensor([[1.0, -2.0], [-1.0, 2.0]]).reshape(*block.shape, 2)
    scales = 0.3 * torch.eye(2).expand(*block.shape, 2, 2)
    guide = start.guide(Gaussian([means], [scales], {}), frozenset(), tails=False)
    symmetries = Symmetries(start)
    (told,) = symmetries.told(guide, is_sure=True)
    assert re.match(r"2 elements of 'loc', 'to' can .* up to log 2 = 0\.6931", told)
    assert symmetries.spread(guide).images is None

    def refit(places: Sequence[Place]) -> Gaussian:
        return Gaussian([mean for mean, _ in places], [sd.diag_embed() for _, sd in places], {})

    spread = at_other_orders(start, guide, refit)
    assert spread.guide.num_modes == 2
    assert symmetries.told(spread.guide, is_sure=True) == []
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MPISWarning)
        MPImportance(regression).adapt()  # its elements are as far apart


@pytest.mark.parametrize(("gain", "share"), [(math.log(3.0), 0.25), (800.0, 0.0), (-800.0, 1.0)])
def test_the_share_of_an_order_that_another_is_far_from(gain: float, share: float) -> None:
    orders = cast(Orders, SimpleNamespace(gains=[0.0, gain]))
    assert _share(orders, 0) == pytest.approx(share)


def named(y: torch.Tensor, prior: tuple[float, float] = (2.0, 2.0)) -> None:
    """A mixture of two, each with latents of its own: too many for draws from the prior."""
    share = pyro.sample("share", dist.Beta(torch.tensor(prior[0]), torch.tensor(prior[1])))
    loc0 = pyro.sample("loc0", dist.Normal(torch.zeros(5), 5.0).to_event(1))
    loc1 = pyro.sample("loc1", dist.Normal(torch.zeros(5), 5.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        loc = torch.where(z.unsqueeze(-1) == 1, loc1, loc0)
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)


def four(y: torch.Tensor) -> None:
    """More orders than images of a guide."""
    names = [f"loc{n}" for n in range(4)]
    loc = [pyro.sample(name, dist.Normal(torch.zeros(5), 5.0).to_event(1)) for name in names]
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(4)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(torch.stack(loc)[z], 1.0).to_event(1), obs=y)


def slopes(y: torch.Tensor) -> None:
    """Latents that are alike, but not exchangeable: each has its own predictor."""
    with pyro.plate("few", 3):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    rows = torch.linspace(-1.0, 1.0, len(y))
    b0 = pyro.sample("b0", dist.Normal(0.0, 5.0))
    b1 = pyro.sample("b1", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        mean = b0 * rows + b1 * rows.square() + shift.sum() / 3
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y[:, 0])


TWO = torch.cat([torch.full((6, 5), -1.5), torch.full((9, 5), 1.5)])
TWO = TWO + 0.3 * torch.linspace(-1.0, 1.0, 75).reshape(15, 5)


CENTRES = torch.tensor([[3.0, 1.0, -5.0, 2.0, 0.0], [-4.0, 2.0, 1.0, 5.0, -1.0]])
CENTRES = torch.cat([CENTRES, torch.tensor([[0.0, -6.0, 4.0, -2.0, 3.0], [5.0, 6.0, 2.0, -4, -3]])])
FOUR = CENTRES.repeat_interleave(6, 0) + 0.5 * torch.linspace(0.0, 40.0, 120).cos().reshape(24, 5)


@pytest.mark.parametrize(
    ("model", "data", "images", "number"),
    [
        (named, TWO, 2, 0),
        (partial(named, prior=(2.0, 3.0)), TWO, 0, 0),  # orders that are not equally good
        (slopes, TWO, 0, 0),
        (four, FOUR, 0, 1),
    ],
)
def test_labels_that_are_latents_with_names_of_their_own(
    model: Callable[[torch.Tensor], None], data: torch.Tensor, images: int, number: int
) -> None:
    pyro.set_rng_seed(0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        guide = MPImportance(model, disable_progbar=True).adapt(data).guide
    assert isinstance(guide, AutoPlateNormal)
    assert (guide.images.number if guide.images is not None else 0) == images
    messages = [str(w.message) for w in told if "change places" in str(w.message)]
    assert len(messages) == number
    for message in messages:
        assert message.startswith("'loc0', 'loc1', 'loc2', 'loc3' can change places")
        assert f"log 24 = {math.log(24):.4f}" in message


def test_latents_are_alike_in_shape_and_prior() -> None:
    def model() -> None:
        for name in ("m0", "m1", "m2", "width"):
            pyro.sample(name, dist.Normal(0.0, 2.0))
        pyro.sample("s0", dist.LogNormal(0.0, 1.0))
        pyro.sample("s1", dist.LogNormal(0.0, 2.0))  # of another prior
        pyro.sample("left", dist.Gamma(2.0, 1.0))
        pyro.sample("right", dist.Gamma(2.0, 1.0))
        pyro.sample("rate", dist.Gamma(3.0, 1.0))  # beside those: of no number, and another prior
        pyro.sample("net.0.bias", dist.Beta(2.0, 2.0))
        pyro.sample("share", dist.Beta(1.0, 1.0))
        pyro.sample("net.1.bias", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", 2):
            pyro.sample("x0", dist.Exponential(1.0))
            pyro.sample("x1", dist.Exponential(1.0))

    assert alike(started(model, (), {}, Options(num_samples=2))) == [
        ("m0", "m1", "m2"),
        ("left", "right"),
        ("net.0.bias", "net.1.bias"),
    ]


def test_few_of_many_latents_are_compared() -> None:
    """Each has a prior of its own, so that all pairs would be compared."""

    def model(number: int) -> None:
        for i in range(number):
            pyro.sample(f"x{i}", dist.Normal(float(i // 2), 1.0))

    def found(number: int) -> int:
        return len(alike(started(model, (number,), {}, Options(num_samples=2))))

    assert found(MOST_NAMES) == MOST_NAMES // 2
    assert found(MOST_NAMES + 1) == 0
