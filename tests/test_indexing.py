# SPDX-License-Identifier: Apache-2.0
"""Latents of one plate read in another by index, against closed forms and against brute force."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Problem, brute_force
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.particles import memory

pytestmark = pytest.mark.usefixtures("float64")

COUNTY = torch.tensor([0, 1, 1, 2, 0, 2, 2])  # of each house
STATE = torch.tensor([0, 1, 0])  # of each county
Y = torch.tensor([0.3, -0.5, 1.2, 2.0, -1.0, 0.1, 0.8], dtype=torch.float64)
HIDDEN = torch.tensor([True, False, True, True, True, False, True])


def radon() -> None:
    """Effects of counties, read by the houses."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
    with pyro.plate("house", 7):
        pyro.sample("y", dist.Normal(alpha[..., COUNTY], 1.0), obs=Y)


def test_radon_has_the_weights_of_the_model_written_by_county() -> None:
    """Regrouping equals writing out the houses of each county."""

    def by_county() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
            log_prob = dist.Normal(alpha.unsqueeze(-1), 1.0).log_prob(Y)
            own = COUNTY == torch.arange(3).unsqueeze(-1)
            pyro.factor("y", (log_prob * own).sum(-1))

    results = []
    for model in (radon, by_county):
        pyro.set_rng_seed(0)
        results.append(MPImportance(model, num_samples=20).run())
    one, other = results
    torch.testing.assert_close(one.evidence(), other.evidence())
    for site, mean in one.moments().items():
        torch.testing.assert_close(mean, other.moments()[site])
    torch.testing.assert_close(
        one.marginals("mu", "alpha").log_weights, other.marginals("mu", "alpha").log_weights
    )


def closed_form(cov: Tensor) -> float:
    """Log density of Y under a normal with mean zero."""
    return float(dist.MultivariateNormal(torch.zeros(7), cov).log_prob(Y))


def radon_truth() -> float:
    """Of the radon model."""
    same = (COUNTY == COUNTY.unsqueeze(-1)).double()
    return closed_form(1.0 + same + torch.eye(7))


def overdispersed() -> None:
    """Houses have an effect of their own besides that of their county."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
    with pyro.plate("house", 7):
        z = pyro.sample("z", dist.Normal(alpha[..., COUNTY], 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y)


def three_levels() -> None:
    """Counties read the effect of their state, houses that of their county."""
    with pyro.plate("state", 2):
        gamma = pyro.sample("gamma", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(gamma[..., STATE], 1.0))
    with pyro.plate("house", 7):
        pyro.sample("y", dist.Normal(alpha[..., COUNTY], 1.0), obs=Y)


def three_levels_read_directly() -> None:
    """Houses read the effects of their county and of the county's state."""
    with pyro.plate("state", 2):
        gamma = pyro.sample("gamma", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(gamma[..., STATE], 1.0))
    with pyro.plate("house", 7):
        mean = alpha[..., COUNTY] + gamma[..., STATE[COUNTY]]
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


def three_levels_truth() -> float:
    """Of the model of three levels."""
    county = (COUNTY == COUNTY.unsqueeze(-1)).double()
    state = (STATE[COUNTY] == STATE[COUNTY].unsqueeze(-1)).double()
    return closed_form(county + state + torch.eye(7))


def three_levels_read_directly_truth() -> float:
    """The state's effect counts twice."""
    county = (COUNTY == COUNTY.unsqueeze(-1)).double()
    state = (STATE[COUNTY] == STATE[COUNTY].unsqueeze(-1)).double()
    return closed_form(county + 4.0 * state + torch.eye(7))


def overdispersed_truth() -> float:
    """Of the model with effects of houses."""
    same = (COUNTY == COUNTY.unsqueeze(-1)).double()
    return closed_form(1.0 + same + 2.0 * torch.eye(7))


