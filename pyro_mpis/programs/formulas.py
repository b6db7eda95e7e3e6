# SPDX-License-Identifier: Apache-2.0
"""Densities by another formula than torch's, where torch's takes many large tensors if mapped."""

import math

import torch
from pyro.distributions import Bernoulli, LogNormal, Normal
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.nn.functional import softplus

from pyro_mpis.programs.tensors import elementwise, is_mapped, unwrapped

THRESHOLD = 50.0  # beyond it log(1 + exp(x)) is x, in float64 too
HALF_LOG_2_PI = math.log(2 * math.pi) / 2


def by_formula(fn: Distribution, value: Tensor) -> Tensor | None:
    """
    Return a log density: ``(*batch shape)``.

    :return: None if torch's own formula is as good.
    """
    if isinstance(fn, Independent):
        log_prob = by_formula(fn.base_dist, value)
        dims = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        return log_prob.sum(dims) if log_prob is not None and dims else log_prob
    if type(fn) in (Bernoulli, torch.distributions.Bernoulli):
        return _bernoulli(fn, value)
    if type(fn) in (Normal, torch.distributions.Normal):
        return _normal(fn, value)
    if type(fn) in (LogNormal, torch.distributions.LogNormal):
        log_value = value.log()
        log_prob = _normal(fn.base_dist, log_value)  # type: ignore[attr-defined]
        return None if log_prob is None else log_prob - log_value
    return None


def _bernoulli(fn: Distribution, value: Tensor) -> Tensor | None:
    """Return ``-log(1 + exp(-s * logits))`` with the sign s of an outcome: two large tensors."""
    logits: Tensor = fn.logits  # type: ignore[attr-defined]
    values = unwrapped(value).tensor
    if not is_mapped(logits) or not bool(((values == 0) | (values == 1)).all()):
        return None
    return softplus((1 - 2 * value) * logits, threshold=THRESHOLD).neg_()


def _normal(fn: Distribution, value: Tensor) -> Tensor | None:
    """
    Return the usual formula, in one large tensor.

    Memory is planned by torch's, which takes more.
    """
    loc, scale = fn.loc, fn.scale  # type: ignore[attr-defined]
    if not any(map(is_mapped, (value, loc, scale))):
        return None
    return elementwise(_normal_of, value, loc, scale)


def _normal_of(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    square = (value - loc).square_()
    constant = scale.log().add_(HALF_LOG_2_PI).neg_()
    return torch.addcmul(constant, square, scale.pow(-2), value=-0.5)
