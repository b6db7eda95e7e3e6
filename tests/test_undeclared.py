# SPDX-License-Identifier: Apache-2.0
"""
Batch dims that no plate declares count as event dims.

Each program has a twin that declares them by ``.to_event``; brute force runs on the twin.
"""

import warnings
from pathlib import Path
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_evidence, check_moment, check_samples, check_weights
from oracles import Problem, Program, brute_force
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.poutine.runtime import InferDict
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_mpis import Marginal, MPImportance, MPISWarning

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pyro_mpis.MPISWarning"),
]

X = torch.tensor([[-1.0], [0.3], [2.0], [0.7]])
Y = torch.tensor([[-0.4], [0.9], [2.5], [1.0]])
FIRST_AND_LAST = cast(torch.BoolTensor, torch.tensor([True, False, True]))
FIRST_TWO = cast(torch.BoolTensor, torch.tensor([True, True, False]))
START = {"w": torch.zeros(3), "v": torch.ones(3)}
ROWS = torch.tensor([[0.2, 1.0, -0.3], [1.1, 0.4, 0.8]])


def column() -> None:
    """A latent (1,), observations (4, 1)."""
    a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(a * X, s), obs=Y)


def column_declared() -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    loc, s = a.unsqueeze(-1) * X, s.unsqueeze(-1).unsqueeze(-1)
    pyro.sample("y", dist.Normal(loc, s).to_event(2), obs=Y)


def column_guide() -> None:
    s = pyro.sample("s", dist.LogNormal(0.1, 0.6))
    pyro.sample("a", dist.Normal(torch.full((1,), 0.5) * s, 1.2))


def column_guide_declared() -> None:
    s = pyro.sample("s", dist.LogNormal(0.1, 0.6))
    pyro.sample("a", dist.Normal(0.5 * s.unsqueeze(-1), 1.2).to_event(1))


def vectors() -> None:
    """A chain of vectors, elementwise, then read in a plate of their size."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
    v = pyro.sample("v", dist.Normal(w, torch.tensor([0.5, 1.0, 1.5])))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(v, 1.0), obs=ROWS[0])


def vectors_declared() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    v = pyro.sample("v", dist.Normal(w, torch.tensor([0.5, 1.0, 1.5])).to_event(1))
    pyro.sample("y", dist.Normal(v, 1.0).to_event(1), obs=ROWS[0])


def left_of_plate() -> None:
    """Two more elements at each plate element, left of the plate's dim."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3, dim=-1):
        b = pyro.sample("b", dist.Normal(mu.expand((*mu.shape[:-2], 2, 1)), 1.0))
        c = pyro.sample("c", dist.Normal(mu, 0.7))
        pyro.sample("y", dist.Normal(b + c, 1.0), obs=ROWS)


def left_of_plate_declared() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3, dim=-1):
        b = pyro.sample("b", dist.Normal(mu.unsqueeze(-1).expand((*mu.shape, 2)), 1.0).to_event(1))
        c = pyro.sample("c", dist.Normal(mu, 0.7))
        pyro.sample("y", dist.Normal(b + c.unsqueeze(-1), 1.0).to_event(1), obs=ROWS.T)


def between_plates() -> None:
    """Batch shape (plate of 2, 2 undeclared, plate of 2)."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2, 1), 1.0))
    with pyro.plate("outer", 2, dim=-3):
        with pyro.plate("inner", 2, dim=-1):
            b = pyro.sample("b", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(b, 0.5), obs=0.3 * torch.arange(8.0).reshape(2, 2, 2))


def between_plates_declared() -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 2, dim=-1):
        b = pyro.sample("b", dist.Normal(mu.squeeze(-1), 1.0).to_event(1))
        data = 0.3 * torch.arange(8.0).reshape(2, 2, 2).transpose(1, 2)
        pyro.sample("y", dist.Normal(b, 0.5).to_event(1), obs=data)


def outside_of_its_plate() -> None:
    """Dim -1 is a plate's at one site and undeclared at others, which read it elementwise."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
    u = pyro.sample("u", dist.Normal(z, 0.5))
    pyro.sample("x", dist.Normal(u, 0.8), obs=ROWS[0])
    pyro.sample("y", dist.Normal(z, 0.6), obs=ROWS[1])
    pyro.sample("other", dist.Normal(mu, 2.0), obs=torch.tensor([0.1, -0.2]))


