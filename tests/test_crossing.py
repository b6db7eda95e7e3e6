# SPDX-License-Identifier: Apache-2.0
"""Plates that lie in each other by what is read, and plates that cross, against brute force."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from counties import COUNTY, OCCASIONS, Y, check_sharing
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning

pytestmark = pytest.mark.usefixtures("float64")

CROSS = "which cross"


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
    compare(model, num_samples=2)


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
    compare(model, num_samples=2, single_values=False)


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
    compare(model, num_samples=2)


def test_crossed_effects() -> None:
    """Two latents of different plates, read by two indices that cross: the smaller plate shares."""

    def crossed() -> None:
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("year", 2):
            beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        with pyro.plate("house", 7):
            mean = alpha[COUNTY] + beta[torch.arange(7) % 2]
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

    check_sharing(crossed, "beta", "year", f"site 'y' reads.*'year' and of plate 'county', {CROSS}")
    compare(crossed, num_samples=3, shared={"alpha": ["county"]}, shared_plates=["county"])
    both = {"alpha": ["county"], "beta": ["year"]}
    compare(crossed, num_samples=3, shared=both, shared_plates=["county", "year"])


def test_vectors_of_latents_count_by_their_values() -> None:
    """What shares is what has the fewest numbers, whatever the sizes of the plates."""

    def crossed() -> None:
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("year", 2):
            beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("house", 7):
            mean = alpha[COUNTY] + beta[torch.arange(7) % 2].sum(-1)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

    check_sharing(crossed, "alpha", "county", CROSS)


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

    check_sharing(model, "a", "county", CROSS)


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

    check_sharing(model, "alpha", "county", f"'county' and of plate 'house', {CROSS}")


@pytest.mark.parametrize("first", [False, True])
def test_houses_that_move_and_houses_that_stay(first: bool) -> None:
    """One site reads the county of a house, another one that of a house and an occasion."""

    def model() -> None:
        with pyro.plate("county", 2):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("house", 2, dim=-1):
            loc = alpha[..., [0, 1]] if first else 0.0
            effect = pyro.sample("effect", dist.Normal(loc, 1.0))
            with pyro.plate("occasion", 2, dim=-2):
                noise = pyro.sample("noise", dist.Normal(effect, 1.0))
                late = torch.tensor([[False], [True]])
                moving = torch.where(late, alpha[..., 1:], alpha[..., :1])
                pyro.sample("y", dist.Normal(moving + noise, 1.0), obs=OCCASIONS[:, :2])
                staying = alpha[..., [0, 1]] + noise
                pyro.sample("z", dist.Normal(staying, 1.0), obs=OCCASIONS[:, 1:])

    reason = r"by an index array that differs from that of another site in plate '\w+'"
    check_sharing(model, "alpha", "county", reason, num_samples=2)


def effects(school: Tensor) -> None:
    """Classes lie in schools as pupils read them; teachers read a class and a school."""
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


def test_effects_nested_for_one_site_and_crossed_for_another() -> None:
    compare(partial(effects, torch.tensor([0, 0, 1])), num_samples=3)
    crossed = partial(effects, torch.tensor([0, 1, 1]))
    check_sharing(crossed, "alpha", "school", f"site 'w' reads .*{CROSS}")


def test_shared_enumerated_site_is_drawn() -> None:
    """The sum over all joint values of a plate's elements would be exponential in their number."""

    def model(enumerate_: bool) -> None:
        infer = {"enumerate": "parallel"} if enumerate_ else {}
        with pyro.plate("county", 2):
            kind = pyro.sample("kind", dist.Bernoulli(0.4), infer=infer)  # type: ignore[arg-type]
        pyro.sample("y", dist.Normal(kind.sum(-1), 1.0), obs=torch.tensor(0.5))

    evidences = []
    for enumerate_ in (False, True):
        pyro.set_rng_seed(0)
        with pytest.warns(MPISWarning, match="'kind' has one particle index for all"):
            posterior = MPImportance(model, num_samples=5).run(enumerate_)
        evidences.append(posterior.evidence())
    assert torch.equal(*evidences)
    compare(
        model,
        args=(False,),
        num_samples=5,
        shared={"kind": ["county"]},
        warning="several elements of plate 'county' together",
    )
