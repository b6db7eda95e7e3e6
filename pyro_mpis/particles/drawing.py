# SPDX-License-Identifier: Apache-2.0
"""Draw the particles: K of every random site, by one mapped run of guide and model."""

from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_mpis._typing import SampleMessage
from pyro_mpis.programs.mapped import Mapped, is_mapped, log_prob_of, tensors_of
from pyro_mpis.programs.masks import unmasked
from pyro_mpis.programs.messages import drawn_from
from pyro_mpis.programs.runs import Collect, OtherSitesError, Programs, Wanted, draw
from pyro_mpis.programs.structure import Site, Structure


@dataclass(frozen=True)
class Draw:
    """The particles of one random site."""

    value: Tensor  # (K, *shape), the shape of an ordinary run
    log_prob: Tensor  # (K, *batch shape): the density that each was drawn with
    reads_particles: bool  # whether the proposal differs between particles
    support: Tensor | None = None  # (values, *shape), of a site that is to be summed over it


@dataclass(frozen=True)
class Drawn:
    """K particles of every random site, before they are weighed."""

    num_samples: int
    draws: Mapping[str, Draw]


def draw_particles(structure: Structure, programs: Programs, num_samples: int) -> Drawn:
    """
    Draw K particles of every random site; draws random numbers.

    :raises NotMappableError: if torch cannot map the programs.
    """
    from_guide = _from_guide(structure)
    supports: dict[str, Tensor | None] = {}
    with pyro.validation_enabled(False):
        said_by_guide, said_by_model = draw(
            programs,
            num_samples,
            guide=Wanted(
                {name: _collecting(structure.guide[name], supports) for name in from_guide},
                frozenset(structure.guide),
            ),
            model=Wanted(
                {
                    name: _collecting(structure.model[name], supports)
                    for name, origin in structure.origins.items()
                    if origin == "prior" or (origin == "enumerated" and name not in from_guide)
                }
            ),
            shapes=structure.latent_shapes,
        )
    draws = {}
    for name, said in (said_by_guide | said_by_model).items():
        site = structure.guide[name] if name in said_by_guide else structure.model[name]
        draws[name] = Draw(
            value=_of_particles(said["value"], site.shape, num_samples),
            log_prob=_of_particles(said["log_prob"], site.batch_shape, num_samples),
            reads_particles="reads" in said,
            support=supports[name],
        )
    return Drawn(num_samples, draws)


def _from_guide(structure: Structure) -> list[str]:
    """Return the random sites that the guide draws, those without an index of their own too."""
    return [
        name
        for name in structure.guide
        if name not in structure.guide_factors
        and name not in structure.carried
        and (name in structure.origins or name not in structure.model)
    ]


def _collecting(site: Site, supports: dict[str, Tensor | None]) -> Collect:
    """Return what to keep of a site: value, density, and ``reads`` if its proposal reads sites."""

    def collect(message: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fn, value = unmasked(message["fn"]), message["value"]
        if value.shape != site.shape:
            raise OtherSitesError(
                f"site '{site.name}' has shape {tuple(value.shape)}, and {tuple(site.shape)} in "
                "another run"
            )
        supports[site.name] = _support(site, message)
        result = {"value": value, "log_prob": drawn_from(message, log_prob_of(fn, value))}
        if not isinstance(fn, torch.distributions.Distribution) or any(
            map(is_mapped, tensors_of(fn))
        ):
            result["reads"] = value.new_zeros(())
        return result

    return collect


def _of_particles(mapped: Mapped, shape: torch.Size, num_samples: int) -> Tensor:
    """Return ``(K, *shape)``."""
    tensor = mapped.tensor if mapped.levels else mapped.tensor.unsqueeze(0)
    missing = len(shape) - (tensor.dim() - 1)
    tensor = tensor.reshape((len(tensor), *(1,) * missing, *tensor.shape[1:]))
    return tensor.expand((num_samples, *shape))


def _support(site: Site, message: SampleMessage) -> Tensor | None:
    """Return all values that a site can take, one of each for all plate elements."""
    fn = message["fn"]
    if not getattr(fn, "has_enumerate_support", False):
        return None
    try:
        support = fn.enumerate_support(expand=False)
    except (NotImplementedError, RuntimeError):  # as of a Binomial of several totals
        return None
    if is_mapped(support):
        return None
    ones = (1,) * len(site.batch_shape)
    event = site.shape[len(ones) :]
    return support.reshape((len(support), *ones, *event)).expand((len(support), *site.shape))
