# SPDX-License-Identifier: Apache-2.0
"""Independent replicates, and blocks and replicates sent to executors."""

import math
import warnings
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.results.spread import evidence_error

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0.3, -0.5, 1.2], dtype=torch.float64)


def model() -> None:
    """A hierarchy with a param: workers must know the param store too."""
    scale = pyro.param("scale", torch.tensor(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, scale))
    nu = pyro.sample("nu", dist.Normal(0.0, 1.0))
    with pyro.plate("p", 3):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x + nu, 1.0), obs=Y)


def impossible_half_of_the_time() -> None:
    """With one particle, the evidence is often zero."""
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.factor("f", torch.where(z == 1.0, 0.0, -math.inf))


def run(executor: Executor | None = None, **options: Any) -> MPImportance:
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(1.5))
    pyro.set_rng_seed(0)
    return MPImportance(model, num_samples=6, executor=executor, **options).run()


def check_same(one: MPImportance, other: MPImportance) -> None:
    """Same numbers, to rounding, for every query; draws too."""
    torch.testing.assert_close(one.evidence(), other.evidence())
    for site, mean in one.moments().items():
        torch.testing.assert_close(mean, other.moments()[site])
        torch.testing.assert_close(
            one.marginals(site).log_weights, other.marginals(site).log_weights
        )
    torch.testing.assert_close(
        one.moments(torch.mul, "mu", "x"), other.moments(torch.mul, "mu", "x")
    )
    draws = []
    for posterior in (one, other):
        pyro.set_rng_seed(5)
        draws.append(posterior.sample(50))
    for site, values in draws[0].items():
        torch.testing.assert_close(values, draws[1][site])


def test_replicates_are_runs_weighted_by_evidence() -> None:
    """Against the same runs one by one, with the seeds that the replicates have."""
    num_replicates = 5
    posterior = run(num_replicates=num_replicates)
    assert posterior.marginals("x").samples.shape == (3, 30)
    single = []
    pyro.set_rng_seed(0)
    MPImportance(model, num_samples=6)  # draws nothing
    pyro.set_rng_seed(0)
    with pyro.poutine.block():
        model()  # the plain run, before the seeds are drawn
    for seed in torch.randint(2**31 - 1, (num_replicates,)).tolist():
        state = pyro.util.get_rng_state()
        pyro.set_rng_seed(seed)
        single.append(MPImportanceOfOneDraw().run())
        pyro.util.set_rng_state(state)
    log_evidences = torch.stack([one.evidence() for one in single])
    torch.testing.assert_close(
        posterior.evidence(), log_evidences.logsumexp(0) - math.log(num_replicates)
    )
    shares = log_evidences.softmax(0)
    for site, mean in posterior.moments().items():
        means = torch.stack([one.moments()[site] for one in single], -1)
        torch.testing.assert_close(mean, (shares * means).sum(-1))
        torch.testing.assert_close(posterior.marginals(site).mean, mean)
    ratios = shares * num_replicates
    error = float(ratios.std()) / math.sqrt(num_replicates)
    with pytest.warns(MPISWarning, match="5 replicates rarely have a high one among them"):
        assert posterior.evidence_error() == pytest.approx(error)
    assert f"(standard error {error:.2g})" in str(posterior.summary())


def test_a_number_of_replicates_is_for_the_next_run() -> None:
    """Set after a run, or by adapt, it changes none of the run's answers."""
    posterior = run(num_replicates=3)

    def answers() -> tuple[float, float, str, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MPISWarning)
            found = posterior.evidence_error(), str(posterior.summary())
        return (posterior.evidence().item(), *found, repr(posterior))

    before = answers()
    posterior.num_replicates = 7
    assert answers() == before
    assert len(posterior.diagnose(show=False).log_evidences) == 3
    assert len(posterior.run().diagnose(show=False).log_evidences) == 7


class MPImportanceOfOneDraw:
    """A run whose plain run draws nothing from the generator, as in a replicate."""

    def run(self) -> MPImportance:
        posterior = MPImportance(model, num_samples=6)
        state = pyro.util.get_rng_state()

        def restoring() -> None:
            if not restored:
                restored.append(True)
                model()
                pyro.util.set_rng_state(state)
            else:
                model()

        restored: list[bool] = []
        posterior.model = restoring
        return posterior.run()


