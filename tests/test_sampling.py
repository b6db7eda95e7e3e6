# SPDX-License-Identifier: Apache-2.0
"""Draws of indices against the exact joint distribution of small graphs: false alarms 1e-6."""

from collections.abc import Sequence

import pytest
import torch
from checks import check_frequencies
from graphs import graph_of, noise
from torch import Tensor

from pyro_mpis.factor_graph import sampling
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.factor_graph.sampling import forward_pass, sample_indices

NUM_DRAWS = 20_000


def loop(x: int, y: int, z: int, slope: float) -> FactorGraph:
    """Three indices in a loop, so that each is drawn from a product of terms."""
    number = torch.arange(y, dtype=torch.double)
    tables = {
        "xy": noise(x, y, seed=0) - slope * number,
        "yz": noise(y, z, seed=1) + slope * number.unsqueeze(-1),
        "zx": noise(z, x, seed=2),
    }
    return graph_of(tables.items(), dict.fromkeys("xyz", ""))


def joint_probs(graph: FactorGraph) -> Tensor:
    xy, yz, zx = (factor.tensor for factor in graph.factors)
    joint = xy[:, :, None] + yz[None] + zx.T[:, None]
    return joint.flatten().softmax(0).reshape(joint.shape)


def check(graph: FactorGraph, num_draws: int = NUM_DRAWS) -> None:
    """Draws of all three indices follow their joint distribution."""
    probs = joint_probs(graph)
    torch.manual_seed(1)
    _, drawn = sample_indices(graph, num_draws)
    cell = (drawn["x"] * probs.shape[1] + drawn["y"]) * probs.shape[2] + drawn["z"]
    check_frequencies(cell.bincount(minlength=probs.numel()), probs.flatten())


@pytest.mark.parametrize("slope", [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0, 40.0, 1e4])
@pytest.mark.parametrize("size", [6, 12])
def test_terms_whose_maxima_do_not_meet(slope: float, size: int) -> None:
    """At any distance of the maxima, the verge of underflow included."""
    check(loop(3, size, 4, slope))


@pytest.mark.parametrize(
    ("lost", "slope", "size"),
    [
        pytest.param(-1.0, 20.0, 6, id="all lost"),
        pytest.param(-1.0, 40.0, 6, id="all lost, far apart"),
        pytest.param(1e-38, 8.0, 12, id="some lost: the sum is a normal number, its terms are not"),
    ],
)
def test_products_that_underflow_are_rejected(
    monkeypatch: pytest.MonkeyPatch, lost: float, slope: float, size: int
) -> None:
    """The wrong program multiplies shares without a look, or too late a look, at what is lost."""
    monkeypatch.setattr(sampling, "LOST", lost)
    with pytest.raises(AssertionError):
        check(loop(3, size, 4, slope))


def test_more_particles_than_small_integers() -> None:
    check(loop(2, 300, 2, 0.0))