@pytest.mark.parametrize(
    ("model", "truth"),
    [
        (radon, radon_truth),
        (overdispersed, overdispersed_truth),
        (three_levels, three_levels_truth),
        (three_levels_read_directly, three_levels_read_directly_truth),
    ],
)
def test_evidence_converges_to_the_closed_form(
    model: Callable[[], None], truth: Callable[[], float]
) -> None:
    """With many particles the evidence is near the truth, which shared particles miss by nats."""
    pyro.set_rng_seed(0)
    estimates = torch.stack(
        [MPImportance(model, num_samples=150).run().evidence() for _ in range(8)]
    )
    ratio = (estimates - truth()).exp()
    error = float(ratio.std() / math.sqrt(len(ratio)))
    assert error < 0.1
    assert abs(float(ratio.mean()) - 1.0) < 6 * error, f"{ratio.mean():.3f} +- {error:.3f}"


@pytest.mark.parametrize("model", [overdispersed, three_levels, three_levels_read_directly])
def test_samples_agree_with_weights_under_ragged_plates(model: Callable[[], None]) -> None:
    """Means of joint draws are the moments, products of two levels included (6 sd, fixed seed)."""
    pyro.set_rng_seed(1)
    posterior = MPImportance(model, num_samples=6).run()
    draws = posterior.sample(20_000)
    for site, mean in posterior.moments().items():
        spread = draws[site].std(0) / math.sqrt(20_000)
        assert bool(((draws[site].mean(0) - mean).abs() <= 6 * spread + 1e-9).all()), site
    outer, inner, at = (
        ("alpha", "z", COUNTY) if model is overdispersed else ("gamma", "alpha", STATE)
    )
    product = draws[outer][:, at] * draws[inner]
    mean = posterior.moments(torch.mul, outer, inner)
    spread = product.std(0) / math.sqrt(20_000)
    assert bool(((product.mean(0) - mean).abs() <= 6 * spread + 1e-9).all())
    joint = posterior.marginals(outer, inner)
    assert joint.batch_shape == inner_shape(posterior, inner)
    torch.testing.assert_close(joint.unpack(joint.mean)[inner], posterior.moments()[inner])
    torch.testing.assert_close(joint.unpack(joint.mean)[outer], posterior.moments()[outer][at])


def inner_shape(posterior: MPImportance, site: str) -> torch.Size:
    """Batch shape of a site."""
    return posterior.marginals(site).batch_shape


def test_masked_observations_read_nothing() -> None:
    """A hidden house may point to any county."""

    def masked(keep: Tensor, houses: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
        with pyro.plate("house", len(houses)), pyro.poutine.mask(mask=keep):  # type: ignore[call-overload]
            pyro.sample("y", dist.Normal(alpha[..., COUNTY[houses]], 1.0), obs=Y[houses])

    results = []
    for arguments in ((HIDDEN, torch.arange(7)), (torch.ones(5).bool(), HIDDEN.nonzero()[:, 0])):
        pyro.set_rng_seed(0)
        results.append(MPImportance(masked, num_samples=10).run(*arguments).evidence())
    torch.testing.assert_close(*results)


def test_index_that_repeats_a_plate_within_another() -> None:
    """The day is a plate of both, the county is read by index within it."""

    def days(index: Tensor | None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("day", 2, dim=-2):
            beta = pyro.sample("beta", dist.Normal(mu, 1.0))
            with pyro.plate("county", 3, dim=-1):
                alpha = pyro.sample("alpha", dist.Normal(beta, 1.0))
            if index is None:
                with pyro.plate("county again", 3, dim=-1):
                    pyro.sample("y", dist.Normal(alpha, 1.0), obs=torch.arange(3.0))
            else:
                with pyro.plate("house", 3, dim=-1):
                    mean = alpha[..., index]
                    pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.arange(3.0)[index])

    results = []
    for index in (torch.tensor([2, 0, 1]), torch.arange(3)):
        pyro.set_rng_seed(0)
        results.append(MPImportance(days, num_samples=5).run(index).evidence())
    torch.testing.assert_close(*results)


def test_index_by_a_joint_guide_needs_no_regrouping() -> None:
    """Where the guide draws the counties as one vector, there is one particle index for all."""

    def guide() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("alpha", dist.Normal(torch.zeros(3), 1.5).to_event(1))

    pyro.set_rng_seed(0)
    posterior = MPImportance(radon, guide, num_samples=2000).run()
    assert abs(float(posterior.evidence()) - radon_truth()) < 0.2
    assert posterior.moments()["alpha"].shape == (3,)


def test_crossed_effects_are_refused() -> None:
    """Two latents of different plates, read by two indices that cross."""

    def crossed() -> None:
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("year", 2):
            beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        with pyro.plate("house", 7):
            mean = alpha[..., COUNTY] + beta[..., torch.arange(7) % 2]
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

    with pytest.raises(NotImplementedError, match=r"site 'y'.*'year'.*'county'.*to_event"):
        MPImportance(crossed, num_samples=3).run()


def test_reading_several_elements_is_refused() -> None:
    """An observation of the sum over a plate, outside and inside of it."""

    def outside() -> None:
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(alpha.sum(-1, keepdim=True), 1.0), obs=Y[:1])

    def neighbours() -> None:
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(alpha.cumsum(-1), 1.0), obs=Y[:3])

    with pytest.raises(NotImplementedError, match=r"site 'y'.*several elements of plate 'county'"):
        MPImportance(outside, num_samples=3).run()
    with pytest.raises(NotImplementedError, match=r"site 'y'.*plate 'county'.*other elements"):
        MPImportance(neighbours, num_samples=3).run()


