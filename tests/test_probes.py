# SPDX-License-Identifier: Apache-2.0
"""Which element each density reads: found where it is hidden, rare, or decided by a latent."""

from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from counties import COUNTY, HIDDEN, Y, check_sharing
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.particles import memory, probes
from pyro_mpis.programs import rewritten

pytestmark = pytest.mark.usefixtures("float64")


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
    compare(discrete, args=(False,), num_samples=4, seed=3)


def compared() -> None:
    """What is read is hidden behind a comparison, which a nan does not pass."""
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with pyro.plate("house", 7):
        loc = torch.where(alpha[..., COUNTY] > 0, 1.0, -1.0)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)


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
        compare(partial(house_alone, declared, local), num_samples=2, seed=seed)


def test_comparisons_are_found_at_other_particles() -> None:
    for seed in range(3):
        compare(compared, num_samples=3, seed=seed)


def test_elements_that_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a probe at one particle, a comparison can hide what is read: the plate shares."""
    monkeypatch.setattr(probes, "PROBE_ELEMENTS", 1)
    monkeypatch.setattr(probes, "MIN_ROWS", 1)
    reason = (
        "site 'y' reads latents of plate 'county' from outside of it, and it could not be found "
        "out which element"
    )
    check_sharing(compared, "alpha", "county", reason, num_samples=5)


def test_element_that_depends_on_a_continuous_latent() -> None:
    """A change point: before it one element is read, after it the other."""
    time = torch.arange(7.0)

    def change_point() -> None:
        tau = pyro.sample("tau", dist.Uniform(0.0, 7.0))
        with pyro.plate("segment", 2):
            rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        with pyro.plate("time", 7):
            loc = torch.where(time > tau, rate[..., 1:], rate[..., :1])
            pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)

    compare(change_point, num_samples=5)


def decided(most: float) -> None:
    """Which element the last one reads depends on a latent."""
    when = pyro.sample("when", dist.Uniform(0.0, 1.0))
    with pyro.plate("regimes", 2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        late = torch.arange(4.0) > 3.0 - most + when
        mean = torch.where(late, level[..., 1:], level[..., :1])
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(4))


def check_decided(most: float, num_samples: int = 64) -> None:
    """Given the particle that decides, each element reads one regime: each has its own index."""
    for seed in range(3):
        pyro.set_rng_seed(seed)
        posterior = MPImportance(decided, num_samples=num_samples).run(most)
        when = posterior.marginals("when").samples
        level = posterior.marginals("level").samples  # (2, K)
        log_prob = dist.Normal(level, 1.0).log_prob(torch.zeros(()))
        late = (torch.arange(4.0) > 3.0 - most + when.unsqueeze(-1)).sum(-1)  # elements, (K,)
        number = torch.stack([4 - late, late])  # (2, K) that read each regime
        regimes = (number.unsqueeze(-1) * log_prob.unsqueeze(1)).exp().mean(-1)  # (2, K)
        torch.testing.assert_close(posterior.evidence(), regimes.prod(0).mean().log())


def test_element_that_a_latent_decides_at_few_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated two at a time, the particles of the first piece agree on the element."""
    monkeypatch.setattr(memory, "PIECE_BYTES", 1000)
    monkeypatch.setattr(memory, "MORE_WORK", 1e9)
    check_decided(0.9, num_samples=16)


def test_element_that_a_latent_decides_in_a_large_plate(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the plates, several combinations of particles are looked at."""
    monkeypatch.setattr(probes, "PROBE_ELEMENTS", 1)
    check_decided(0.5)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9])
def test_every_element_of_a_plate_is_told_from_the_others(size: int) -> None:
    """By the bits of its number: sizes at and beside powers of two."""
    order = torch.arange(size).flip(0).roll(1)

    def model(in_another_plate: bool) -> None:
        with pyro.plate("county", size):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
            if not in_another_plate:
                pyro.sample("y", dist.Normal(alpha, 1.0), obs=torch.arange(size) / size)
        if in_another_plate:
            with pyro.plate("house", size):
                data = (torch.arange(size) / size)[order]
                pyro.sample("y", dist.Normal(alpha[..., order], 1.0), obs=data)

    evidences = []
    for in_another_plate in (False, True):
        pyro.set_rng_seed(0)
        evidences.append(MPImportance(model, num_samples=4).run(in_another_plate).evidence())
    torch.testing.assert_close(*evidences)


def by_index() -> None:
    """A latent that is an index once it is rounded."""
    x = pyro.sample("x", dist.Uniform(0.0, 3.0))
    with pyro.plate("data", 2):
        loc = torch.tensor([-1.0, 0.0, 2.0])[x.long()]
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor([0.3, 1.0]))


def test_nan_is_no_index_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewritten, "NAN_IS_FOUND", set[str]())
    nan = torch.tensor([1.0, torch.nan])
    with rewritten.NoNanAsIndex():
        for convert in (
            lambda: nan.long(),
            lambda: nan.to(torch.int32),
            lambda: nan.to("cpu", dtype=torch.long),
            lambda: nan.type(torch.short),
            lambda: torch.func.vmap(lambda x: x.long())(nan),
        ):
            with pytest.raises(IndexError, match="nan is no index"):
                convert()
        assert nan.to(torch.float32).dtype == torch.float32
        assert nan.nan_to_num().long().tolist() == [1, 0]
    compare(by_index, num_samples=4, seed=1)


@pytest.mark.parametrize("seed", range(4))
def test_differences_of_discrete_latents_that_are_grouped(seed: int) -> None:
    """Sites of a group have one particle: those that tell what is read have them differ."""

    def differences() -> None:
        with pyro.plate("county", 3):
            x = pyro.sample("x", dist.Bernoulli(0.4))
            z = pyro.sample("z", dist.Bernoulli(0.6))
            pyro.sample("y", dist.Normal((x - z).roll(1), 0.5), obs=Y[:3])

    shared = {"x": ["county"], "z": ["county"]}
    warning = "other elements of plate 'county' than its own: 'x', 'z' have"
    compare(differences, groups=[("x", "z")], shared=shared, warning=warning, seed=seed)


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5])
def test_discrete_elements_that_a_latent_switches_between(num_samples: int) -> None:
    """Found at every particle of the latent that decides; discrete elements are tried at few."""
    other = 1 - COUNTY.clamp(max=1)

    def switching() -> None:
        tau = pyro.sample("tau", dist.Normal(0.0, 1.0))
        with pyro.plate("county", 2):
            kind = pyro.sample("kind", dist.Bernoulli(0.4))
        with pyro.plate("house", 7):
            loc = torch.where(tau > 0, kind[COUNTY.clamp(max=1)], kind[other])
            pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)

    compare(switching, num_samples=num_samples)
