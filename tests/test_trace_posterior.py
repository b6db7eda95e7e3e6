# SPDX-License-Identifier: Apache-2.0
"""The members that ``pyro.infer.Importance`` has: traces of the model and their weights."""

import math
import pickle
import warnings
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import Program, chain, plated, single
from pyro.infer import EmpiricalMarginal, Importance
from pyro.infer.abstract_infer import TracePosterior, TracePredictive
from pyro.ops.stats import waic
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning

X = torch.linspace(-1.0, 2.0, 50).unsqueeze(-1)
DATA = 0.7 * X + 0.3


def column() -> Tensor:
    """Batch dims that no plate declares."""
    w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0))
    pyro.sample("y", dist.Normal(w * X + b, 1.0), obs=DATA)
    return w


def nothing_observed() -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    return pyro.sample("b", dist.Poisson(a.exp()))


def enumerated() -> Tensor:
    z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.8))
    return z


def no_latents() -> float:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.8))
    return 3.0


PROGRAMS: dict[str, Program] = {
    program.__name__: program
    for program in (single, chain, plated, column, nothing_observed, enumerated)
}


def quietly(inference: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        return inference.run()


@pytest.mark.parametrize("name", PROGRAMS)
def test_types_and_shapes(name: str) -> None:
    """Every member of ``Importance`` has its type and shape."""
    program, num_samples = PROGRAMS[name], 7
    pyro.set_rng_seed(0)
    theirs: Any = Importance(program, num_samples=num_samples).run()
    ours: Any = quietly(MPImportance(program, num_samples=num_samples))
    assert issubclass(MPImportance, TracePosterior)
    assert ours.num_chains == theirs.num_chains
    assert ours.chain_ids == theirs.chain_ids
    for attribute in ("exec_traces", "log_weights", "chain_ids"):
        assert type(getattr(ours, attribute)) is type(getattr(theirs, attribute))
        assert len(getattr(ours, attribute)) == num_samples
    assert {weight.shape for weight in ours.log_weights} == {torch.Size([])}
    for our_trace, their_trace in zip(ours.exec_traces, theirs.exec_traces, strict=True):
        check_trace(our_trace, their_trace)
    check_trace(ours(), theirs())
    for method, kwargs in [
        ("get_log_normalizer", {}),
        ("get_normalized_weights", {}),
        ("get_normalized_weights", {"log_scale": True}),
        ("get_ESS", {}),
    ]:
        ours_of, theirs_of = (getattr(p, method)(**kwargs) for p in (ours, theirs))
        assert ours_of.shape == theirs_of.shape
        assert ours_of.dtype == theirs_of.dtype
        assert bool(ours_of.isfinite().all())
    assert float(ours.get_normalized_weights().sum()) == pytest.approx(1.0, abs=1e-4)
    for sites in (None, *latents(theirs)):
        check_empirical(EmpiricalMarginal(ours, sites), EmpiricalMarginal(theirs, sites))
    found, expected = (p.marginal(latents(theirs)) for p in (ours, theirs))
    assert found.empirical.keys() == expected.empirical.keys()
    assert found.support().keys() == expected.support().keys()
    for site in expected.empirical:
        check_empirical(found.empirical[site], expected.empirical[site])
        assert found.support()[site].shape == expected.support()[site].shape
    if name != "nothing_observed":
        for pointwise in (False, True):
            criterion = ours.information_criterion(pointwise)
            reference = theirs.information_criterion(pointwise)
            assert type(criterion) is type(reference)
            assert criterion.keys() == reference.keys()
            for key in reference:
                assert criterion[key].shape == reference[key].shape


def latents(posterior: Any) -> list[str]:
    nodes = posterior.exec_traces[0].nodes.items()
    return [n for n, site in nodes if site["type"] == "sample" and not site["is_observed"]][-2:]


def check_trace(ours: Any, theirs: Any) -> None:
    assert {type(ours), type(theirs)} == {Trace}
    assert ours.nodes.keys() == theirs.nodes.keys()
    for name, site in theirs.nodes.items():
        own = ours.nodes[name]
        assert own.keys() == site.keys(), name
        if site["type"] == "sample":
            assert own["is_observed"] == site["is_observed"]
            if hasattr(site["fn"], "batch_shape"):  # not of a plate's own site
                assert own["fn"].batch_shape == site["fn"].batch_shape
            assert own["value"].shape == site["value"].shape
            assert own["value"].dtype == site["value"].dtype
        if name == "_RETURN":
            assert own["value"].shape == site["value"].shape


def check_empirical(ours: Any, theirs: Any) -> None:
    assert ours.batch_shape == theirs.batch_shape
    assert ours.event_shape == theirs.event_shape
    assert ours.sample().shape == theirs.sample().shape
    if theirs.sample().is_floating_point():
        assert ours.mean.shape == ours.variance.shape == theirs.mean.shape
    assert ours.enumerate_support().shape == theirs.enumerate_support().shape


def test_one_index_is_importance_sampling(float64: None) -> None:
    """With one particle index the traces are the particles, and the weights theirs."""

    def guide() -> None:
        pyro.sample("a", dist.Normal(0.5, 0.8))

    posterior: Any = MPImportance(single, guide, num_samples=20).run()
    proposal = dist.Normal(0.5, 0.8)
    for trace, log_weight in zip(posterior.exec_traces, posterior.log_weights, strict=True):
        value = cast(Tensor, trace.nodes["a"]["value"])
        expected = trace.log_prob_sum() - proposal.log_prob(value)
        torch.testing.assert_close(log_weight, expected)
        torch.testing.assert_close(trace.nodes["_RETURN"]["value"], 2.0 * value)
    log_weights = torch.stack(posterior.log_weights)
    expected = log_weights.logsumexp(0) - math.log(20)
    torch.testing.assert_close(posterior.get_log_normalizer(), expected)
    torch.testing.assert_close(posterior.evidence(), expected)
    weights = posterior.get_normalized_weights()
    torch.testing.assert_close(posterior.get_ESS(), 1.0 / weights.square().sum())
    marginal = EmpiricalMarginal(posterior, "a")
    torch.testing.assert_close(marginal.mean, posterior.moments()["a"])
    torch.testing.assert_close(marginal.variance, posterior.marginals("a").variance)
    assert not torch.allclose(weights, torch.full((20,), 0.05), rtol=0.1)


def test_several_indices_give_joint_draws(float64: None) -> None:
    """Traces are draws from the MP posterior; return values belong to them."""
    pyro.set_rng_seed(0)
    number = 1000
    posterior: Any = MPImportance(chain, num_samples=number).run()
    assert {float(weight) for weight in posterior.log_weights} == {float(posterior.evidence())}
    torch.testing.assert_close(posterior.get_log_normalizer(), posterior.evidence())
    b, returned = EmpiricalMarginal(posterior, "b"), EmpiricalMarginal(posterior)
    for site, column in (("a", 0), ("b", 1)):
        draws = EmpiricalMarginal(posterior, site).enumerate_support()
        torch.testing.assert_close(returned.enumerate_support()[:, column], draws)
        marginal = posterior.marginals(site)
        z = (draws.mean() - marginal.mean) / (marginal.variance / number).sqrt()
        assert abs(float(z)) < 5.0  # given the particles; false alarm below 1e-6
        prior = (draws.mean() - 0.0) / (marginal.variance / number).sqrt()
        assert abs(float(prior)) > 5.0  # the prior's mean is rejected
    both = EmpiricalMarginal(posterior, ["a", "b"])
    assert both.event_shape == (2,)
    assert b.sample((3,)).shape == (3,)
    product = posterior.moments(torch.mul, "a", "b")
    draws = returned.enumerate_support().prod(-1)
    square = posterior.moments(lambda a, b: (a * b).square(), "a", "b")
    z = (draws.mean() - product) / ((square - product.square()) / number).sqrt()
    assert abs(float(z)) < 5.0
    ess = min(float(posterior.marginals(site).ess) for site in ("a", "b"))
    assert float(posterior.get_ESS()) == pytest.approx(ess)


def test_draws_are_made_once_a_run() -> None:
    pyro.set_rng_seed(0)
    posterior: Any = MPImportance(chain, num_samples=5).run()
    first = EmpiricalMarginal(posterior, "a").enumerate_support()
    assert torch.equal(first, EmpiricalMarginal(posterior, "a").enumerate_support())
    assert posterior.exec_traces is posterior.exec_traces
    posterior.run()
    assert not torch.equal(first, EmpiricalMarginal(posterior, "a").enumerate_support())


def test_call_draws_by_weight(float64: None) -> None:
    """A trace without observations, as often as its weight says."""
    pyro.set_rng_seed(0)
    posterior: Any = MPImportance(single, num_samples=4).run()
    particles = torch.stack([trace.nodes["a"]["value"] for trace in posterior.exec_traces])
    drawn = torch.stack([posterior().nodes["a"]["value"] for _ in range(2000)])
    counts = (drawn.unsqueeze(-1) == particles).sum(0).double()
    expected = 2000 * posterior.get_normalized_weights()
    statistic = float(((counts - expected).square() / expected).sum())
    assert statistic < 31.0  # chi-square, 3 degrees of freedom: false alarm below 1e-6
    even = torch.full((4,), 500.0)
    assert float(((counts - even).square() / even).sum()) > 31.0
    assert "y" not in posterior().nodes


def test_information_criterion(float64: None) -> None:
    posterior: Any = MPImportance(column, num_samples=300)
    pyro.set_rng_seed(0)
    posterior = quietly(posterior)
    weights = torch.stack(posterior.log_weights)
    likelihoods = torch.stack(
        [
            dist.Normal(trace.nodes["w"]["value"] * X + trace.nodes["b"]["value"], 1.0).log_prob(
                DATA
            )
            for trace in posterior.exec_traces
        ]
    )
    expected = waic(likelihoods, weights, pointwise=True)
    found = posterior.information_criterion(pointwise=True)
    torch.testing.assert_close(found["waic"], expected[0])
    torch.testing.assert_close(found["p_waic"], expected[1])


def test_no_latents() -> None:
    posterior = MPImportance(no_latents, num_samples=3).run()
    assert len(posterior.exec_traces) == 3
    expected = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.8))
    torch.testing.assert_close(posterior.get_log_normalizer(), expected)
    assert posterior.exec_traces[0].nodes["_RETURN"]["value"] == 3.0
    assert float(posterior.get_ESS()) == 3.0


