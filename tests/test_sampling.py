# SPDX-License-Identifier: Apache-2.0
"""Draws of indices against the exact joint distribution of small graphs: false alarms 1e-6."""

import pytest
import torch
from checks import check_frequencies
from torch import Tensor

from pyro_mpis.factor_graph import sampling
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.factor_graph.sampling import sample_indices

NUM_DRAWS = 20_000


def loop(x: int, y: int, z: int, slope: float) -> FactorGraph:
    """Three indices in a loop, so that each is drawn from a product of terms."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.double)

    number = torch.arange(y, dtype=torch.double)
    tables = {
        "xy": noise(x, y) - slope * number,
        "yz": noise(y, z) + slope * number.unsqueeze(-1),
        "zx": noise(z, x),
    }
    return FactorGraph(
        factors=tuple(LogFactor(dims, table, dims, frozenset()) for dims, table in tables.items()),
        sizes={"x": x, "y": y, "z": z},
        index_plates={symbol: frozenset() for symbol in "xyz"},
        plate_dims={},
        max_plate_nesting=0,
        values={},
        plate_names={},
        index_sites={symbol: (symbol,) for symbol in "xyz"},
        dtype=torch.double,
        device=torch.device("cpu"),
    )


def joint_probs(graph: FactorGraph) -> Tensor:
    xy, yz, zx = (factor.tensor for factor in graph.factors)
    joint = xy[:, :, None] + yz[None] + zx.T[:, None]
    return joint.flatten().softmax(0).reshape(joint.shape)


def check(graph: FactorGraph) -> None:
    """Draws of all three indices follow their joint distribution."""
    probs = joint_probs(graph)
    torch.manual_seed(1)
    _, drawn = sample_indices(graph, NUM_DRAWS)
    cell = (drawn["x"] * probs.shape[1] + drawn["y"]) * probs.shape[2] + drawn["z"]
    check_frequencies(cell.bincount(minlength=probs.numel()), probs.flatten())


@pytest.mark.parametrize("slope", [0.0, 10.0, 20.0, 40.0, 1e4])
def test_terms_whose_maxima_do_not_meet(slope: float) -> None:
    check(loop(3, 6, 4, slope))


@pytest.mark.parametrize("slope", [20.0, 40.0])
def test_products_that_underflow_are_rejected(
    monkeypatch: pytest.MonkeyPatch, slope: float
) -> None:
    """The wrong program multiplies shares without a look at what is lost."""
    monkeypatch.setattr(sampling, "LOST", -1.0)
    with pytest.raises(AssertionError):
        check(loop(3, 6, 4, slope))


def test_more_particles_than_small_integers() -> None:
    check(loop(2, 300, 2, 0.0))


@pytest.mark.parametrize("elements", [8, 1000])
def test_in_parts(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(sampling, "DRAW_ELEMENTS", elements)
    check(loop(3, 6, 4, 10.0))


def test_terms_larger_than_what_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then rows are exponentiated as they are looked up."""
    tables: list[sampling._Table] = []
    original = sampling._Table.__init__

    def noting(self: sampling._Table, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        tables.append(self)

    monkeypatch.setattr(sampling._Table, "__init__", noting)
    graph = loop(60, 5, 60, 20.0)
    torch.manual_seed(0)
    few = torch.stack([sample_indices(graph, 10)[1]["y"] for _ in range(300)]).flatten()
    assert any(table.all_shares is None for table in tables)
    check_frequencies(few.bincount(minlength=5), joint_probs(graph).sum((0, 2)))
