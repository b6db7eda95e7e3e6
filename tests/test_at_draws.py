# SPDX-License-Identifier: Apache-2.0
"""The model at posterior draws: densities against Pyro's own, predictions by their moments."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_mean
from models import random_case
from posteriors import MASK, SIGMA, Y, dims, elaborated, fitted, values
from pyro import poutine
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.results import at_draws
from pyro_mpis.results.pointwise import summed_latents, summed_log_likelihoods

pytest.importorskip("arviz", reason="needs pyro-mpis[arviz]")
pytest.importorskip("xarray", reason="needs pyro-mpis[arviz]")

pytestmark = pytest.mark.usefixtures("float64")


def conditioned(
    model: Callable[..., object], draws: Mapping[str, Tensor], number: int
) -> poutine.Trace:
    """Pyro's own trace of one draw, with its log densities."""
    trace = poutine.trace(
        poutine.condition(model, {name: draw[number] for name, draw in draws.items()})
    ).get_trace()
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.usefixtures("data_tree")
def test_densities_are_pyros(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random models, in plates or not: log joint and log likelihoods, draw by draw."""
    monkeypatch.setattr(at_draws, "CHUNK_ELEMENTS", 20)  # several chunks
    case = random_case(seed)
    pyro.set_rng_seed(seed)
    posterior = MPImportance(
        case.model, case.guide, num_samples=case.num_samples, groups=case.groups
    ).run()
    data = posterior.to_arviz(7)
    pyro.set_rng_seed(seed + 1)
    again = posterior.to_arviz(7, log_likelihood=False)
    assert "log_likelihood" not in again
    pyro.set_rng_seed(seed + 1)
    draws = posterior.sample(7)
    posterior_values, lp = values(again, "posterior"), values(again, "sample_stats")["lp"]
    for name, draw in draws.items():
        torch.testing.assert_close(
            posterior_values[name], draw.reshape(posterior_values[name].shape)
        )
    for number in (0, 3, 6):
        trace = conditioned(case.model, draws, number)
        torch.testing.assert_close(lp[number], trace.log_prob_sum())
    pyro.set_rng_seed(seed + 1)
    likelihood = values(posterior.to_arviz(7), "log_likelihood")
    found = summed_latents(posterior._sums[0].replicate)
    summed = () if found is None else found.observed  # not given by draws
    for site in case.model.sites:
        if site.obs is not None and site.name not in summed:
            expected = trace.nodes[site.name]["log_prob"]
            torch.testing.assert_close(
                likelihood[site.name][6], expected.reshape(likelihood[site.name].shape[1:])
            )
    assert dims(data, "log_likelihood").keys() == {
        s.name for s in case.model.sites if s.obs is not None
    }


@pytest.mark.usefixtures("data_tree")
def test_scales_masks_and_factors() -> None:
    """An observation's own density; nan where it is hidden, zero at the draws that hide it."""
    data = elaborated().to_arviz(40)
    draws, found = values(data, "posterior"), values(data, "log_likelihood")
    assert found.keys() == {"vector", "y", "count"}
    v, on = draws["v"], draws["on"]
    torch.testing.assert_close(
        found["vector"], dist.Normal(v, 1.0).log_prob(torch.ones(())).sum(-1)
    )
    y = torch.tensor([[0.5], [9.0], [-0.5]])
    expected = dist.Normal(v[..., 0], 1.0).log_prob(y)
    torch.testing.assert_close(found["y"][:, MASK], expected[:, MASK])
    assert bool(found["y"][:, ~MASK].isnan().all())
    counts = torch.tensor([[1.0], [0.0], [4.0]])
    expected = dist.Poisson(2.0).log_prob(counts) * on[:, None, None]
    assert set(on.tolist()) == {0.0, 1.0}
    torch.testing.assert_close(found["count"], expected)
    joint = (
        dist.Normal(0.0, 1.0).log_prob(draws["mu"])
        + dist.Bernoulli(0.99).log_prob(on)
        + dist.Normal(draws["mu"][:, None, None, None], 1.0).log_prob(v).sum((1, 2, 3))
        + 3 * found["vector"].sum((1, 2))
        + found["y"].nan_to_num(0.0).sum((1, 2))
        + expected.sum((1, 2))
        - draws["mu"].square()
    )
    torch.testing.assert_close(values(data, "sample_stats")["lp"], joint)


@pytest.mark.usefixtures("data_tree")
def test_partly_observed_sites() -> None:
    """Pyro's obs_mask: what is hidden is a latent, what is seen an observation."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor([1.0, 2.0, 3.0]), obs_mask=MASK)  # type: ignore[arg-type]

    data = MPImportance(model, num_samples=5).run().to_arviz(10)
    draws, found = values(data, "posterior"), values(data, "log_likelihood")["y_observed"]
    assert draws.keys() == {"mu", "y_unobserved", "y"}
    assert torch.equal(draws["y"][:, 1], draws["y_unobserved"][:, 1])
    assert found.isnan().tolist() == 10 * [[False, True, False]]
    expected = dist.Normal(draws["mu"], 1.0).log_prob(torch.tensor(3.0))
    torch.testing.assert_close(found[:, 2], expected)


@pytest.mark.usefixtures("data_tree")
def test_sites_that_do_not_count_and_values_unlike_their_plates() -> None:
    """A latent that is masked altogether; deterministic values that are not shaped as the plate."""

    def model() -> None:
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=False):
                pyro.sample("free", dist.Normal(0.0, 1.0))
                pyro.sample("unused", dist.Normal(z, 1.0), obs=torch.zeros(3))
            pyro.deterministic("one", torch.tensor(2.0))
            pyro.deterministic("five", torch.arange(5.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3))

    data = MPImportance(model, num_samples=4).run().to_arviz(6, prior=True)
    left = ("chain", "draw")
    assert (
        dims(data, "posterior")
        == dims(data, "prior")
        == {
            "z": (*left, "n"),
            "free": (*left, "n"),
            "one": left,
            "five": (*left, "five_dim_0"),
        }
    )
    assert dims(data, "log_likelihood").keys() == dims(data, "observed_data").keys() == {"y"}
    z = values(data, "posterior")["z"]
    standard = dist.Normal(0.0, 1.0)
    joint = (standard.log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.zeros(3))).sum(-1)
    joint += standard.log_prob(values(data, "posterior")["free"]).sum(-1)  # drawn, if masked
    torch.testing.assert_close(values(data, "sample_stats")["lp"], joint)


@pytest.mark.usefixtures("data_tree")
def test_predictions_have_the_models_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    z-tests of first and second moments, two false alarms in a million each.

    Given its draw, a posterior prediction is the model's: rejected is one that keeps the data.
    """
    monkeypatch.setattr(at_draws, "CHUNK_ELEMENTS", 2000)  # several chunks
    posterior = fitted(20)
    data = posterior.to_arviz(2000, prior=True, posterior_predictive=True)
    theta = values(data, "posterior")["theta"]
    residual = (values(data, "posterior_predictive")["y"] - theta) / SIGMA
    for group in range(4):
        check_mean(residual[:, group] + 1.0, 1.0)
        check_mean(residual[:, group].square(), 1.0)
    with pytest.raises(AssertionError):
        check_mean(((Y - theta) / SIGMA)[:, 0].square(), 1.0)
    drawn, seen = values(data, "prior"), values(data, "prior_predictive")["y"]
    check_mean(drawn["mu"].square() / 4.0, 1.0)
    check_mean((drawn["theta"] - drawn["mu"][:, None])[:, 2].square(), 1.0)
    check_mean(((seen - drawn["theta"]) / SIGMA)[:, 3].square(), 1.0)
    check_mean(((seen - drawn["theta"]) / SIGMA)[:, 3] + 1.0, 1.0)


@pytest.mark.usefixtures("data_tree")
def test_predictions_differ_between_draws_and_feed_what_follows() -> None:
    """Sites that read no latent are drawn anew for each draw; later sites read what was drawn."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("noise", dist.Normal(0.0, 1.0), obs=torch.tensor(0.1))
        first = pyro.sample("first", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
        pyro.deterministic("moved", first + 100.0)
        pyro.sample("second", dist.Normal(first + 100.0, 1e-6), obs=torch.tensor(100.5))

    data = MPImportance(model, num_samples=5).run().to_arviz(50, posterior_predictive=True)
    predicted = values(data, "posterior_predictive")
    assert predicted.keys() == {"noise", "first", "second"}
    assert len(predicted["noise"].unique()) == 50
    torch.testing.assert_close(predicted["second"], predicted["first"] + 100.0, atol=1e-4, rtol=0)
    assert torch.equal(values(data, "posterior")["moved"], torch.full((50,), 100.5))


def test_memory_is_bounded_by_the_largest_argument() -> None:
    """Probabilities of many categories count, not only the value; inside of other distributions."""

    def model() -> None:
        with pyro.plate("n", 10):
            fn = dist.Categorical(logits=torch.zeros(10, 3, 100)).to_event(1)
            pyro.sample("y", fn, obs=torch.zeros(10, 3))

    builder = MPImportance(model, num_samples=1).run()._sums[0].replicate
    sites = at_draws.ordinary_sites(builder.structure, builder.programs, {})
    assert sites["y"].elements == 3000
    assert at_draws._chunk_size(sites) == at_draws.CHUNK_ELEMENTS // 3000


def smoothed() -> None:
    """Compute much more than the sites hold."""
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    grid = torch.linspace(0.0, 1.0, 200)
    kernel = torch.exp(-((grid[:, None] - grid) ** 2) / length)
    pyro.sample("y", dist.Normal(kernel.mean(-1), 1.0).to_event(1), obs=grid)


def states() -> None:
    """Sum over pairs of states of each observation."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 50):
        one, other = (
            pyro.sample(name, dist.Categorical(torch.ones(20)), infer={"enumerate": "parallel"})
            for name in ("one", "other")
        )
        pyro.sample("y", dist.Normal(loc + one - other, 1.0), obs=torch.zeros(50))


@pytest.mark.parametrize(("model", "bytes_of_draw"), [(smoothed, 4e4 * 4), (states, 2e4 * 8)])
def test_memory_of_draws_is_within_the_limit(
    model: Callable[[], None], bytes_of_draw: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What programs compute on the way counts, and the sum over enumerated latents."""
    limit, together = 4 * 10**6, []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            together.append(len(next(v for a in args if isinstance(a, dict) for v in a.values())))
            return function(*args)

        return count

    monkeypatch.setattr(at_draws, "at_all", counted(at_draws.at_all))
    monkeypatch.setattr(at_draws, "summed_log_likelihoods", counted(summed_log_likelihoods))
    replicate = MPImportance(model, num_samples=3).run()._sums[0].replicate
    draws = {"loc": torch.zeros(100), "length": torch.ones(100)}
    draws |= dict.fromkeys(("one", "other"), torch.zeros(100, 50))
    draws = {name: draw for name, draw in draws.items() if name in replicate.structure.model}
    found, most = [], []
    for memory_limit in (None, limit):
        together.clear()
        replayed = at_draws.replay_draws(
            replicate.structure,
            replicate.programs,
            draws,
            100,
            likelihood=True,
            summed=summed_latents(replicate),
            memory_limit=memory_limit,
        )
        found.append(replayed.log_likelihoods["y"])
        most.append(max(together))
    torch.testing.assert_close(*found)
    assert most[0] > limit / bytes_of_draw
    assert most[1] <= limit / bytes_of_draw / 2


@pytest.mark.parametrize("number", [4, 5])
def test_deterministic_sites_for_single_values(number: int) -> None:
    """Also where the number of draws is a plate's."""

    def model() -> None:
        with pyro.plate("n", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)
        pyro.deterministic("first", z[0])

    posterior = MPImportance(model, num_samples=3).run()
    groups: Any = posterior.to_arviz(number)
    first, z = groups["posterior"]["first"], groups["posterior"]["z"]
    assert first.shape == (1, number)
    assert (first.values == z.values[..., 0]).all()


@pytest.mark.usefixtures("data_tree")
def test_a_program_that_differentiates() -> None:
    """Its derivatives are wrapped by torch while they are computed."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        slope = torch.func.grad(lambda x: x**3)(x)
        pyro.sample("y", dist.Normal(slope, 1.0), obs=torch.tensor(0.5))

    posterior = MPImportance(model, num_samples=5).run()
    data = posterior.to_arviz(7)
    x, found = values(data, "posterior")["x"], values(data, "log_likelihood")["y"]
    expected = dist.Normal(3.0 * torch.as_tensor(x) ** 2, 1.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(torch.as_tensor(found).reshape(-1), expected.reshape(-1))