def test_before_a_run() -> None:
    """As empty as ``Importance`` is."""
    posterior: Any = MPImportance(single, num_samples=3)
    assert posterior.exec_traces == posterior.log_weights == posterior.chain_ids == []
    assert posterior.information_criterion() == {}
    with pytest.warns(UserWarning, match="log_weights list is empty"):
        assert posterior.get_ESS() == 0
    with pytest.warns(UserWarning, match="log_weights list is empty"):
        assert posterior.get_normalized_weights() is None
    with pytest.warns(UserWarning, match="log_weights list is empty"):
        assert posterior.get_log_normalizer() is None


def test_trace_predictive(float64: None) -> None:
    """Pyro's older way to a predictive distribution."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(plated, num_samples=50).run()
    with pytest.warns(FutureWarning, match="deprecated"):
        predictive: Any = TracePredictive(plated, posterior, num_samples=5)
    assert EmpiricalMarginal(predictive.run(), "theta").sample().shape == (4,)
    assert len(list(posterior._traces())) == 50


def test_pickle(float64: None) -> None:
    """After a run, with the traces, if the model is a function of a module."""
    pyro.set_rng_seed(0)
    posterior: Any = MPImportance(chain, num_samples=5).run()
    before = pickle.loads(pickle.dumps(posterior))
    torch.testing.assert_close(before.moments(), posterior.moments())
    draws = EmpiricalMarginal(posterior, "a").enumerate_support()
    after = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(EmpiricalMarginal(after, "a").enumerate_support(), draws)
    assert len(EmpiricalMarginal(before, "a").enumerate_support()) == 5


def test_many_samples_of_one_site() -> None:
    pyro.set_rng_seed(0)
    posterior: Any = MPImportance(single, num_samples=2_500).run(torch.tensor(0.3))
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(0.3))
    ess = float(posterior.get_ESS())
    assert ess > 750
    assert abs(float(posterior.get_log_normalizer() - exact)) < 5 / ess**0.5
    assert posterior.get_normalized_weights().shape == (2_500,)
    assert len(posterior.log_weights) == 2_500
    mean = float(EmpiricalMarginal(posterior, "a").mean)  # makes 2,500 traces
    assert abs(mean - 0.3 / 1.25) < 5 * (0.2 / ess) ** 0.5
