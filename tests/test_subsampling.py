# SPDX-License-Identifier: Apache-2.0
"""Plates that select a minibatch: objectives and queries, against loops over its elements."""

import itertools
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
    gradients,
    log_evidence_by_loops,
    param,
)
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning, MPReweightedWakeSleep, TraceMP_ELBO

pytestmark = pytest.mark.usefixtures("float64")

NAMES = ["prior", "width", "a", "b", "c", "d"]
SEEN: list[Tensor] = []  # the subsamples that programs were given


def note(ind: Tensor | None) -> None:
    assert ind is not None
    SEEN.append(ind)


def model(size: int = 2) -> None:
    mu = pyro.sample("mu", dist.Normal(param("prior", 0.2), 1.5))
    with pyro.plate("group", len(Y), subsample_size=size) as ind:
        note(ind)
        theta = pyro.sample("theta", dist.Normal(mu, param("width", 0.8, positive=True)))
        pyro.sample("y", dist.Normal(theta, 0.7), obs=Y[ind])


def model_of_all(size: int = 2) -> None:
    """The plate says how many elements there are, and leaves the minibatch to the guide."""
    mu = pyro.sample("mu", dist.Normal(param("prior", 0.2), 1.5))
    with pyro.plate("group", len(Y)) as ind:
        note(ind)
        loc = mu * torch.ones(len(Y[ind]))
        theta = pyro.sample("theta", dist.Normal(loc, param("width", 0.8, positive=True)))
        pyro.sample("y", dist.Normal(theta, 0.7), obs=Y[ind])


def guide(size: int = 2) -> None:
    mu = pyro.sample("mu", dist.Normal(param("a", 0.4), param("b", 1.2, positive=True)))
    with pyro.plate("group", len(Y), subsample_size=size) as ind:
        note(ind)
        pyro.sample("theta", dist.Normal(0.5 * mu + param("c", 0.3), param("d", 1.1)))


