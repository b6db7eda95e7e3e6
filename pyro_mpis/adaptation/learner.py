# SPDX-License-Identifier: Apache-2.0
"""
Fit a plate-structured Gaussian to a model: which latents are centred, which blocks are coupled.

A latent whose data say more than its prior is centred, others are standardised by their prior's
location and scale; a first fit with all of them standardised tells which.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.log_joint import LogJoint, Pair
from pyro_mpis.adaptation.natural import Fitted, Settings, fit
from pyro_mpis.adaptation.start import Start

CENTRED_BELOW = 0.35  # posterior variance given the latents around, in units of the prior's
UNCOUPLED_ABOVE = 0.5
FIRST_LOOK = Settings(points=4, at_most=35, tail=8)
ANEW = Settings(at_least=8, at_most=40, tail=8)  # from where another mode may be
SHRUNK = 1e-3  # of the sd that a fit starts from, below which it has found no mode

Tell = Callable[[float], None]


def learnt(start: Start, settings: Settings, tell: Tell) -> tuple[Fitted, frozenset[str]]:
    """
    Fit a Gaussian, and choose which latents are centred; draws random numbers.

    :return: the fit, and the latents that are not centred.
    """
    scalable = start.can_be_non_centred()
    pairs = [(b.number, around) for b in start.blocks for around in b.parents]
    if not scalable:
        return _fitted_twice(start, scalable, pairs, settings, tell), scalable
    first = _fitted(start, scalable, pairs, FIRST_LOOK, tell)
    ratios = variance_ratios(start, first)
    non_centred = frozenset(name for name in scalable if ratios[name] >= CENTRED_BELOW)
    coupled = []
    for block, around in pairs:
        names = {part.name for part in start.blocks[block].parts}
        ruled = names <= non_centred and all(ratios[name] > UNCOUPLED_ABOVE for name in names)
        if not ruled:
            coupled.append((block, around))
    same = non_centred == scalable and math.isfinite(first.elbo)
    last = _fitted_twice(
        start, non_centred, coupled, settings, tell, resumed=first if same else None
    )
    if _is_better(first, last):
        return _fitted(start, scalable, pairs, settings, tell), scalable
    return last, non_centred


def _is_better(first: Fitted, last: Fitted) -> bool:
    """Whether a first look found a higher ELBO than the fit that came of it."""
    if not math.isfinite(last.elbo):
        return True
    return first.settled and first.elbo > last.elbo + 1 + 3 * (first.error + last.error)


def refitted(
    start: Start,
    places: Sequence[tuple[Tensor, Tensor]],
    non_centred: frozenset[str],
    coupled: Sequence[Pair],
    points: int,
    tell: Tell,
) -> Gaussian | None:
    """
    Fit from where another mode may be; draws random numbers.

    :param places: means and sds of each block's numbers to start from.
    :return: None if the density cannot be evaluated there, or where the fit shrinks to a point.
    """
    fitted = fit(
        start.blocks,
        _log_joint(start, non_centred, coupled).derivatives,
        [mean for mean, _ in places],
        [sd for _, sd in places],
        start.widths(non_centred),
        coupled,
        replace(ANEW, points=points),
        tell,
        scales=(1.0, 0.3),
    )
    pairs = zip(fitted.gaussian.sds(), places, strict=True)
    has_shrunk = any(bool((sd < SHRUNK * at_start).any()) for sd, (_, at_start) in pairs)
    return fitted.gaussian if math.isfinite(fitted.elbo) and not has_shrunk else None


def variance_ratios(start: Start, fitted: Fitted) -> dict[str, float]:
    """
    Return each latent's posterior variance given the blocks around it, in units of the prior's.

    :param fitted: of latents that are all standardised where they can be.
    """
    _, prior_sds = start.moments(start.can_be_non_centred())
    result = {}
    for block, sd, prior_sd in zip(start.blocks, fitted.gaussian.sds(), prior_sds, strict=True):
        ratio = (sd / prior_sd).square()
        for part in block.parts:
            result[part.name] = float(ratio[..., part.start : part.stop].mean())
    return result


def _fitted_twice(
    start: Start,
    non_centred: frozenset[str],
    coupled: list[Pair],
    settings: Settings,
    tell: Tell,
    resumed: Fitted | None = None,
) -> Fitted:
    """Fit, and once more with other noise where that does not settle."""
    fitted = _fitted(start, non_centred, coupled, settings, tell, resumed)
    if fitted.settled:
        return fitted
    again = _fitted(start, non_centred, coupled, settings, tell)
    return again if again.settled or again.elbo > fitted.elbo else fitted


def _fitted(
    start: Start,
    non_centred: frozenset[str],
    coupled: list[Pair],
    settings: Settings,
    tell: Tell,
    resumed: Fitted | None = None,
) -> Fitted:
    medians, sds = start.moments(non_centred)
    return fit(
        start.blocks,
        _log_joint(start, non_centred, coupled).derivatives,
        medians,
        sds,
        start.widths(non_centred),
        coupled,
        settings,
        tell,
        resumed,
    )


def _log_joint(start: Start, non_centred: frozenset[str], coupled: Sequence[Pair]) -> LogJoint:
    return LogJoint(
        start.programs,
        start.structure,
        start.blocks,
        non_centred,
        start.supports,
        start.others,
        frozenset(coupled),
    )
