# SPDX-License-Identifier: Apache-2.0
"""Graphs held against programs: elements that are mixed, reads that were missed, rare switches."""

import math
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from counties import Y, check_sharing
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.particles import memory, mixtures, probes

pytestmark = pytest.mark.usefixtures("float64")

OTHER = "site 'y' reads other elements of plate 'county' than its own"


def mixed(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Return a model in which an element reads others of its plate."""

    def model() -> None:
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(function(alpha), 1.0), obs=Y[:3])

    return model


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.cumsum(-1),
        lambda x: x[..., [1, 2, 0]],
        lambda x: x.roll(1, -1),
        lambda x: x.sort(-1)[0],
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x.softmax(-1),
        lambda x: torch.stack([x[0], x[0] + x[1], x[2]]),
        lambda x: torch.stack([x[0], x[1], x[1]]),
    ],
)
def test_elements_that_are_mixed(function: Callable[[Tensor], Tensor]) -> None:
    check_sharing(mixed(function), "alpha", "county", OTHER, num_samples=4)


def test_sum_over_a_plate_outside_of_it() -> None:
    def outside() -> None:
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(alpha.sum(-1, keepdim=True), 1.0), obs=Y[:1])

    reason = "site 'y' reads several elements of plate 'county' together"
    check_sharing(outside, "alpha", "county", reason)


def test_elements_that_are_exchanged_where_a_latent_says_so() -> None:
    def flips() -> None:
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("county", 2):
            x = pyro.sample("alpha", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(torch.where(s > 0, x, x.flip(-1)), 1.0), obs=Y[:2])

    check_sharing(flips, "alpha", "county", OTHER, num_samples=4)


def test_elements_that_are_mixed_where_nan_would_stop_the_model() -> None:
    def cholesky() -> None:
        with pyro.plate("county", 2):
            s = pyro.sample("alpha", dist.LogNormal(0.0, 0.5))
            cov = torch.diag_embed(torch.stack([s, s.flip(-1)], -1))
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), cov), obs=torch.ones(2, 2))

    check_sharing(cholesky, "alpha", "county", OTHER, num_samples=4)


def test_discrete_elements_that_are_mixed() -> None:
    def swapped() -> None:
        with pyro.plate("county", 2):
            kind = pyro.sample("alpha", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("y", dist.Normal(kind[..., [1, 0]].double(), 1.0), obs=Y[:2])

    check_sharing(swapped, "alpha", "county", OTHER, num_samples=4)


@pytest.mark.parametrize("function", [lambda x: x.roll(1, -1), lambda x: x.cumsum(-1)])
def test_mixed_elements_of_a_large_plate(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few rows are looked at."""
    monkeypatch.setattr(mixtures, "ELEMENTS", 2**10)
    size = 2**12

    def large() -> None:
        with pyro.plate("county", size):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 0.1))
            pyro.sample("y", dist.Normal(function(alpha), 1.0), obs=torch.zeros(size))

    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=OTHER):
        posterior = MPImportance(large, num_samples=2).run()
    alpha = posterior.marginals("alpha").samples.movedim(-1, 0)  # (K, size)
    log_prob = torch.stack([dist.Normal(function(a), 1.0).log_prob(torch.zeros(())) for a in alpha])
    expected = log_prob.sum(-1).logsumexp(0) - math.log(2)
    torch.testing.assert_close(posterior.evidence(), expected)


SHARE = 0.02  # of the particles, at which another element is read
BEFORE, AFTER = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0])