def drawn(num_samples: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the guide draws from seed 0: mu, the subsample, theta."""
    pyro.set_rng_seed(0)
    zero = torch.zeros(())
    of_mu = dist.Normal(zero, 1.0).expand([num_samples])()
    ind = torch.randperm(len(Y))[:size]
    of_theta = dist.Normal(zero, 1.0).expand([num_samples, size])()
    mu = param("a", 0.4) + param("b", 1.2, positive=True) * of_mu
    return mu, ind, (0.5 * mu + param("c", 0.3)).unsqueeze(-1) + param("d", 1.1) * of_theta


@pytest.mark.parametrize("size", [1, 2])
def test_one_particle_is_the_elbo(size: int) -> None:
    expected = gradients(Trace_ELBO(), model, guide, size)
    SEEN.clear()
    loss = TraceMP_ELBO(num_samples=1)
    found = gradients(loss, model, guide, size)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert_same(found[1], expected[1])
    subsamples = []
    for seed in range(8):
        SEEN.clear()
        gradients(loss, model, guide, size, seed=seed)
        assert len(SEEN) >= 2  # one run of each, or more
        assert all(torch.equal(ind, SEEN[0]) for ind in SEEN)
        subsamples.append(tuple(SEEN[0].tolist()))
    assert len(set(subsamples)) > 1


@pytest.mark.parametrize("program", [model, model_of_all])
@pytest.mark.parametrize("size", [1, 2])
def test_sum_over_all_combinations(size: int, program: Callable[[int], None]) -> None:
    """The scale multiplies the log of the sum over an element's latents, not each density."""
    mu, ind, theta = drawn(3, size)
    expected = -log_evidence_by_loops(mu, theta, Y[ind], scale=len(Y) / size)
    value, found = gradients(TraceMP_ELBO(num_samples=3), program, guide, size)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert_same(found, derivatives(expected, NAMES))
    mu, ind, theta = drawn(3, size)
    log_p = log_evidence_by_loops(mu.detach(), theta.detach(), Y[ind], scale=len(Y) / size)
    _, found = gradients(MPReweightedWakeSleep(3), program, guide, size)
    grads = derivatives(log_p, NAMES)
    assert_same(found, {n: -g if n in ("prior", "width") else g for n, g in grads.items()})


def test_gradient_is_unbiased_over_subsamples() -> None:
    """Without latents outside of the plate, the mean over all subsamples is that of all data."""

    def local(ind: Tensor) -> None:
        log_weights = torch.stack([param("prior", 0.2), torch.zeros(())])
        with pyro.plate("group", len(Y), subsample=ind):
            z = pyro.sample(
                "z", dist.Categorical(logits=log_weights), infer={"enumerate": "parallel"}
            )
            pyro.sample("y", dist.Normal(2.0 * z, 0.7), obs=Y[ind])

    def at(*ind: int) -> tuple[float, dict[str, Tensor]]:
        value, grads = gradients(TraceMP_ELBO(2), local, lambda ind: None, torch.tensor(ind))
        assert isinstance(value, float)
        return value, grads

    value, found = at(0, 1, 2)
    parts = [at(*ind) for ind in itertools.combinations(range(3), 2)]
    assert sum(part[0] for part in parts) / 3 == pytest.approx(value)
    mean = torch.stack([part[1]["prior"] for part in parts]).mean()
    torch.testing.assert_close(mean, found["prior"])


def test_index_through_a_subsample() -> None:
    """Observations of a minibatch read the effects of their groups: other ones in each step."""
    group = torch.tensor([0, 1, 1, 0, 1])
    data = torch.tensor([0.3, -1.0, 2.0, 0.5, 0.1])

    def by_index() -> None:
        with pyro.plate("group", 2):
            alpha = pyro.sample("alpha", dist.Normal(param("prior", 0.2), 1.0))
        with pyro.plate("point", 5, subsample_size=3) as ind:
            note(ind)
            shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
            pyro.sample("y", dist.Normal(alpha[group[ind]] + shift, 1.0), obs=data[ind])

    def proposal() -> None:
        with pyro.plate("group", 2):
            pyro.sample("alpha", dist.Normal(param("a", 0.1), 1.0))

    loss = TraceMP_ELBO(num_samples=2)
    for seed in range(3):
        found = gradients(loss, by_index, proposal, seed=seed)
        ind = SEEN[-1]
        pyro.set_rng_seed(seed)
        alpha = param("a", 0.1) + dist.Normal(torch.zeros(()), 1.0).expand([2, 2])()
        assert torch.equal(torch.randperm(5)[:3], ind)
        shift = 0.5 * dist.Normal(torch.zeros(()), 1.0).expand([2, 3])()
        log_p = torch.zeros(())
        for element in range(2):
            rows = []
            for k in range(2):
                value = alpha[k, element]
                row = dist.Normal(param("prior", 0.2), 1.0).log_prob(value)
                row = row - dist.Normal(param("a", 0.1), 1.0).log_prob(value)
                for position, i in enumerate(ind.tolist()):
                    if group[i] == element:
                        terms = dist.Normal(value + shift[:, position], 1.0).log_prob(data[i])
                        row = row + 5 / 3 * (terms.logsumexp(0) - math.log(2))
                rows.append(row)
            log_p = log_p + torch.stack(rows).logsumexp(0) - math.log(2)
        assert found[0] == pytest.approx(-log_p.item(), rel=1e-12)
        assert_same(found[1], derivatives(-log_p, ["prior", "a"]))


def test_one_group_is_the_bound_of_renyi() -> None:
    """With an index that all elements share the log of each density is scaled."""
    ind = torch.tensor([2, 0])

    def fixed_model() -> None:
        mu = pyro.sample("mu", dist.Normal(param("prior", 0.2), 1.5))
        with pyro.plate("group", len(Y), subsample=ind):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.7), obs=Y[ind])

    def fixed_guide() -> None:
        mu = pyro.sample("mu", dist.Normal(param("a", 0.1), 1.0))
        with pyro.plate("group", len(Y), subsample=ind):
            pyro.sample("theta", dist.Normal(0.5 * mu + param("c", 0.3), 1.0))

    renyi = RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    expected = gradients(renyi, fixed_model, fixed_guide)
    loss = TraceMP_ELBO(num_samples=3, groups=ALL, shared_plates=["group"])
    found = gradients(loss, fixed_model, fixed_guide)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert_same(found[1], expected[1])


def test_autoguide() -> None:
    def create_plates() -> pyro.plate:
        return pyro.plate("group", len(Y), subsample_size=2)

    pyro.set_rng_seed(0)
    autoguide = AutoNormal(model, create_plates=create_plates)
    autoguide()
    expected = gradients(Trace_ELBO(), model, autoguide)
    found = gradients(TraceMP_ELBO(num_samples=1), model, autoguide)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert_same(found[1], expected[1])


def test_loop_over_a_subsample() -> None:
    """Without latents it is scaled as Pyro does; with latents it is refused."""

    def program(*, latent: bool) -> None:
        mu = pyro.sample("mu", dist.Normal(param("prior", 0.2), 1.0))
        for i in pyro.plate("group", len(Y), subsample=torch.tensor([0, 2])):
            i = int(i)
            loc = pyro.sample(f"x_{i}", dist.Normal(mu, 1.0)) if latent else mu
            pyro.sample(f"y_{i}", dist.Normal(loc, 1.0), obs=Y[i])

    mean = gradients(TraceMP_ELBO(num_samples=1), lambda: program(latent=False), nothing)
    pyro.set_rng_seed(0)
    mu = dist.Normal(param("prior", 0.2), 1.0)()
    expected = -1.5 * dist.Normal(mu, 1.0).log_prob(Y[[0, 2]]).sum()
    assert mean[0] == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(NotImplementedError, match=r"site 'x_0': a latent in a loop over plate"):
        MPImportance(lambda: program(latent=True), num_samples=2).run()


