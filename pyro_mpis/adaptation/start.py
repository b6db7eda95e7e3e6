# SPDX-License-Identifier: Apache-2.0
"""
Where a fit starts: the continuous latents of a model, and the median and spread of their prior.

The model runs once plainly (:mod:`pyro_mpis.planning`), and once mapped over draws from the prior.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyro
import torch
from pyro.ops.provenance import detach_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_mpis._typing import Program, SampleMessage
from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.layout import Block, Grouping, blocks_of, by_plates, depth_of
from pyro_mpis.adaptation.parametrisation import is_fixed, is_gaussian, scaling_of
from pyro_mpis.adaptation.prepared import is_improper
from pyro_mpis.particles.drawing import draw_particles
from pyro_mpis.planning import Plan
from pyro_mpis.programs.environment import Environment
from pyro_mpis.programs.messages import is_delta, is_latent, statements
from pyro_mpis.programs.runs import Programs, Wanted, evaluate
from pyro_mpis.programs.structure import Structure
from pyro_mpis.programs.tensors import device_of, is_mapped, tensors_of

PRIOR_DRAWS = 200
UNBOUNDED = 1e4  # times the sd of draws in place of an improper prior's: no bound to a fit's sd
STRETCHES = (0.15, 0.03)  # of the noise in plates, by their depth: many particles, or fewer
SMALLEST_RATIO = 0.5  # of variances: below, weights have none under a wider Gaussian
LARGEST_STRETCHED = 3  # numbers in an element
LARGEST_SD = 5.0  # of the prior, in unconstrained numbers; and its median's largest size


@dataclass(frozen=True)
class Prior:
    """What the prior says of one continuous latent, over draws from it."""

    centred: tuple[Tensor, Tensor]  # median and sd of its unconstrained value, both capped
    width: Tensor  # that sd, not capped
    scale: Tensor | None  # median of the prior's scale given the other latents, if it has one
    is_fixed: bool  # whether its support is the same for all values of the other latents


@dataclass(frozen=True)
class Start:
    """The continuous latents of a model, and what else a fit needs to know of it."""

    programs: Programs
    structure: Structure
    blocks: tuple[Block, ...]
    priors: Mapping[str, Prior]
    supports: Mapping[str, Tensor]  # of the sites to be summed over their support
    others: Mapping[str, Tensor]  # plain values of all other latents
    environment: Environment
    sites: Mapping[str, SampleMessage]  # of a plain run
    fixed_supports: Mapping[str, object]  # of latents, where they are always the same

    @property
    def model(self) -> Program:
        """The model."""
        return self.programs.model

    def blocks_by(self, grouping: Grouping) -> tuple[Block, ...]:
        """Put the continuous latents into blocks."""
        return blocks_of(
            self.structure,
            {name: prior.centred[0].shape for name, prior in self.priors.items()},
            {name: self.sites[name]["value"].dtype for name in self.priors},
            {name: self.sites[name]["cond_indep_stack"] for name in self.priors},
            grouping,
        )

    def guide(
        self, gaussian: Gaussian, non_centred: frozenset[str], *, tails: bool
    ) -> AutoPlateNormal:
        """Make a guide of a Gaussian of the blocks' numbers."""
        medians, sds = self.moments(non_centred)
        stretches = {
            block.number: STRETCHES[min(max(depth_of(block, self.blocks), 1), len(STRETCHES)) - 1]
            for block in self.blocks
            if self._has_tails(block, gaussian, non_centred)
        }
        with torch.no_grad():
            return AutoPlateNormal(
                self.model,
                self.blocks,
                gaussian,
                non_centred=non_centred,
                supports=self.fixed_supports,
                others=self.others,
                tails=tails,
                prior=(medians[0], sds[0]),
                stretches=stretches,
            )

    def _has_tails(self, block: Block, gaussian: Gaussian, non_centred: frozenset[str]) -> bool:
        """
        Whether the numbers of a block in plates may have heavier tails than a Gaussian.

        If a Gaussian prior dominates them in each element, they have not. Blocks of many numbers
        would lose more in the middle than they win in the tails.
        """
        if block.is_outer or block.size > LARGEST_STRETCHED:
            return False
        names = {part.name for part in block.parts}
        if not names <= non_centred or not all(map(self._is_gaussian, names)):
            return True
        return float(gaussian.sds()[block.number].min()) ** 2 < SMALLEST_RATIO

    def _is_gaussian(self, name: str) -> bool:
        """Whether the prior of a latent is Gaussian in its unconstrained numbers."""
        return is_gaussian(self.sites[name]["fn"])

    @property
    def work(self) -> float:
        """Number of densities that derivatives at a point take, times rows of the Hessian."""
        structure = self.structure
        densities = 0
        for site in structure.model.values():
            summed = structure.indices_read(site) & {
                structure.index_of[name].symbol for name in self.supports
            }
            values = (structure.by_symbol[symbol].support or 1 for symbol in summed)
            event_size = max(1, site.event_size)  # that of pyro.factor is none
            site = replace(site, event_size=event_size)
            densities += structure.elements(site) * math.prod(values)
        return densities * sum(block.size for block in self.blocks)

    def can_be_non_centred(self) -> frozenset[str]:
        """Return the latents whose prior has a location or scale computed from other latents."""
        return frozenset(name for name, prior in self.priors.items() if prior.scale is not None)

    def moments(self, non_centred: frozenset[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Return median and sd of the prior of each block's numbers, float64."""
        medians, sds = [], []
        for block in self.blocks:
            of_block = {}
            for part in block.parts:
                median, sd = self.priors[part.name].centred
                if part.name in non_centred:
                    median, sd = torch.zeros_like(median), torch.ones_like(sd)
                of_block[part.name] = median, sd
            medians.append(block.joined({name: m for name, (m, _) in of_block.items()}))
            sds.append(block.joined({name: s for name, (_, s) in of_block.items()}))
        return medians, sds

    def widths(self, non_centred: frozenset[str]) -> list[Tensor]:
        """Return the prior sds of each block's numbers, not capped."""
        result = []
        for block in self.blocks:
            widths = {part.name: self.priors[part.name].width for part in block.parts}
            ones = {n: torch.ones_like(w) for n, w in widths.items() if n in non_centred}
            result.append(block.joined(widths | ones))
        return result


def start_of(plan: Plan, structure: Structure, trace: Trace) -> Start:
    """
    Find the continuous latents of a model, and where their prior is; draws random numbers.

    :param plan: of a run of the model without a guide.
    :param structure: what a run found the structure to be.
    :param trace: of a plain run of the model.
    """
    programs = plan.programs
    sites = {name: site for name, site in statements(trace).items() if is_latent(site)}
    indices = tuple(replace(index, num_samples=PRIOR_DRAWS) for index in structure.indices)
    drawn = draw_particles(replace(structure, indices=indices), programs, stratified=True)
    supports = {}
    for name, index in structure.index_of.items():
        support = drawn.draws[name].support
        if index.enumerated and support is not None:
            supports[name] = support
    free_names = [
        name
        for name, origin in structure.origins.items()
        if origin == "prior" and not is_discrete(sites[name])
    ]
    values = {name: draw.value for name, draw in drawn.draws.items()}
    fixed: set[str] = set()

    def collect(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fn, value = site["fn"], site["value"]
        result = {"free": biject_to(fn.support).inv(value)}
        if is_fixed(fn.support, is_mapped):
            fixed.add(site["name"])
        scaling = scaling_of(fn)
        if scaling is not None and any(map(is_mapped, tensors_of(fn))):
            scale = scaling.scale
            scale = scale.diagonal(dim1=-2, dim2=-1) if scaling.is_matrix else scale
            result["scale"] = scale.expand(result["free"].shape)
        return result

    with pyro.validation_enabled(False):
        _, said = evaluate(
            programs,
            [values],
            model=Wanted(dict.fromkeys(free_names, collect)),
            shapes=structure.latent_shapes,
        )
    priors = {}
    device = device_of(tensors_of([site["value"] for site in statements(trace).values()]))
    reads_discrete = _reading(structure, set(structure.origins) - set(free_names))
    for name in free_names:
        free = said[name]["free"].along(0).to(device)
        scale = None
        if "scale" in said[name] and name not in reads_discrete:
            scale = said[name]["scale"].along(0).to(device).double().median(0).values
        median, width = _median_and_sd(free.double())
        if is_improper(sites[name]["fn"]):
            width = UNBOUNDED * width
        capped = median.clamp(-LARGEST_SD, LARGEST_SD), width.clamp(max=LARGEST_SD)
        priors[name] = Prior(capped, width, scale, name in fixed)
    others = {
        name: detach_provenance(site["value"])
        for name, site in sites.items()
        if name not in priors and not is_delta(site["fn"])
    }
    fixed_supports = {
        name: sites[name]["fn"].support for name, prior in priors.items() if prior.is_fixed
    }
    start = Start(
        programs, structure, (), priors, supports, others, plan.environment, sites, fixed_supports
    )
    return replace(start, blocks=start.blocks_by(by_plates))


def is_discrete(site: SampleMessage) -> bool:
    """Whether a latent has discrete values."""
    support = site["fn"].support
    return support is not None and bool(support.is_discrete)


def _reading(structure: Structure, names: set[str]) -> set[str]:
    """Return the sites that read some of the given ones."""
    return {name for name, site in structure.model.items() if site.reads & names}


def _median_and_sd(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median and half the range of 68 % of draws."""
    low, median, high = draws.quantile(draws.new_tensor([0.16, 0.5, 0.84]), 0)
    return median, (0.5 * (high - low)).clamp(min=1e-6)
