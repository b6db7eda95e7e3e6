# SPDX-License-Identifier: Apache-2.0
"""How even the weights of one site's particles are."""

import math
from dataclasses import dataclass

from torch import Tensor

from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.programs.structure import Structure
from pyro_mpis.results.narrowness import Curvature, curvature_of

# Where weights are nearly even, the tail that k-hat is fitted to is noise. So k-hat counts only
# where the effective sample size is below this share of the particles.
UNEVEN_ESS = 0.5


@dataclass(frozen=True)
class SiteDiagnosis:
    """
    The weights of one site's particles, by plate element.

    :param name: the site.
    :param proposal: what its particles were drawn from: ``"guide"``, ``"learned guide"`` or
        ``"prior"``.
    :param num_particles: number of weights of each element.
    :param ess: effective sample size: ``batch_shape``.
    :param heaviest: share of the weight that the heaviest particle has: ``batch_shape``.
    :param pareto_k: Pareto k-hat, nan with fewer than about 50 particles: ``batch_shape``.
    :param plates: name of the plate of each batch dim, ``""`` for none.
    :param curvature: whether the weights rise towards the outermost particles.
    """

    name: str
    proposal: str
    num_particles: int
    ess: Tensor
    heaviest: Tensor
    pareto_k: Tensor
    plates: tuple[str, ...]
    curvature: Curvature

    @property
    def lowest_ess(self) -> float:
        """The effective sample size of the worst element."""
        return float(self.ess.min())

    @property
    def uneven(self) -> Tensor:
        """Whether the weights of each element are uneven enough for k-hat to say something."""
        return self.ess < UNEVEN_ESS * self.num_particles

    @property
    def worst(self) -> str:
        """The element of the lowest effective sample size, as in ``theta[school=3]``."""
        return self.element(int(self.ess.reshape(-1).argmin()))

    @property
    def highest_k(self) -> float:
        """The highest k-hat of elements with uneven weights; nan where there is none."""
        tails = self.pareto_k[self.uneven & ~self.pareto_k.isnan()]
        return float(tails.max()) if tails.numel() else math.nan

    def element(self, position: int) -> str:
        """Name the element at a position of the flattened batch shape."""
        parts = []
        for size, plate in zip(reversed(self.ess.shape), reversed(self.plates), strict=True):
            position, number = divmod(position, size)
            if plate or size > 1:
                parts.append(f"{plate}={number}" if plate else str(number))
        return f"{self.name}[{', '.join(reversed(parts))}]" if parts else self.name


def diagnose_site(
    structure: Structure, name: str, marginal: Marginal, num_replicates: int, guide: str
) -> SiteDiagnosis:
    """
    Measure how even the weights of a site are.

    :param marginal: of the site, over all replicates.
    :param num_replicates: of those whose evidence is not zero.
    :param guide: what to call a guide: ``"guide"`` or ``"learned guide"``.
    """
    site = structure.model[name]
    dims = {plate.dim: plate.name for plate in map(structure.plates.__getitem__, site.plates)}
    batch_dims = [d for d in range(-len(site.batch_shape), 0) if d not in site.undeclared]
    return SiteDiagnosis(
        name=name,
        proposal="prior" if structure.origins[name] == "prior" else guide,
        num_particles=marginal.log_weights.shape[-1],
        ess=marginal.ess.double().cpu(),
        heaviest=marginal.weights.amax(-1).double().cpu(),
        pareto_k=marginal.pareto_k.double().cpu(),
        plates=tuple(dims.get(dim, "") for dim in batch_dims),
        curvature=curvature_of(marginal.samples, marginal.log_weights, num_replicates),
    )
