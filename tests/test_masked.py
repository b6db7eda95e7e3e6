# SPDX-License-Identifier: Apache-2.0
"""Masked latents: flat where something that counts reads them, left out where nothing does."""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compared import compare
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.poutine.messenger import Messenger
from singles import Exact, Singles, exact
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis._warnings import MPISWarning
from pyro_mpis.particles import masked
from pyro_mpis.programs.generic import DifferentEntries, moved
from pyro_mpis.programs.mapped import run_mapped
from pyro_mpis.programs.masks import taken_apart, unmasked
from pyro_mpis.programs.tensors import unwrapped

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0.5, -1.0, 1.5], dtype=torch.double)
SEEN = torch.tensor([True, False, True])
HALF = torch.tensor(0.5, dtype=torch.double)
ENUMERATE: Any = {"enumerate": "parallel"}
FLAT = r"masked, but a site that is not masked reads it"


def hidden(mask: Any) -> AbstractContextManager[object]:
    handler: Messenger = poutine.mask(mask=mask)
    return handler


def both_ways(name: str, fn: Any, mask: Any, by_handler: bool, **options: Any) -> Tensor:
    """Sample under poutine.mask, or with the mask within the distribution."""
    with hidden(mask) if by_handler else nullcontext():
        result: Tensor = pyro.sample(name, fn if by_handler else fn.mask(mask), **options)
        return result


def imputed(by_handler: bool) -> None:
    """One element is missing: only there the latent is read."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 3):
        gap = both_ways("gap", dist.Normal(1.0, 2.0), False, by_handler)
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.where(SEEN, Y, gap))


def imputed_guide() -> None:
    pyro.sample("mu", dist.Normal(0.1, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("gap", dist.Normal(0.0, 1.5))


def padded(by_handler: bool, enumerated: bool) -> None:
    """Two sequences, one of them shorter."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("sequence", 2):
        z = torch.zeros(2)
        for t in range(2):
            there = t < torch.tensor([2, 1])
            if enumerated:
                fn: Any = dist.Bernoulli(0.2 + 0.6 * z)
                z = both_ways(f"z{t}", fn, there, by_handler, infer=ENUMERATE)
            else:
                z = both_ways(f"z{t}", dist.Normal(0.8 * z, scale), there, by_handler)
            both_ways(f"y{t}", dist.Normal(z, 1.0), there, by_handler, obs=Y[t : t + 2])


def padded_guide(masked: bool) -> None:
    pyro.sample("scale", dist.LogNormal(0.1, 0.3))
    with pyro.plate("sequence", 2):
        z = torch.zeros(2)
        for t in range(2):
            there = t < torch.tensor([2, 1])
            with hidden(there) if masked else nullcontext():
                z = pyro.sample(f"z{t}", dist.Normal(0.5 * z + 3.0, 1.0))


def padded_vectors() -> None:
    with pyro.plate("sequence", 2):
        z = torch.zeros(2, 2)
        for t in range(2):
            there = (t < torch.tensor([2, 1])).unsqueeze(-1)
            z = pyro.sample(f"z{t}", dist.Normal(0.8 * z, 1.0).mask(there).to_event(1))
            fn = dist.Normal(z, 1.0).mask(there).to_event(1)
            pyro.sample(f"y{t}", fn, obs=torch.ones(2, 2))


def flat_prior(by_handler: bool) -> None:
    p = both_ways("p", dist.Beta(3.0, 5.0), False, by_handler)
    x = pyro.sample("x", dist.Normal(p, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def wide_guide() -> None:
    pyro.sample("p", dist.Normal(0.5, 1.0))  # most of it outside of the support


def masked_states(by_handler: bool) -> None:
    """Summed with their weights where a handler masks them, without where they mask themselves."""
    with pyro.plate("data", 3):
        fn = dist.Categorical(torch.tensor([0.1, 0.3, 0.6]))
        z = both_ways("z", fn, torch.tensor([True, False, False]), by_handler, infer=ENUMERATE)
        with hidden(torch.tensor([True, True, False])):
            pyro.sample("y", dist.Normal(z * 1.0, 1.0), obs=Y)


def states_of_two_masks() -> None:
    """Of an element that masks itself, nothing tells; one that a handler masks counts."""
    with pyro.plate("data", 3):
        fn = dist.Categorical(torch.tensor([0.1, 0.3, 0.6]))
        with hidden(torch.tensor([False, True, False])):
            own = fn.mask(torch.tensor([True, False, False]))
            z = pyro.sample("z", own, infer=ENUMERATE)
        with hidden(torch.tensor([True, True, False])):
            pyro.sample("y", dist.Normal(z * 1.0, 1.0), obs=Y)


def read_by_a_state() -> None:
    """The density of a state that a handler masks counts, and reads a masked latent."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
    with hidden(False):
        z = pyro.sample("z", dist.Bernoulli(logits=x), infer=ENUMERATE)
    pyro.sample("y", dist.Normal(z, 1.0), obs=Y[0])


def masked_delta() -> None:
    """The density of a value that the model computes counts only where it is not masked."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with hidden(False):
        twice = pyro.sample("twice", dist.Delta(2 * x, log_density=3 * x))
    pyro.sample("y", dist.Normal(twice, 1.0), obs=Y[0])


def unused_county(by_handler: bool) -> None:
    """A county without houses is masked; so is one with."""
    with pyro.plate("county", 3):
        alpha = both_ways(
            "alpha", dist.Normal(0.0, 1.0), torch.tensor([True, False, False]), by_handler
        )
    with pyro.plate("house", 3):
        pyro.sample("y", dist.Normal(alpha[torch.tensor([0, 0, 1])], 1.0), obs=Y)


def running_sums(by_handler: bool) -> None:
    """The last step reads all, and is the only one that counts."""
    with pyro.plate("time", 3):
        step = both_ways(
            "step", dist.Normal(0.0, 1.0), torch.tensor([False, True, False]), by_handler
        )
        with hidden(torch.tensor([False, True, False])):
            pyro.sample("y", dist.Normal(step.cumsum(0), 1.0), obs=Y)


def events() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with hidden(False):
        b = pyro.sample("b", dist.Normal(a, 0.5))
    with pyro.plate("data", 2):
        with hidden(torch.tensor([True, False])):
            c = pyro.sample("c", dist.Normal(b, 1.0))
        fn = dist.Normal(b.unsqueeze(-1), torch.ones(2, 1))
        d = pyro.sample("d", fn.mask(torch.tensor([[True], [False]])).to_event(1))
        pyro.sample("x", dist.Normal(c + d[..., 0], 1.0), obs=Y[:2])


def scaled(by_handler: bool) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=2.0), pyro.plate("data", 3):
        x = both_ways("x", dist.Normal(mu, 1.0), SEEN, by_handler)
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def mixture_of_flat() -> None:
    """Which of the masked locations is read depends on a latent."""
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0).mask(False))
    z = pyro.sample("z", dist.Bernoulli(0.3), infer=ENUMERATE).long()
    pyro.sample("y", dist.Normal(loc[z], 1.0), obs=Y[0])