def outside_of_its_plate_declared() -> None:
    """The same joint density: ``u`` has one index, its density given ``z`` is in the plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    u = pyro.sample("u", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(u, 0.8).to_event(1), obs=ROWS[0])
    u = u.squeeze(-2) if u.dim() > 1 else u  # its event along the plate
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.factor("u given z", dist.Normal(z, 0.5).log_prob(u) - dist.Normal(0, 1).log_prob(u))
        pyro.sample("y", dist.Normal(z, 0.6), obs=ROWS[1])
    loc = mu.unsqueeze(-1).expand((*mu.shape, 2))
    pyro.sample("other", dist.Normal(loc, 2.0).to_event(1), obs=torch.tensor([0.1, -0.2]))


def outside_of_its_plate_guide() -> None:
    pyro.sample("mu", dist.Normal(0.2, 1.1))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(0.1, 1.5))
    pyro.sample("u", dist.Normal(torch.zeros(3), 1.2).to_event(1))


def masked_and_scaled() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
    with poutine.scale(scale=0.5), poutine.mask(mask=FIRST_AND_LAST):
        pyro.sample("y", dist.Normal(w, 1.0), obs=ROWS[0])
    with poutine.mask(mask=FIRST_TWO):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))


def masked_and_scaled_declared() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.poutine.scale(scale=0.5):
        fn = dist.Normal(w, 1.0).mask(torch.tensor([True, False, True]))
        pyro.sample("y", fn.to_event(1), obs=ROWS[0])
    fn = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    pyro.sample("x", fn, obs=torch.full((2,), 0.5))


def reduced() -> None:
    """A vector of coefficients that the program sums over."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    x = ROWS.T[:, :2]
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal((w * x).sum(-1) + b, 1.0), obs=ROWS[0])


def reduced_declared() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    x = ROWS.T[:, :2]
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal((w * x).sum(-1) + b, 1.0), obs=ROWS[0])


def reduced_guide() -> None:
    w = pyro.sample("w", dist.Normal(torch.tensor([0.2, -0.1]), 1.2))
    pyro.sample("b", dist.Normal(0.3 * w.sum(-1), 1.1))


def reduced_guide_declared() -> None:
    w = pyro.sample("w", dist.Normal(torch.tensor([0.2, -0.1]), 1.2).to_event(1))
    pyro.sample("b", dist.Normal(0.3 * w.sum(-1), 1.1))


def counts() -> None:
    """Discrete, and with event dims of its own."""
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2, 3)))
    n = pyro.sample("n", dist.Poisson(torch.tensor([1.0, 3.0])))
    pyro.sample("y", dist.Normal(n.unsqueeze(-1) * w, 1.0).to_event(1), obs=ROWS)


def counts_declared() -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2, 3)).to_event(1))
    n = pyro.sample("n", dist.Poisson(torch.tensor([1.0, 3.0])).to_event(1))
    pyro.sample("y", dist.Normal(n.unsqueeze(-1) * w, 1.0).to_event(2), obs=ROWS)


def vector_guide() -> None:
    with pyro.plate("parts", 3):
        w = pyro.sample("w", dist.Normal(torch.full((3,), 0.2), 1.3))
    pyro.sample("v", dist.Normal(0.5 * w, 1.0))


def vector_guide_declared() -> None:
    w = pyro.sample("w", dist.Normal(torch.full((3,), 0.2), 1.3).to_event(1))
    pyro.sample("v", dist.Normal(0.5 * w, 1.0).to_event(1))


