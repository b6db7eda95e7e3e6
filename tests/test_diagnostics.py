# SPDX-License-Identifier: Apache-2.0
"""What is poor is said, at the right site."""

import copy
import math
import re
import sys
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import diagnosed, weighted, wide
from pyro import settings

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.results.diagnostics import (
    Diagnosis,
    _heavy_tails,
    _unsure_evidence,
    diagnose,
    evidence_error,
)

pytestmark = pytest.mark.usefixtures("float64")


def plated() -> None:
    """A global, a vector in an outer plate of two, a scalar in an inner one of three."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("outer", 2, dim=-2):
        v = pyro.sample("v", dist.Normal(mu.unsqueeze(-1), torch.ones(3)).to_event(1))
        with pyro.plate("inner", 3, dim=-1):
            x = pyro.sample("x", dist.Normal(v.sum(-1), 1.0))
            y = torch.tensor([[0.3, -0.5, 1.2], [0.8, 0.1, 9.0]])
            pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def test_numbers_of_every_site_and_element() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(plated, num_samples=60, num_replicates=2).run()
    diagnosis = posterior.diagnose(show=False)
    assert [site.name for site in diagnosis.sites] == ["mu", "v", "x"]
    for site in diagnosis.sites:
        marginal = posterior.marginals(site.name)
        weights = marginal.weights
        assert site.num_particles == 120
        torch.testing.assert_close(site.ess, 1 / weights.square().sum(-1))
        torch.testing.assert_close(site.heaviest, weights.max(-1).values)
        torch.testing.assert_close(site.pareto_k, marginal.pareto_k, equal_nan=True)
        assert site.lowest_ess == pytest.approx(float(site.ess.min()))
    x = diagnosis.sites[2]
    assert x.plates == ("outer", "inner")
    assert [x.element(i) for i in (0, 5)] == ["x[outer=0, inner=0]", "x[outer=1, inner=2]"]
    assert x.worst == "x[outer=1, inner=2]"  # the observation of 9
    assert diagnosis.sites[1].element(1) == "v[outer=1]"
    assert diagnosis.sites[0].worst == "mu"
    assert diagnosis.bottleneck is min(diagnosis.sites, key=lambda site: site.lowest_ess)
    assert diagnosis.log_evidence == pytest.approx(float(posterior.evidence()))
    with pytest.warns(MPISWarning, match="2 replicates rarely have a high one"):
        assert diagnosis.evidence_error == pytest.approx(posterior.evidence_error())
    line = f"(standard error {diagnosis.evidence_error:.2g} over 2 replicates, not to be trusted)"
    assert line in str(diagnosis)


def test_it_is_shown_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script prints it; a prompt or a notebook shows what the call returns."""
    posterior = MPImportance(plated, num_samples=6).run()
    monkeypatch.delattr(sys, "ps1", raising=False)
    diagnosis = posterior.diagnose()
    assert capsys.readouterr().out == f"{diagnosis}\n"
    assert repr(diagnosis) == str(diagnosis)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    posterior.diagnose()
    assert not capsys.readouterr().out
    posterior.diagnose(show=True)
    assert capsys.readouterr().out == f"{diagnosis}\n"


def test_it_prints_and_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(plated, num_samples=6).run()
    state = torch.get_rng_state()
    posterior.diagnose(show=False)
    assert not capsys.readouterr().out
    diagnosis = posterior.diagnose()
    printed = capsys.readouterr().out
    assert printed == f"{diagnosis}\n"
    assert torch.equal(torch.get_rng_state(), state)
    assert max(map(len, printed.splitlines())) <= 100
    assert "Poor: " in printed
    for site in ("mu", "v", "x"):
        assert re.search(rf"^{site} +prior +6 ", printed, re.MULTILINE)


def test_nothing_is_poor() -> None:
    text = str(
        diagnosed(lambda: wide(1.0), lambda: pyro.sample("a", dist.Normal(0.3, 0.08)), K=100)
    )
    assert "Nothing is poor" in text
    assert "Poor" not in text
    assert "num_replicates=8 would tell" in text


def test_no_site_has_particles() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    diagnosis = diagnosed(model)
    assert diagnosis.bottleneck is None
    assert "summed over its whole support" in str(diagnosis)


def test_no_site_is_observed() -> None:
    def model(y: torch.Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    (problem,) = diagnosed(model).problems
    assert "observes nothing" in problem.found
    posterior = MPImportance(model, num_samples=20).run(torch.tensor(0.1))
    assert not posterior.diagnose(show=False).problems


def test_a_long_table_shows_the_lowest() -> None:
    def model() -> None:
        for i in range(40):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(z, 39.1 - i), obs=torch.tensor(0.0))

    diagnosis = diagnosed(model)
    text = str(diagnosis)
    shown = [i for i in range(40) if re.search(rf"^z_{i} ", text, re.MULTILINE)]
    lowest = sorted(range(40), key=lambda i: diagnosis.sites[i].lowest_ess)[:30]
    assert shown == sorted(lowest)
    assert shown[-10:] == list(range(30, 40))  # the most informed
    assert "and 10 sites of higher ESS" in text


