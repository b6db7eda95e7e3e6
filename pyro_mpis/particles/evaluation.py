# SPDX-License-Identifier: Apache-2.0
"""
What the programs say at all particles: one mapped run, with indices on levels.

The densities and values come out in the dims of the levels that they were computed from
(:func:`pyro_mpis.programs.runs.evaluate`), so that each says by itself what it reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyro
import torch
from pyro.distributions.util import is_identically_one
from torch import Tensor

from pyro_mpis._typing import Ordinal, SampleMessage
from pyro_mpis.programs.densities import density_of, zero_unless_finite
from pyro_mpis.programs.masks import is_masked, unmasked
from pyro_mpis.programs.messages import counted, drawn_from
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.runs import Collect, Programs, Wanted, evaluate
from pyro_mpis.programs.structure import Site, Structure, levels_of
from pyro_mpis.programs.tensors import Mapped, Said

MAX_LEVELS = 60  # of a mapped run: a torch tensor has 64 dims


class MissedReadError(Exception):
    """A site reads indices that the plain run did not see it read."""


@dataclass(frozen=True)
class Evaluated:
    """What guide and model said of their sites, and which indices were on which level."""

    guide: Said
    model: Said
    levels: Sequence[Sequence[str]]  # symbols of the indices on each level

    def symbols(self, name: str, mapped: Mapped, expected: Ordinal) -> str:
        """
        Return the indices of a result's levels.

        :raises MissedReadError: if it reads a level of which none was expected.
        """
        result = ""
        for number in mapped.levels:
            level = self.levels[number]
            read = level if len(level) == 1 else [s for s in level if s in expected]
            if len(read) != 1 or read[0] not in expected:
                raise MissedReadError(name)
            result += read[0]
        return result


def evaluate_programs(
    structure: Structure,
    values: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    programs: Programs,
    *,
    validate: bool,
    carried: Said | None = None,
) -> Evaluated:
    """
    Run guide and model once, with every index on a level.

    :param values: of the sites of all indices: ``(size, *shape)``.
    :param sizes: of the indices, by symbol.
    :param validate: whether to look at supports and arguments.
    :param carried: values and densities of all sites that the guide carries, each at the particles
        of the one index that it reads, if these are known: the guide is not run then.
    :raises NotMappableError: if torch cannot map the programs.
    """
    levels = levels_of(structure, sizes)
    by_level = [
        {name: values[name] for s in level for name in structure.by_symbol[s].sites}
        for level in levels
    ]
    known: Said = {}
    for name, said in (carried or {}).items():
        (symbol,) = structure.indices_read(structure.guide[name])
        number = next(n for n, level in enumerate(levels) if symbol in level)
        by_level[number][name] = said["value"].of_each(sizes[symbol])
        log_prob = said["log_prob"]
        known[name] = {"log_prob": replace(log_prob, levels=(number,) * len(log_prob.levels))}
    with pyro.validation_enabled(False):
        said_by_guide, said_by_model = evaluate(
            programs,
            by_level,
            guide=None if carried else wanted_of_guide(structure, validate=validate),
            model=wanted_of_model(structure, validate=validate, nan_is_zero=programs.is_learned),
            shapes=structure.latent_shapes,
        )
    return Evaluated(known or said_by_guide, said_by_model, levels)


def carried_by_one(structure: Structure, *, validate: bool) -> Mapping[str, Collect]:
    """
    Return what to keep of carried sites when they are drawn, so that the guide need not run again.

    That is so where each reads particles of one index, as those of most autoguides do.

    :return: empty if there are others, or factors of the guide.
    """
    for name in structure.carried:
        indices = structure.indices_read(structure.guide[name])
        if len(indices) != 1 or any(structure.by_symbol[s].enumerated for s in indices):
            return {}
        if any(i.num_samples != structure.num_draws[i.symbol] for i in structure.indices):
            return {}  # not every draw is a particle
    wanted = wanted_of_guide(structure, validate=validate)
    if wanted is None or structure.guide_factors:
        return {}

    def keeping(collect: Collect) -> Collect:
        return lambda site, values: {"value": site["value"], **collect(site, values)}

    return {name: keeping(collect) for name, collect in wanted.collect.items()}


def wanted_of_guide(structure: Structure, *, validate: bool) -> Wanted | None:
    """Return what the guide is to say: the densities of sites that it computes from others."""
    names = [*structure.guide_factors, *structure.carried]

    def collect(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        checked = validate and structure.guide[site["name"]].checked
        density = density_of(unmasked(site["fn"]), site["value"], validate=checked)
        return {"log_prob": drawn_from(site, density)}

    if not names:
        return None
    return Wanted(dict.fromkeys(names, collect), frozenset(structure.guide))


def wanted_of_model(structure: Structure, *, validate: bool, nan_is_zero: bool = False) -> Wanted:
    """
    Return what the model is to say: the densities of its sites, the values of its latents.

    :param nan_is_zero: whether a density that is nan or infinite counts as zero.
    """

    def collecting(name: str) -> Collect:
        dims = structure.summed_dims(structure.model[name])
        has_density = not structure.model[name].silent
        has_density &= structure.origins.get(name) != "model_delta"
        has_value = name in structure.origins
        is_prior = structure.origins.get(name) == "prior"
        checked = validate and structure.model[name].checked

        def collect(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
            result = {"value": site["value"]} if has_value else {}
            if has_density:
                fn, value = site["fn"], site["value"]
                density = density_of(fn, value, validate=checked, latent=has_value)
                if nan_is_zero:
                    density = zero_unless_finite(density)
                result["log_prob"] = summed_over(counted(site, density), dims)
                flat = is_masked(site)
                if is_prior and (flat or not is_identically_one(site["scale"])):
                    if flat:
                        density = density_of(unmasked(fn), value, validate=checked)
                    result["drawn_from"] = summed_over(drawn_from(site, density), dims)
            return result

        return collect

    collect = {name: collecting(name) for name in structure.model}
    return Wanted(collect, frozenset(structure.model))


def summed_over(log_prob: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum a site's ``log_prob`` over batch dims that no plate declares, and keep them as ones."""
    for dim in dims:
        if -dim <= log_prob.dim():
            log_prob = log_prob.sum(dim, keepdim=True, dtype=torch.double).to(log_prob.dtype)
    return log_prob


