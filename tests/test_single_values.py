# SPDX-License-Identifier: Apache-2.0
"""Programs written for single values, as Pyro's own examples are, against brute force."""

from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning

pytestmark = pytest.mark.usefixtures("float64")

Program = Callable[..., object]
N = 5  # elements of data


def rows() -> Tensor:
    return torch.linspace(-1.0, 1.0, N)


def kernel() -> None:
    """A matrix of one latent's."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    covariance = torch.exp(-(((rows()[:, None] - rows()) / scale) ** 2)) + torch.eye(N)
    assert covariance.shape == (N, N)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(N), covariance), obs=torch.zeros(N))


def expanded() -> None:
    """A distribution that is expanded by hand."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    w = pyro.sample("w", dist.Normal(0.0, scale).expand([N]).to_event(1))
    pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.tensor(0.5))


def mixture_of_components() -> None:
    """Arguments of which one alone has a mapped dim."""
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", N):
        fn = dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(loc, 1.0))
        pyro.sample("y", fn, obs=rows())


def layer() -> None:
    """A linear layer, by its function."""
    x = torch.stack([rows(), rows() ** 2], -1)
    weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    mean = torch.nn.functional.linear(x, weight, bias).squeeze(-1)
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=rows())


class Regression(PyroModule):
    """A linear layer of torch's with sampled weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)  # type: ignore[call-arg, arg-type]
        self.linear.weight = PyroSample(dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def forward(self) -> None:
        mean = self.linear(torch.stack([rows(), rows() ** 2], -1)).squeeze(-1)
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=rows())


def vector_along_a_plate() -> None:
    f = pyro.sample("f", dist.Normal(torch.zeros(N), 1.0).to_event(1))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(f, 1.0), obs=rows())


def product() -> None:
    x = torch.stack([rows(), rows() ** 2, torch.ones(N)], -1)
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(x @ w, s).to_event(1), obs=rows())


def as_many_particles_as_rows() -> None:
    """What broadcasts by accident where particles are a batch dim."""
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 3):
        scale = s * (1.0 + w.abs().mean(-1, keepdim=True))
        mean = (w * torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])).sum(-1)
        pyro.sample("y", dist.Normal(mean, scale), obs=torch.ones(3))


def first_element() -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(a[0], 1.0))
    pyro.sample("y", dist.Normal(a.reshape(1, 2)[0, 1] + b, 1.0), obs=torch.tensor(0.5))


def reshaped() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    with pyro.plate("data", 3):
        loc = torch.cat([a.reshape(-1), b.reshape(-1), torch.stack([a, b]).sum(0, keepdim=True)])
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.ones(3))


def walk(function: Callable[[Tensor], Tensor]) -> None:
    """Elements of a vector that are mixed."""
    x = pyro.sample("x", dist.Normal(torch.zeros(N), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(function(x), s).to_event(1), obs=torch.ones(N))


def table() -> None:
    """Rows of a table of probabilities, read by a state: as in a hidden Markov model."""
    table = pyro.sample("table", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    assert table.shape == (2, 2)
    assert locs.shape == (2,)
    z = torch.tensor(0)
    for step in range(3):
        z = pyro.sample(f"z_{step}", dist.Categorical(table[z]))
        pyro.sample(f"y_{step}", dist.Normal(locs[z], 1.0), obs=torch.tensor(0.3 * step))


def components(joint: bool, advanced: bool) -> None:
    """A mixture whose components are a vector, or a plate."""
    if joint:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    else:
        with pyro.plate("component", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        mean = Vindex(loc)[..., z] if advanced else loc[z]
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor([1.5, -0.5]))


PROGRAMS: dict[str, tuple[Program, int]] = {
    "kernel": (kernel, 6),
    "expanded": (expanded, 4),
    "mixture of components": (mixture_of_components, 4),
    "layer": (layer, 4),
    "vector along a plate": (vector_along_a_plate, 6),
    "matrix times vector": (product, 4),
    "as many particles as rows": (as_many_particles_as_rows, 3),
    "first element": (first_element, 5),
    "reshape": (reshaped, 5),
    "less its mean": (partial(walk, lambda x: x - x.mean()), 4),
    "over its norm": (partial(walk, lambda x: x / x.norm()), 4),
    "softmax": (partial(walk, lambda x: torch.softmax(x, 0)), 4),
    "cumsum": (partial(walk, lambda x: torch.cumsum(x, 0)), 4),
    "table": (table, 3),
    "components as a vector": (partial(components, True, False), 4),
    "components as a vector, by Vindex": (partial(components, True, True), 4),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_for_single_values(name: str) -> None:
    program, num_samples = PROGRAMS[name]
    compare(program, num_samples=num_samples)


def test_layer_with_sampled_weights() -> None:
    """A module of torch's runs as its function does."""
    posterior, _ = compare(Regression(), num_samples=4)
    pyro.set_rng_seed(0)
    by_function = MPImportance(layer, num_samples=4).run()
    torch.testing.assert_close(posterior.evidence(), by_function.evidence())


@pytest.mark.parametrize("advanced", [False, True])
def test_elements_that_a_latent_chooses_share_an_index(advanced: bool) -> None:
    """Any component may be read by any element, so they have one particle index together."""
    message = (
        r"site 'y' reads several elements of plate 'component' together: 'loc' has one particle "
        r"index for all of plate 'component'"
    )
    model = partial(components, False, advanced)
    compare(model, num_samples=3, shared={"loc": ["component"]}, warning=message)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(),
        lambda x: x / x.norm(),
        lambda x: torch.softmax(x, 0),
        lambda x: torch.cumsum(x, 0),
    ],
)
def test_undeclared_dims_may_be_mixed(function: Callable[[Tensor], Tensor]) -> None:
    """They have one particle index, as an event has, which gives the same numbers."""

    def model(event_dim: int) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(N), 1.0).to_event(event_dim))
        pyro.sample("y", dist.Normal(function(x), 1.0).to_event(event_dim), obs=torch.ones(N))

    posterior, _ = compare(model, args=(1,), num_samples=6)
    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=r"no pyro\.plate declares \('x' \(5,\), 'y' \(5,\)\)"):
        undeclared = MPImportance(model, num_samples=6).run(0)
    torch.testing.assert_close(undeclared.evidence(), posterior.evidence())


@pytest.mark.parametrize("log_density", [False, True])
def test_guide_that_mixes_elements(log_density: bool) -> None:
    """The value, or the density, of a Delta site is computed from all of a vector."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        pyro.sample("y", dist.Normal(x, s).to_event(1), obs=torch.ones(3))

    def guide() -> None:
        u = pyro.sample(
            "u", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer={"is_auxiliary": True}
        )
        x = u - u.mean() + 0.3 * u
        log_det = -(u[0] * 0.1 + u.mean()) if log_density else torch.tensor(0.0)
        pyro.sample("x", dist.Delta(x, log_density=log_det, event_dim=1))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=4).run()
    x, s = posterior.marginals("x").samples, posterior.marginals("s").samples
    inverse = torch.linalg.inv(1.3 * torch.eye(3) - torch.ones(3, 3) / 3)
    total = torch.zeros(())
    for value in x:
        u = inverse @ value
        log_q = dist.Normal(0.0, 1.0).log_prob(u).sum()
        if log_density:
            log_q = log_q - (u[0] * 0.1 + u.mean())
        for scale in s:
            log_p = dist.Normal(0.0, 1.0).log_prob(value).sum()
            log_p = log_p + dist.Normal(value, scale).log_prob(torch.ones(3)).sum()
            total = total + (log_p - log_q).exp() / 16
    torch.testing.assert_close(posterior.evidence(), total.log())