def outside_of_its_plate_prior() -> None:
    """The prior as a guide, to be run on single values only."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
    pyro.sample("u", dist.Normal(z, 0.5).to_event(1))


PROGRAMS: dict[str, tuple[Program, Program | None, Program, Program | None, int]] = {
    "column": (column, None, column_declared, None, 4),
    "column, guide": (column, column_guide, column_declared, column_guide_declared, 4),
    "column, one particle": (column, column_guide, column_declared, column_guide_declared, 1),
    "vectors": (vectors, None, vectors_declared, None, 4),
    "vectors, plate in the guide": (
        *(vectors, vector_guide),
        *(vectors_declared, vector_guide_declared),
        4,
    ),
    "left of a plate": (left_of_plate, None, left_of_plate_declared, None, 3),
    "between plates": (between_plates, None, between_plates_declared, None, 3),
    "outside of its plate": (
        *(outside_of_its_plate, outside_of_its_plate_guide),
        *(outside_of_its_plate_declared, outside_of_its_plate_guide),
        3,
    ),
    "outside of its plate, prior": (
        *(outside_of_its_plate, None),
        *(outside_of_its_plate_declared, outside_of_its_plate_prior),
        3,
    ),
    "mask and scale": (masked_and_scaled, None, masked_and_scaled_declared, None, 4),
    "reduced": (reduced, None, reduced_declared, None, 4),
    "reduced, guide": (reduced, reduced_guide, reduced_declared, reduced_guide_declared, 4),
    "counts": (counts, None, counts_declared, None, 4),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_undeclared_dims_are_event_dims(name: str) -> None:
    model, guide, declared_model, declared_guide, num_samples = PROGRAMS[name]
    pyro.set_rng_seed(1)
    posterior = MPImportance(model, guide, num_samples=num_samples).run()
    marginals = posterior.marginals()
    particles = {name: marginal.samples for name, marginal in marginals.items()}
    exact = brute_force(Problem(declared_model, declared_guide, particles))
    check_evidence(posterior.evidence(), exact)
    sites = poutine.trace(model).get_trace().nodes
    for site, marginal in marginals.items():
        check_weights(marginal.log_weights, exact, site)
        squares = posterior.moments(lambda x: x.double().square().sum(), site)
        check_moment(squares, exact.moment(lambda x: x.double().square().sum(), site))
    means = posterior.moments()
    samples = posterior.sample(5_000)
    declared = {}
    for site, marginal in marginals.items():
        value: Any = sites[site]["value"]
        assert means[site].shape == value.shape
        assert samples[site].shape == (5_000, *value.shape)
        expected = exact.moment(lambda x: x.to(torch.get_default_dtype()), site)
        check_moment(as_declared(means[site][None], marginal, sites[site])[0], expected)
        declared[site] = as_declared(samples[site], marginal, sites[site])
    check_samples(declared, exact)


def as_declared(values: Tensor, marginal: Marginal, node: Any) -> Tensor:
    """Move the undeclared dims of ordinary values behind those of plates."""
    dims = sorted(frame.dim - node["fn"].event_dim for frame in node["cond_indep_stack"])
    assert len(dims) == len(marginal.batch_shape)
    return values.movedim(dims, list(range(1, 1 + len(dims))))


def test_said_once() -> None:
    """One warning names the sites and their shapes; dims of size one alone lose nothing."""
    with pytest.warns(MPISWarning, match=r"\('y' \(4, 1\)\) count as event dims") as caught:
        MPImportance(column, num_samples=3).run().moments()
    assert len(caught) == 1

    def single() -> None:
        pyro.sample("a", dist.Normal(torch.zeros(1), 1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MPImportance(single, num_samples=3).run().marginals("a").event_shape == (1,)


class LargestTensor(TorchFunctionMode):
    """Notes the number of elements of the largest result of any torch function."""

    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_many_samples_of_one_site() -> None:
    """Nothing has the square of the number of particles."""
    pyro.set_rng_seed(0)
    with LargestTensor() as largest:
        posterior = MPImportance(line, num_samples=10_000).run()
        posterior.moments()
        posterior.sample(100)
        assert posterior.log_weights[0].shape == ()
    assert 10_000 <= largest.numel <= 1_000_000  # as a mapped run shows them, without its dim
    precision = 1.0 + float(X.square().sum())
    mean = float((X * Y).sum()) / precision
    sd = precision**-0.5
    # the weights' own standard errors; false alarm below 1e-6
    ess = float(posterior.marginals("a").ess)
    assert ess > 1000
    assert abs(float(posterior.moments()["a"]) - mean) < 6 * sd / ess**0.5
    covariance = torch.eye(4) + X @ X.T
    exact = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(Y.squeeze(-1))
    assert abs(float(posterior.evidence() - exact)) < 6 / ess**0.5


def line() -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0))
    pyro.sample("y", dist.Normal(a * X, 1.0), obs=Y)


def test_autoguide_of_undeclared_dims() -> None:
    """The guide has the model's undeclared dims; the same numbers as with declared ones."""
    results = []
    for model in (vectors, vectors_declared):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoNormal(model, init_loc_fn=init_to_value(values=START), init_scale=0.7)
        results.append(MPImportance(model, guide, num_samples=20).run())
    torch.testing.assert_close(results[0].evidence(), results[1].evidence())
    torch.testing.assert_close(results[0].moments(), results[1].moments())


def test_auxiliary_sites_of_a_program_that_sums() -> None:
    """The guide's own latents have event dims too, when the model is run with them."""
    pyro.set_rng_seed(0)
    guide: Any = AutoNormal(reduced, init_scale=0.9)
    posterior = MPImportance(reduced, guide, num_samples=4).run()
    locs, scales = guide.locs, guide.scales

    def longhand() -> None:
        pyro.sample("w", dist.Normal(locs.w, scales.w).to_event(1))
        pyro.sample("b", dist.Normal(locs.b, scales.b))

    particles = {name: marginal.samples for name, marginal in posterior.marginals().items()}
    check_evidence(
        posterior.evidence(), brute_force(Problem(reduced_declared, longhand, particles))
    )


def test_group() -> None:
    """Sites of a group are weighed together."""
    pyro.set_rng_seed(0)
    groups = [("w", "v")]
    posterior = MPImportance(vectors, vector_guide, num_samples=5, groups=groups).run()
    particles = {name: marginal.samples for name, marginal in posterior.marginals().items()}
    problem = Problem(vectors_declared, vector_guide_declared, particles, groups=groups)
    exact = brute_force(problem)
    check_evidence(posterior.evidence(), exact)
    check_weights(posterior.marginals("w", "v").log_weights, exact, "w", "v")


