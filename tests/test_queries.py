# SPDX-License-Identifier: Apache-2.0
"""Marginals, moments, samples and the summary, as a user meets them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchy import hierarchy, run_hierarchy

from pyro_mpis import MPImportance, MPISWarning

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def posterior() -> MPImportance:
    return run_hierarchy()


def test_shapes(posterior: MPImportance) -> None:
    shapes = {name: m.samples.shape for name, m in posterior.marginals().items()}
    assert shapes == {"mu": (8,), "kind": (8,), "v": (2, 1, 8, 4), "x": (2, 3, 8)}
    assert {n: m.log_weights.shape for n, m in posterior.marginals().items()} == {
        "mu": (8,),
        "kind": (8,),
        "v": (2, 1, 8),
        "x": (2, 3, 8),
    }
    ordinary = {"mu": (), "kind": (), "v": (2, 1, 4), "x": (2, 3)}
    assert {name: tuple(mean.shape) for name, mean in posterior.moments().items()} == ordinary
    draws = posterior.sample(5)
    assert {name: tuple(d.shape[1:]) for name, d in draws.items()} == ordinary
    assert draws["kind"].dtype == torch.long
    assert posterior.evidence().shape == ()
    torch.testing.assert_close(posterior.evidence(log_scale=False).log(), posterior.evidence())


def test_samples_have_the_moments(posterior: MPImportance) -> None:
    """Within 6 standard errors, at a fixed seed."""
    draws = posterior.sample(20_000)
    for name, mean in posterior.moments().items():
        values = draws[name].double()
        error = values.std(0) / math.sqrt(20_000)
        assert bool(((values.mean(0) - mean).abs() <= 6 * error + 1e-9).all()), name


def test_summary_is_a_table(posterior: MPImportance) -> None:
    with pytest.warns(MPISWarning, match=r"effective sample size below 5.*num_samples"):
        summary = posterior.summary()
    lines = str(summary).splitlines()
    assert lines[0].split() == ["mean", "sd", "5%", "50%", "95%", "ESS", "k-hat"]
    assert len(lines) == 1 + (1 + 1 + 8 + 6) + 1
    names = [line.split()[0] for line in lines[1:-1]]
    assert names[:3] == ["mu", "kind", "v[0,0,0]"]
    assert names[-1] == "x[1,2]"
    assert "8 particles" in lines[-1]
    row = summary.rows[0]
    assert row.mean == pytest.approx(float(posterior.moments()["mu"]))
    assert row.lower <= row.median <= row.upper
    assert 1.0 <= row.ess <= 8.0


def test_what_a_notebook_shows(posterior: MPImportance) -> None:
    unrun = MPImportance(hierarchy, num_samples=3, num_replicates=2)
    assert repr(unrun) == "<MPImportance: 3 particles a site, 2 replicates, not run>"
    log_evidence = f"{float(posterior.evidence()):.2f}"
    assert repr(posterior) == f"<MPImportance: 8 particles a site, log evidence {log_evidence}>"
    shown = "Marginal('v': 8 particles, batch shape (2, 1), event shape (4,))"
    assert repr(posterior.marginals("v")) == shown
    assert repr(posterior.marginals("mu", "kind")).startswith("Marginal('mu', 'kind': 64 particles")
    with pytest.warns(MPISWarning):
        summary = posterior.summary()
    assert repr(summary) == str(summary)


def test_summary_leaves_out_k_hat_of_even_weights() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 3.0), obs=torch.tensor(0.0))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=100).run()
    (row,) = posterior.summary().rows
    assert row.ess > 50
    assert math.isnan(row.k_hat)
    assert not math.isnan(float(posterior.marginals("a").pareto_k))


def test_summary_warns_of_heavy_tails() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.StudentT(1.0, 0.0, 1.0))
        pyro.sample("y", dist.StudentT(1.0, mu, 1.0), obs=torch.tensor(8.0))

    def guide() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=1000).run()
    with pytest.warns(MPISWarning, match=r"k-hat above 0\.7.*wider guide"):
        posterior.summary()


def test_summary_of_sites_without_particles() -> None:
    """Summed exactly, or fixed by the guide: no ESS, and no warning of one."""

    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("c", dist.Normal(0.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.3))

    def guide() -> None:
        pyro.sample("c", dist.Delta(torch.tensor(0.2)))

    with pytest.warns(MPISWarning, match="fixes 'c' at a point"):
        posterior = MPImportance(model, guide, num_samples=50).run()
    rows = {row.name: row for row in posterior.summary().rows}
    assert math.isnan(rows["z"].ess)
    assert math.isnan(rows["c"].ess)
    assert rows["mu"].ess > 5.0
    assert rows["z"].mean == pytest.approx(0.3)
    assert rows["c"].mean == pytest.approx(0.2)
