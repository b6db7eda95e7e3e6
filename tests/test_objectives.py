# SPDX-License-Identifier: Apache-2.0
"""Objectives for SVI: against Pyro's, sums written out in loops, and finite differences."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from objectives import (
    ALL,
    Y,
    assert_same,
    derivatives,
    draws,
    gradients,
    guide,
    independent_guide,
    log_evidence_by_loops,
    model,
    param,
    unconstrained,
)
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_mpis import MPReweightedWakeSleep, TraceMP_ELBO, planning
from pyro_mpis.objectives import compiled

pytestmark = pytest.mark.usefixtures("float64")

NAMES = ["prior", "width", "a", "b", "c", "d"]


def scaled_model() -> None:
    with poutine.scale(scale=0.3):
        mu = pyro.sample("mu", dist.Normal(param("prior", 0.2), 1.5))
    pyro.sample("y", dist.Normal(mu, 0.7), obs=Y[0])


def scaled_guide() -> None:
    with poutine.scale(scale=0.3):
        pyro.sample("mu", dist.Normal(param("a", 0.4), param("b", 1.2, positive=True)))


@pytest.mark.parametrize("name", ["hierarchy", "autoguide", "scaled"])
def test_one_particle_is_the_elbo(name: str) -> None:
    if name == "scaled":  # as in annealing, where the scale counts in guide and model
        pair: tuple[Callable[..., object], Callable[..., object]] = scaled_model, scaled_guide
    else:
        pair = model, guide if name == "hierarchy" else AutoNormal(model)
        pair[1]()  # makes the parameters
    expected = gradients(Trace_ELBO(), *pair)
    found = gradients(TraceMP_ELBO(num_samples=1), *pair)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert_same(found[1], expected[1])


def test_one_group_is_the_bound_of_renyi() -> None:
    expected = gradients(
        RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        model,
        guide,
    )
    loss = TraceMP_ELBO(num_samples=4, groups=ALL, shared_plates=["group"])
    found = gradients(loss, model, guide)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert_same(found[1], expected[1])
    apart = gradients(TraceMP_ELBO(num_samples=4), model, guide)
    assert apart[0] != pytest.approx(expected[0], rel=1e-3)


@pytest.mark.parametrize("insomnia", [1.0, 0.4, 0.0])
def test_one_group_is_reweighted_wake_sleep(insomnia: float) -> None:
    """Of a guide without dependence: Pyro's gradients leak through the values that others read."""

    def with_observations(y: Tensor = Y, observations: object = None) -> None:
        independent_guide(y)

    theirs = ReweightedWakeSleep(
        num_particles=4, insomnia=insomnia, max_plate_nesting=1, model_has_params=insomnia > 0
    )
    expected = gradients(theirs, model, with_observations)
    ours = MPReweightedWakeSleep(
        4,
        insomnia,
        model_has_params=insomnia > 0,
        max_plate_nesting=1,
        groups=ALL,
        shared_plates=["group"],
    )
    found = gradients(ours, model, with_observations)
    start = 0 if insomnia else 1  # without wake-theta Pyro's first loss is a number for nothing
    for one, other in list(zip(found[0], expected[0], strict=True))[start:]:  # type: ignore[call-overload]
        assert one == pytest.approx(other, rel=1e-9)
    assert_same({n: found[1][n] for n in "abcd"}, {n: expected[1][n] for n in "abcd"})
    if insomnia:
        assert_same(found[1], expected[1])


def test_sum_over_all_combinations() -> None:
    expected = -log_evidence_by_loops(*draws(num_samples=2, size=3))
    value, found = gradients(TraceMP_ELBO(num_samples=2), model, guide)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert_same({n: found[n] for n in NAMES}, derivatives(expected, NAMES))


