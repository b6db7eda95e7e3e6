# SPDX-License-Identifier: Apache-2.0
"""How sure the log evidence is, by the spread of the replicates."""

import math

from torch import Tensor

# A standard error of the log evidence, in nats: a factor of 1.6 either way.
LARGE_ERROR = 0.5
# Of fewer replicates, the spread is known to a quarter or worse, and usually too small.
FEW_REPLICATES = 8
# With a replicate that has this share of the evidence, the spread is that of a single number.
HEAVY_REPLICATE = 0.5
ALIKE = "More particles, or particles nearer to the posterior, make replicates alike."


def evidence_error(log_evidences: Tensor) -> float:
    """
    Return the standard error of the log of the mean evidence of several replicates.

    By the delta method: that of the mean evidence, relative to it. It is 1 at most, where one
    replicate has all of the evidence, whatever the others are.

    :param log_evidences: ``(replicates,)``; -inf is an evidence of zero.
    """
    number = len(log_evidences)
    ratios = (log_evidences - log_evidences.logsumexp(0)).exp() * number  # of mean one
    return float(ratios.std()) / math.sqrt(number)


def spread_above(log_evidences: Tensor) -> float:
    """
    Return the standard deviation of normal log evidences, from those not below the median.

    Those far below it are of replicates that missed something, and say nothing of how high the
    evidence may be.
    """
    middle = log_evidences.quantile(0.5)
    return float((log_evidences[log_evidences >= middle] - middle).square().mean().sqrt())


def lacking(log_evidences: Tensor) -> float:
    """
    Return by how many nats the log of the mean evidence is too low if the logs are normal.

    The mean of a log-normal number is half the variance of its log above the median of that. The
    mean of a few such numbers is near the highest of them, and far below where they vary much.
    """
    mean = float(log_evidences.logsumexp(0)) - math.log(len(log_evidences))
    return float(log_evidences.quantile(0.5)) + spread_above(log_evidences) ** 2 / 2 - mean


def of_one(log_evidences: Tensor) -> str:
    """Say what the evidence is worth where one replicate has most of it; "" where none has."""
    number, share = len(log_evidences), float(log_evidences.softmax(0).max())
    if number < 3 or share <= HEAVY_REPLICATE:
        return ""
    text = (
        f"One replicate has {100 * share:.0f} % of the evidence of all {number}, so the spread is "
        "that of one number: however unsure it is, its standard error is 1 nat at most."
    )
    known = log_evidences[log_evidences > -math.inf].double()
    if len(known) >= FEW_REPLICATES and lacking(known) > LARGE_ERROR:
        text += (
            f" The log evidences have a standard deviation of {spread_above(known):.1f} nats. If "
            "they are normal, as sums over many plate elements nearly are, the log evidence is "
            f"some {lacking(known):.2g} nats too low."
        )
    return text