def test_standard_error_is_that_of_the_spread() -> None:
    """Over many repetitions, the error of the log evidence is as large as reported."""
    truth = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1.5**2 + 1.0).log_prob(Y)
    scores = []
    for seed in range(24):
        pyro.clear_param_store()
        pyro.param("scale", torch.tensor(1.5))
        pyro.set_rng_seed(seed)
        posterior = MPImportance(model, num_samples=20, num_replicates=8).run()
        # the error without the diagnosis of a run, which takes ten times as long as the run
        error = evidence_error(posterior._replicates())
        assert seed > 0 or error == pytest.approx(posterior.evidence_error())
        scores.append(float(posterior.evidence() - truth) / error)
    spread = float(torch.tensor(scores).std())
    assert 0.5 < spread < 2.1  # about 1.2, a t of 7, and a chi-square of 23 around it


def test_no_spread_without_replicates() -> None:
    with pytest.raises(
        ValueError, match=r"num_replicates: the error comes from the spread of several"
    ):
        run().evidence_error()
    for number in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_replicates: expected a positive integer"):
            MPImportance(model, num_samples=3, num_replicates=number)  # type: ignore[arg-type]


def test_replicates_without_evidence_count_as_zero() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(impossible_half_of_the_time, num_samples=1, num_replicates=40).run()
    assert 0.2 < float(posterior.evidence(log_scale=False)) < 0.8
    assert float(posterior.moments()["z"]) == pytest.approx(1.0)
    assert bool((posterior.sample(10)["z"] == 1.0).all())
    assert posterior.evidence_error() > 0.0


def test_an_infinite_moment_counts_as_nothing_where_the_evidence_is_negligible() -> None:
    def narrow() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -1e5 * z.square())

    pyro.set_rng_seed(0)
    posterior = MPImportance(narrow, num_samples=1, num_replicates=40).run()
    outside = posterior.marginals("z").samples.abs() > 0.5
    assert 0 < int(outside.sum()) < 40
    moment = posterior.moments(lambda z: torch.where(z.abs() > 0.5, math.inf, z), "z")
    torch.testing.assert_close(moment, posterior.moments()["z"])


def test_process_pool() -> None:
    """Replicates, and the blocks of a single run, in two processes: the same numbers as here."""
    with ProcessPoolExecutor(2) as pool:
        check_same(run(num_replicates=3), run(pool, num_replicates=3))
        check_same(run(memory_limit=3_000), run(pool, memory_limit=3_000))
    assert len(run(memory_limit=3_000)._sums[0].blocks) > 1


@pytest.mark.parametrize("options", [{"num_replicates": 6}, {"memory_limit": 3_000}])
def test_threads_do_not_act_on_each_other(options: dict[str, Any]) -> None:
    """Handlers, parameters and random numbers are those of the process: jobs take turns."""
    with ThreadPoolExecutor(4) as pool:
        threaded = run(pool, **options)
        check_same(run(**options), threaded)
    assert pyro.poutine.runtime._PYRO_STACK == []


class Failing(Executor):
    """An executor whose second job is lost."""

    def __init__(self) -> None:
        self.count = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.count += 1
        if self.count == 2:
            future.set_exception(RuntimeError("worker died"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_a_lost_worker_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="worker died"):
        run(Failing(), num_replicates=3)


def test_params_that_change_after_the_run_do_not_count() -> None:
    """Blocks are evaluated again by a query: with the parameters of the run."""
    other, posterior = run(memory_limit=3_000), run(memory_limit=3_000)
    expected = other.moments()
    with torch.no_grad():
        pyro.get_param_store()["scale"].unconstrained().mul_(3.0)  # type: ignore[attr-defined]
    for name, mean in posterior.moments().items():
        torch.testing.assert_close(mean, expected[name])


def test_other_changes_after_the_run_are_noticed() -> None:
    """A tensor that the model refers to by itself is not kept: its blocks are others."""
    noise = torch.tensor(1.0)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, noise), obs=torch.tensor(0.5))

    posterior = MPImportance(model, num_samples=5, num_replicates=2).run()
    noise.mul_(3.0)
    with pytest.raises(RuntimeError, match=r"parameters have changed since \.run"):
        posterior.moments()
    with pytest.raises(RuntimeError, match=r"parameters have changed since \.run"):
        posterior.sample(50)


@pytest.mark.slow
def test_dask() -> None:
    """Real processes of Dask's; every day `test_process_pool` and stand-ins in `test_workers`."""
    distributed = pytest.importorskip("distributed", reason="needs pyro-mpis[dask]")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True
    )
    with cluster, distributed.Client(cluster) as client:
        check_same(run(num_replicates=3), run(client.get_executor(), num_replicates=3))