def test_wake_gradients_over_all_combinations() -> None:
    """Of log P at fixed particles: up for the guide's parameters, down for the model's."""
    mu, theta = draws(num_samples=2, size=3)
    log_p = log_evidence_by_loops(mu.detach(), theta.detach())
    losses, found = gradients(MPReweightedWakeSleep(2), model, guide)
    assert isinstance(losses, tuple)
    assert losses[0] == pytest.approx(-log_p.item(), rel=1e-12)
    grads = derivatives(log_p, NAMES)
    assert_same(found, {n: -g if n in ("prior", "width") else g for n, g in grads.items()})


def test_wake_gradients_of_discrete_latents() -> None:
    def coins() -> None:
        with pyro.plate("coin", 3):
            z = pyro.sample("z", dist.Bernoulli(logits=param("bias", 0.2)))
            pyro.sample("y", dist.Normal(2 * z, 1.0), obs=Y)

    def proposal() -> None:
        logits = pyro.param("logits", torch.tensor([0.1, -0.5, 0.7]))
        with pyro.plate("coin", 3):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    _, found = gradients(MPReweightedWakeSleep(5), coins, proposal)
    pyro.set_rng_seed(0)
    logits = pyro.param("logits")
    z = dist.Bernoulli(logits=logits).expand([5, 3])().detach()
    log_p = torch.zeros(())
    for i in range(3):
        weights = [
            dist.Bernoulli(logits=param("bias", 0.2)).log_prob(z[k, i])
            + dist.Normal(2 * z[k, i], 1.0).log_prob(Y[i])
            - dist.Bernoulli(logits=logits[i]).log_prob(z[k, i])
            for k in range(5)
        ]
        log_p = log_p + torch.stack(weights).logsumexp(0) - math.log(5)
    grads = derivatives(log_p, ["bias", "logits"])
    assert_same(found, {"bias": -grads["bias"], "logits": grads["logits"]})
    with pytest.raises(NotImplementedError, match=r"'z': discrete, and drawn by the guide.*sum"):
        gradients(TraceMP_ELBO(num_samples=5), coins, proposal)
    assert math.isfinite(TraceMP_ELBO(num_samples=5).loss(coins, proposal))  # only a number


@pytest.mark.parametrize("autoguide", [False, True])
def test_finite_differences(autoguide: bool) -> None:
    """The mean over common random numbers, in a random direction of all parameters."""
    loss = TraceMP_ELBO(num_samples=3, num_particles=2)
    pair = model, AutoNormal(model) if autoguide else guide
    _, found = gradients(loss, *pair, seed=1)
    params = {name: unconstrained(name) for name in found}
    directions = {name: torch.randn_like(value) for name, value in params.items()}
    step, ends = 1e-5, []
    for sign in (1.0, -1.0):
        for name, value in params.items():
            value.data.add_(directions[name], alpha=sign * step)
        pyro.set_rng_seed(1)
        ends.append(loss.loss(*pair))
        for name, value in params.items():
            value.data.add_(directions[name], alpha=-sign * step)
    slope = sum(float((found[name] * directions[name]).sum()) for name in found)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("loss", [TraceMP_ELBO(num_samples=3), MPReweightedWakeSleep(3)])
