# SPDX-License-Identifier: Apache-2.0
"""The state that programs run in: what a run found, whatever has happened since."""

import pickle
import threading
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.programs.environment import Environment, seeded

Y = torch.tensor([4.0, 5.0, 6.0])


def model() -> None:
    sd = pyro.param("sd", torch.tensor(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, sd), obs=Y)


def answers(posterior: MPImportance) -> dict[str, Tensor]:
    """Ask for everything that runs the model again."""
    pyro.set_rng_seed(1)
    posterior._reset()  # traces are made anew
    likelihoods = [torch.as_tensor(trace.log_prob_sum()) for trace in posterior.exec_traces]
    found = {
        "mean": posterior.moments()["mu"],
        "sample": posterior.sample(3)["mu"],
        "traces": torch.stack(likelihoods),
    }
    pytest.importorskip("xarray", reason="needs pyro-mpis[arviz]")
    data: Any = posterior.to_arviz(5)
    return found | {"log_likelihood": torch.tensor(data.log_likelihood["y"].values)}


@pytest.mark.parametrize("num_replicates", [1, 3])  # of three, every query evaluates the model
@pytest.mark.parametrize("change", ["in place", "removed", "another"])
def test_parameters_that_change_after_a_run(change: str, num_replicates: int) -> None:
    pyro.param("sd", torch.tensor(1.0))
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=20, num_replicates=num_replicates).run()
    expected = answers(posterior)
    if change == "in place":  # as a step of an optimiser does
        with torch.no_grad():
            pyro.param("sd").fill_(3.0)
    elif change == "removed":
        pyro.clear_param_store()
    else:
        pyro.get_param_store()["sd"] = torch.tensor(3.0)
    found = answers(posterior)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    if change != "removed":
        assert float(pyro.param("sd").detach()) == 3.0  # as the user left it


def test_a_guide_that_is_trained_on() -> None:
    """Modules hold the tensors of the param store; they keep them, and their new values."""

    def plain() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    guide = AutoNormal(plain)
    guide()
    svi = SVI(plain, guide, ClippedAdam({"lr": 0.1}), Trace_ELBO())
    posterior = MPImportance(plain, guide, num_samples=20, num_replicates=3).run()
    expected = answers(posterior)
    for _ in range(5):
        svi.step()
    tensors = dict(pyro.get_param_store().named_parameters())
    trained = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    found = answers(posterior)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    for name, tensor in pyro.get_param_store().named_parameters():
        assert tensor is tensors[name]
        torch.testing.assert_close(tensor.detach(), trained[name])
    svi.step()


def test_pickled_with_the_values_of_its_time() -> None:
    pyro.param("sd", torch.tensor(1.0))
    environment = Environment()
    with torch.no_grad():
        pyro.param("sd").fill_(3.0)
    copied = pickle.loads(pickle.dumps(environment))
    pyro.clear_param_store()
    for each in (environment, copied):
        with each.entered():
            assert float(pyro.param("sd").detach()) == 1.0
    assert not pyro.get_param_store()


def test_values_are_restored_after_an_error() -> None:
    pyro.param("sd", torch.tensor(1.0))
    environment = Environment()
    with torch.no_grad():
        pyro.param("sd").fill_(3.0)
    with pytest.raises(ZeroDivisionError), environment.entered():
        1 / (float(pyro.param("sd").detach()) - 1.0)
    assert float(pyro.param("sd").detach()) == 3.0


def test_threads_take_turns() -> None:
    """Nothing is random here: every run of every thread finds the same number."""

    def mixture(y: Tensor) -> None:
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    expected = MPImportance(mixture, num_samples=3).run(Y).evidence()
    found: list[object] = []

    def work() -> None:
        for _ in range(10):
            try:
                posterior = MPImportance(mixture, num_samples=3).run(Y)
                posterior.sample(2)
                posterior.moments()
                found.append(bool(posterior.evidence() == expected))
            except Exception as error:
                found.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 30
    assert not _PYRO_STACK


def test_generators_of_gpus_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.tensor([1]), torch.tensor([2])]
    restored: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    with pytest.raises(ZeroDivisionError), seeded(0):
        raise ZeroDivisionError
    assert restored == [states]
