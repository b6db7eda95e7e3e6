# SPDX-License-Identifier: Apache-2.0
"""A probability that is given as zero is zero; one of one, and logits, are as torch has them."""

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.runtime import InferDict
from torch import Tensor, tensor

from pyro_mpis import MPImportance
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.zeros import possible_values

NEVER = [
    (dist.Bernoulli(tensor(0.0)), tensor(1.0)),
    (dist.Bernoulli(tensor([0.0, 0.5])).to_event(1), tensor([1.0, 1.0])),
    (dist.Bernoulli(tensor([[0.0, 0.5]])).to_event(2), tensor([[1.0, 1.0]])),
    (dist.Binomial(5, tensor(0.0)), tensor(2.0)),
    (dist.NegativeBinomial(3.0, tensor(0.0)), tensor(2.0)),
    (dist.Categorical(tensor([0.0, 1.0])), tensor(0)),
    (dist.Categorical(tensor([0.0, 1.0])).mask(torch.tensor(True)), tensor(0)),
    (dist.OneHotCategorical(tensor([0.0, 1.0])), tensor([1.0, 0.0])),
    (dist.Multinomial(3, tensor([0.0, 1.0])), tensor([1.0, 2.0])),
]
AS_TORCH_HAS_THEM = [
    (dist.Bernoulli(tensor(0.0)), tensor(0.0)),
    (dist.Bernoulli(tensor(1.0)), tensor(0.0)),  # perhaps rounded
    (dist.Bernoulli(tensor(1.0)), tensor(1.0)),
    (dist.Bernoulli(logits=tensor(-200.0)), tensor(1.0)),
    (dist.Bernoulli(tensor(1e-30)), tensor(1.0)),
    (dist.Bernoulli(tensor([0.0, 0.5])).to_event(1), tensor([0.0, 1.0])),
    (dist.Binomial(5, tensor(0.0)), tensor(0.0)),
    (dist.NegativeBinomial(3.0, tensor(0.0)), tensor(0.0)),
    (dist.Categorical(tensor([0.0, 1.0])), tensor(1)),
    (dist.Categorical(logits=tensor([-300.0, 0.0])), tensor(0)),
    (dist.OneHotCategorical(tensor([0.0, 1.0])), tensor([0.0, 1.0])),
    (dist.Multinomial(3, tensor([0.0, 1.0])), tensor([0.0, 3.0])),
    (dist.Geometric(tensor(1.0)), tensor(0.0)),
    (dist.Geometric(tensor(1.0)), tensor(3.0)),
    (dist.Poisson(tensor(0.0)), tensor(3.0)),
]


@pytest.mark.parametrize(("fn", "value"), NEVER)
def test_what_is_given_no_probability(fn: TorchDistribution, value: Tensor) -> None:
    assert float(density_of(fn, value, validate=True)) == -math.inf
    assert float(fn.log_prob(value)) > -40  # torch's, which counts for a user without validation
    torch.testing.assert_close(density_of(fn, value, validate=False), fn.log_prob(value))


@pytest.mark.parametrize(("fn", "value"), AS_TORCH_HAS_THEM)
def test_what_has_some(fn: Any, value: Tensor) -> None:
    _ = getattr(fn, "probs", None)  # computed from logits, these may be rounded to zero
    torch.testing.assert_close(density_of(fn, value, validate=True), fn.log_prob(value))


def test_each_element_is_looked_at() -> None:
    table = tensor([[0.0, 1.0], [0.5, 0.5]])
    found = density_of(dist.Categorical(table), tensor([[0, 0], [1, 1]]), validate=True)
    half = -math.log(2)
    torch.testing.assert_close(found, tensor([[-math.inf, half], [0.0, half]]))
    expanded = dist.Bernoulli(tensor(0.0)).expand([2])
    found = density_of(expanded, tensor([1.0, 0.0]), validate=True)
    torch.testing.assert_close(found, tensor([-math.inf, 0.0]))


def test_distributions_that_are_expanded_from_without() -> None:
    fn = ExpandedDistribution(dist.Bernoulli(tensor(0.0)), [2])
    torch.testing.assert_close(
        density_of(fn, tensor([1.0, 0.0]), validate=True), tensor([-math.inf, 0.0])
    )
    event = ExpandedDistribution(dist.Bernoulli(tensor(0.0)), [2, 3]).to_event(2)
    assert [float(density_of(event, tensor(k), validate=True)) for k in (0.0, 1.0)] == [
        0.0,
        -math.inf,
    ]


