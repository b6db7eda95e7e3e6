# SPDX-License-Identifier: Apache-2.0
"""The export to ArviZ: its functions, LOO against a closed form, names, arguments."""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import SIGMA, Y, dims, effects, elaborated, fitted, values
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.results import arviz_export

arviz = pytest.importorskip("arviz", reason="needs pyro-mpis[arviz]")
xarray = pytest.importorskip("xarray", reason="needs pyro-mpis[arviz]")

pytestmark = pytest.mark.usefixtures("float64")

Arrays = Mapping[str, "np.ndarray[tuple[int, ...], np.dtype[np.double]]"]


# --- ArviZ's functions


@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values")
def test_functions_of_arviz_work(tmp_path: Path) -> None:
    """With the data structure of the installed version; a file keeps it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    posterior = fitted(num_replicates=3)
    data = posterior.to_arviz(500, coords={"group": list("abcd")}, dims={"sigma": ["group"]})
    table = arviz.summary(data, kind="stats")
    assert list(table.index) == ["mu", *(f"theta[{letter}]" for letter in "abcd")]
    draws = values(data, "posterior")
    assert float(table["mean"]["theta[c]"]) == pytest.approx(
        float(draws["theta"][:, 2].mean()), abs=0.01
    )
    arviz.plot_forest(data, combined=True)
    pyplot.close("all")
    loo = arviz.loo(data)
    assert loo.n_data_points == 4
    assert len(arviz.compare({"one": data, "two": posterior.to_arviz(500)})) == 2
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    again = arviz.from_netcdf(tmp_path / "posterior.nc")
    groups = {
        "posterior", "sample_stats", "log_likelihood", "observed_data", "constant_data",
        "particles", "particle_weights", "particle_ess",
    }  # fmt: skip
    for group in groups:
        for name, value in values(data, group).items():
            assert torch.equal(values(again, group)[name], value)
    assert float(again.posterior.attrs["log_evidence"]) == float(posterior.evidence())
    assert list(again.posterior["group"].values) == list("abcd")


def test_evidence_and_versions_are_attributes() -> None:
    posterior = fitted(num_replicates=3)
    data = posterior.to_arviz(5)
    for attributes in (data.attrs, data.posterior.attrs):  # type: ignore[union-attr]
        assert attributes["log_evidence"] == float(posterior.evidence())
        assert attributes["log_evidence_error"] == posterior.diagnose(show=False).evidence_error
        assert (attributes["num_particles"], attributes["num_replicates"]) == (50, 3)
        assert attributes["inference_library"] == "pyro_mpis"
        assert attributes["inference_library_version"]
    assert "log_evidence_error" not in fitted().to_arviz(5).attrs


def elpd_of(loo: Any) -> float:
    """Return the expected log predictive density, by the name that ArviZ has for it."""
    return float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)


def test_leave_one_out_agrees_with_the_closed_form() -> None:
    """
    The expected log predictive density of a normal mean, each observation left out in turn.

    Exact: y_i given the others is normal. Over 25 seeds the errors had a mean of 0.00 and a sd of
    0.03, an eighth of the tolerance; leaving nothing out is 1.5 off, and must be rejected.
    """
    pyro.set_rng_seed(0)
    y = torch.randn(8) + 1.0

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("n", 8):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    exact = 0.0
    for i in range(8):
        rest = torch.cat([y[:i], y[i + 1 :]])
        precision = 1 / 9 + len(rest)
        given = dist.Normal(rest.sum() / precision, math.sqrt(1 + 1 / precision))
        exact += float(given.log_prob(y[i]))
    data = MPImportance(model, num_samples=20_000).run().to_arviz(10_000)
    loo = arviz.loo(data, pointwise=True)
    assert abs(elpd_of(loo) - exact) < 0.25
    within = float(values(data, "log_likelihood")["y"].exp().mean(0).log().sum())
    assert abs(within - exact) > 0.5


def test_leave_one_out_without_what_is_hidden() -> None:
    """A masked observation has no density: nan, until it is dropped, and not a number that is."""

    def model(seen: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("n", 4), poutine.mask(mask=seen):  # type: ignore[call-overload]
            pyro.sample("y", dist.Normal(mu, 2.0), obs=Y)

    pyro.set_rng_seed(0)
    seen = torch.tensor([True, True, False, True])
    data: Any = MPImportance(model, num_samples=200).run(seen).to_arviz()
    if hasattr(data.log_likelihood, "dropna"):
        data.log_likelihood = data.log_likelihood.dropna("n")
    else:  # a DataTree, of ArviZ 1.0 and later
        data["log_likelihood"] = data["log_likelihood"].to_dataset().dropna("n")
    loo = arviz.loo(data)
    assert loo.n_data_points == 3
    assert math.isfinite(elpd_of(loo))


# --- names


@pytest.mark.usefixtures("data_tree")
def test_dims_are_named_after_plates() -> None:
    """Plates of size one too; event dims are numbered; deterministic sites find their plates."""
    data = elaborated().to_arviz(4, prior=True, posterior_predictive=True)
    left = ("chain", "draw")
    plates = ("row", "only")
    assert dims(data, "posterior") == {
        "mu": left,
        "on": left,
        "v": (*left, *plates, "v_dim_0"),
        "norm": (*left, *plates),
        "twice": (*left, *plates, "twice_dim_0"),
        "three": (*left, "three_dim_0"),
    }
    assert dims(data, "prior") == dims(data, "posterior")
    assert dims(data, "log_likelihood") == dict.fromkeys(("vector", "y", "count"), (*left, *plates))
    predicted = {
        "vector": (*left, *plates, "vector_dim_0"),
        "y": (*left, *plates),
        "count": (*left, *plates),
    }
    assert dims(data, "posterior_predictive") == dims(data, "prior_predictive") == predicted
    assert dims(data, "observed_data") == {name: own[2:] for name, own in predicted.items()}
    assert dims(data, "particles") == {
        "mu": ("particle",),
        "on": ("on_value",),
        "v": ("particle", *plates, "v_dim_0"),
    }
    assert dims(data, "particle_weights")["v"] == ("particle", *plates)
    assert dims(data, "particle_ess") == {"mu": (), "v": plates}
    assert "constant_data" not in data  # all arguments are observed
    assert data["posterior"]["v"].shape == (1, 4, 3, 1, 2)
    draws = values(data, "posterior")
    torch.testing.assert_close(draws["norm"], draws["v"].square().sum(-1).sqrt())
    torch.testing.assert_close(draws["twice"], 2 * draws["v"])
    assert torch.equal(draws["three"], torch.arange(3.0).expand(4, 3))


@pytest.mark.usefixtures("data_tree")
def test_batch_dims_of_size_one_outside_of_plates_are_dropped() -> None:
    def model() -> None:
        with pyro.plate("outer", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(()))

    data = MPImportance(model, num_samples=5).run().to_arviz(4)
    assert dims(data, "posterior") == {"z": ("chain", "draw", "outer")}
    assert dims(data, "particles") == {"z": ("particle", "outer")}
    assert data["observed_data"]["y"].shape == (2, 3)  # one zero, observed by all
    assert data["log_likelihood"]["y"].shape == (1, 4, 2, 3)


@pytest.mark.usefixtures("data_tree")
def test_names_given() -> None:
    """For all dims of a site, or for those that are no plates."""
    posterior = elaborated()
    for given, plates in ((["axis"], ("row", "only")), (["line", "one", "axis"], ("line", "one"))):
        data = posterior.to_arviz(4, dims={"v": given}, coords={"axis": ["x", "y"]})
        assert dims(data, "posterior")["v"] == ("chain", "draw", *plates, "axis")
        assert dims(data, "particles")["v"] == ("particle", *plates, "axis")
        assert dims(data, "particle_ess")["v"] == plates
        assert np.asarray(data["posterior"]["axis"]).tolist() == ["x", "y"]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"coords": {"grp": "abcd"}}, r"coords: no dim 'grp', only .*'group'"),
        ({"coords": {"group": list("abc")}}, r"coords: 'group' has 4 elements.*\(3,\)"),
        ({"dims": {"alpha": ["a"]}}, r"dims: no site or argument 'alpha' is exported, only"),
        ({"dims": {"theta": ["a", "b"]}}, r"dims: 'theta' has 1 dims, 'group', but \['a', 'b'\]"),
        ({"dims": {"theta": "group"}}, r"dims: 'theta' has 1 dims"),
        ({"dims": {"sigma": ["a", "b"]}}, r"dims: the argument 'sigma' has 1 dims"),
        ({"dims": {"theta": ["draw"]}}, r"site 'theta': a dim is named 'draw'"),
        ({"dims": {"theta": ["mu"]}}, r"dims: 'mu' is a dim in the group 'posterior' and a var"),
    ],
)
def test_names_that_do_not_fit(names: dict[str, Any], match: str) -> None:
    posterior = fitted(5)
    with pytest.raises(ValueError, match=match):
        posterior.to_arviz(4, **names)


def test_number_of_draws() -> None:
    with pytest.raises(ValueError, match="num_samples: expected a positive integer"):
        fitted(5).to_arviz(0)


# --- arguments of the model


class Module(pyro.nn.PyroModule):
    def forward(self, sigma: Tensor, y: Tensor) -> None:
        effects(sigma, y)


def many(*arrays: Tensor, **options: object) -> None:
    effects(arrays[0], arrays[1])


@pytest.mark.usefixtures("data_tree")
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (effects, "sigma"),
        (poutine.scale(effects, scale=2.0), "sigma"),
        (poutine.reparam(effects, config={}), "sigma"),
        (poutine.mask(poutine.scale(effects, scale=2.0), mask=True), "sigma"),
        (Module(), "sigma"),
        (partial(effects), "sigma"),
        (many, "arrays_0"),
    ],
)
def test_constant_data_are_the_arguments_that_are_not_observed(
    model: Callable[..., None], name: str
) -> None:
    data = MPImportance(model, num_samples=4).run(SIGMA, Y).to_arviz(4)
    assert torch.equal(values(data, "constant_data")[name], SIGMA)
    assert dims(data, "constant_data") == {name: (f"{name}_dim_0",)}
    assert torch.equal(values(data, "observed_data")["y"], Y)


@pytest.mark.usefixtures("data_tree")
def test_arguments_that_are_no_arrays() -> None:
    """NumPy's arrays are kept, keyword arguments too; numbers and strings are not."""

    def model(
        x: "np.ndarray[tuple[int, ...], np.dtype[np.double]]", name: str, **more: object
    ) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + float(x.sum()), 1.0), obs=torch.tensor(0.3))

    x = np.arange(6.0).reshape(2, 3)
    names = np.array(["first", "second"])
    posterior = MPImportance(model, num_samples=4).run(x, "name", other=SIGMA, n=3, names=names)
    data = posterior.to_arviz(4)
    assert set(dims(data, "constant_data")) == {"x", "other", "names"}
    assert np.asarray(data["constant_data"]["names"]).tolist() == ["first", "second"]
    assert data["constant_data"]["x"].shape == (2, 3)

    class NoSignature:
        __signature__ = "none"

        def __call__(self, *args: object) -> None:
            model(x, "name")

    data = MPImportance(NoSignature(), num_samples=4).run(x, "name").to_arviz(4)
    assert values(data, "constant_data").keys() == {"arg_0"}