def reads_found(
    structure: Structure, values: Mapping[str, Tensor], programs: Programs
) -> Structure:
    """
    Find what every site reads: one mapped run at two particles, with a level for each index.

    It is for programs whose plain run lost track of what was computed from what.

    :param values: particles of every random site: ``(K, *shape)``.

    :raises NotMappableError: if there are more indices than levels.
    """
    symbols = [index.symbol for index in structure.indices]
    if len(symbols) > MAX_LEVELS:
        raise NotMappableError(
            "what the sites read could not be followed, and there are too many latent sites "
            f"({len(symbols)}) to find it out",
            "compute with torch operations, without TorchScript and without writing in place",
        )
    with pyro.validation_enabled(False):
        said_by_guide, said_by_model = evaluate(
            programs,
            [
                {name: values[name][:2] for name in structure.by_symbol[symbol].sites}
                for symbol in symbols
            ],
            guide=wanted_of_guide(structure, validate=False),
            model=wanted_of_model(structure, validate=False),
            shapes=structure.latent_shapes,
        )

    levels = [structure.by_symbol[symbol].sites for symbol in symbols]
    return with_reads(structure, (said_by_guide, said_by_model), levels)


def with_reads(
    structure: Structure, said: tuple[Said, Said], levels: Sequence[Sequence[str]]
) -> Structure:
    """
    Add to what sites read the levels that they were mapped at.

    :param said: by guide and model.
    :param levels: the random sites on each level, those of one index.
    """

    def reading(sites: Mapping[str, Site], said: Said) -> dict[str, Site]:
        result = dict(sites)
        for name, parts in said.items():
            found = {level for mapped in parts.values() for level in mapped.levels}
            names = {site for number in found for site in levels[number]}
            if not names <= sites[name].reads | {name}:
                reads = sites[name].reads | (names - {name})
                result[name] = replace(sites[name], reads=reads)
        return result

    return replace(
        structure,
        guide=reading(structure.guide, said[0]),
        model=reading(structure.model, said[1]),
    )