def thresholded() -> None:
    """A density that is the same on either side of a threshold."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
    pyro.sample("y", dist.Normal((x > 0.2).double(), 1.0), obs=Y[2])


def ways(function: Callable[..., None], *more: Any) -> dict[str, Callable[..., None]]:
    return {word: partial(function, by, *more) for word, by in (("handler", True), ("own", False))}


PROGRAMS: dict[str, tuple[Callable[..., None], Callable[..., None] | None, int]] = {
    "vectors": (padded_vectors, None, 2),
    "events": (events, None, 3),
    "switch": (mixture_of_flat, None, 3),
    "threshold": (thresholded, None, 3),
    "states of two masks": (states_of_two_masks, None, 1),
    "masked Delta": (masked_delta, None, 3),
    "read by a state": (read_by_a_state, None, 3),
}
for word in ("handler", "own"):
    by_handler = word == "handler"
    PROGRAMS |= {
        f"imputed, {word}": (partial(imputed, by_handler), None, 3),
        f"imputed, guide, {word}": (partial(imputed, by_handler), imputed_guide, 3),
        f"padded, {word}": (partial(padded, by_handler, False), None, 2),
        f"padded, guide, {word}": (
            partial(padded, by_handler, False),
            partial(padded_guide, False),
            2,
        ),
        f"padded, both, {word}": (
            partial(padded, by_handler, False),
            partial(padded_guide, True),
            2,
        ),
        f"padded states, {word}": (partial(padded, by_handler, True), None, 3),
        f"flat, {word}": (partial(flat_prior, by_handler), None, 4),
        f"flat, wide guide, {word}": (partial(flat_prior, by_handler), wide_guide, 6),
        f"masked states, {word}": (partial(masked_states, by_handler), None, 1),
        f"unused county, {word}": (partial(unused_county, by_handler), None, 3),
        f"running sums, {word}": (partial(running_sums, by_handler), None, 3),
        f"scaled, {word}": (partial(scaled, by_handler), None, 3),
    }


def test_masks_at_every_depth_are_one() -> None:
    """That of the elements, that of the events around them, and that of the message."""
    each = torch.tensor([[True, False, True], [True, True, False]])
    event, message = torch.tensor([True, True]), torch.tensor([True, False])
    fn = dist.Normal(torch.zeros(2, 3), 1.0).mask(each).to_event(1).mask(event)
    parts = taken_apart(fn, message)
    assert parts.event_dims == 1
    assert isinstance(parts.mask, Tensor)
    assert parts.mask.tolist() == [[True, False, True], [False, False, False]]
    without: Any = unmasked(fn)
    plain = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    torch.testing.assert_close(without.log_prob(torch.ones(2, 3)), plain.log_prob(torch.ones(2, 3)))


@pytest.mark.parametrize("seen", list(itertools.product([0.0, 1.0], repeat=3)))
def test_summed_states_are_those_of_pyro(seen: tuple[float, ...]) -> None:
    """Animals that live on count from their first capture on: TraceEnum_ELBO is exact."""

    def model(captures: Tensor) -> None:
        with pyro.plate("animals", len(captures)):
            lives, known = torch.ones(len(captures)), torch.zeros(len(captures), dtype=torch.bool)
            for t in pyro.markov(range(captures.shape[1])):
                with hidden(known):
                    p = torch.where(known, 0.6 * lives, 1.0 - 1e-7)
                    lives = pyro.sample(f"z_{t}", dist.Bernoulli(p), infer=ENUMERATE)
                    p = 0.7 * lives + 1e-7
                    pyro.sample(f"y_{t}", dist.Bernoulli(p), obs=captures[:, t])
                known = known | (captures[:, t] > 0)

    captures = torch.tensor([seen, (1.0, 0.0, 1.0)])
    summed = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda captures: None, captures)
    found = MPImportance(model, num_samples=1).run(captures).evidence()
    torch.testing.assert_close(found, torch.tensor(summed), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str) -> None:
    model, guide, num_samples = PROGRAMS[name]
    compare(model, guide, num_samples)


@pytest.mark.parametrize("name", ["running sums, own", "unused county, own", "vectors"])
@pytest.mark.parametrize("elements", [1, 600])
def test_program_whose_elements_are_changed_in_parts(
    name: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pattern at a time, and some: the last part may be smaller."""
    monkeypatch.setattr(masked, "PROBE_ELEMENTS", elements)
    model, guide, num_samples = PROGRAMS[name]
    compare(model, guide, num_samples)


def test_wrong_masks_are_rejected() -> None:
    """Masks lifted, or flat where nothing reads: brute force sees both."""

    def with_unread(problem: Singles, read: bool) -> Exact:
        problem.unread = {n: torch.full_like(e, not read) for n, e in problem.unread.items()}
        return exact(problem)

    for name in ("imputed, guide, own", "imputed, own", "unused county, handler"):
        for read in (True, False):
            with pytest.raises(AssertionError, match=r"evidence|weights|mean"):
                compare(*PROGRAMS[name], wrong=partial(with_unread, read=read))