@pytest.mark.parametrize("elements", [8, 1000])
def test_in_parts(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(sampling, "DRAW_ELEMENTS", elements)
    check(loop(3, 6, 4, 10.0), NUM_DRAWS if elements > 8 else NUM_DRAWS // 8)


@pytest.mark.parametrize("slope", [0.0, 30.0])
@pytest.mark.parametrize("num_draws", [1, 7, 2000])
def test_draws_that_are_given_the_same(
    monkeypatch: pytest.MonkeyPatch, slope: float, num_draws: int
) -> None:
    """They share distribution functions, and are what each is by itself; lost products too."""
    graph = loop(3, 6, 4, slope)
    found = []
    for number in (2**62, 0):  # none may be shared
        monkeypatch.setattr(sampling, "LARGEST_NUMBER", number)
        torch.manual_seed(0)
        found.append(sample_indices(graph, num_draws)[1])
    for symbol in "xyz":
        assert torch.equal(found[0][symbol], found[1][symbol])


def test_elements_that_are_given_others() -> None:
    """An index in a plate is given one of the plate, another in each element."""
    graph = graph_of(
        {"xp": noise(3, 4, seed=0), "xyp": 3 * noise(3, 5, 4, seed=1)}.items(),
        {"x": "p", "y": "p"},
    )
    torch.manual_seed(2)
    _, drawn = sample_indices(graph, NUM_DRAWS)
    tables = {factor.name: factor.tensor for factor in graph.factors}
    joint = (tables["xp"][:, None] + tables["xyp"]).flatten(0, 1).softmax(0)
    for element in range(4):
        cell = drawn["x"][:, element] * 5 + drawn["y"][:, element]
        check_frequencies(cell.bincount(minlength=15), joint[:, element])


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


def test_no_step_of_a_draw_is_larger_than_that_of_the_sum() -> None:
    """Of a path of four indices: dims of one term alone are not drawn together with shared ones."""
    size = 300
    tables = {pair: noise(size, size, seed=n) for n, pair in enumerate(("wx", "xy", "yz"))}
    graph = graph_of(tables.items(), dict.fromkeys("wxyz", ""))
    largest = []
    original = sampling._log_product

    def noting(terms: Sequence[Tensor], layout: str) -> Tensor:
        result = original(terms, layout)
        largest.append(result.numel())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_log_product", noting)
        torch.manual_seed(0)
        _, drawn = sample_indices(graph, NUM_DRAWS)
    assert max(largest) <= size**2
    wx, xy, yz = tables.values()
    probs = (wx.logsumexp(0).unsqueeze(-1) + xy + yz.logsumexp(1)).flatten().softmax(0)
    cell = (drawn["x"] * size + drawn["y"]) // 100
    check_frequencies(cell.bincount(minlength=size * 3), probs.reshape(-1, 100).sum(1))
    assert drawn["w"].shape == drawn["z"].shape == (NUM_DRAWS,)


def test_indices_that_one_step_sums_are_drawn_together() -> None:
    """Two indices in both terms of a step, of a plate, given a third."""
    x, y, z, p = 3, 4, 2, 3
    tables = {
        "xyp": noise(x, y, p, seed=0) * 3.0,
        "xyzp": noise(x, y, z, p, seed=1) * 3.0,
        "z": noise(z, seed=2),
    }
    graph = graph_of(tables.items(), {"x": "p", "y": "p", "z": ""})
    logits = tables["xyp"].unsqueeze(2) + tables["xyzp"]
    log_z = logits.logsumexp((0, 1)).sum(-1) + tables["z"]
    torch.manual_seed(0)
    log_p, drawn = sample_indices(graph, NUM_DRAWS)
    torch.testing.assert_close(log_p, log_z.logsumexp(0))
    check_frequencies(drawn["z"].bincount(minlength=z), log_z.softmax(0))
    of_plate = (logits - logits.logsumexp((0, 1))).exp() * log_z.softmax(0).unsqueeze(-1)
    for element in range(p):
        cell = (drawn["x"][:, element] * y + drawn["y"][:, element]) * z + drawn["z"]
        check_frequencies(cell.bincount(minlength=x * y * z), of_plate[..., element].flatten())


def test_draws_take_up_a_forward_pass_that_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of a pass of their own, and do not contract again."""
    graph = loop(3, 6, 4, 2.0)
    log_p, forward = forward_pass(graph)
    torch.manual_seed(0)
    expected_p, expected = sample_indices(graph, 50)
    torch.testing.assert_close(log_p, expected_p)
    monkeypatch.delattr(sampling, "contract")
    torch.manual_seed(0)
    _, drawn = sample_indices(graph, 50, forward)
    for symbol in "xyz":
        assert torch.equal(drawn[symbol], expected[symbol])


def test_a_forward_pass_of_large_messages_is_not_kept() -> None:
    """The first index to be summed leaves a message of the other two; factors do not count."""
    graph = loop(30, 20, 20, 0.0)
    message = 20 * 20 * torch.double.itemsize
    assert sum(factor.tensor.nbytes for factor in graph.factors) > 2 * message
    log_p, forward = forward_pass(graph, 2 * message)
    assert forward is not None
    same, none = forward_pass(graph, message // 2)
    assert none is None
    assert torch.equal(log_p, same)