def test_permuted_elements_of_the_same_plate_are_refused() -> None:
    """Same plate, other element: a plate's elements are not independent then."""

    def permuted() -> None:
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(alpha[..., [1, 2, 0]], 1.0), obs=Y[:3])

    with pytest.raises(NotImplementedError, match=r"site 'y'.*other elements of it than its own"):
        MPImportance(permuted, num_samples=3).run()


@pytest.mark.parametrize("mixed", [lambda x: x.roll(1, -1), lambda x: x.cumsum(-1), torch.sort])
def test_mixed_elements_of_a_large_plate_are_refused(
    mixed: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
) -> None:
    """Its elements are told apart by random numbers of a few bits; many pairs are mixed."""
    size = 2 * indexing.CHECK_ELEMENTS

    def large() -> None:
        with pyro.plate("county", size):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
            value = mixed(alpha)
            loc = value if isinstance(value, Tensor) else value[0]
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.zeros(size))

    with pytest.raises(NotImplementedError, match=r"site 'y'.*other elements of it than its own"):
        MPImportance(large, num_samples=2).run()


def test_large_plates_are_checked_in_few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two bits, once with each bit set and once with it not set, and one that changes none."""
    runs = []
    original = indexing._probing_runs

    def counting(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        runs.append(max(len(pattern) for pattern in args[3].values()))
        return original(*args, **kwargs)

    monkeypatch.setattr(indexing, "_probing_runs", counting)

    def plated(size: int) -> None:
        with pyro.plate("county", size):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(alpha, 1.0), obs=torch.zeros(size))

    for size in (2, 1000, 2 * indexing.CHECK_ELEMENTS):
        MPImportance(plated, num_samples=2).run(size)
    assert runs == [1 + 2 * 1, 1 + 2 * 10, 1 + 2 * 2]


def test_discrete_latents_by_index() -> None:
    """Sampled, against the sum over all choices; enumerated, against the sum over all values."""

    def discrete(enumerate_: bool) -> None:
        infer = {"enumerate": "parallel"} if enumerate_ else {}
        with pyro.plate("county", 3):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])), infer=infer)  # type: ignore[arg-type]
        with pyro.plate("house", 7):
            loc = torch.tensor([-1.0, 1.0])[kind[..., COUNTY]]
            pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)

    log_lik = dist.Normal(torch.tensor([-1.0, 1.0]).unsqueeze(-1), 1.0).log_prob(Y)  # (kind, house)
    county = torch.zeros(2, 3).index_add(1, COUNTY, log_lik) + torch.tensor([[0.3], [0.7]]).log()
    posterior = MPImportance(discrete, num_samples=2).run(True)
    torch.testing.assert_close(posterior.evidence(), county.logsumexp(0).sum())
    torch.testing.assert_close(posterior.moments()["kind"], county.softmax(0)[1])
    pyro.set_rng_seed(3)
    posterior = MPImportance(discrete, num_samples=4).run(False)
    particles = {name: m.samples for name, m in posterior.marginals().items()}
    exact = brute_force(Problem(discrete, None, particles, args=(False,)))
    torch.testing.assert_close(posterior.evidence(), exact.log_evidence)


def compared() -> None:
    """What is read is hidden behind a comparison, which a nan does not pass."""
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with pyro.plate("house", 7):
        loc = torch.where(alpha[..., COUNTY] > 0, 1.0, -1.0)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)


def check_by_brute_force(model: Callable[[], None], num_samples: int = 3) -> None:
    """Evidence and marginals are the sums over all choices."""
    posterior = MPImportance(model, num_samples=num_samples).run()
    marginals = posterior.marginals()
    exact = brute_force(Problem(model, None, {name: m.samples for name, m in marginals.items()}))
    torch.testing.assert_close(posterior.evidence(), exact.log_evidence)
    for name, marginal in marginals.items():
        torch.testing.assert_close(marginal.weights, exact.weights(name))


def house_alone(declared: bool, local: bool) -> None:
    """One observation of one county, in no plate that counts."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(alpha, 1.0), obs=Y[:3])

    with pyro.plate("house", 1) if declared else nullcontext():
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0)) if local else torch.tensor(0.0)
        pyro.sample("y", dist.Normal(alpha[..., 1:2] + noise, 0.5), obs=torch.tensor([2.0]))


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("local", [False, True])
def test_single_reader(declared: bool, local: bool) -> None:
    """Of size one, the reader's plate has no dim: its factor is that of one element."""
    for seed in range(2):
        pyro.set_rng_seed(seed)
        check_by_brute_force(partial(house_alone, declared, local), num_samples=2)