# --- programs


@pytest.mark.usefixtures("data_tree")
def test_autoguides_and_their_params() -> None:
    """The params of the run are used, whatever has become of the store since."""
    pyro.set_rng_seed(0)
    guide = AutoNormal(poutine.condition(effects, {}))
    guide(SIGMA, Y)
    posterior = MPImportance(effects, guide, num_samples=30).run(SIGMA, Y)
    pyro.clear_param_store()
    data = posterior.to_arviz(20)
    assert dims(data, "posterior").keys() == {"mu", "theta"}
    assert dims(data, "particles") == {"mu": ("particle",), "theta": ("particle", "group")}
    weights = values(data, "particle_weights")["theta"]
    torch.testing.assert_close(weights.sum(0), torch.ones(4))
    torch.testing.assert_close(values(data, "particle_ess")["theta"], 1 / weights.square().sum(0))


@pytest.mark.usefixtures("data_tree")
def test_sites_that_follow_several_have_no_particles_of_their_own() -> None:
    """A point for each combination: their number would be squared."""

    def guide(sigma: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        b = pyro.sample("b", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Delta(a + b, log_density=torch.zeros_like(a + b)))

    data = MPImportance(effects, guide, num_samples=6).run(SIGMA, Y).to_arviz(4)
    assert dims(data, "particles").keys() == {"theta"}
    assert dims(data, "particle_ess").keys() == {"mu", "theta"}


@pytest.mark.usefixtures("data_tree")
def test_models_without_latents_or_observations() -> None:
    def nothing() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))

    data = MPImportance(nothing, num_samples=3).run().to_arviz(4)
    assert "posterior" not in data
    assert values(data, "sample_stats")["lp"].shape == (4,)

    def prior() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    data = MPImportance(prior, num_samples=3).run().to_arviz(1)
    assert values(data, "posterior")["z"].shape == (1,)
    assert "log_likelihood" not in data
    assert "observed_data" not in data