def test_a_masked_guide_draws_all_the_same() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])

    def guide() -> None:
        pyro.sample("x", dist.Normal(0.3, 1.2))

    masks: list[Any] = [False, torch.tensor(False)]
    for mask in masks:
        compare(model, poutine.mask(guide, mask=mask), 3)


def test_a_masked_autoguide_has_all_of_its_density() -> None:
    """Autoguides ask for their mask, and leave out the density of a transform where it is False."""

    def model() -> None:
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])

    guide = AutoNormal(model, init_scale=0.5)
    guide()
    for proposal in (guide, poutine.mask(guide, mask=False)):
        posterior = MPImportance(model, proposal, num_samples=8).run()
        x = posterior.marginals("x").samples
        log_q = dist.LogNormal(guide.median()["x"].log().detach(), 0.5).log_prob(x)
        log_p = dist.LogNormal(0.0, 1.0).log_prob(x) + normal(x, Y[0])
        torch.testing.assert_close(posterior.evidence(), (log_p - log_q).exp().mean().log())


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
def test_padding_under_an_autoguide(autoguide: Any) -> None:
    """The evidence is that of the sequences without padding."""

    def model(length: int, there: int) -> None:
        with pyro.plate("time", length), hidden(torch.arange(length) < there):
            z = pyro.sample("z", dist.LogNormal(0.0, 0.5))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(length))

    found = []
    for length in (2, 4):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = autoguide(model, init_scale=0.4)
        found.append(float(MPImportance(model, guide, num_samples=4000).run(length, 2).evidence()))
    x = torch.linspace(-6, 6, 4001).exp()
    density = (
        dist.LogNormal(0.0, 0.5).log_prob(x) + dist.Normal(x, 1.0).log_prob(torch.ones(()))
    ).exp()
    truth = 2 * math.log(float(torch.trapezoid(density, x)))
    assert max(abs(value - truth) for value in found) < 0.1


def test_guide_of_the_padded_end_does_not_matter() -> None:
    """It is left out exactly: the numbers are the same wherever the guide puts it."""

    def model() -> None:
        with pyro.plate("time", 3), hidden(torch.arange(3) < 2):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    def plain(shift: float) -> None:
        with pyro.plate("time", 3):
            pyro.sample("z", dist.LogNormal(shift * torch.tensor([0.0, 0.0, 1.0]), 1.0))

    def carried(shift: float) -> None:
        with pyro.plate("time", 3):
            u = pyro.sample(
                "u",
                dist.Normal(shift * torch.tensor([0.0, 0.0, 1.0]), 1.0),
                infer={"is_auxiliary": True},
            )
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    for guide in (plain, carried):
        found = []
        for shift in (0.0, 40.0):
            pyro.set_rng_seed(0)
            found.append(MPImportance(model, partial(guide, shift), num_samples=5).run().evidence())
        torch.testing.assert_close(*found)


def normal(x: Tensor, loc: Any = 0.0, scale: float = 1.0) -> Tensor:
    result: Tensor = dist.Normal(loc, scale).log_prob(x)
    return result


def test_an_event_is_left_out_as_a_whole() -> None:
    """Where one of its scalars is read, the others are forecasts: drawn together, they count."""
    counts = torch.tensor([[False, False], [True, False], [False, False]])

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, 2), 1.0).mask(counts).to_event(1))
            with hidden(torch.tensor([True, True, False])):
                pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=Y)

    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.3 * torch.ones(3, 2), 1.3).to_event(1))

    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=f"'z': {FLAT}"):
        posterior = MPImportance(model, guide, num_samples=6).run()
    z = posterior.marginals("z").samples  # (data, K, 2)
    prior = torch.stack([normal(z[0, :, 1]), normal(z[1]).sum(-1)])
    data = normal(z[:2, :, 0], Y[:2, None])
    log_weights = prior + data - normal(z[:2], 0.3, 1.3).sum(-1)
    torch.testing.assert_close(posterior.evidence(), log_weights.exp().mean(-1).log().sum())


@pytest.mark.parametrize("more", ["nothing", "Delta", "factor", "Delta of two", "across"])
def test_latents_that_the_guide_computes(more: str) -> None:
    """
    The padded end is left out with the guide's draw of it, unless that means something else too.

    Then it is a forecast: both densities count.
    """

    def model() -> None:
        time = pyro.plate("time", 3)
        with time, hidden(torch.arange(3) < 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)
        if more == "Delta":
            with time:
                x = pyro.sample("x", dist.Normal(0.0, 1.0))
                pyro.sample("v", dist.Normal(x, 1.0), obs=Y)

    def guide() -> None:
        hint: Any = {"is_auxiliary": True}
        draw = partial(pyro.sample, fn=dist.Normal(0.2 * torch.ones(3), 1.3), infer=hint)
        if more == "across":  # in no plate: one particle has all elements, in another order
            u = draw("u").flip(0)
        with pyro.plate("time", 3):
            u = u if more == "across" else draw("u")
            half = 0.5 * (u + draw("other")) if more == "Delta of two" else u
            pyro.sample("z", dist.Delta(half))
            if more == "Delta":
                pyro.sample("x", dist.Delta(2 * u, log_density=-math.log(2.0)))
            if more == "factor":
                pyro.factor("f", 0.3 * u, has_rsample=False)

    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        posterior = MPImportance(model, guide, num_samples=5).run()
    names = ("u", "other") if more == "Delta of two" else ("u",)
    drawn = [posterior._sums[0].replicate.particles.values[name] for name in names]
    u = drawn[0].flip(-1) if more == "across" else drawn[0]  # (K, time)
    log_q = normal(u, 0.2, 1.3)
    if more == "Delta of two":
        other = drawn[1].unsqueeze(1)
        log_q = (log_q + normal(other, 0.2, 1.3)).flatten(0, 1)
        u = (0.5 * (u + other)).flatten(0, 1)
    log_p = normal(u) + torch.where(torch.arange(3) < 2, normal(u, Y), 0.0)
    if more == "Delta":
        log_p = log_p + normal(2 * u) + normal(2 * u, Y)
        log_q = log_q - math.log(2.0)
    if more == "factor":
        log_q = log_q + 0.3 * u
    if more == "nothing":
        log_p, log_q = log_p[:, :2], log_q[:, :2]
    log_weights = log_p - log_q
    log_weights = log_weights.sum(-1, keepdim=True) if more == "across" else log_weights
    truth = (log_weights.logsumexp(0) - math.log(len(log_weights))).sum()
    torch.testing.assert_close(posterior.evidence(), truth)


