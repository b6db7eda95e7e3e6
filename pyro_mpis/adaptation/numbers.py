# SPDX-License-Identifier: Apache-2.0
"""
Numbers of particles of a learned guide, by the latents that a user knows.

The particle indices are those of its noise, one of each block of latents, and of the sites that
choose an image and a mode: of these there are as many particles as images and modes.
"""

from collections.abc import Mapping

from pyro_mpis._typing import NumSamples, Program
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.programs.numbers import different_numbers

Numbers = Mapping[str | None, int]  # by site; None stands for all others


def by_latent(guide: AutoPlateNormal, numbers: Numbers) -> dict[str | None, int]:
    """Return numbers by the latents of the guide, in place of its own sites."""
    latents = _latents(guide)
    choices = guide.choices(is_final=True)
    result: dict[str | None, int] = {}
    for name, number in numbers.items():
        if name not in choices:
            result.update(dict.fromkeys(latents.get(name, (name,)), number))
    return result


def by_own_site(guide: Program | None, given: NumSamples | None) -> Numbers:
    """
    Return numbers by the sites that a learned guide draws, in place of its latents.

    :param guide: another program than a learned guide changes nothing.
    :param given: a single number is that of all.
    :raises ValueError: if latents of one noise have different numbers.
    """
    if given is None:
        return {}
    if isinstance(given, int):
        return {None: given}
    result: dict[str | None, int] = {name: number for name, number in given.items()}
    if not isinstance(guide, AutoPlateNormal):
        return result
    for own, latents in _latents(guide).items():
        named = {name: result.pop(name) for name in latents if name in result}
        if not named:
            continue
        if len(set(named.values())) > 1:
            raise different_numbers(named)
        result[own] = next(iter(named.values()))
        for site, number in guide.choices(is_final=True).items():
            result.setdefault(site, number)
    return result


def _latents(guide: AutoPlateNormal) -> dict[str | None, tuple[str, ...]]:
    """Return the latents that are computed from each noise site."""
    return {
        own: tuple(part.name for part in block.parts)
        for own, block in zip(guide.noise_sites, guide.blocks, strict=True)
    }
