# SPDX-License-Identifier: Apache-2.0
"""Queries answer with the parameters of the run, whatever has become of these since."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0.5, 1.0, 3.0]).double()


class Scaled(PyroModule):
    """A model whose scale is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = PyroParam(torch.tensor(2.0), dist.constraints.positive)

    def forward(self) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("i", 3):
            pyro.sample("y", dist.Normal(mu, self.scale), obs=Y)


def scaled() -> None:
    scale = pyro.param("scale", torch.tensor(2.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("i", 3):
        pyro.sample("y", dist.Normal(mu, scale), obs=Y)


def networked(net: torch.nn.Module) -> Any:
    def model() -> None:
        scale = pyro.module("net", net)(torch.ones(1)).squeeze().exp()
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("i", 3):
            pyro.sample("y", dist.Normal(mu, scale), obs=Y)

    return model


def changed(params: list[Tensor]) -> None:
    """Change parameters in place, as a step of an optimiser does."""
    with torch.no_grad():
        for param in params:
            param += 1.0


@pytest.mark.parametrize("kind", ["store", "created in the run", "PyroModule", "pyro.module"])
def test_traces_and_log_likelihoods_are_of_the_run(kind: str) -> None:
    """Log likelihoods of the draws are those of the scale of the run; the change stays."""
    params: list[Tensor] = []
    expected = 2.0
    if kind == "PyroModule":
        module = Scaled()
        model: Any = module
        params = list(module.parameters())
    elif kind == "pyro.module":
        net = torch.nn.Linear(1, 1)
        model, params = networked(net), list(net.parameters())
        expected = float(net(torch.ones(1)).detach().exp())
    else:
        model = scaled
        if kind == "store":
            pyro.param("scale", torch.tensor(2.0))
            params = [pyro.get_param_store()["scale"]]
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=5).run()
    before = [param.detach().clone() for param in params]
    changed(params)
    if kind == "created in the run":
        pyro.param("scale", torch.tensor(9.0))
    for trace in posterior.exec_traces:
        y: Any = trace.nodes["y"]["fn"]
        mu: Any = trace.nodes["mu"]["value"]
        found = y.log_prob(Y)
        torch.testing.assert_close(found, dist.Normal(mu, expected).log_prob(Y))
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), old + 1.0)
    assert [id(param) for param in params] == [
        id(param) for param in (model.parameters() if kind == "PyroModule" else params)
    ]


def test_blocks_are_evaluated_with_the_parameters_of_the_run() -> None:
    pyro.param("scale", torch.tensor(2.0))
    pyro.set_rng_seed(0)
    posterior = MPImportance(scaled, num_samples=5, num_replicates=3).run()
    again = MPImportance(scaled, num_samples=5, num_replicates=3)
    pyro.set_rng_seed(0)
    expected = again.run().moments()["mu"]
    changed([pyro.get_param_store()["scale"]])
    torch.testing.assert_close(posterior.moments()["mu"], expected)


def test_a_point_of_the_guide_stays_that_of_the_run() -> None:
    """A Delta's value is the parameter itself, which an optimiser changes in place."""

    def guide() -> None:
        pyro.sample("mu", dist.Delta(pyro.param("point", torch.tensor(1.0))))

    pyro.param("point", torch.tensor(1.0))
    with pytest.warns(MPISWarning, match="fixes 'mu' at a point"):
        posterior = MPImportance(scaled, guide, num_samples=2).run()
    changed([pyro.get_param_store()["point"]])
    assert float(posterior.moments()["mu"]) == 1.0