def test_a_run_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is asked; again after another run, and by other thresholds."""
    calls = []

    def counted(*args: object) -> Diagnosis:
        calls.append(args)
        return diagnose(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("pyro_mpis.posterior.diagnose", counted)
    posterior = MPImportance(wide, num_samples=20, num_replicates=8).run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        posterior.evidence_error()
        posterior.summary()
        before = posterior.diagnose(show=False)
        assert copy.copy(posterior).diagnose(show=False) is before
        assert len(calls) == 1
        with settings.context(mpis_low_ess=1e6):
            assert "below 1e+06" in str(posterior.diagnose(show=False))
        posterior.run()
    assert posterior.diagnose(show=False).log_evidence != before.log_evidence
    assert len(calls) == 3


def test_before_run() -> None:
    with pytest.raises(RuntimeError, match=r"call \.run"):
        MPImportance(plated, num_samples=3).diagnose()


def test_site_of_replicates_in_plates_of_no_name() -> None:
    """Batch dims of size one outside of all plates are not numbered."""

    def model() -> None:
        with pyro.plate("outer", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(2, 1))

    (site,) = diagnosed(model).sites
    assert site.ess.shape == (2, 1)
    assert site.element(1) == "z[outer=1]"


def test_heavy_tails() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.StudentT(1.0, 0.0, 1.0))
        pyro.sample("y", dist.StudentT(1.0, mu, 1.0), obs=torch.tensor(8.0))

    def guide() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    diagnosis = diagnosed(model, guide, K=1000)
    (problem,) = (p for p in diagnosis.problems if "k-hat" in p.found)
    worst = diagnosis.bottleneck
    assert worst is not None
    assert f"(highest: mu, {worst.highest_k:.2f})" in problem.found
    assert "Make the guide wider" in problem.helps[0]
    heavier = "may not settle" if worst.highest_k > 1 else "less exact than the ESS says"
    assert heavier in problem.found

    def tight() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 0.2), obs=torch.tensor(5.0))

    problems = diagnosed(tight, K=1000).problems
    assert any("k-hat" in p.found and "The prior has few particles" in p.helps[0] for p in problems)


def test_k_hat_counts_only_where_weights_are_uneven() -> None:
    """Where the effective sample size is below half of the particles."""
    site = replace(
        diagnosed(wide, K=60).sites[0],
        ess=torch.tensor([30.1, 29.9, 10.0]),
        pareto_k=torch.tensor([0.9, 0.3, math.nan]),
    )
    assert site.highest_k == pytest.approx(0.3)
    assert math.isnan(replace(site, pareto_k=torch.full((3,), math.nan)).highest_k)


# --- where poor begins


@pytest.mark.parametrize(("ess", "poor"), [(4.9, True), (5.1, False)])
def test_an_effective_sample_size_below_five_is_poor(ess: float, poor: bool) -> None:
    total = MPImportance(wide, num_samples=100).run()._sums[0]
    diagnosis = diagnose(total, {"a": weighted(ess, 40)}, {"a"}, torch.zeros(1))
    assert diagnosis.sites[0].lowest_ess == pytest.approx(ess)
    assert bool(diagnosis.problems) == poor


@pytest.mark.parametrize(("k_hat", "poor"), [(0.69, False), (0.71, True)])
def test_a_k_hat_above_seven_tenths_is_poor(k_hat: float, poor: bool) -> None:
    site = replace(
        diagnosed(wide, K=60).sites[0],
        ess=torch.tensor([30.1, 29.9]),
        pareto_k=torch.tensor([0.9, k_hat]),
        plates=("n",),
    )
    problems = _heavy_tails((site,))
    assert bool(problems) == poor
    if poor:
        assert problems[0].found.startswith("1 of 2 marginals have a Pareto k-hat above 0.7")
        assert "(highest: a[n=1], 0.71)" in problems[0].found


@pytest.mark.parametrize(("error", "poor"), [(0.49, False), (0.51, True)])
def test_an_error_above_half_a_nat_is_poor(error: float, poor: bool) -> None:
    log_evidences = torch.tensor([0.0, 2 * math.atanh(error)])
    assert evidence_error(log_evidences) == pytest.approx(error)
    assert bool(_unsure_evidence(log_evidences)) == poor


def test_an_unsure_evidence() -> None:
    def vague() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(a, 0.05), obs=torch.tensor(0.3))

    diagnosis = diagnosed(vague, K=10, R=4)
    (problem,) = (p for p in diagnosis.problems if "log evidence" in p.found)
    assert diagnosis.evidence_error is not None
    assert (
        f"standard error of {diagnosis.evidence_error:.1f} nats over 4 replicates" in problem.found
    )
    assert "num_replicates=16" in problem.helps[0]
    assert not any("log evidence" in p.found for p in diagnosed(wide, K=300, R=4).problems)


def test_replicates_without_evidence() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Delta(z), obs=torch.tensor(1.0))

    diagnosis = diagnosed(model, K=1, R=8)
    lost = int((diagnosis.log_evidences == -math.inf).sum())
    assert 0 < lost < 8
    assert any(p.found.startswith(f"{lost} of 8 replicates have") for p in diagnosis.problems)