def test_a_group_whose_members_read_what_is_left_out() -> None:
    def model() -> None:
        with pyro.plate("time", 2):
            with hidden(torch.arange(2) < 1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=Y[:2])
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(x, 1.0), obs=Y[:2])

    def guide() -> None:
        with pyro.plate("time", 2):
            z = pyro.sample("z", dist.Normal(0.2, 1.3))
            pyro.sample("x", dist.Normal(0.5 * z, 1.0))

    for groups in ((), (("z", "x"),)):
        compare(model, guide, 2, groups)


def test_guide_of_the_padded_end_where_other_entries_make_the_model_fail() -> None:
    """A matrix that is selected has to be positive definite: the programs run as they are, too."""
    matrices = 1e-4 * torch.stack([torch.eye(2), 2 * torch.eye(2)])

    def model() -> None:
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("v", dist.MultivariateNormal(torch.zeros(2), matrices[z]), obs=Y[:2])
        with pyro.plate("time", 3), hidden(torch.arange(3) < 2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y)

    def guide(shift: float) -> None:
        with pyro.plate("time", 3):
            pyro.sample("x", dist.Normal(shift * torch.tensor([0.0, 0.0, 1.0]), 1.0))

    found = []
    for shift in (0.0, 40.0):
        pyro.set_rng_seed(0)
        found.append(MPImportance(model, partial(guide, shift), num_samples=5).run().evidence())
    torch.testing.assert_close(*found)


