# SPDX-License-Identifier: Apache-2.0
"""Plots return their axes, and what they draw are the particles and weights."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mpis import MPImportance
from pyro_mpis.plots import MAX_ROWS, plot_ess, plot_evidence, plot_marginals

matplotlib = pytest.importorskip("matplotlib", reason="needs pyro-mpis[plots]")
pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _figures() -> Iterator[None]:
    """Draw into files, and forget them."""
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


def model() -> None:
    """A scalar, a discrete one, a vector, a plate of more elements than are shown."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    kind = pyro.sample("kind", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("many", 50):
        x = pyro.sample("x", dist.Normal(mu + kind, 1.0))
        pyro.sample(
            "y", dist.Normal(x + 0.1 * w.sum(-1, keepdim=True).squeeze(-1), 1.0), obs=torch.ones(50)
        )


@pytest.fixture
def posterior() -> MPImportance:
    pyro.set_rng_seed(0)
    return MPImportance(model, num_samples=8, num_replicates=3).run()


def test_marginals(posterior: MPImportance) -> None:
    axes: list[Any] = [*plot_marginals(posterior)]
    assert [ax.get_title() for ax in axes] == ["mu", "kind", "w", "x"]
    scalar, discrete, vector, many = axes
    scalar.figure.canvas.draw()

    mu = posterior.marginals("mu")
    (stems,) = scalar.collections
    tips = np.array([segment[1] for segment in stems.get_segments()])
    low, high = scalar.get_xlim()
    inside = (mu.samples > low) & (mu.samples < high)
    np.testing.assert_allclose(tips[:, 0], mu.samples[inside], rtol=1e-6)
    shares = mu.weights[inside] / mu.weights.max()
    np.testing.assert_allclose(tips[:, 1] / tips[:, 1].max(), shares / shares.max(), rtol=1e-5)
    assert f"ESS {float(mu.ess):.1f}" in scalar.get_xlabel()

    heights = [bar.get_height() for bar in discrete.patches]
    by_value = posterior.marginals("kind").weights  # each value once, with three replicates too
    np.testing.assert_allclose(heights, by_value, rtol=1e-5)

    assert [label.get_text() for label in vector.get_yticklabels()] == ["0", "1"]
    legend = [text.get_text() for text in scalar.get_legend().get_texts()]
    assert legend == ["posterior", "proposal: prior", "particles, by weight", "mean"]
    assert discrete.get_legend() is None  # the scalar's says what it shows
    explained = [text.get_text() for text in vector.get_legend().get_texts()]
    assert explained == ["particles, area by weight", "5 % to 95 %, median"]

    dots = vector.collections[1]
    w = posterior.marginals("w")
    order = w.samples[:, 1].argsort()
    np.testing.assert_allclose(dots.get_offsets()[:, 0], w.samples[order, 1], rtol=1e-6)
    areas = dots.get_sizes()
    np.testing.assert_allclose(areas / areas.sum(), w.weights[order], rtol=1e-5)

    assert len(many.collections) == MAX_ROWS
    assert many.get_ylabel() == "many, 40 of 50"
    quantiles = posterior.marginals("x").quantile([0.05, 0.95])[:, 3]
    np.testing.assert_allclose(many.lines[2 * 3].get_xdata(), quantiles, rtol=1e-6)


def test_marginals_of_some_sites_into_given_axes(posterior: MPImportance) -> None:
    _, given = pyplot.subplots(1, 2)
    axes = plot_marginals(posterior, "x", "mu", axes=given)
    assert axes == list(given)
    assert [ax.get_title() for ax in axes] == ["x", "mu"]
    with pytest.raises(ValueError, match="axes: expected one for each of 1 sites, not 2"):
        plot_marginals(posterior, "mu", axes=given)
    with pytest.raises(ValueError, match="no such latent site"):
        plot_marginals(posterior, "nu")


def test_histograms_stay_in_the_support() -> None:
    """Of a positive site none begins below zero; its outline is that of the particles."""

    def positive() -> None:
        z = pyro.sample("z", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.2))

    pyro.set_rng_seed(0)
    posterior = MPImportance(positive, num_samples=200).run()
    (ax,) = plot_marginals(posterior)
    filled, outline = (patch for patch in ax.patches)  # both stairs
    for stairs in (filled, outline):
        assert stairs.get_data().edges[0] >= posterior["z"].samples.min()  # type: ignore[attr-defined]
    data = outline.get_data()  # type: ignore[attr-defined]
    z = posterior["z"].samples
    shares = [
        ((z >= left) & (z <= right)).double().mean()
        for left, right in zip(data.edges, data.edges[1:], strict=False)
    ]
    np.testing.assert_allclose(data.values * np.diff(data.edges), shares, atol=0.011)


def _share(values: torch.Tensor, weights: torch.Tensor, left: float, right: float) -> float:
    return float(weights[(values >= left) & (values < right)].double().sum())


def _uneven() -> MPImportance:
    """A scalar and a plate whose data are far in the tail of one element's prior."""

    def uneven() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("seen", dist.Normal(z, 0.1), obs=torch.tensor(1.5))
        with pyro.plate("two", 2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, torch.tensor([0.03, 5.0])), obs=torch.ones(2))

    pyro.set_rng_seed(0)
    return MPImportance(uneven, num_samples=500).run()