@pytest.mark.parametrize("seen", [[False, True], [True, False]])
def test_reads_of_nested_plates_where_some_are_hidden(seen: list[bool]) -> None:
    """A house that is masked reads neither county nor state, and is in the way of neither."""
    state = torch.tensor([1, 0])  # of each county

    def model() -> None:
        with pyro.plate("state", 2):
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("county", 2):
            a = pyro.sample("a", dist.Normal(s[..., state], 1.0))
        mask = torch.tensor(seen)
        with pyro.plate("house", 2), pyro.poutine.mask(mask=mask):  # type: ignore[call-overload]
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            mean = noise + a[..., [1, 0]] + s[..., state][..., [1, 0]]
            pyro.sample("y", dist.Normal(mean, 0.5), obs=Y[:2])

    pyro.set_rng_seed(1)
    check_by_brute_force(model, num_samples=2)


def test_reads_of_a_nested_plate_alone_at_some_elements() -> None:
    """Where only the outer plate is read, another element of the inner one is in its place."""
    state = torch.tensor([1, 0])
    near = torch.tensor([True, False])

    def model() -> None:
        with pyro.plate("state", 2):
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("county", 2):
            a = pyro.sample("a", dist.Normal(s[..., state], 1.0))
        with pyro.plate("house", 2):
            mean = torch.where(near, a[..., [1, 0]], 0.0) + s[..., [0, 0]]
            pyro.sample("y", dist.Normal(mean, 0.5), obs=Y[:2])

    with pytest.raises(NotImplementedError, match=r"site 'y'.*two indices that cross"):
        MPImportance(model, num_samples=2).run()


OCCASIONS = Y[:6].reshape(2, 3)