def test_the_search_draws_the_same_each_time_and_nothing_that_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Tensor] = []
    redrawn, search = vars(masked)["redrawn"], masked.unread_elements

    def noting(*args: Any) -> Tensor:
        drawn.append(redrawn(*args))
        return drawn[-1]

    def searching(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        before = torch.get_rng_state()
        found = search(*args, **kwargs)
        torch.testing.assert_close(torch.get_rng_state(), before)
        return found

    monkeypatch.setattr(masked, "redrawn", noting)
    monkeypatch.setattr(masked, "unread_elements", searching)
    model = partial(padded, True, False)
    for seed in (0, 1):
        pyro.set_rng_seed(seed)
        MPImportance(model, num_samples=2).run()
    assert len(drawn) == 2 * 3
    torch.testing.assert_close(drawn[0], drawn[3])  # the scale; others are drawn given that


def test_flat_prior_warns_and_padding_does_not() -> None:
    with pytest.warns(MPISWarning, match=f"'p': {FLAT}"):
        MPImportance(partial(flat_prior, True), num_samples=2).run()
    MPImportance(partial(padded, True, False), partial(padded_guide, False), num_samples=2).run()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("by_handler", [False, True])
def test_where_all_is_masked_the_prior_is_the_posterior(by_handler: bool, guided: bool) -> None:
    """No density counts: the evidence is one, and draws of the prior keep equal weights."""

    def model() -> None:
        x = both_ways("x", dist.Normal(1.0, 2.0), False, by_handler)
        with pyro.plate("data", 3):
            both_ways("y", dist.Normal(x, 1.0), False, by_handler, obs=Y)

    def guide() -> None:
        pyro.sample("x", dist.Normal(0.5, 1.0))

    posterior = MPImportance(model, guide if guided else None, num_samples=5).run()
    torch.testing.assert_close(posterior.evidence(), torch.zeros(()))
    drawn = posterior._sums[0].whole.values["x"].tensor
    torch.testing.assert_close(posterior.moments()["x"], drawn.mean())


@pytest.mark.parametrize("way", ["handler", "own", "event"])
def test_a_fixed_latent_has_the_masked_density(way: str) -> None:
    """Nothing was drawn where it is masked, so that no density is to be balanced."""
    at, event = torch.tensor([0.5, -1.0, 2.0]), way == "event"

    def model() -> None:
        with pyro.plate("data", 3) if not event else nullcontext():
            if event:
                x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).mask(SEEN).to_event(1))
            else:
                x = both_ways("x", dist.Normal(0.0, 1.0), SEEN, way == "handler")
            with hidden(SEEN):
                pyro.sample("y", dist.Normal(x, 1.0), obs=Y)

    def guide() -> None:
        with pyro.plate("data", 3) if not event else nullcontext():
            pyro.sample("x", dist.Delta(at, event_dim=int(event)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        posterior = MPImportance(model, guide, num_samples=2).run()
    log_p = dist.Normal(0.0, 1.0).log_prob(at) + dist.Normal(at, 1.0).log_prob(Y)
    torch.testing.assert_close(posterior.evidence(), log_p[SEEN].sum())


def test_mask_that_depends_on_a_latent() -> None:
    """Flat where the data read it, left out where they do not: one run for each particle."""

    def model(read: bool, own: bool) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        x = both_ways("x", dist.Normal(0.5, 1.0), z.bool(), not own)
        with hidden(read or z.bool()):
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])

    def guide(*_: object) -> None:
        pyro.sample("x", dist.Normal(0.2, 1.5))

    def log_weights(read: bool, guided: bool, z: Tensor, x: Tensor) -> Tensor:
        data = dist.Normal(x, 1.0).log_prob(Y[0])
        prior = dist.Normal(0.5, 1.0).log_prob(x)
        drawn = dist.Normal(0.2, 1.5).log_prob(x) if guided else prior
        return torch.where(z.bool(), prior + data - drawn, (data - drawn) if read else 0.0)

    for read in (True, False):
        for own in (True, False):
            for guided in (True, False):
                pyro.set_rng_seed(0)
                with pytest.warns(MPISWarning, match="'x' is under a mask computed from 'z'"):
                    posterior = MPImportance(model, guide if guided else None, num_samples=20).run(
                        read, own
                    )
                z, x = (posterior.marginals(name).samples for name in ("z", "x"))
                truth = log_weights(read, guided, z, x).exp().mean().log()
                torch.testing.assert_close(posterior.evidence(), truth)


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("plated", [True, False])
def test_mask_that_depends_on_a_value_that_is_looked_at(alone: bool, plated: bool) -> None:
    """Another mask, or none, than in the first run; all latents are looked at, or one is."""
    shape = (2,) if plated else ()

    def model(read: bool) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        there: Any = torch.tensor([True, bool(z)]) if plated else bool(z)
        with pyro.plate("n", 2) if plated else nullcontext():
            with hidden(there):
                x = pyro.sample("x", dist.Normal(0.5, 1.0))
            assert alone or math.isfinite(float(x.sum()))
            with hidden(read | there):
                pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0].expand(shape))

    def guide(*_: object) -> None:
        with pyro.plate("n", 2) if plated else nullcontext():
            pyro.sample("x", dist.Normal(0.2, 1.5))

    for read, guided, seed in itertools.product((True, False), (True, False), range(3)):
        pyro.set_rng_seed(seed)
        posterior = MPImportance(model, guide if guided else None, num_samples=8).run(read)
        z, x = (posterior.marginals(name).samples for name in ("z", "x"))
        x, z = x.reshape(-1, 8), z.bool()  # (elements, K)
        drawn = normal(x, 0.2, 1.5) if guided else normal(x, 0.5)
        unmasked_weights = normal(x, 0.5) + normal(x, Y[0]) - drawn
        masked_weights = normal(x, Y[0]) - drawn if read else torch.zeros_like(x)
        log_weights = torch.where(z, unmasked_weights, masked_weights)
        log_weights[:-1] = unmasked_weights[:-1]  # of two elements, the first is not masked
        truth = log_weights.sum(0).exp().mean().log()
        torch.testing.assert_close(posterior.evidence(), truth)


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
def test_what_is_read_in_some_branches_is_flat_in_all() -> None:
    """As where ``torch.where`` selects it: the mask is the same whatever the branch."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with hidden(False):
            x = pyro.sample("x", dist.Normal(0.5, 1.0))
        loc = x if bool(z) and math.isfinite(float(x)) else torch.zeros(())
        pyro.sample("y", dist.Normal(loc, 1.0), obs=Y[0])

    for seed in range(4):
        pyro.set_rng_seed(seed)
        posterior = MPImportance(model, num_samples=8).run()
        assert posterior._sums[0].traces
        z, x = (posterior.marginals(name).samples for name in ("z", "x"))
        truth = (normal(z * x, Y[0]) - normal(x, 0.5)).exp().mean().log()
        torch.testing.assert_close(posterior.evidence(), truth)


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
def test_where_it_cannot_be_found_out_a_masked_latent_is_taken_for_read() -> None:
    """Statements differ between the runs that would tell."""

    def model() -> None:
        with hidden(False):
            x = pyro.sample("x", dist.Normal(0.5, 1.0))
        if float(x) > 1.0:
            pyro.sample("more", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])

    for seed in range(3):
        pyro.set_rng_seed(seed)
        posterior = MPImportance(model, num_samples=8).run()
        x = posterior.marginals("x").samples
        truth = (normal(x, Y[0]) - normal(x, 0.5)).exp().mean().log()
        torch.testing.assert_close(posterior.evidence(), truth)


class Word(dist.Distribution):
    """Draws a text: no tensor."""

    def sample(self, *_: object) -> str:
        return "long" if float(torch.rand(())) < 0.5 else "short"

    def __call__(self, *_: object) -> str:
        return self.sample()

    def log_prob(self, *_: object) -> Tensor:
        return torch.tensor(0.5).log()


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
def test_a_masked_latent_that_is_no_tensor() -> None:
    """Neither its prior nor what it was drawn from counts, as in pyro.infer.Importance."""

    def model() -> None:
        with hidden(False):
            word: Any = Word()
            length = len(pyro.sample("word", word))
        x = pyro.sample("x", dist.Normal(float(length), 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=8).run()
    truth = normal(posterior.marginals("x").samples, Y[0]).exp().mean().log()
    torch.testing.assert_close(posterior.evidence(), truth)


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
@pytest.mark.parametrize(
    "how", ["computed", "factor", "one event", "events", "summed", "summed, guide"]
)
def test_what_is_left_out_of_ordinary_sampling(how: str) -> None:
    """Two elements that nothing reads where ``z`` is zero; particle by particle."""
    pair = torch.arange(2) == 1

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5)).bool()
        with pyro.plate("n", 2):
            if how == "events":  # one scalar of the first one is read
                fn: Any = dist.Normal(torch.zeros(2, 2), 1.0).mask(z).to_event(1)
                x = pyro.sample("x", fn)
                pyro.sample("y", dist.Normal(torch.where(pair, 0.0, x[:, 0]), 1.0), obs=Y[:2])
                return
            if how.startswith("summed"):  # by a handler, and the second one by itself as well
                fn = dist.Bernoulli(torch.full((2,), 0.5)).mask(z | ~pair)
                with hidden(z | pair):
                    x = pyro.sample("x", fn, infer=ENUMERATE)
            else:
                with hidden(z):
                    x = pyro.sample("x", dist.Normal(0.0, 1.0))
            with hidden(z | ~pair if how == "summed" else z):
                pyro.sample("y", dist.Normal(x, 1.0), obs=Y[:2])

    def guide() -> None:
        with pyro.plate("n", 2):
            if how == "computed":
                u = pyro.sample("u", dist.Normal(0.2, 1.3), infer={"is_auxiliary": True})
                pyro.sample("x", dist.Delta(u))
            elif how == "factor":
                x = pyro.sample("x", dist.Normal(0.2, 1.3))
                pyro.factor("f", 0.3 * x, has_rsample=False)
            elif how == "summed, guide":
                pyro.sample("x", dist.Bernoulli(torch.full((2,), 0.6)))
            elif how == "events":
                pyro.sample("x", dist.Normal(0.2 * torch.ones(2, 2), 1.3).to_event(1))
        if how == "one event":
            pyro.sample("x", dist.Normal(0.2 * torch.ones(2), 1.3).to_event(1))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, None if how == "summed" else guide, num_samples=20).run()
    assert posterior._sums[0].traces
    z, x = (posterior.marginals(name).samples for name in ("z", "x"))
    x = x if len(x) == 20 else x.movedim(x.shape.index(20), 0)  # (K, n, ...)
    z = z.bool().unsqueeze(-1)
    if how.startswith("summed"):
        prior = torch.full((20, 2), math.log(0.5))
        ratio = prior - torch.full((20, 2), math.log(0.6)).where(x > 0, math.log(0.4))
        ratio = torch.where(z | ~pair, ratio, 0.0) if how == "summed, guide" else 0.0 * prior
    else:
        prior, ratio = normal(x), normal(x) - normal(x, 0.2, 1.3)
    if how == "factor":
        ratio = ratio - 0.3 * x
    if how == "events":
        data = normal(torch.where(pair, 0.0, x[..., 0]), Y[:2])
        flat = torch.stack([ratio[:, 0].sum(-1) - prior[:, 0, 0], torch.zeros(20)], -1)
        log_weights = data + torch.where(z, ratio.sum(-1), flat)
    else:
        there = z | ~pair if how == "summed" else z
        log_weights = ratio + torch.where(there, normal(x, Y[:2]), 0.0)
        if how in ("one event", "computed", "factor"):
            assert len(set(log_weights[~z.flatten()].flatten().tolist())) > 2  # forecasts
    torch.testing.assert_close(posterior.evidence(), log_weights.sum(-1).exp().mean().log())


def test_hidden_data_may_lie_anywhere() -> None:
    """Outside of a support that depends on a latent."""

    def model(by_handler: bool) -> None:
        high = pyro.sample("high", dist.Uniform(1.6, 3.0))
        with pyro.plate("data", 3):
            data = torch.tensor([1.0, 7.0, 1.5])
            both_ways("y", dist.Uniform(0.0, high), SEEN, by_handler, obs=data)

    for by_handler in (True, False):
        pyro.set_rng_seed(0)
        posterior = MPImportance(partial(model, by_handler), num_samples=10).run()
        high = posterior.marginals("high").samples
        torch.testing.assert_close(posterior.evidence(), (high**-2.0).mean().log())


def test_site_whose_mask_does_not_fit() -> None:
    def model() -> None:
        with hidden(SEEN):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])

    with pytest.raises(ValueError, match=r"site 'x': its mask has shape \(3,\).*plates"):
        MPImportance(model, num_samples=2).run()


def test_counts_that_are_none_in_the_first_run() -> None:
    """What reads them is found all the same, though their support is zero alone there."""

    def model(plated: bool) -> None:
        total = pyro.sample("total", dist.Categorical(torch.tensor([0.6, 0.2, 0.2]))) * 1.0
        if plated:
            with pyro.plate("data", 3):
                count = pyro.sample("count", dist.Binomial(total * torch.ones(3), HALF).mask(False))
                pyro.sample("y", dist.Normal(count, 1.0), obs=Y + 0.2)
        else:
            count = pyro.sample("count", dist.Binomial(total, HALF).mask(False))
            pyro.sample("y", dist.Normal(count, 1.0), obs=Y[0] + 0.2)

    for plated, seed in itertools.product((True, False), range(4)):
        compare(partial(model, plated), None, 3, seed=seed)


def selected(z: Tensor, table: Tensor, way: str) -> Tensor:
    """Select an entry of a table in one of several ways."""
    if way == "index":
        return table[z]
    if way == "gather":
        return table.gather(0, z.reshape(1)).squeeze(0)
    if way == "embedding":
        return torch.nn.functional.embedding(z, table[:, None]).squeeze(-1)
    if way == "branches":
        return torch.where(z == 1, 0.5, 0.5)
    return torch.where(z == 1, table[1], table[0])


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
@pytest.mark.parametrize("way", ["index", "gather", "embedding", "where", "branches"])
def test_what_is_read_does_not_depend_on_what_it_selects(way: str) -> None:
    """Entries that are equal, and those a little apart: flat, both times."""

    def model(apart: float, enumerated: bool) -> None:
        infer: Any = ENUMERATE if enumerated else {}
        table = 0.5 + torch.tensor([0.0, apart])
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.8])).mask(False), infer=infer)
        pyro.sample("y", dist.Normal(selected(z, table, way), 1.0), obs=Y[0])

    def guide(*_: object) -> None:
        pyro.sample("z", dist.Categorical(torch.tensor([0.6, 0.4])))

    truth = dist.Normal(0.5, 1.0).log_prob(Y[0]) + math.log(2.0)
    exact = MPImportance(partial(model, 0.0, True), num_samples=1).run().evidence()
    torch.testing.assert_close(exact, truth)
    found = []
    for apart in (0.0, 1e-7):
        pyro.set_rng_seed(0)
        posterior = MPImportance(partial(model, apart, False), guide, num_samples=7).run()
        found.append(posterior.evidence())
    torch.testing.assert_close(*found, rtol=0.0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
def test_data_between_two_values_of_a_latent_are_read() -> None:
    """The density is the same at both values."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3).mask(False), infer=ENUMERATE)
        pyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)

    for y in (torch.tensor(1.0), torch.ones(()).requires_grad_()):
        found = MPImportance(model, num_samples=1).run(y).evidence()
        torch.testing.assert_close(found, dist.Normal(0.0, 1.0).log_prob(y).detach() + math.log(2))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("way", ["product", "matrix", "log"])
