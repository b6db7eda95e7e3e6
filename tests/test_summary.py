# SPDX-License-Identifier: Apache-2.0
"""The table of the posterior, and what it warns of."""

import math
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import single, weighted, wide

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.results.summary import summarise

pytestmark = pytest.mark.usefixtures("float64")


def hierarchy() -> None:
    """A global, a discrete one, a vector in the outer plate, a scalar in the inner one."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    with pyro.plate("outer", 2, dim=-2):
        v = pyro.sample("v", dist.Normal(mu.unsqueeze(-1), torch.ones(4)).to_event(1))
        with pyro.plate("inner", 3, dim=-1):
            x = pyro.sample("x", dist.Normal(v.sum(-1) + kind, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(2, 3))


@pytest.fixture
def posterior() -> MPImportance:
    pyro.set_rng_seed(0)
    return MPImportance(hierarchy, num_samples=8).run()


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


@pytest.mark.parametrize(("ess", "even"), [(29.9, False), (30.1, True)])
def test_k_hat_is_shown_below_half_of_the_particles(ess: float, even: bool) -> None:
    (row,) = summarise({"a": weighted(ess, 60)}, {"a"}, 0.0, None, {60}, 0.9).rows
    assert row.ess == pytest.approx(ess)
    assert math.isnan(row.k_hat) == even


def test_summary_warns_of_heavy_tails() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.StudentT(1.0, 0.0, 1.0))
        pyro.sample("y", dist.StudentT(1.0, mu, 1.0), obs=torch.tensor(8.0))

    def guide() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=1000).run()
    with pytest.warns(MPISWarning) as caught:
        posterior.summary()
    texts = [str(warning.message) for warning in caught]
    assert any(re.search(r"k-hat above 0\.7.*guide wider", text) for text in texts)
    assert any("narrower than the posterior" in text for text in texts)


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


def test_a_long_table_is_printed_in_part() -> None:
    """Ten elements of each site, so that no site hides the others; all rows are kept."""

    def many() -> None:
        with pyro.plate("n", 150):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(150))
        pyro.sample("last", dist.Normal(0.0, 1.0))

    summary = MPImportance(many, num_samples=20).run().summary()
    lines = str(summary).splitlines()
    names = [line.split()[0] for line in lines[1:12]]
    assert names == [*(f"x[{number}]" for number in range(10)), "last"]
    assert lines[12] == "and 140 more rows: see .to_dataframe()"
    assert lines[13].startswith("log evidence")
    assert len(lines) == 14
    assert len(summary.rows) == 151
    assert summary._repr_html_().count("<tr>") == 12
    assert "140 more rows" in summary._repr_html_()


def test_summary_has_a_probability() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(single, num_samples=500).run()
    for prob in (0.5, 0.9):
        (row,) = posterior.summary(prob=prob).rows
        lower, median, upper = posterior.marginals("a").quantile(
            [0.5 - prob / 2, 0.5, 0.5 + prob / 2]
        )
        assert (row.lower, row.median, row.upper) == (lower, median, upper)
    assert "25%" in str(posterior.summary(prob=0.5))
    assert "5%" in str(posterior.summary())
    assert "95%" in str(posterior.summary())
    for wrong in (0.0, 1.0, 90.0):
        with pytest.raises(ValueError, match="prob: expected a probability"):
            posterior.summary(prob=wrong)


def test_summary_warns_once_of_the_same() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(wide, num_samples=10).run()
    with pytest.warns(MPISWarning) as caught:
        posterior.summary()
    expected = [str(problem) for problem in posterior.diagnose(show=False).problems]
    assert [str(warning.message) for warning in caught] == expected
    assert all(warning.filename == __file__ for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.summary()
    posterior.run()
    with pytest.warns(MPISWarning):
        posterior.summary()
    posterior.run().diagnose()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.summary()


def test_warnings_can_be_filtered() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(wide, num_samples=10).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", MPISWarning)
        posterior.summary()
