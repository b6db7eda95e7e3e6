# SPDX-License-Identifier: Apache-2.0
r"""
Why the authors' occupancy estimate is biased, on a toy whose evidence is known.

Two parents a and b, uniform on (-1, 1) and proposed so; in each of eight elements i of a plate

    z_i ~ Bernoulli(logit 3 a b), in the model and as the proposal;   x_i ~ Bernoulli(0.9 or 0.1),

0.9 where z_i is one; all x_i are one. With K particles, the estimate is the sum over all (k_a, k_b)
of :math:`K^{-2} \prod_i \sum_k p(z_i^k | a, b) p(x_i | z_i^k) / (K Q(z_i^k))`. Where z_i^k is drawn
given one pair of parents, and Q is the mixture over all :math:`K^2` pairs, its expectation is

* p(x), if the pairs are drawn anew in each plate element, ``anew``: given the parents' particles,
  elements are independent, and each factor has the expectation sum_z p(z | a, b) p(x_i | z);
* something else, if all elements share one pairing, ``shared``, as in the authors' code: the
  expectation of the product is then not the product of expectations.

``pyro_mpis`` shares the pairing as well (particle k of z reads particle k of both parents), but its
Q is the mixture over the K pairs that z was drawn from, and that is unbiased. Its weights are not
bounded by :math:`K^2`, as those of the mixture over all pairs are: with steeper logits, or parents
without bounds (normal ones), their tail is so long that a mean of many runs is mostly too low.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_mpis import MPImportance

OBSERVED = torch.ones(8, dtype=torch.double)
STEEPNESS = 3.0
RIGHT = 0.9  # probability that an observation tells z
K = 2


def model(x: Tensor) -> None:
    parent = dist.Uniform(-x.new_ones(()), x.new_ones(()))
    a = pyro.sample("a", parent)
    b = pyro.sample("b", parent)
    with pyro.plate("i", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=STEEPNESS * a * b))
        pyro.sample("x", dist.Bernoulli(RIGHT * z + (1 - RIGHT) * (1 - z)), obs=x)


def exact() -> float:
    """Return p(x), by the midpoint rule."""
    grid = (torch.arange(1000, dtype=torch.double) + 0.5) / 500 - 1
    present = torch.sigmoid(STEEPNESS * grid[:, None] * grid)
    likelihood = torch.ones_like(present)
    for x in OBSERVED:
        likelihood *= present * _tells(x, 1.0) + (1 - present) * _tells(x, 0.0)
    return float(likelihood.mean())


def estimates(num_runs: int, *, anew: bool = False, all_pairs: bool = True) -> Tensor:
    """
    Run a scheme by hand; draws random numbers.

    :param anew: whether to pair the parents anew in each plate element.
    :param all_pairs: whether Q is the mixture over all pairs of parents, or over those drawn from.
    :return: ``(num_runs,)`` estimates of p(x).
    """
    a = 2 * torch.rand(num_runs, K, 1, dtype=torch.double) - 1
    b = 2 * torch.rand(num_runs, 1, K, dtype=torch.double) - 1
    present = torch.sigmoid(STEEPNESS * a * b)  # (runs, k_a, k_b)
    product = torch.ones_like(present)
    partner = torch.rand(num_runs, K).argsort(-1)  # of each particle of a, among those of b
    for x in OBSERVED:
        if anew:
            partner = torch.rand(num_runs, K).argsort(-1)
        paired = present.gather(2, partner.unsqueeze(-1)).squeeze(-1)  # (runs, k)
        q = (present.flatten(1) if all_pairs else paired).mean(1, keepdim=True)  # of z = 1
        z = torch.bernoulli(paired)
        weight = _tells(x, z) / torch.where(z == 1, q, 1 - q) / K
        ones = (weight * z).sum(-1)[:, None, None]
        zeros = (weight * (1 - z)).sum(-1)[:, None, None]
        product *= present * ones + (1 - present) * zeros
    return product.mean((1, 2))


def ours(num_runs: int) -> tuple[float, float]:
    """Return the mean estimate of this package, and its standard error."""
    posterior = MPImportance(model, num_samples=K, num_replicates=num_runs, disable_progbar=True)
    posterior.run(OBSERVED)
    mean = posterior.evidence(log_scale=False).item()
    error = posterior.diagnose(show=False).evidence_error
    assert error is not None
    return mean, error * mean


def table(num_runs: int, our_runs: int | None = None) -> str:
    """Return the ratio of each scheme's mean to the truth, as a Markdown table."""
    truth = exact()
    pyro.set_rng_seed(0)
    lines = ["| scheme | runs | E[P] / p(x) |", "|---|---|---|"]
    for label, anew, all_pairs in (
        ("the authors': one pairing, mixture over all pairs", False, True),
        ("the authors', with a pairing for each element", True, True),
        ("ours by hand: one pairing, mixture over the pairs drawn from", False, False),
    ):
        drawn = estimates(num_runs, anew=anew, all_pairs=all_pairs) / truth
        error = float(drawn.std()) / math.sqrt(num_runs)
        lines.append(f"| {label} | {num_runs:,} | {float(drawn.mean()):.3f} ± {error:.3f} |")
    our_runs = our_runs or max(200, num_runs // 200)
    mean, error = ours(our_runs)
    lines.append(
        f"| ours, `MPImportance` | {our_runs:,} | {mean / truth:.3f} ± {error / truth:.3f} |"
    )
    return "\n".join(lines) + "\n"


def _tells(x: Tensor, z: Tensor | float) -> Tensor:
    """Return p(x | z)."""
    agrees = x * z + (1 - x) * (1 - z)
    return RIGHT * agrees + (1 - RIGHT) * (1 - agrees)