def test_what_is_multiplied_by_zero_is_not_read(way: str, guided: bool) -> None:
    """The padded end of a sequence, and zeros in place of a mask: the evidence without padding."""
    there = torch.tensor([1.0, 1.0, 0.0])

    def model() -> None:
        with pyro.plate("time", 3), hidden(there.bool()):
            x = pyro.sample("x", dist.LogNormal(0.0, 0.5))
        if way == "product":
            total = (x * there).sum()
        elif way == "matrix":
            total = torch.tril(torch.ones(3, 3))[1] @ x
        else:
            total = (x.log().exp() * there).sum()
        pyro.sample("y", dist.Normal(total, 1.0), obs=Y[2])

    def guide() -> None:
        with pyro.plate("time", 3):
            pyro.sample("x", dist.LogNormal(torch.tensor([-0.1, -0.1, 3.0]), 0.6))

    pyro.set_rng_seed(0)
    proposal = guide if guided else None
    posterior = MPImportance(model, proposal, num_samples=4000, shared_plates=["time"]).run()
    x = torch.linspace(-3.0, 2.5, 1501).exp()
    prior = torch.log(x[1:] / x[:-1]).mean() * x * dist.LogNormal(0.0, 0.5).log_prob(x).exp()
    data = dist.Normal(x + x[:, None], 1.0).log_prob(Y[2]).exp()
    truth = (prior * prior[:, None] * data).sum().log()
    assert abs(float(posterior.evidence() - truth)) < 0.08


