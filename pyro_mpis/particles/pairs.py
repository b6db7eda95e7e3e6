# SPDX-License-Identifier: Apache-2.0
"""
Densities of proposals at pairs of particles: at particle k, given all else at particle j.

As many particles k are taken at once as fit into memory.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import pyro
import torch
from torch import Tensor

from pyro_mpis._typing import SampleMessage
from pyro_mpis.particles.drawing import Drawn
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.masks import unmasked
from pyro_mpis.programs.messages import drawn_from
from pyro_mpis.programs.meter import Meter
from pyro_mpis.programs.runs import Programs, Wanted, evaluate
from pyro_mpis.programs.structure import Structure
from pyro_mpis.programs.tensors import Mapped, vmap_alone

MIXTURE_ELEMENTS = 2**24  # densities of pairs of particles that are held at once
HIDDEN_IN_PAIRS = 32  # what evaluating them may take besides, in tensors of their size
JOINTS = 2  # copies of them that adding them up over a group and over particles takes


def rows_at_once(
    structure: Structure,
    programs: Programs,
    drawn: Drawn,
    names: list[str],
    together: list[str],
    numbers: tuple[int, int],
    memory_limit: int | None,
    *,
    validate: bool,
) -> int:
    """
    Return for how many particles k to evaluate the densities given all particles j at once.

    Where these may come near the limit, they are evaluated at one particle k first, to see what
    that allocates. It makes no difference to what is computed.

    :param numbers: of particles k, and of draws j.
    """
    num_samples, num_draws = numbers
    elements = [structure.elements(structure.proposal_site(name)) for name in names]
    size = max(1, MIXTURE_ELEMENTS // (num_draws * max(elements)))
    size = min(size, num_samples)
    bytes_of_row = num_draws * sum(elements) * torch.double.itemsize
    if memory_limit is None or size * bytes_of_row * HIDDEN_IN_PAIRS <= memory_limit:
        return size
    meter = Meter(num_levels=2)
    with meter, vmap_alone():
        few = {name: replace(draw, value=draw.value[:1]) for name, draw in drawn.draws.items()}
        log_probs_of_pairs(
            structure,
            programs,
            Drawn(few, kept={}),
            names,
            together,
            slice(0, 1),
            1,
            validate=validate,
        )
    meter.finish()

    def held(rows: int) -> int:
        """Return the most bytes held with a number of rows."""
        sizes = rows, num_draws
        return max(
            sum(n * math.prod(sizes[level] for level in levels) for levels, n in moment.items())
            + JOINTS * sum(elements) * rows * num_draws * torch.double.itemsize
            for _, moment in meter.moments
        )

    while size > 1 and held(size) > memory_limit:
        size = math.ceil(size / 2)
    return size


def log_probs_of_pairs(
    structure: Structure,
    programs: Programs,
    drawn: Drawn,
    names: list[str],
    together: list[str],
    rows: slice,
    num_draws: int,
    *,
    validate: bool,
) -> dict[str, Tensor]:
    """
    Evaluate the proposals of some sites at particle k, given all other sites at draw j.

    :param together: those of them that are at particle k for the others too: members of a group.
    :param rows: the particles k.
    :param num_draws: the number of draws j.
    :return: ``(rows, draws or 1, *batch shape)``.
    """
    candidates = {name: drawn.particles(structure, name).value[rows] for name in names}
    others = {n: draw.value[:num_draws] for n, draw in drawn.draws.items() if n not in together}
    prefix = "" if together else "candidate "  # candidates are not what the programs read
    levels = [{prefix + name: value for name, value in candidates.items()}]
    if others:
        levels.append(others)
    from_guide = [n for n in names if structure.proposal_site(n) is structure.guide.get(n)]
    from_model = [name for name in names if name not in from_guide]
    said = _evaluate_at(
        structure, programs, levels, from_guide, from_model, prefix, validate=validate
    )
    result = {}
    for name in names:
        tensor = said[name]["log_prob"].along(0, 1)
        site = structure.proposal_site(name)
        lead = (len(candidates[name]), tensor.shape[1])
        result[name] = tensor.expand((*lead, *site.batch_shape))
    return result


def _evaluate_at(
    structure: Structure,
    programs: Programs,
    levels: list[dict[str, Tensor]],
    from_guide: list[str],
    from_model: list[str],
    prefix: str,
    *,
    validate: bool,
) -> dict[str, dict[str, Mapped]]:
    """Evaluate proposals, each at its candidate, where programs read the values of other levels."""

    def collect(site: SampleMessage, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        value = values[prefix + site["name"]]
        checked = validate and structure.proposal_site(site["name"]).checked
        density = density_of(unmasked(site["fn"]), value, validate=checked)
        return {"log_prob": drawn_from(site, density)}

    needs_carried = bool(from_model and structure.carried)
    guide = Wanted(
        dict.fromkeys(from_guide, collect),
        frozenset(structure.guide) if needs_carried else frozenset(),
    )
    with pyro.validation_enabled(False):  # pairs of particles may be outside of supports
        said_by_guide, said_by_model = evaluate(
            programs,
            levels,
            guide=guide if from_guide or needs_carried else None,
            model=Wanted(dict.fromkeys(from_model, collect)) if from_model else None,
            shapes=structure.latent_shapes,
        )
    return said_by_guide | said_by_model