def test_values_that_are_no_places_in_a_table() -> None:
    fn = dist.Categorical(tensor([[0.0, 1.0], [0.5, 0.5]]))
    found = density_of(fn, tensor([-1, 2]), validate=True)
    assert found.tolist() == [-math.inf, -math.inf]
    possible = possible_values(fn, tensor([-1, 2]))
    assert possible is not None
    assert possible.tolist() == [False, True]  # of the nearest places


def test_what_is_certain_is_written_by_its_complement() -> None:
    """As the documentation has it: one is left to torch, and one minus one is zero."""
    certain, probs = tensor([0.3, 1.0]), []
    for k in (0, 1):
        seen = dist.Bernoulli(certain[k])
        failed = dist.Bernoulli(1 - certain[k])
        probs.append([density_of(seen, tensor(0.0), validate=True).exp().item()])
        probs[k].append(density_of(failed, tensor(1.0), validate=True).exp().item())
    assert probs[0] == pytest.approx([0.7, 0.7])
    assert probs[1][0] == pytest.approx(1.2e-7, rel=0.01)
    assert probs[1][1] == 0.0


def test_a_component_without_a_share() -> None:
    components = dist.Normal(tensor([0.0, 20.0]), 1.0)
    mixture = dist.MixtureSameFamily(dist.Categorical(tensor([0.0, 1.0])), components)
    expected = dist.Normal(20.0, 1.0).log_prob(tensor(0.0))
    torch.testing.assert_close(density_of(mixture, tensor(0.0), validate=True), expected)
    assert float(mixture.log_prob(tensor(0.0))) > -20


# --- programs

TRANSITIONS = tensor([[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]])
LOCS = tensor([0.0, 5.0, 9.0])
Y = tensor([0.0, 9.0, 0.5, 1.0])  # the data go forbidden ways


@pytest.mark.parametrize("enumerated", [True, False])
def test_forbidden_transitions(enumerated: bool) -> None:
    """Against the sum over all paths; under torch's formula, forbidden ones have nearly all."""

    def chain() -> None:
        z: Any = 0
        for step in range(4):
            infer = InferDict(enumerate="parallel") if enumerated else None
            z = pyro.sample(f"z_{step}", dist.Categorical(TRANSITIONS[z]), infer=infer)
            pyro.sample(f"y_{step}", dist.Normal(LOCS[z], 0.5), obs=Y[step])

    def guide() -> None:
        for step in range(4):
            pyro.sample(f"z_{step}", dist.Categorical(torch.ones(3)))

    allowed, least = [], math.log(1.2e-7)
    all_ways = []
    for path in itertools.product(range(3), repeat=4):
        log_probs = [TRANSITIONS[a, b].log() for a, b in itertools.pairwise((0, *path))]
        data = float(dist.Normal(LOCS[list(path)], 0.5).log_prob(Y).sum())
        allowed.append(float(sum(log_probs)) + data)
        all_ways.append(float(sum(p.clamp(min=least) for p in log_probs)) + data)
    expected = float(tensor(allowed).logsumexp(0))
    assert float(tensor(all_ways).logsumexp(0)) > expected + 20
    pyro.set_rng_seed(0)
    run = MPImportance(chain, None if enumerated else guide, 60).run()
    found = float(run.evidence())
    assert found == pytest.approx(expected, abs=1e-3 if enumerated else 1.0)
    assert float(run.marginals("z_1").mean) < (2 if enumerated else 2.01)


def test_probabilities_that_depend_on_a_latent() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Bernoulli(0.5 * (a > 0)), obs=torch.ones(3))

    pyro.set_rng_seed(0)
    run = MPImportance(model, num_samples=40).run()
    samples, weights = run.marginals("a").samples, run.marginals("a").weights
    assert bool(((weights > 0) == (samples > 0)).all())
    share = float((samples > 0).double().mean())
    assert float(run.evidence()) == pytest.approx(math.log(share) - 3 * math.log(2), abs=1e-5)


def test_data_without_probability_are_an_error() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(tensor(0.0)), obs=tensor(1.0))

    with pytest.raises(ValueError, match="site 'y': probability zero for all particles"):
        MPImportance(model, num_samples=5).run()
