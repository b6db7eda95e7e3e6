# SPDX-License-Identifier: Apache-2.0
"""The picture of the factor graph, as the text that Graphviz is given."""

import re
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_mpis import MPImportance

pytest.importorskip("graphviz")


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def crossed(y: Tensor) -> None:
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with columns:
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    with rows, columns:
        pyro.sample("y", dist.Normal(u + z, 1.0), obs=y)


def labels(source: str) -> dict[str, str]:
    """Return the label of each node."""
    return dict(re.findall(r"^\s*(\w+) \[label=\"([^\"]*)\"", source, re.MULTILINE))


def test_indices_and_factors_with_their_sizes() -> None:
    source = MPImportance(schools, num_samples={"theta": 7, None: 30}).render(torch.zeros(8)).source
    by_label = {label: key for key, label in labels(source).items() if key != "graph"}
    assert set(by_label) == {
        r"mu\nK = 30",
        r"tau\nK = 30",
        r"theta\nK = 7",
        r"mu\n30",
        r"tau\n30",
        r"theta\n30 x 30 x 7 x 8",
        r"y\n7 x 8",
    }
    edges = {
        (r"mu\n30", r"mu\nK = 30"),
        (r"tau\n30", r"tau\nK = 30"),
        (r"mu\nK = 30", r"theta\n30 x 30 x 7 x 8"),
        (r"tau\nK = 30", r"theta\n30 x 30 x 7 x 8"),
        (r"theta\n30 x 30 x 7 x 8", r"theta\nK = 7"),
        (r"theta\nK = 7", r"y\n7 x 8"),
    }
    assert set(re.findall(r"(\w+) -> (\w+)", source)) == {
        (by_label[one], by_label[other]) for one, other in edges
    }
    inside = source[source.index("subgraph") : source.index("}")]
    assert 'label="school: 8"' in inside
    assert [line for line in labels(inside).values() if "mu" in line or "tau" in line] == []
    assert len(re.findall("style=filled", source)) == 1
    (largest,) = re.findall(r"(\w+) \[[^]]*penwidth=2", source)
    assert largest == by_label[r"theta\n30 x 30 x 7 x 8"]


def test_the_sum_of_all_sizes_is_that_of_the_plan() -> None:
    y = torch.zeros(3, 4)
    sampler = MPImportance(crossed, num_samples=30)
    (cost,) = (cost for cost in sampler.plan(y).costs if cost.num_samples == 30)
    assert f'label="{cost.entries:,} log densities"' in sampler.render(y).source


def test_crossed_plates_are_not_nested() -> None:
    source = MPImportance(crossed, num_samples=5).render(torch.zeros(3, 4)).source
    assert re.findall(r'label="([^"]*: \d)" ', source) == [
        "rows: 3",
        "rows: 3 x columns: 4",
        "columns: 4",
    ]
    depth = [source[: found.start()].count("{") - source[: found.start()].count("}")
             for found in re.finditer("subgraph", source)]  # fmt: skip
    assert depth == [1, 1, 1]
    assert r"z\n2 values" in labels(source).values()


def test_plates_of_one_another_are_nested() -> None:
    def nested() -> None:
        with pyro.plate("outer", 2, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                pyro.sample("b", dist.Normal(a, 1.0), obs=torch.zeros(2, 3))

    source = MPImportance(nested, num_samples=5).render().source
    outer, inner = source.index('label="outer: 2"'), source.index('label="inner: 3"')
    assert outer < inner
    assert "}" not in source[outer:inner]


def test_a_group_is_one_index() -> None:
    sampler = MPImportance(schools, num_samples=30, groups=[("mu", "tau")])
    found = set(labels(sampler.render(torch.zeros(8)).source).values())
    assert r"mu, tau\nK = 30" in found
    assert r"theta\n30 x 30 x 8" in found


def test_nothing_is_drawn() -> None:
    state = torch.get_rng_state()
    sampler = MPImportance(schools, num_samples=5)
    sampler.render(torch.zeros(8))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match=r"call \.run"):
        sampler.evidence()


def test_without_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(ImportError, match="pip install graphviz"):
        MPImportance(schools, num_samples=5).render(torch.zeros(8))
