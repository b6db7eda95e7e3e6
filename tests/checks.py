# SPDX-License-Identifier: Apache-2.0
"""
What the tests demand of a result, in one place for right and for wrong programs.

Each function raises an ``AssertionError`` for a wrong result.
"""

from collections.abc import Mapping
from statistics import NormalDist

import torch
from oracles import BruteForce
from torch import Tensor

RELATIVE_ERROR = 1e-5
FALSE_ALARM = 1e-6
SMALLEST_COUNT = 20.0  # joint values expected less often are counted together


def check_evidence(log_evidence: Tensor, exact: BruteForce) -> None:
    """The evidence is the sum over all choices to ``RELATIVE_ERROR``."""
    assert log_evidence.shape == ()
    error = float((log_evidence - exact.log_evidence).abs())
    assert error < RELATIVE_ERROR, f"relative error {error:.1g}"  # NaN is an error too


def check_weights(log_weights: Tensor, exact: BruteForce, *sites: str) -> None:
    """The marginal weights of one site, or the joint ones of several, are those of (25)."""
    expected = exact.weights(*sites)
    torch.testing.assert_close(log_weights.exp(), expected, rtol=RELATIVE_ERROR, atol=1e-12)


def check_moment(moment: Tensor, expected: Tensor) -> None:
    """A moment has the exact shape and value."""
    torch.testing.assert_close(moment, expected, rtol=RELATIVE_ERROR, atol=1e-8)


def check_samples(
    samples: Mapping[str, Tensor], exact: BruteForce, false_alarm: float = FALSE_ALARM
) -> None:
    """
    Joint samples have the frequencies of (25): a chi-square test over all joint values.

    Rejects a correct program with probability ``false_alarm``.
    """
    check_frequencies(*exact.frequencies(samples), false_alarm)


def check_frequencies(counts: Tensor, probs: Tensor, false_alarm: float = FALSE_ALARM) -> None:
    """Counts of independent draws follow probabilities: a chi-square test."""
    num_samples = int(counts.sum())
    assert not counts[probs < 1e-12 / num_samples].any(), "a sample of probability zero"
    bins = [(0.0, 0)]
    for i in probs.argsort(stable=True).tolist():  # by expectation alone, whatever was drawn
        if bins[-1][0] >= SMALLEST_COUNT:
            bins.append((0.0, 0))
        expected, count = bins[-1]
        bins[-1] = (expected + float(probs[i]) * num_samples, count + int(counts[i]))
    statistic = sum((count - expected) ** 2 / expected for expected, count in bins)
    freedom = max(len(bins) - 1, 1)
    arguments = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    p_value = float(torch.special.gammaincc(*arguments))
    assert p_value > false_alarm, f"chi-square {statistic:.1f}, {freedom} degrees of freedom"


def check_mean(draws: Tensor, expected: float, false_alarm: float = FALSE_ALARM) -> None:
    """
    z-test of a mean; rejects a correct program with probability ``false_alarm``.

    Draws that are all equal have to be exact.
    """
    assert torch.isfinite(draws).all()
    if draws.std() < 1e-10 * abs(expected):
        assert abs(float(draws.mean()) / expected - 1) < 1e-9
        return
    z = float((draws.mean() - expected) / (draws.std() / len(draws) ** 0.5))
    limit = NormalDist().inv_cdf(1 - false_alarm / 2)
    assert abs(z) < limit, f"z = {z:.1f}, limit {limit:.1f}, n = {len(draws)}"


def check_exact_mean(mean: float, expected: float) -> None:
    """A mean over all outcomes, each counted with its probability."""
    error = abs(mean / expected - 1)
    assert error < 1e-12, f"relative error {error:.1g}"