def test_guide_that_need_not_run_again(
    loss: TraceMP_ELBO | MPReweightedWakeSleep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites that read one index are known from the draws: the numbers are those of a run."""
    autoguide = AutoNormal(model)
    autoguide()
    found = gradients(loss, model, autoguide)
    monkeypatch.setattr(compiled, "carried_by_one", lambda structure, validate: {})
    expected = gradients(loss, model, autoguide)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert_same(found[1], expected[1])
    assert any(bool(grad.abs().max() > 1e-3) for grad in found[1].values())


def test_sum_over_a_support() -> None:
    """With nothing but enumerated latents the loss is exact, and so are its derivatives."""

    def mixture() -> None:
        weights = torch.stack([param("bias", 0.2), torch.zeros(())])
        with pyro.plate("point", 3):
            z = pyro.sample("z", dist.Categorical(logits=weights), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=Y)

    value, found = gradients(TraceMP_ELBO(num_samples=2), mixture, nothing)
    log_weights = torch.stack([param("bias", 0.2), torch.zeros(())]).log_softmax(0)
    terms = log_weights + dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(Y[:, None])
    exact = -terms.logsumexp(-1).sum()
    assert value == pytest.approx(exact.item(), rel=1e-12)
    expected = derivatives(exact, ["bias"])
    assert_same(found, expected)
    _, found = gradients(MPReweightedWakeSleep(2), mixture, nothing)
    assert_same(found, expected)


def test_training_reaches_the_posterior() -> None:
    """The posterior, a normal distribution, is in the guide's family."""

    def one(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def proposal(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(param("a", 0.0), param("b", 1.5, positive=True)))

    y = torch.tensor(1.5)
    for loss in (TraceMP_ELBO(num_samples=2), MPReweightedWakeSleep(4)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(one, proposal, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99}), loss)
        for _ in range(250):
            svi.step(y)
        assert pyro.param("a").item() == pytest.approx(1.5 * 4 / 5, abs=0.2)
        assert pyro.param("b").item() == pytest.approx(math.sqrt(4 / 5), abs=0.25)


def test_as_a_module() -> None:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.tensor(0.5))

        def forward(self) -> None:
            pyro.sample(
                "mu",
                dist.Normal(self.loc, 1.0),  # type: ignore[arg-type]
            )

    class Model(PyroModule):
        def forward(self) -> None:
            pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=Y[0])

    with pyro.settings.context(module_local_params=True):
        module = TraceMP_ELBO(num_samples=3)(Model(), Guide())
        pyro.set_rng_seed(0)
        loss = module()
        loss.backward()
        (found,) = (p.grad for p in module.parameters())
        pyro.set_rng_seed(0)
        loc = torch.tensor(0.5, requires_grad=True)
        mu = loc + dist.Normal(0.0, 1.0).sample([3])
        log_weight = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu, 1.0).log_prob(Y[0])
        expected = -(log_weight - dist.Normal(loc, 1.0).log_prob(mu)).logsumexp(0) + math.log(3)
        torch.testing.assert_close(loss, expected)
        (grad,) = torch.autograd.grad(expected, loc)
        torch.testing.assert_close(found, grad)


def test_programs_are_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []

    def counted(*args: object) -> object:
        runs.append(args)
        return planning.plan_of(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(compiled, "plan_of", counted)
    loss = TraceMP_ELBO(num_samples=2)
    for y in (Y, Y + 1.0, Y[:2], Y, Y[:2]):
        gradients(loss, model, guide, y)
    assert len(runs) == 2  # one for each shape
    pyro.clear_param_store()
    assert gradients(loss, model, guide, Y)[1].keys() == set(NAMES)
    assert len(runs) == 2


def test_index_arrays_may_change() -> None:
    def by_index(group: Tensor) -> None:
        with pyro.plate("group", 2):
            alpha = pyro.sample("alpha", dist.Normal(param("prior", 0.2), 1.0))
        with pyro.plate("point", 3):
            pyro.sample("y", dist.Normal(alpha[group], 1.0), obs=Y)

    loss = TraceMP_ELBO(num_samples=3)
    found = []
    for group in ([0, 1, 1], [1, 0, 1], [1, 0, 1], [0, 0, 0]):
        index = torch.tensor(group)
        again = gradients(loss, by_index, nothing, index)
        anew = gradients(TraceMP_ELBO(num_samples=3), by_index, nothing, index)
        assert again[0] == pytest.approx(anew[0], rel=1e-12)
        assert_same(again[1], anew[1])
        found.append(again[0])
    assert len(set(found)) == 3
    written = torch.tensor([0, 1, 1])
    first = gradients(loss, by_index, nothing, written)[0]
    written[:] = torch.tensor([1, 0, 1])  # in place
    assert gradients(loss, by_index, nothing, written)[0] == found[1] != first


def nothing(*args: object) -> None:
    """Draw all from the prior."""


def test_draws_without_derivative() -> None:
    def target() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])

    def proposal() -> None:
        pyro.sample("x", NonreparameterizedNormal(param("a", 0.4), 1.0))

    message = r"site 'x': without reparametrised draws \(rsample\).*by the guide.*MPReweighted"
    with pytest.raises(NotImplementedError, match=message):
        gradients(TraceMP_ELBO(num_samples=2), target, proposal)
    gradients(MPReweightedWakeSleep(2), target, proposal)

    def from_prior() -> None:
        n = pyro.sample("n", dist.Poisson(param("rate", 2.0, positive=True)))
        pyro.sample("y", dist.Normal(n, 1.0), obs=Y[0])

    with pytest.raises(NotImplementedError, match=r"site 'n': discrete.*by the model"):
        gradients(TraceMP_ELBO(num_samples=2), from_prior, nothing)

    def fixed() -> None:  # nothing is learned of it
        n = pyro.sample("n", dist.Poisson(2.0))
        pyro.sample("y", dist.Normal(n + param("shift", 0.1), 1.0), obs=Y[0])

    _, found = gradients(TraceMP_ELBO(num_samples=2), fixed, nothing)
    assert found["shift"] != 0