def switched() -> None:
    s = pyro.sample("s", dist.Uniform(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with pyro.plate("house", 4):
        index = torch.where(s < SHARE, AFTER, BEFORE)
        pyro.sample("y", dist.Normal(alpha[index], 1.0), obs=Y[:4])


@pytest.mark.parametrize(
    "piece",
    [pytest.param(2**24, id="whole"), pytest.param(2**10, id="pieces", marks=pytest.mark.slow)],
)
def test_index_array_that_is_another_at_rare_particles(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Which the probe's few rows miss: its factor is held against the programs at all particles.

    Given the particle of ``s`` each house reads one county, so counties keep an index each.
    """
    monkeypatch.setattr(probes, "PROBE_ELEMENTS", 1)
    monkeypatch.setattr(memory, "PIECE_BYTES", piece)
    found = []
    for seed in range(6):
        pyro.set_rng_seed(seed)
        posterior = MPImportance(switched, num_samples=40).run()
        assert len(posterior._sums[0].replicate.plan.cut.pieces) == (2 if piece == 2**10 else 0)
        s = posterior.marginals("s").samples
        alpha = posterior.marginals("alpha").samples.movedim(-1, 0)  # (K, 3)
        log_evidences = []
        for index in (BEFORE, AFTER):
            log_prob = dist.Normal(alpha[:, index], 1.0).log_prob(Y[:4])  # (K, 4)
            counties = torch.zeros(3, 40).index_add(0, index, log_prob.T)
            log_evidences.append(counties.exp().mean(-1).log().sum())
        switches = s < SHARE
        found.append(bool(switches.any()))
        expected = torch.stack(log_evidences)[switches.long()].exp().mean().log()
        torch.testing.assert_close(posterior.evidence(), expected)
    assert 0 < sum(found) < 6, "each is met"


# More latents than have a level each.


def hidden(x: Tensor) -> Tensor:
    """The same value, by a way on which its origin is lost."""
    with torch._C.DisableTorchFunctionSubclass():
        return x + 0.0


def in_place(x: Tensor, y: Tensor) -> Tensor:
    """Where both are on one level, torch maps this."""
    total = 0.5 * x
    total[...] = total + y
    return total


def out_of_sight(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * x + hidden(y)


def in_sight(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * x + y


def chain(function: Callable[[Tensor, Tensor], Tensor], length: int) -> None:
    """A chain, the data of which read two states each that no transition reads together."""
    x: list[Tensor] = []
    for i in range(length):
        loc = x[-1] if x else torch.tensor(0.0)
        x.append(pyro.sample(f"x_{i}", dist.Normal(loc, 1.0)))
    for i in range(length - 2):
        mean = function(x[i], x[i + 2])
        pyro.sample(f"y_{i}", dist.Normal(mean, 1.0), obs=torch.tensor(0.3 * i))


@pytest.mark.parametrize("length", [3, 4, 5, 7])
@pytest.mark.parametrize("function", [in_sight, out_of_sight])
def test_reads_that_the_plain_run_missed(
    function: Callable[[Tensor, Tensor], Tensor], length: int
) -> None:
    """On a level that two latents share, a missed read would put both on a diagonal."""
    compare(partial(chain, function, length), num_samples=2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
def test_reads_through_torchscript() -> None:
    scripted = torch.jit.script(in_sight)
    compare(partial(chain, scripted, 6), num_samples=2)


def test_writes_in_place_on_a_shared_level() -> None:
    compare(partial(chain, in_place, 6), num_samples=2)


def test_missed_reads_of_plates() -> None:
    """On a shared level, in a plate, and by index."""

    def model() -> None:
        globals_ = [pyro.sample(f"g_{i}", dist.Normal(0.0, 1.0)) for i in range(4)]
        with pyro.plate("county", 2):
            a = pyro.sample("a", dist.Normal(globals_[0], 1.0))
            b = pyro.sample("b", dist.Normal(hidden(globals_[1]), 1.0))
            pyro.sample("y", dist.Normal(a + hidden(b), 1.0), obs=Y[:2])
        with pyro.plate("house", 3):
            loc = b[..., [1, 0, 0]] + hidden(globals_[2])
            pyro.sample("z", dist.Normal(loc, 1.0), obs=Y[:3])
        pyro.sample("w", dist.Normal(globals_[3] + hidden(globals_[0]), 1.0), obs=Y[0])

    compare(model, num_samples=2)
