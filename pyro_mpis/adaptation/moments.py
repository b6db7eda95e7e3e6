# SPDX-License-Identifier: Apache-2.0
"""
Learn without gradients: match a Gaussian for each latent to the moments that trial runs find.

Weights of few particles are flattened until their ESS is a third of their number (Koblents and
Miguez 2015), so that a proposal far off moves in steps. Moments of few particles are too narrow,
more so at each step, and no ESS shows it; so variances are corrected, the last steps take more
particles, and widen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.start import Start
from pyro_mpis.adaptation.trials import Runs, Trial, with_numbers
from pyro_mpis.options import Options
from pyro_mpis.planning import Plan, plan_of

SMALLEST_SHARE = 0.3  # of the particles, that the ESS of flattened weights is to have
SMALLEST_FACTOR = 0.05  # of a variance, in one step
LAST_WIDTH = 1.2  # of the final sds


@dataclass(frozen=True)
class Stage:
    """Some steps with the same settings."""

    steps: int
    particles: int
    damping: float
    widening: float
    may_end: bool  # before that many steps, where the evidence does not rise any more


LAST_STAGE = Stage(8, 8, 0.4, 1.3, False)
STAGES = (Stage(40, 6, 0.5, 1.0, True), LAST_STAGE)
ANEW = (Stage(12, 6, 0.5, 1.0, True), LAST_STAGE)  # from where another mode may be
WINDOW = 6  # steps whose mean log evidences are compared
FINAL_PARTICLES = 8

Tell = Callable[[Trial], None]


def matched_by_moments(
    start: Start,
    options: Options,
    tell: Tell,
    stages: Sequence[Stage] = STAGES,
    places: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> tuple[AutoPlateNormal, Plan]:
    """
    Learn a Gaussian for each latent; draws random numbers.

    :param start: with a block for each latent, or for some together.
    :param places: means and sds of each block's numbers to start from, in place of the prior's.
    :return: the guide, and a plan of runs of it.
    """
    medians, sds = start.moments(frozenset())
    if places is not None:
        medians, sds = [mean for mean, _ in places], [sd for _, sd in places]
    gaussian = Gaussian(medians, [torch.diag_embed(sd) for sd in sds], {})
    guide = start.guide(gaussian, frozenset(), tails=False)
    for stage in stages:
        runs = Runs(_planned(start, guide, options, stage.particles))
        log_evidences: list[float] = []
        for _ in range(stage.steps):
            log_p, parts = runs(guide)
            if parts is None:
                continue
            log_evidences.append(float(log_p))
            if stage.may_end and _settled(log_evidences):
                break
            guide = _moved(guide, parts, stage)
            tell(Trial(log_p.reshape(1), {}, 1 / parts[0][0].square().sum(0).flatten()))
    gaussian = guide.gaussian()
    wide = replace(gaussian, scales=[LAST_WIDTH * scale for scale in gaussian.scales])
    guide = guide.with_gaussian(wide)
    return guide, _planned(start, guide, options, FINAL_PARTICLES)


def _settled(log_evidences: Sequence[float]) -> bool:
    """Whether the log evidence does not rise any more."""
    now, before = log_evidences[-WINDOW:], log_evidences[-2 * WINDOW : -WINDOW]
    return len(before) == WINDOW and sum(now) < sum(before) + WINDOW * 0.5


def _planned(start: Start, guide: AutoPlateNormal, options: Options, particles: int) -> Plan:
    """Plan runs with a number of particles for each latent; draws random numbers."""
    numbers = dict.fromkeys(guide.noise_sites, particles)
    programs = replace(start.programs, guide=guide)
    return plan_of(programs, with_numbers(options, numbers))[0]


def _moved(
    guide: AutoPlateNormal, parts: Sequence[tuple[Tensor, Tensor]], stage: Stage
) -> AutoPlateNormal:
    """
    Take a step towards the moments of flattened weights.

    :param parts: weights and noise of each block: ``(K, *batch dims)``, ``(K, *batch dims, D)``.
    """
    gaussian = guide.gaussian()
    means, scales = [], []
    damping = stage.damping
    for (weight, noise), mean, scale in zip(parts, gaussian.means, gaussian.scales, strict=True):
        flat = flattened(weight)
        ess = (1 / flat.square().sum(0)).unsqueeze(-1)
        flat = flat.unsqueeze(-1)
        shift = (flat * noise).sum(0)
        variance = (flat * (noise - shift).square()).sum(0) * ess / (ess - 1)
        factor = (1 - damping) + damping * (
            stage.widening * variance + (1 - damping) * shift.square()
        )
        sd = scale.diagonal(dim1=-2, dim2=-1)
        means.append(mean + damping * sd * shift.to(mean))
        scales.append(torch.diag_embed(sd * factor.clamp(min=SMALLEST_FACTOR).sqrt().to(sd)))
    return guide.with_gaussian(replace(gaussian, means=means, scales=scales))


def flattened(weight: Tensor) -> Tensor:
    """
    Raise weights to the largest power up to one with which their ESS is large enough.

    :param weight: ``(K, *batch dims)``, summing to one over K.
    """
    goal = SMALLEST_SHARE * len(weight)
    log_weight = weight.clamp(min=1e-300).log()
    low, high = torch.zeros_like(weight[0]), torch.ones_like(weight[0])
    power = high
    for _ in range(20):
        flat = (power * log_weight).softmax(0)
        enough = 1 / flat.square().sum(0) >= goal
        low, high = torch.where(enough, power, low), torch.where(enough, high, power)
        power = 0.5 * (low + high)
    whole = log_weight.softmax(0)
    enough = 1 / whole.square().sum(0) >= goal
    return torch.where(enough, whole, (low * log_weight).softmax(0))