def test_what_wake_sleep_cannot_learn() -> None:
    with pytest.raises(
        NotImplementedError, match=r"'mu', 'theta': the guide gives a Delta.*depend"
    ):
        gradients(MPReweightedWakeSleep(2), model, AutoDelta(model))

    def only_mu() -> None:
        pyro.sample("mu", dist.Normal(param("a", 0.4), 1.0))

    def two() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0))

    with pytest.raises(NotImplementedError, match=r"groups: 'mu', 'x' share.*'x' is drawn from"):
        gradients(MPReweightedWakeSleep(2, groups=[("mu", "x")]), two, only_mu)


def test_programs_that_run_once_for_each_particle() -> None:
    def branching() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x if x > 0 else -x, 1.0), obs=Y[0])

    for loss, other in (
        (TraceMP_ELBO(num_samples=20), r"RenyiELBO\(alpha=0, num_particles=20\)"),
        (MPReweightedWakeSleep(20), r"pyro\.infer\.ReweightedWakeSleep"),
    ):
        pyro.set_rng_seed(0)
        with pytest.raises(NotImplementedError, match=rf"once for each particle.*{other}"):
            loss.loss(branching, nothing)


def test_blocks_are_refused() -> None:
    with pytest.raises(MemoryError, match=r"particles of 'mu' would.*in blocks.*groups="):
        TraceMP_ELBO(num_samples=50, memory_limit=100_000).loss(model, guide)


def test_nan_names_its_site() -> None:
    def bad() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", x * param("shift", 1.0).log())

    loss = TraceMP_ELBO(num_samples=2)
    gradients(loss, bad, nothing)
    pyro.param("shift").data.fill_(-1.0)  # as a step of an optimiser may
    with pytest.raises(ValueError, match=r"site 'f': log_prob is nan at 2 of 2"):
        gradients(loss, bad, nothing)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="num_samples: expected a positive integer"):
        TraceMP_ELBO(num_samples=0)
    with pytest.raises(ValueError, match="num_particles: one particle has no weight"):
        MPReweightedWakeSleep(1)
    with pytest.raises(ValueError, match=r"insomnia: expected a share in \[0, 1\]"):
        MPReweightedWakeSleep(2, insomnia=1.5)


def test_nothing_stays_behind() -> None:
    """A failed step leaves parameters and random numbers as they were."""

    def bad() -> None:
        pyro.sample("x", dist.Normal(param("new", 0.0), 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs="text")  # type: ignore[arg-type]

    pyro.set_rng_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="'y'"):
        TraceMP_ELBO(num_samples=2).loss(bad, nothing)
    assert torch.equal(state, torch.get_rng_state())
    assert "new" not in pyro.get_param_store()
