# SPDX-License-Identifier: Apache-2.0
"""
Random programs: the evidence is that of ``pyro.infer.Importance``, up to the errors of both.

Both are unbiased, so the means over many replicates of ours and over many samples of theirs differ
by no more than their standard errors explain. The programs have no masks and scales, which count
in another way there, and are proposed from the prior: ``Importance`` does not count the density of
latents that a guide leaves out.
"""

import math
import warnings
from itertools import count, islice
from statistics import NormalDist

import pyro
import pytest
import torch
from generated import generate
from pyro.infer import Importance
from random_parts import Generated
from torch import Tensor

from pyro_mpis import MPImportance

pytestmark = pytest.mark.usefixtures("float64")

FALSE_ALARM = 1e-9  # of one program, where its means are normal: they are a little skewed
ERROR = 0.05  # a program is compared if both relative errors are below
WRONG = math.log(1.8)
EVERY_DAY, NUMBER = (2,), 63  # seeds; how many are tried in all


def suitable() -> list[int]:
    """Seeds of programs without masks, scales and branches."""

    def is_suitable(seed: int) -> bool:
        program = generate(seed, max_combinations=90)
        hidden = any(word in program.source for word in ("mask(", "scale("))
        return not hidden and not program.branches

    return list(islice(filter(is_suitable, count()), NUMBER))


def mean_of(log_weights: Tensor) -> tuple[float, float]:
    """Return the log of the mean weight, and its relative standard error."""
    log_mean = log_weights.logsumexp(0) - math.log(len(log_weights))
    ratios = (log_weights - log_mean).exp()
    return float(log_mean), float(ratios.std()) / len(ratios) ** 0.5


def ours(program: Generated, replicates: int) -> tuple[float, float]:
    model, _ = program.programs()
    posterior = MPImportance(model, None, 4, num_replicates=replicates).run()
    return mean_of(posterior._replicates())


def theirs(program: Generated, number: int) -> tuple[float, float]:
    model, _ = program.programs()
    importance = Importance(model, num_samples=number).run()
    return mean_of(torch.stack([torch.as_tensor(weight) for weight in importance.log_weights]))


def agree(one: tuple[float, float], other: tuple[float, float], wrong: float = 0.0) -> bool:
    """Whether the difference of two logs of means is within what their errors explain."""
    limit = NormalDist().inv_cdf(1 - FALSE_ALARM / 2)
    return abs(one[0] + wrong - other[0]) < limit * math.hypot(one[1], other[1])


@pytest.mark.parametrize(
    "seed",
    [
        seed
        if seed in EVERY_DAY
        else pytest.param(seed, marks=(pytest.mark.slow, pytest.mark.timeout(1_800)))
        for seed in suitable()
    ],
)
def test_evidence_is_that_of_importance(seed: int) -> None:
    program = generate(seed, max_combinations=90)
    print(program.source)
    pyro.set_rng_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, samples = ours(program, 60), 500
        known = theirs(program, samples)
        while max(known[1], found[1]) > ERROR and samples < 8_000:
            samples *= 4
            found, known = ours(program, samples // 20), theirs(program, samples)
    if max(found[1], known[1]) > ERROR:
        pytest.skip("the weights are too uneven")
    assert agree(found, known)
    assert not agree(found, known, WRONG)
    assert not agree(found, known, -WRONG)