def test_blocks_and_replicates() -> None:
    """A sum in blocks is the same."""
    pyro.set_rng_seed(0)
    whole = MPImportance(vectors, num_samples=8).run()
    pyro.set_rng_seed(0)
    cut = MPImportance(vectors, num_samples=8, memory_limit=3 * 3 * 8 * 8 * 2).run()
    torch.testing.assert_close(whole.evidence(), cut.evidence())
    torch.testing.assert_close(whole.moments(), cut.moments())
    assert MPImportance(vectors, num_samples=8, num_replicates=2).run().sample(3)["w"].shape == (
        *(3, 3),
    )


def test_enumerated_site_with_undeclared_dims() -> None:
    def model() -> None:
        infer: InferDict = {"enumerate": "parallel"}
        z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.2, 0.7])), infer=infer)
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(2))

    with pytest.raises(
        ValueError, match=r"site 'z': marked .*dim -1 .*\(2,\).*pyro\.plate of size 2"
    ):
        MPImportance(model, num_samples=2).run()


def test_element_that_reads_others() -> None:
    """Each element of an observation outside of a plate reads one, which need not be its own."""

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.flip(-1), 1.0), obs=ROWS[0])

    def declared() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=ROWS[0].flip(-1))

    for validate in (True, False):
        with pyro.validation_enabled(validate):
            posterior = MPImportance(model, num_samples=3).run()
        particles = {"z": posterior.marginals("z").samples}
        exact = brute_force(Problem(declared, None, particles))
        check_evidence(posterior.evidence(), exact)
        check_weights(posterior.marginals("z").log_weights, exact, "z")


def test_program_for_single_values() -> None:
    """Elements of an undeclared dim are those of one vector."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("y", dist.Normal(w[0] + w[1], 1.0), obs=torch.tensor(0.3))

    with pytest.warns(MPISWarning, match=r"\('w' \(3,\)\) count as event dims.*to_event"):
        posterior = MPImportance(model, num_samples=4).run()
    w = posterior.marginals("w").samples
    log_prob = dist.Normal(w[:, 0] + w[:, 1], 1.0).log_prob(torch.tensor(0.3))
    torch.testing.assert_close(posterior.evidence(), log_prob.exp().mean().log())
    torch.testing.assert_close(posterior.marginals("w").weights, log_prob.softmax(0))


def test_diagnosis_and_export() -> None:
    """Undeclared dims stay in their places, and take no plate's name."""
    pytest.importorskip("arviz")
    posterior = MPImportance(left_of_plate, num_samples=60).run()
    assert {site.name: site.plates for site in posterior.diagnose(show=False).sites} == {
        "mu": (),
        "b": ("data",),
        "c": ("data",),
    }
    groups: Any = posterior.to_arviz(50, posterior_predictive=True)
    expected = {"b_dim_0": 2, "data": 3}
    for group, name, left in (
        ("posterior", "b", {"chain": 1, "draw": 50}),
        ("particles", "b", {"particle": 60}),
        ("particle_weights", "b", {"particle": 60}),
        ("particle_ess", "b", {}),
    ):
        array = groups[group][name]
        assert dict(zip(array.dims, array.shape, strict=True)) == left | expected
    particles = groups["particles"]["b"].values  # (K, undeclared, plate)
    samples = posterior.marginals("b").samples.numpy()  # (plate, K, undeclared)
    assert (particles == samples.transpose(1, 2, 0)).all()
    assert groups["posterior_predictive"]["y"].dims == ("chain", "draw", "y_dim_0", "data")


@pytest.mark.parametrize("model", [left_of_plate, outside_of_its_plate, reduced])
@pytest.mark.parametrize("factors", [True, False])
def test_save_and_load(model: Program, factors: bool, tmp_path: Path) -> None:
    """Also of a program that was run with event dims; its factors may be evaluated again."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=5).run()
    posterior.save(tmp_path / "kept.mpis", factors=factors)
    loaded = MPImportance.load(tmp_path / "kept.mpis", model)
    torch.testing.assert_close(loaded.moments(), posterior.moments())
    for kept in (loaded, loaded.to("cpu")):
        (first, *_) = latents = list(kept.moments())
        assert len(kept.exec_traces) == 5
        assert set(latents) <= set(kept.exec_traces[0].nodes)
        fn: Any = kept.exec_traces[0].nodes[first]["fn"]
        assert fn.event_dim == 0  # the program as it was written


def test_broadcast_by_mistake_is_said() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(3, 1))

    with pytest.warns(MPISWarning, match=r"'y' \(3, 3\)"):
        MPImportance(model, num_samples=2).run()