def panel(reads: str, occasion_latent: bool, same_county: bool) -> None:
    """Houses of counties, with effects of their own, observed on two occasions each."""
    county = torch.tensor([1, 1, 1] if same_county else [0, 1, 1])
    with pyro.plate("county", 2):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with pyro.plate("house", 3, dim=-1):
        own = alpha[..., county]
        effect = pyro.sample("effect", dist.Normal(own if reads == "both" else 0.0, 1.0))
        with pyro.plate("occasion", 2, dim=-2):
            loc = effect
            if occasion_latent:
                loc = pyro.sample("noise", dist.Normal(effect, 1.0))
            mask = torch.tensor([[True, False, True], [True, True, False]])
            with pyro.poutine.mask(mask=mask):  # type: ignore[call-overload]
                pyro.sample("y", dist.Normal(own + loc, 1.0), obs=OCCASIONS)


@pytest.mark.parametrize("reads", ["one", "both"])
@pytest.mark.parametrize("occasion_latent", [False, True])
@pytest.mark.parametrize("same_county", [False, True])
def test_panel(reads: str, occasion_latent: bool, same_county: bool) -> None:
    """On all occasions a house lies in the same county."""
    pyro.set_rng_seed(0)
    model = partial(panel, reads, occasion_latent, same_county)
    check_by_brute_force(model, num_samples=2)


def test_houses_that_move() -> None:
    """A house that is in another county on another occasion makes the two plates cross."""

    def model() -> None:
        with pyro.plate("county", 2):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("house", 3, dim=-1):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            with pyro.plate("occasion", 2, dim=-2):
                late = torch.tensor([[False], [True]])
                own = torch.where(late, alpha[..., 1:], alpha[..., :1])
                pyro.sample("y", dist.Normal(own + effect, 1.0), obs=OCCASIONS)

    with pytest.raises(NotImplementedError, match=r"site 'y'.*two indices that cross"):
        MPImportance(model, num_samples=2).run()


@pytest.mark.parametrize("first", [False, True])
def test_houses_that_move_and_houses_that_stay(first: bool) -> None:
    """One site reads the county of a house, another one that of a house and an occasion."""

    def model() -> None:
        with pyro.plate("county", 2):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("house", 3, dim=-1):
            loc = alpha[..., [0, 1, 1]] if first else 0.0
            effect = pyro.sample("effect", dist.Normal(loc, 1.0))
            with pyro.plate("occasion", 2, dim=-2):
                noise = pyro.sample("noise", dist.Normal(effect, 1.0))
                late = torch.tensor([[False], [True]])
                moving = torch.where(late, alpha[..., 1:], alpha[..., :1])
                pyro.sample("y", dist.Normal(moving + noise, 1.0), obs=OCCASIONS)
                staying = alpha[..., [0, 1, 1]] + noise
                pyro.sample("z", dist.Normal(staying, 1.0), obs=OCCASIONS)

    with pytest.raises(NotImplementedError, match=r"by another index than another site"):
        MPImportance(model, num_samples=2).run()


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("index", [[1], [1, 1, 0]])
def test_reads_within_a_plate_around(local: bool, index: list[int]) -> None:
    """By index along one of a latent's plates, element by element along the other."""

    def model() -> None:
        with pyro.plate("state", 2, dim=-2):
            s = pyro.sample("s", dist.Normal(0.0, 1.0)) if local else torch.tensor(0.0)
            with pyro.plate("county", 2, dim=-1):
                a = pyro.sample("a", dist.Normal(s, 1.0))
                pyro.sample("x", dist.Normal(a, 1.0), obs=OCCASIONS[:, :2])
            with pyro.plate("house", len(index), dim=-1):
                data = OCCASIONS[:, : len(index)]
                pyro.sample("y", dist.Normal(a[..., index] + s, 1.0), obs=data)

    pyro.set_rng_seed(0)
    check_by_brute_force(model, num_samples=2)


