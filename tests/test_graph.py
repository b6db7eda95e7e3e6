# SPDX-License-Identifier: Apache-2.0
"""The graph of log factors: what it prints, which plates its tensors have, and their layouts."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from graphs import graph_of, noise

from pyro_mpis import MPImportance
from pyro_mpis.factor_graph.graph import FactorGraph, RaggedPlate


def test_a_graph_prints_the_range_of_each_factor() -> None:
    """Of a program: with a group, nested plates, and a value that the model excludes."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
            pyro.sample("c", dist.Normal(a + b, 1.0))
        pyro.factor("positive", torch.where(a > 0, 0.0, -math.inf))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=4, groups=[["a", "b"]]).run()
    lines = [line.split("  ") for line in str(posterior._sums[0].whole).splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert table[0] == ["factor", "indices", "plates", "size", "lowest", "highest"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["positive"] == ["a+b:4", "4", "-inf", "0.00"]
    assert set(rows["c"][0].split()) == {"c:4", "a+b:4"}
    assert rows["c"][1:3] == ["rows:3 columns:2", "96"]
    (prior,) = (f.tensor for f in posterior._sums[0].whole.factors if f.name == "a")
    assert rows["a"] == ["a+b:4", "4", f"{float(prior.min()):.2f}", f"{float(prior.max()):.2f}"]


def test_a_graph_prints_scalars_and_nothing() -> None:
    graph = graph_of([("", torch.tensor(-1.5)), ("p", torch.zeros(0))], {})
    scalar, empty = (line.split() for line in str(graph).splitlines()[1:])
    assert scalar == ["1", "-1.50", "-1.50"]
    assert empty == ["p", "plate", "p:0", "0"]


@pytest.fixture
def schools() -> FactorGraph:
    """Pupils in classes in schools, by index arrays, and two occasions."""
    classes = RaggedPlate("c", {"s": torch.tensor([0, 0, 1])})
    pupils = RaggedPlate("p", {"c": torch.tensor([0, 1, 2, 2])})
    tables = [("ks", noise(5, 2)), ("c", noise(3)), ("op", noise(2, 4))]
    return graph_of(tables, {"k": "s"}, {"c": classes, "p": pupils})


def test_plates_around_ragged_plates(schools: FactorGraph) -> None:
    assert schools.with_enclosing(frozenset("p")) == frozenset("pcs")
    assert schools.with_enclosing(frozenset("co")) == frozenset("cos")
    assert schools.with_enclosing(frozenset()) == frozenset()
    assert schools.tensor_plates(frozenset("pcso")) == "op"
    assert schools.tensor_plates(frozenset("cs")) == "c"
    assert schools.tensor_plates(frozenset("s")) == "s"


def test_batch_dims_to_plates_and_back(schools: FactorGraph) -> None:
    """Plates have the order of the letters; batch dims that of the program."""
    x = noise(5, 1, 4, 2, 1, 7)  # (k; s, p, o, c; event), batch dims from -4 to -1
    by_plate = schools.to_plates(x, "op", left=1, right=1)
    torch.testing.assert_close(by_plate, x[:, 0, :, :, 0].transpose(1, 2))
    assert schools.to_plates(x, "ops", left=1, right=1).shape == (5, 2, 4, 2, 7)
    again = schools.to_batch(by_plate, "op", torch.Size([1, 4, 2, 1]), left=1)
    torch.testing.assert_close(again, x)
    assert schools.to_batch(by_plate, "op", torch.Size([2, 4, 2, 3]), left=1).shape[1:5] == (
        2,
        4,
        2,
        3,
    )