def test_of_many_particles_those_that_matter_are_drawn() -> None:
    posterior = _uneven()
    z, x = posterior["z"], posterior["x"]
    heavy, all_heavy = z.weights >= 0.01, x.weights >= 0.01
    assert 0 < heavy.sum() <= 100 < len(heavy)  # the test is one of both kinds
    assert all_heavy[0].any()
    assert not all_heavy[1].any()

    axes: list[Any] = [*plot_marginals(posterior)]
    scalar, rows = axes
    (stems,) = scalar.collections
    drawn = np.sort([segment[1][0] for segment in stems.get_segments()])
    np.testing.assert_allclose(drawn, z.samples[heavy].sort().values, rtol=1e-6)
    legend = [text.get_text() for text in scalar.get_legend().get_texts()]
    assert "particles above 1%, by weight" in legend

    (dots,) = rows.collections  # of the first row; no particle of the other is heavy
    places = dots.get_offsets()
    np.testing.assert_allclose(places[:, 0], x.samples[0, all_heavy[0]].sort().values, rtol=1e-6)
    assert set(places[:, 1]) == {0.0}
    for row, stairs in enumerate(rows.patches):  # up from the row's line, on an axis turned down
        data = stairs.get_data()
        heights = row - data.values
        shares = [
            _share(x.samples[row], x.weights[row], left, right)
            for left, right in zip(data.edges, data.edges[1:], strict=False)
        ]
        assert heights.max() == pytest.approx(0.6)
        np.testing.assert_allclose(
            heights / heights.sum(), np.divide(shares, sum(shares)), atol=0.01
        )
        assert data.edges[0] >= x.samples[row].min()


def test_even_weights_of_many_particles() -> None:
    """No single particle matters, so there is none to draw, and no legend of them."""

    def even() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(0)
    ax: Any = plot_marginals(MPImportance(even, num_samples=400).run())[0]
    assert not ax.collections
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["posterior", "proposal: prior", "mean"]
    assert "ESS 400 of 400" in ax.get_xlabel()


def test_coords(posterior: MPImportance) -> None:
    names = [f"element {number}" for number in range(50)]
    (ax,) = plot_marginals(posterior, "x", coords={"many": names})
    assert [label.get_text() for label in ax.get_yticklabels()] == names[:MAX_ROWS]
    with pytest.raises(ValueError, match="coords: plate 'many' has 50 elements, but 2 names"):
        plot_marginals(posterior, "x", coords={"many": ["one", "two"]})


def test_ess(posterior: MPImportance) -> None:
    ax: Any = plot_ess(posterior)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["mu", "w", "x"]
    dots = [collection.get_offsets()[:, 0] for collection in ax.collections]
    for found, site in zip(dots, ("mu", "w", "x"), strict=True):
        np.testing.assert_allclose(found, posterior.marginals(site).ess.reshape(-1), rtol=1e-5)
    _, given = pyplot.subplots()
    assert plot_ess(posterior, ax=given) is given


def test_evidence(posterior: MPImportance) -> None:
    ax: Any = plot_evidence(posterior)
    values = [float(total.log_evidence) for total in posterior._sums]
    np.testing.assert_allclose(ax.collections[0].get_offsets()[:, 1], values)
    np.testing.assert_allclose(
        ax.lines[0].get_ydata(), 2 * [float(posterior.evidence())], rtol=1e-6
    )
    _, given = pyplot.subplots()
    assert plot_evidence(posterior, ax=given) is given
    with pytest.raises(ValueError, match="num_replicates: one set of particles has no spread"):
        plot_evidence(MPImportance(model, num_samples=2).run())


def test_replicates_without_evidence() -> None:
    def half() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Delta(z), obs=torch.tensor(1.0))

    pyro.set_rng_seed(0)
    posterior = MPImportance(half, num_samples=1, num_replicates=8).run()
    lost = 8 - len(posterior._sums)
    assert lost > 0
    ax: Any = plot_evidence(posterior)
    assert len(ax.collections[1].get_offsets()) == lost
    assert "evidence zero" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_without_particles() -> None:
    def exact() -> None:
        pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    posterior = MPImportance(exact, num_samples=1).run()
    assert plot_ess(posterior).get_yticks().tolist() == []
    bars: list[Any] = [*plot_marginals(posterior)[0].patches]
    assert [bar.get_height() for bar in bars] == [0.5, 0.5]

    def nothing() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    assert plot_marginals(MPImportance(nothing, num_samples=1).run()) == []


def test_particles_at_one_value() -> None:
    """No spread at all: limits are still a range."""

    def point() -> None:
        pyro.sample("z", dist.Normal(torch.tensor(0.5), 1e-10))

    (ax,) = plot_marginals(MPImportance(point, num_samples=1).run())
    low, high = ax.get_xlim()
    assert low < 0.5 < high


def test_without_matplotlib(posterior: MPImportance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (plot_marginals, plot_ess, plot_evidence):
        with pytest.raises(ImportError, match="pip install matplotlib"):
            plot(posterior)