def test_comparisons_are_found_at_other_particles() -> None:
    for seed in range(3):
        pyro.set_rng_seed(seed)
        check_by_brute_force(compared)


def test_elements_that_cannot_be_found_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a probe at one particle, a comparison can hide what is read."""
    monkeypatch.setattr(indexing, "PROBE_ELEMENTS", 1)
    monkeypatch.setattr(indexing, "MIN_ROWS", 1)
    pyro.set_rng_seed(0)
    with pytest.raises(NotImplementedError, match=r"site 'y'.*plate 'county' from outside.*hide"):
        MPImportance(compared, num_samples=30).run()


def test_element_that_depends_on_a_continuous_latent_is_refused() -> None:
    """A change point: before it one element is read, after it the other."""
    time = torch.arange(7.0)

    def change_point() -> None:
        tau = pyro.sample("tau", dist.Uniform(0.0, 7.0))
        with pyro.plate("segment", 2):
            rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        with pyro.plate("time", 7):
            loc = torch.where(time > tau, rate[..., 1:], rate[..., :1])
            pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)

    def flips() -> None:
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("county", 2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(torch.where(s > 0, x, x.flip(-1)), 1.0), obs=Y[:2])

    for seed in range(3):
        pyro.set_rng_seed(seed)
        with pytest.raises(NotImplementedError, match=r"site 'y'.*several elements.*'segment'"):
            MPImportance(change_point, num_samples=20).run()
        with pytest.raises(NotImplementedError, match=r"site 'y'.*other elements of it than its"):
            MPImportance(flips, num_samples=20).run()


def test_plates_are_checked_where_nan_stops_the_model() -> None:
    def cholesky() -> None:
        with pyro.plate("county", 2):
            s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
            cov = torch.diag_embed(torch.stack([s, s.flip(-1)], -1))
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), cov), obs=torch.ones(2, 2))

    with pytest.raises(NotImplementedError, match=r"site 'y'.*other elements of it than its own"):
        MPImportance(cholesky, num_samples=5).run()


def test_discrete_latents_of_other_elements_are_refused() -> None:
    """As for continuous ones."""

    def swapped() -> None:
        with pyro.plate("county", 2):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("y", dist.Normal(kind[..., [1, 0]].double(), 1.0), obs=Y[:2])

    pyro.set_rng_seed(0)
    with pytest.raises(NotImplementedError, match=r"site 'y'.*other elements of it than its own"):
        MPImportance(swapped, num_samples=5).run()


def test_no_regrouping_is_wrong() -> None:
    """One particle for all counties: the wrong program that the tests above reject."""
    pyro.set_rng_seed(0)

    def shared() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        alpha = pyro.sample("alpha", dist.Normal(mu.unsqueeze(-1), torch.ones(3)).to_event(1))
        with pyro.plate("house", 7):
            pyro.sample("y", dist.Normal(Vindex(alpha)[..., COUNTY], 1.0), obs=Y)

    right = MPImportance(radon, num_samples=8).run()
    pyro.set_rng_seed(0)
    wrong = MPImportance(shared, num_samples=8).run()
    assert abs(float(right.evidence()) - float(wrong.evidence())) > 0.1


def test_brute_force_agrees() -> None:
    """The oracle reads the model's log_prob at every choice, whatever the plates."""
    pyro.set_rng_seed(2)
    posterior = MPImportance(radon, num_samples=3).run()
    particles = {name: m.samples for name, m in posterior.marginals().items()}
    exact = brute_force(Problem(radon, None, particles))
    torch.testing.assert_close(posterior.evidence(), exact.log_evidence)


def gaussian_mixture(joint: bool) -> None:
    """Components read by a latent index; their vector has one particle index, or one each."""
    if joint:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    else:
        with pyro.plate("component", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 2.0)).unsqueeze(-2)
    with pyro.plate("house", 7):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(2)), infer=GMM_INFER)  # type: ignore[arg-type]
        pyro.sample("y", dist.Normal(Vindex(loc)[..., kind], 1.0), obs=Y)


