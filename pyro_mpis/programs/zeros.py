# SPDX-License-Identifier: Apache-2.0
"""
Values that are given a probability of exactly zero.

Torch takes such a probability for one of about 1e-7 in float32, 2e-16 in float64, where it is
an argument of Bernoulli, Categorical and their kin. A path through a forbidden transition then
counts as soon as the data prefer it by 16 nats. A probability of exactly one is left as it is:
``sigmoid(17)`` is one in float32 by rounding alone, and what it rules out is not impossible. One
that is rounded to zero is below 1e-38, and zero is nearer to it than torch's number. (Where one is
meant, the complement is given: that is zero exactly.)
"""

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    Multinomial,
    NegativeBinomial,
    OneHotCategorical,
)

from pyro_mpis.programs.tensors import unwrapped


def possible_values(fn: Distribution, value: Tensor) -> Tensor | None:
    """
    Return where values have a probability that is not given as zero: ``(*batch shape)``.

    :param value: may be outside of the support, where nothing is said of it.
    :return: None if all have; of a distribution with logits for arguments, all have.
    """
    if isinstance(fn, Independent):
        possible = possible_values(fn.base_dist, value)
        dims = min(fn.reinterpreted_batch_ndims, 0 if possible is None else possible.dim())
        return possible.flatten(-dims).all(-1) if possible is not None and dims else possible
    if isinstance(fn, MaskedDistribution | ExpandedDistribution):
        return possible_values(fn.base_dist, value)
    probs = given_probs(fn)
    if probs is None:
        return None
    positive = probs > 0
    if bool(unwrapped(positive).tensor.all()):
        return None
    if isinstance(fn, Categorical):
        value = value.long().clamp(0, positive.shape[-1] - 1).unsqueeze(-1)  # places in a table
        value, positive = torch.broadcast_tensors(value, positive)
        found: Tensor = positive.gather(-1, value[..., :1]).squeeze(-1)
        return found
    allowed: Tensor = positive | (value == 0)
    return allowed.all(-1) if isinstance(fn, OneHotCategorical | Multinomial) else allowed


def given_probs(fn: Distribution) -> Tensor | None:
    """Return the probabilities that a distribution was made of; None if it was made of logits."""
    if isinstance(fn, OneHotCategorical | Multinomial):
        fn = fn._categorical
    if not isinstance(fn, Bernoulli | Binomial | Categorical | NegativeBinomial):
        return None
    probs: Tensor | None = fn.__dict__.get("probs")  # there too once computed from logits
    return probs if probs is not None and fn._param is probs else None