def nothing() -> None:
    """Draw all from the prior."""


@pytest.mark.parametrize("program", [model, model_of_all])
@pytest.mark.parametrize("size", [1, 2])
def test_query(size: int, program: Callable[[int], None]) -> None:
    """Weights of the plate's latents are those given the weights of the latents outside."""
    message = rf"plate 'group': a subsample of {size} of 3.*one minibatch"
    pyro.set_rng_seed(0)
    SEEN.clear()
    with pytest.warns(MPISWarning, match=message):
        posterior = MPImportance(program, guide, num_samples=3).run(size)
    ind = SEEN[-1]
    assert all(torch.equal(chosen, ind) for chosen in SEEN[2:])  # the first run shows the plate
    graph = posterior._sums[0].whole
    mu = graph.values["mu"].tensor.reshape(3)
    theta = graph.values["theta"].tensor.reshape(3, size)
    log_p = log_evidence_by_loops(mu, theta, Y[ind], scale=3 / size)
    torch.testing.assert_close(posterior.evidence(), log_p.detach())

    # weights by loops: of mu, and of each theta given mu
    rows, given = [], torch.zeros(3, size, 3)
    for j in range(3):
        row = -log_evidence_of(mu, j)
        for i in range(size):
            terms = torch.stack([_term(mu, theta, Y[ind], j, m, i) for m in range(3)])
            given[j, i] = terms.softmax(0)
            row = row + 3 / size * terms.logsumexp(0)
        rows.append(row)
    weights = torch.stack(rows).softmax(0).detach()
    moments = posterior.moments()
    torch.testing.assert_close(moments["mu"], (weights * mu).sum())
    expected = torch.einsum("j,jim,mi->i", weights, given.detach(), theta)
    torch.testing.assert_close(moments["theta"], expected)
    pair = posterior.moments({"both": (torch.mul, "mu", "theta")})["both"]
    expected = torch.einsum("j,j,jim,mi->i", weights, mu, given.detach(), theta)
    torch.testing.assert_close(pair, expected)
    sample = posterior.sample(4000)
    spread = (weights * (mu - moments["mu"]) ** 2).sum().sqrt()
    assert abs(sample["mu"].mean() - moments["mu"]) < 6 * spread / math.sqrt(4000) + 1e-9
    with pytest.raises(NotImplementedError, match="subsample"):
        posterior.save("nowhere")


def log_evidence_of(mu: Tensor, j: int) -> Tensor:
    """Return minus the log weight of mu alone at a particle."""
    of_guide: Tensor = dist.Normal(param("a", 0.4), param("b", 1.2, positive=True)).log_prob(mu[j])
    of_model: Tensor = dist.Normal(param("prior", 0.2), 1.5).log_prob(mu[j])
    return of_guide - of_model


def _term(mu: Tensor, theta: Tensor, y: Tensor, j: int, m: int, i: int) -> Tensor:
    means = 0.5 * mu + param("c", 0.3)
    mixture: Tensor = dist.Normal(means, param("d", 1.1)).log_prob(theta[m, i]).logsumexp(0)
    own: Tensor = dist.Normal(mu[j], param("width", 0.8, positive=True)).log_prob(theta[m, i])
    seen: Tensor = dist.Normal(theta[m, i], 0.7).log_prob(y[i])
    return own + seen - mixture + math.log(3)


def test_guide_that_runs_the_model() -> None:
    """Its observations are the model's, and are no part of the proposal."""

    def on_data() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.5))
        with pyro.plate("group", len(Y), subsample=torch.tensor([0, 2])) as ind:
            pyro.sample("y", dist.Normal(mu, 0.7), obs=Y[ind])

    guide = AutoNormalMessenger(on_data)
    with pytest.warns(MPISWarning, match="one minibatch"):
        posterior = MPImportance(on_data, guide, num_samples=3).run()
    mu = posterior._sums[0].whole.values["mu"].tensor.reshape(3)
    loc, scale = guide.locs.mu.detach(), guide.scales.mu.detach()
    log_joint = dist.Normal(0.0, 1.5).log_prob(mu)
    log_joint += 1.5 * dist.Normal(mu, 0.7).log_prob(Y[[0, 2]].unsqueeze(-1)).sum(0)
    expected = (log_joint - dist.Normal(loc, scale).log_prob(mu)).logsumexp(0) - math.log(3)
    torch.testing.assert_close(posterior.evidence(), expected)


def test_no_proposal_is_learned_of_a_minibatch() -> None:
    with pytest.raises(ValueError, match=r"'group': a subsample of 2 of 3.*own by SVI"):
        MPImportance(model, num_samples=3).adapt(2)
