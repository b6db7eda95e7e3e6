# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows, and what pandas gets."""

import re
import sys
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mpis import Advice, MPImportance
from pyro_mpis._text import html_table, scalars
from pyro_mpis.results.diagnostics import Problem


def model() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("school", 3):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor([0.5, -0.5, 2.0]))


@pytest.fixture
def posterior() -> MPImportance:
    pyro.set_rng_seed(0)
    return MPImportance(model, num_samples=50).run()


def cells(page: str) -> list[list[str]]:
    """Return the cells of each line of a table."""
    lines = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in lines]


def test_tables_are_escaped() -> None:
    page = html_table([("", "a<b"), ("x&y", "1")], "1 < 2")
    assert cells(page) == [["", "a&lt;b"], ["x&amp;y", "1"]]
    assert page.endswith("<p>1 &lt; 2</p>")


def test_names_of_scalars() -> None:
    assert scalars("x", ()) == ["x"]
    assert scalars("x", (1, 2)) == ["x[0,0]", "x[0,1]"]


def test_summary_and_posterior(posterior: MPImportance) -> None:
    summary = posterior.summary()
    page = summary._repr_html_()
    assert posterior._repr_html_() == page
    assert [line[0] for line in cells(page)[1:]] == ["mu", "theta[0]", "theta[1]", "theta[2]"]
    assert cells(page)[1][1] == f"{summary.rows[0].mean:.2f}"
    assert "50 particles a site" in page
    assert "not run" in MPImportance(model, num_samples=5)._repr_html_()


def test_marginals(posterior: MPImportance) -> None:
    theta = posterior["theta"]
    torch.testing.assert_close(theta.samples, posterior.marginals("theta").samples)
    lines = cells(theta._repr_html_())
    assert lines[0] == ["", "mean", "sd", "5%", "50%", "95%"]
    assert lines[3][:2] == ["theta[2]", f"{float(theta.mean[2]):.3g}"]

    joint = posterior.marginals("mu", "theta")
    names = [line[0] for line in cells(joint._repr_html_())[1:]]
    assert names == ["mu[0]", "theta[0]", "mu[1]", "theta[1]", "mu[2]", "theta[2]"]


def test_diagnosis(posterior: MPImportance) -> None:
    diagnosis = posterior.diagnose(show=False)
    page = diagnosis._repr_html_()
    header, mu, theta = cells(page)
    assert header == [
        "site",
        "from",
        "particles",
        "ESS, lowest",
        "of",
        "median",
        "heaviest",
        "k-hat",
    ]
    assert mu[:4] == ["mu", "prior", "50", f"{diagnosis.sites[0].lowest_ess:.1f}"]
    assert theta[4] == diagnosis.sites[1].worst
    assert f"log evidence {diagnosis.log_evidence:.2f}" in page
    assert "Nothing is poor" in page

    problem = Problem("a < b", ("do c & d",))
    page = replace(diagnosis, problems=(problem,), sites=())._repr_html_()
    assert "<p>Poor: a &lt; b</p><ul><li>do c &amp; d</li></ul>" in page
    assert "<table>" not in page


def test_plan() -> None:
    plan = MPImportance(model, num_samples=50).plan()
    plan = replace(plan, advice=(Advice("a < b"),))
    page = plan._repr_html_()
    assert cells(page)[0] == ["K", "entries", "memory", "in parts", "seconds"]
    assert [line[0] for line in cells(page)[1:]] == ["10", "30", "50", "100", "300", "1000"]
    assert page.endswith("<ul><li>a &lt; b</li></ul>")
    assert repr(plan) == str(plan)
    assert str(replace(plan, costs=())).startswith("memory limit: ")


def test_data_frames(posterior: MPImportance) -> None:
    pytest.importorskip("pandas")
    summary = posterior.summary()
    frame = summary.to_dataframe()
    assert list(frame.index) == ["mu", "theta[0]", "theta[1]", "theta[2]"]
    assert frame.loc["theta[1]", "mean"] == summary.rows[2].mean

    theta = posterior["theta"]
    frame = theta.to_dataframe()
    one = frame[frame["scalar"] == "theta[1]"]
    assert list(one["particle"]) == list(range(50))
    assert list(one["value"]) == theta.samples[1].tolist()
    assert list(one["weight"]) == pytest.approx(theta.weights[1].tolist())

    diagnosis = posterior.diagnose(show=False)
    frame = diagnosis.to_dataframe()
    assert list(frame.index) == ["mu", "theta"]
    assert frame.loc["theta", "lowest_ess"] == diagnosis.sites[1].lowest_ess
    assert frame.loc["theta", "worst"] == diagnosis.sites[1].worst

    plan = MPImportance(model, num_samples=50).plan()
    frame = plan.to_dataframe()
    assert list(frame.index) == [10, 30, 50, 100, 300, 1000]
    assert list(frame["entries"]) == [cost.entries for cost in plan.costs]


def test_without_pandas(posterior: MPImportance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        posterior.summary().to_dataframe()
    with pytest.raises(ImportError, match="pip install pandas"):
        posterior["mu"].to_dataframe()
    with pytest.raises(ImportError, match="pip install pandas"):
        posterior.diagnose(show=False).to_dataframe()
    with pytest.raises(ImportError, match="pip install pandas"):
        MPImportance(model, num_samples=5).plan().to_dataframe()