def test_what_saturates_is_read() -> None:
    """A density that is flat at most values of the prior."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        pyro.sample("y", dist.Normal((x - 3.0).relu(), 1.0), obs=Y[0])

    with pytest.warns(MPISWarning, match=f"'x': {FLAT}"):
        MPImportance(model, num_samples=2).run()


def test_entries_of_every_kind_of_table_differ() -> None:
    """Zeros, in a mapped run: selected by a mapped number, and not by another."""
    table, two = torch.zeros(3), torch.tensor([2])
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda z: table[z],
        lambda z: table.gather(0, z),
        lambda z: torch.gather(table, 0, z),
        lambda z: table.index_select(0, z),
        lambda z: torch.index_select(table, 0, z),
        lambda z: table.take(z),
        lambda z: torch.take(table, z),
        lambda z: table.take_along_dim(z, 0),
        lambda z: torch.take_along_dim(table, z, 0),
        lambda z: torch.nn.functional.embedding(z, table[:, None]),
        lambda z: torch.where(z == 2, 0.0, 0.0),
        lambda z: torch.where(z == 2, table[0], table[0]),
        lambda z: table[:1].where(z == 2, table[:1]),
    ]

    def run(values: Mapping[str, Tensor]) -> None:
        for way in ways:
            assert not bool(unwrapped(way(two)).tensor.any())
            found = unwrapped(way(values["z"])).tensor.reshape(2)
            assert found[0] != found[1]
        assert way_of_integers(values["z"]).dtype == torch.long

    def way_of_integers(z: Tensor) -> Tensor:
        return torch.arange(3)[z]

    with DifferentEntries():
        run_mapped(run, [{"z": torch.tensor([[1], [2]])}], patched=False)
    assert bool((moved(torch.tensor([0.0, 1.0])) != torch.tensor([0.0, 1.0])).all())
    assert bool(((moved(torch.tensor([0.0, 1.0])) - 0.5).abs() < 0.5).all())


def flat_evidence(posterior: MPImportance, log_prob: Callable[..., Tensor], drawn: Any) -> Tensor:
    """Return the evidence where the prior of ``x`` is flat."""
    x = posterior.marginals("x").samples
    result: Tensor = (log_prob(x) - drawn.log_prob(x)).exp().mean().log()
    return result


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
def test_what_bounds_small_data_is_read() -> None:
    """Data that are moved by a few per cent of one are beyond every bound."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        pyro.sample("y", dist.Uniform(0.0, 1e-4 * x.exp()), obs=torch.tensor(1e-6))

    def data(x: Tensor) -> Tensor:
        return math.log(1e4) - x

    for seed in range(3):
        pyro.set_rng_seed(seed)
        posterior = MPImportance(model, num_samples=8).run()
        truth = flat_evidence(posterior, data, dist.Normal(0.0, 1.0))
        torch.testing.assert_close(posterior.evidence(), truth)


def test_whole_data_read_what_they_read() -> None:
    """Counts of zero, and the highest class, tell nothing of what others would: it is left out."""

    def classes() -> None:
        p = pyro.sample("p", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(-8.0, 1.0).mask(False))
        fn = dist.OrderedLogistic(torch.zeros(()), torch.stack([x, p], -1))
        pyro.sample("y", fn, obs=torch.tensor(2.0))

    def counts() -> None:
        p = pyro.sample("p", dist.Normal(0.0, 1.0)).sigmoid()
        x = pyro.sample("x", dist.Normal(-8.0, 1.0).mask(False)).sigmoid()
        fn = dist.Multinomial(2, torch.stack([p * x, p * (1 - x), 1 - p], -1))
        pyro.sample("y", fn, obs=torch.tensor([0.0, 0.0, 2.0]))

    def guide() -> None:
        pyro.sample("x", dist.Normal(-12.0, 1.0))

    for model, number in ((classes, 1), (counts, 2)):
        pyro.set_rng_seed(0)
        posterior = MPImportance(model, guide, num_samples=5).run()
        truth = torch.sigmoid(-posterior.marginals("p").samples).pow(number).mean().log()
        torch.testing.assert_close(posterior.evidence(), truth)