GMM_INFER: dict[str, str] = {}


@pytest.mark.parametrize("enumerate_", [False, True])
def test_elements_read_by_a_latent_index(enumerate_: bool) -> None:
    """Which component is read depends on a latent: all are, so the plate is refused."""
    GMM_INFER.clear()
    if enumerate_:
        GMM_INFER["enumerate"] = "parallel"
    pyro.set_rng_seed(0)
    with pytest.raises(NotImplementedError, match=r"site 'y'.*several elements.*'component'"):
        MPImportance(gaussian_mixture, num_samples=10).run(False)
    posterior = MPImportance(gaussian_mixture, num_samples=1000 if enumerate_ else 30).run(True)
    if enumerate_:
        nodes = torch.linspace(-12.0, 12.0, 801)
        log_prior = dist.Normal(0.0, 2.0).log_prob(nodes) + math.log(24.0 / 800)
        log_lik = dist.Normal(nodes[:, None], 1.0).log_prob(Y)  # (node, house)
        pair = torch.logaddexp(log_lik[:, None], log_lik[None]) - math.log(2.0)
        total = (pair.sum(-1) + log_prior[:, None] + log_prior).flatten().logsumexp(0)
        assert abs(float(posterior.evidence() - total)) < 0.2
    assert posterior.sample(3)["kind"].shape == (3, 7)


def test_autoguide_of_a_model_read_by_index() -> None:
    """The values of a Delta site are read by index too."""
    pyro.set_rng_seed(0)
    guide = AutoNormal(radon, init_scale=1.0)
    estimates = torch.stack(
        [MPImportance(radon, guide, num_samples=100).run().evidence() for _ in range(8)]
    )
    ratio = (estimates - radon_truth()).exp()
    error = float(ratio.std() / math.sqrt(len(ratio)))
    assert abs(float(ratio.mean()) - 1.0) < 6 * error
    assert error < 0.1


def decided(most: float) -> None:
    """Which element the last one reads depends on a latent."""
    when = pyro.sample("when", dist.Uniform(0.0, 1.0))
    with pyro.plate("regimes", 2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        late = torch.arange(4.0) > 3.0 - most + when
        mean = torch.where(late, level[..., 1:], level[..., :1])
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(4))


def check_refused(most: float) -> None:
    for seed in range(3):
        pyro.set_rng_seed(seed)
        with pytest.raises(NotImplementedError, match=r"site 'y'.*reads several elements"):
            MPImportance(decided, num_samples=64).run(most)


def test_element_that_a_latent_decides_at_few_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated two at a time, the particles of the first piece agree on the element."""
    monkeypatch.setattr(memory, "PIECE_BYTES", 1000)
    monkeypatch.setattr(memory, "MORE_WORK", 1e9)
    check_refused(0.9)


def test_element_that_a_latent_decides_in_a_large_plate(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the plates, several combinations of particles are looked at."""
    monkeypatch.setattr(indexing, "PROBE_ELEMENTS", 1)
    check_refused(0.5)


def test_effects_nested_for_one_site_and_crossed_for_another() -> None:
    """Classes lie in schools as one site reads them; another reads a class with another school."""

    def model(school: Tensor) -> None:
        with pyro.plate("class", 3):
            beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        with pyro.plate("school", 2):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", 4):
            loc = alpha[..., torch.tensor([0, 0, 1, 1])] + beta[..., torch.tensor([0, 1, 2, 2])]
            pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.zeros(4))
        with pyro.plate("teacher", 3):
            loc = alpha[..., school] + beta[..., torch.arange(3)]
            pyro.sample("w", dist.Normal(loc, 0.5), obs=torch.zeros(3))

    MPImportance(model, num_samples=3).run(torch.tensor([0, 0, 1]))
    with pytest.raises(NotImplementedError, match="two indices that cross"):
        MPImportance(model, num_samples=3).run(torch.tensor([0, 1, 1]))