def test_blocks_and_replicates() -> None:
    """Weights are those of all of them together."""
    posterior = fitted(20, num_replicates=2, memory_limit=10_000)
    assert len(posterior._sums[0].blocks) > 1
    data = posterior.to_arviz(10)
    weights = values(data, "particle_weights")
    assert weights["mu"].shape == (40,)
    torch.testing.assert_close(weights["theta"].sum(0), torch.ones(4))


# --- versions of ArviZ


def test_the_structure_follows_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted(5)
    old = arviz.__version__.startswith("0.")
    assert isinstance(posterior.to_arviz(3), arviz.InferenceData if old else xarray.DataTree)
    monkeypatch.setattr(arviz_export, "version", lambda name: "1.3.0")
    assert isinstance(posterior.to_arviz(3), xarray.DataTree)

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(arviz_export, "version", missing)
    assert isinstance(posterior.to_arviz(3), xarray.DataTree)


def test_without_xarray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match="pip install arviz"):
        fitted(5).to_arviz(3)


@pytest.mark.usefixtures("data_tree")
def test_sites_of_different_numbers_of_particles() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        nu = pyro.sample("nu", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(mu + nu, 1.0), obs=torch.tensor(0.3))

    posterior = MPImportance(model, num_samples={"mu": 7, None: 5}).run()
    data = posterior.to_arviz(10)
    assert dims(data, "particles") == {"mu": ("particle",), "nu": ("nu_particle",)}
    assert torch.equal(values(data, "particles")["nu"], posterior.marginals("nu").samples)