class Untold(dist.TorchDistribution):
    """A normal distribution that says nothing of its support."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def sample(self, shape: Any = ()) -> Tensor:
        drawn: Tensor = dist.Normal(self.loc, 1.0).sample(shape)
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        return normal(value, self.loc)


class Unnamed(Untold):
    """One that has no word for it."""

    @property
    def support(self) -> Any:
        raise AttributeError("support")


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
@pytest.mark.parametrize("family", [Untold, Unnamed])
def test_data_of_a_distribution_without_a_known_support(family: type[Untold]) -> None:
    """They are moved; what they do not read is left out."""

    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        z = pyro.sample("z", dist.Bernoulli(0.3).mask(False), infer=ENUMERATE)
        pyro.sample("y", family(2.0 * z), obs=torch.tensor(1.0))  # the same density at both values

    def guide() -> None:
        pyro.sample("x", dist.Normal(5.0, 0.5))

    found = MPImportance(model, guide, num_samples=3).run().evidence()
    torch.testing.assert_close(found, normal(torch.tensor(1.0)) + math.log(2.0))


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
@pytest.mark.parametrize("when", ["last of four", "first of six", "positive"])
def test_what_is_read_at_some_values_of_another_latent(when: str) -> None:
    """Each value of a small support is tried; of others, several."""
    size = {"last of four": 4, "first of six": 6}.get(when, 0)

    def model() -> None:
        states: Any = dist.Categorical(torch.ones(max(size, 1)))
        w = pyro.sample("w", states if size else dist.Normal(0.0, 1.0))
        prior: Any = states if size == 6 else dist.Normal(0.0, 1.0)
        x = pyro.sample("x", prior.mask(False))
        if when == "last of four":
            loc = torch.where(w == 3, x, 0.0)
        elif when == "first of six":
            loc = ((w == 0) & (x == 5)).double()
        else:
            loc = torch.where(w > 0, x, 0.0)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=Y[0])

    for seed in range(4):
        pyro.set_rng_seed(seed)
        with pytest.warns(MPISWarning, match=f"'x': {FLAT}"):
            MPImportance(model, num_samples=4).run()


@pytest.mark.parametrize("threshold", [-1.0, -0.5, 0.0, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
def test_steps_are_read(threshold: float) -> None:
    """At values on either side of a step, and at others between far ones."""

    def model(inner: bool) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        is_read = (x - threshold).abs() < 0.7 if inner else x > threshold
        pyro.sample("y", dist.Normal(is_read.double(), 1.0), obs=Y[0])

    for seed, inner in itertools.product(range(4), (True, False)):
        pyro.set_rng_seed(seed)
        with pytest.warns(MPISWarning, match=f"'x': {FLAT}"):
            MPImportance(model, num_samples=2).run(inner)


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
def test_masked_where_a_state_that_is_looked_at_is_one() -> None:
    """At a particle of ordinary importance sampling its own values count."""

    def model(read: bool) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        there = torch.tensor([True, not bool(z)])
        with pyro.plate("n", 2):
            with hidden(there):
                x = pyro.sample("x", dist.Normal(0.5, 1.0))
            assert math.isfinite(float(x.sum()))
            with hidden(read | there):
                pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0].expand(2))

    def guide(*_: object) -> None:
        with pyro.plate("n", 2):
            pyro.sample("x", dist.Normal(0.2, 1.5))

    for seed, read in itertools.product(range(4), (True, False)):
        pyro.set_rng_seed(seed)
        posterior = MPImportance(model, guide, num_samples=8).run(read)
        assert posterior._sums[0].traces
        z, x = (posterior.marginals(name).samples for name in ("z", "x"))
        x = x.reshape(2, 8)
        data = normal(x, Y[0]) - normal(x, 0.2, 1.5)
        log_weights = data + normal(x, 0.5)
        log_weights[1] = torch.where(z > 0, data[1] if read else 0.0, log_weights[1])
        torch.testing.assert_close(posterior.evidence(), log_weights.sum(0).exp().mean().log())


@pytest.mark.filterwarnings("ignore::pyro_mpis._warnings.MPISWarning")
@pytest.mark.parametrize("far", [True, False])
def test_a_program_that_refuses_other_values_reads_them(far: bool) -> None:
    """With an error of its own; those far away, or all that the prior would draw."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        if abs(float(x) - (0.0 if far else 20.0)) > 4.0:
            raise ArithmeticError("the solver does not converge")
        pyro.sample("y", dist.Uniform(0.0, 1.0), obs=HALF)  # a log density of zero

    def guide() -> None:
        pyro.sample("x", dist.Normal(0.0 if far else 20.0, 0.5))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=4).run()
    drawn = dist.Normal(0.0 if far else 20.0, 0.5)
    truth = flat_evidence(posterior, torch.zeros_like, drawn)
    torch.testing.assert_close(posterior.evidence(), truth)


def test_want_of_memory_in_the_search_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of what is read."""

    def evaluate(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(masked, "evaluate", evaluate)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        MPImportance(partial(padded, True, False), num_samples=2).run()


def test_elements_that_are_read_are_found_whoever_reads_them() -> None:
    """Two densities, each of which reads any of four elements: all of 16 * 16 cases."""

    class Reading:
        """Densities change if one of the elements that they read does."""

        def __init__(self, *read: Tensor) -> None:
            self.read = torch.stack(read)

        def changed(self, patterns: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"y": (patterns["x"][:, None] & self.read).any(-1)}

    subsets = torch.arange(16)[:, None].bitwise_right_shift(torch.arange(4)) & 1 > 0
    for size in (2, 3, 4):
        places = torch.arange(7) % 2 == 0  # of the masked elements
        places &= torch.arange(7) < 2 * size
        for one, other in itertools.product(subsets, subsets):
            read = [torch.zeros(7, dtype=torch.bool) for _ in range(2)]
            for elements, subset in zip(read, (one, other), strict=True):
                elements[::2] = subset
            probe: Any = Reading(*read)
            found = masked._read_elements(probe, "x", places)
            assert torch.equal(found, (read[0] | read[1]) & places)
