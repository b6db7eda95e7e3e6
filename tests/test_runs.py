# SPDX-License-Identifier: Apache-2.0
"""How programs are run: how often, in whose line they fail, and what they leave behind."""

import functools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning

Program = Callable[..., object]


class Counted:
    """A program that counts its runs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.runs = 0

    def __call__(self, *args: object) -> object:
        self.runs += 1
        return self.program(*args)


def schools(num_plates: int = 1) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("school", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.arange(4.0))


def schools_guide(num_plates: int = 1) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.2))
    pyro.sample("tau", dist.LogNormal(0.0, 0.6))
    with pyro.plate("school", 4):
        pyro.sample("theta", dist.Normal(mu, 1.5))


def flat() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(0.5))


def indexed() -> None:
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with pyro.plate("house", 4):
        pyro.sample("y", dist.Normal(alpha[..., [0, 0, 1, 2]], 1.0), obs=torch.ones(4))


def factorised() -> None:
    """Nothing that is proposed given something else: no mixture to evaluate."""
    pyro.sample("a", dist.Normal(0.0, 1.2))
    pyro.sample("b", dist.Normal(0.0, 1.5))


@pytest.mark.parametrize(
    ("model", "guide", "validate", "model_runs", "guide_runs"),
    [
        # plainly, to draw, factors, where the prior's mixtures and the check of plates are too
        (schools, None, True, 3, 0),
        # a guide that reads: plainly, to draw, mixtures
        (schools, schools_guide, True, 2, 3),
        (flat, None, True, 3, 0),
        (flat, factorised, True, 2, 2),
        # which element is read by index, and that check, of the prior: no mixtures
        (indexed, None, True, 5, 0),
        # what the method itself needs
        (schools, None, False, 3, 0),
        (schools, schools_guide, False, 2, 3),
        (indexed, None, False, 4, 0),
    ],
)
def test_number_of_runs(
    model: Program, guide: Program | None, validate: bool, model_runs: int, guide_runs: int
) -> None:
    counted_model = Counted(model)
    counted_guide = Counted(guide) if guide is not None else None
    with pyro.validation_enabled(validate):
        posterior = MPImportance(counted_model, counted_guide, num_samples=5).run()
    assert counted_model.runs == model_runs
    assert counted_guide is None or counted_guide.runs == guide_runs
    posterior.evidence()
    posterior.moments()
    posterior.marginals("a" if model is flat else "alpha" if model is indexed else "mu")
    posterior.sample(5)
    assert counted_model.runs == model_runs, "queries need no run"


@pytest.mark.parametrize(
    ("make", "model_runs", "guide_runs"),
    [
        # the guide plainly, to draw, and with the model
        (functools.partial(AutoNormal, init_scale=0.5), 2, 3),
        # no plate holds an index
        (AutoMultivariateNormal, 2, 3),
        (AutoDelta, 2, 3),
    ],
)
@pytest.mark.filterwarnings("ignore:the guide (draws|fixes)")
def test_number_of_runs_of_autoguides(
    make: Callable[[Program], Program], model_runs: int, guide_runs: int
) -> None:
    guide = make(schools)
    guide()
    counted_model, counted_guide = Counted(schools), Counted(guide)
    MPImportance(counted_model, counted_guide, num_samples=5).run()
    assert (counted_model.runs, counted_guide.runs) == (model_runs, guide_runs)


def test_number_of_runs_of_replicates() -> None:
    """The plain run is one for all."""
    counted = Counted(schools)
    MPImportance(counted, num_samples=5, num_replicates=4).run()
    assert counted.runs == 1 + 4 * 2


def test_names_no_line_of_the_standard_library() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):  # runs the sample statement within contextlib
            pyro.sample("y", dist.Normal(a.item(), 1.0), obs=torch.zeros(3))

    with pytest.warns(MPISWarning, match=r"after site 'a', in test_runs\.py:\d+, `pyro\.sample"):
        MPImportance(model, num_samples=7).run()


def test_errors_of_a_program_are_its_own() -> None:
    """Not taken for code that cannot be mapped: the plain run raises them."""

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * x[3], 1.0), obs=torch.tensor(0.0))

    with pytest.raises(IndexError, match="out of bounds"):
        MPImportance(model, num_samples=3).run(torch.zeros(2))


def test_programs_draw_the_same_numbers_whatever_torch_can_map() -> None:
    """The state of the generator after a run does not depend on evaluation."""

    def model(first: bool) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = a[..., 0] if first else a.select(-1, 0)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(0.0))

    after = []
    for first in (True, False):
        pyro.set_rng_seed(0)
        MPImportance(model, num_samples=3).run(first)
        after.append(torch.rand(()))
    assert after[0] == after[1]


def entered_by_hand(catches: bool) -> None:
    """A plate that an early end of the program does not leave."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    plate = pyro.plate("data", 3)
    plate.__enter__()
    try:
        x = pyro.sample("x", dist.Normal(mu, 1.0))
    except Exception:
        if not catches:
            raise
        x = pyro.sample("instead", dist.Normal(mu, 1.0))
    plate.__exit__(None, None, None)
    with plate:
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.linspace(-1.0, 1.0, 3))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("catches", [False, True])
def test_runs_end_early_whatever_the_program_does(catches: bool) -> None:
    """Drawing ends at the last latent: in a plate entered by hand, or in a try statement."""
    compare(functools.partial(entered_by_hand, catches), num_samples=2)
