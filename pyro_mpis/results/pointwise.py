# SPDX-License-Identifier: Apache-2.0
r"""
Log likelihoods of single observations, summed over the enumerated latents that they read.

For leave-one-out cross-validation (LOO), the log likelihood of observation i at a posterior draw
:math:`\theta` of the other latents is

.. math:: \log p(y_i \mid \theta, y_{-i}) = \log p(y \mid \theta) - \log p(y_{-i} \mid \theta).

The mean of its inverse over the posterior of :math:`\theta` is
:math:`p(y_{-i}) / p(y) = 1 / p(y_i \mid y_{-i})`, which is what LOO estimates. If no other
observation reads the latents, as in a mixture with an indicator for each observation, this is
:math:`\log p(y_i \mid \theta)`. If others do, as in a hidden Markov model, they tell of the latents
too: neither :math:`p(y_i \mid \theta)` nor :math:`p(y_i \mid \theta, y_{<i})` would do.

Draws of the enumerated latents in place of the sum would have the same mean, but a latent that was
drawn given an observation fits it. The values that do not fit matter most here, and they are rarely
drawn.

All of them come from one sum and its derivatives. The model is evaluated at the draws, in
combination with all values of the enumerated latents. The factor graph is that of a run, in which
the draws are a plate. The derivative of its log sum by the log likelihood of observation i is
:math:`q_i`, the posterior probability of the values z that the observation reads, and

.. math:: p(y_i \mid \theta, y_{-i})^{-1} = \sum_z q_i(z) \, / \, p(y_i \mid z, \theta).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyro
import torch
from opt_einsum import get_symbol
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_mpis._typing import SampleMessage
from pyro_mpis.factor_graph.evidence import log_evidence, reduced
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.factor_graph.sizes import Shape, Shapes, contraction_of
from pyro_mpis.particles.evaluation import Evaluated
from pyro_mpis.particles.factors import Packer, graph_of
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.runs import Programs, Wanted, evaluate
from pyro_mpis.programs.structure import Index, Structure, levels_of
from pyro_mpis.replicate import Replicate

# Nats below the highest log likelihood of an observation. A value of which it is less likely counts
# as so unlikely: no sum tells, and its probability over its likelihood is a number still.
FLOOR = 300.0
DOUBLE = torch.double.itemsize


@dataclass(frozen=True)
class Summed:
    """The enumerated latents that log likelihoods are summed over."""

    structure: Structure  # with an index for each of them, and one for all others: a draw's number
    supports: Mapping[str, Tensor]  # of the latents: (values, *shape)
    observed: tuple[str, ...]  # the sites whose log likelihoods are summed
    draw: str  # the symbol of a draw's number
    bytes: int  # that the sum takes for each draw


def summed_latents(replicate: Replicate) -> Summed | None:
    """
    Find the enumerated latents to sum over; None if there are none.

    Latents that a site reads by an index array are not among them.
    """
    structure = replicate.structure
    by_index = {plates for site in (replicate.reads or {}).values() for plates in site.elements}
    indices = [
        index for index in structure.indices if index.enumerated and index.plates not in by_index
    ]
    names = {index.sites[0] for index in indices}
    observed = tuple(
        name
        for name, site in structure.model.items()
        if name not in structure.origins
        and not site.silent
        and site.reads & names
        and not any(site.batch_shape[dim] > 1 for dim in site.undeclared)  # one for each element
    )
    if not observed:
        return None
    taken, number = {index.symbol for index in structure.indices} | set(structure.plates), 0
    while (draw := get_symbol(number)) in taken:
        number += 1
    others = {name for index in structure.indices for name in index.sites} | {*structure.origins}
    of_draw = Index(draw, tuple(sorted(others - names)), frozenset())
    structure = replace(structure, indices=(of_draw, *indices))
    supports = {name: replicate.particles.values[name] for name in names}
    return Summed(structure, supports, observed, draw, _bytes(structure, draw))


def _bytes(structure: Structure, draw: str) -> int:
    """Return what the sum and its derivatives take for one draw."""
    sites = [site for site in structure.model.values() if not site.silent]
    shapes = []
    for site in sites:
        symbols = sorted((structure.indices_read(site) - {draw}) | site.factor_plates)
        shapes.append(Shape(site.name, "".join(symbols), site.factor_plates, DOUBLE))
    sizes = {**structure.num_particles, **{s: p.size for s, p in structure.plates.items()}}
    index_plates = {i.symbol: i.plates for i in structure.indices if i.symbol != draw}
    contraction = contraction_of(Shapes(tuple(shapes), sizes, index_plates))
    factors = sum(math.prod(sizes[s] for s in shape.dims) for shape in shapes)
    return 2 * DOUBLE * factors + (0 if contraction is None else contraction.backward)


def summed_log_likelihoods(
    summed: Summed, programs: Programs, draws: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    Return the log likelihoods of the observed sites that read enumerated latents.

    :param draws: of all latent sites, ``(draws, *shape)``.
    :return: ``(draws or 1, *batch shape)``; not of sites whose mask depends on what is summed.
    """
    structure = summed.structure
    given = {
        name: draw
        for name, draw in draws.items()
        if name not in summed.supports and structure.origins[name] != "model_delta"
    }
    number = len(next(iter(given.values()))) if given else 1
    sizes = {**structure.num_particles, summed.draw: number}
    levels = levels_of(structure, sizes)
    values: dict[str, Mapping[str, Tensor]] = {summed.draw: given}
    for index in structure.indices:
        if index.symbol != summed.draw:
            values[index.symbol] = {index.sites[0]: summed.supports[index.sites[0]]}
    if not given:
        levels = [level for level in levels if level != [summed.draw]]
    collect = {name: _log_prob for name, site in structure.model.items() if not site.silent}
    with pyro.validation_enabled(False):
        _, said = evaluate(
            programs,
            [{n: v for symbol in level for n, v in values[symbol].items()} for level in levels],
            model=Wanted(collect, frozenset(structure.model)),
            shapes=structure.latent_shapes,
        )
    of_draws = next((n for n, level in enumerate(levels) if summed.draw in level), None)
    hidden = {
        name
        for name in summed.observed
        if "mask" in said[name] and set(said[name]["mask"].levels) - {of_draws}
    }
    graph = _graph(summed, Evaluated({}, said, levels), sizes)
    found = _likelihoods(summed, graph)
    return {name: log_prob for name, log_prob in found.items() if name not in hidden}


def _log_prob(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a density without its scale, and its mask; nan is ruled out by another density."""
    log_prob = density_of(site["fn"], site["value"], validate=True)
    log_prob = torch.where(log_prob.isnan(), -torch.inf, log_prob)
    mask = site["mask"]
    result = {"log_prob": scale_and_mask(log_prob, mask=mask)}
    return result | ({"mask": mask} if isinstance(mask, Tensor) else {})


def _graph(summed: Summed, evaluated: Evaluated, sizes: Mapping[str, int]) -> FactorGraph:
    """Pack the densities into a graph in which the draws are a plate."""
    structure, draw, number = summed.structure, summed.draw, sizes[summed.draw]
    packer = Packer(structure, sizes, evaluated)
    enumerated = {i.symbol: i for i in structure.indices if i.symbol != draw}
    factors = [
        packer.pack(name, parts["log_prob"], structure.model[name])
        for name, parts in evaluated.model.items()
    ]
    device = factors[0].tensor.device
    factors = [*(packer.zeros(index, device) for index in enumerated.values()), *factors]
    of_draw = frozenset({draw}) if number > 1 else frozenset()
    packed = []
    for factor in factors:
        tensor, dims = factor.tensor.detach().double(), factor.dims
        if of_draw and draw not in dims:
            tensor, dims = tensor.expand((number, *tensor.shape)), draw + dims
        packed.append(LogFactor(factor.name, tensor, dims, factor.plates | of_draw))
    graph = graph_of(structure, packed, sizes, {})
    return replace(
        graph,
        index_plates={symbol: index.plates | of_draw for symbol, index in enumerated.items()},
        index_sites={symbol: index.sites for symbol, index in enumerated.items()},
    )


def _likelihoods(summed: Summed, graph: FactorGraph) -> dict[str, Tensor]:
    """Differentiate the log sum, and bring the results to the shapes of an ordinary run."""
    factors, likelihoods = [], {}
    for factor in graph.factors:
        if factor.name in summed.observed:
            indices = [n for n, s in enumerate(factor.dims) if s in graph.index_plates]
            tensor = factor.tensor
            best = tensor.amax(indices, keepdim=True) if indices else tensor
            tensor = torch.maximum(tensor, best - FLOOR).requires_grad_()
            factor = replace(factor, tensor=tensor)
            likelihoods[factor.name] = factor, indices, best
        factors.append(factor)
    with torch.enable_grad():
        total = log_evidence(reduced(replace(graph, factors=tuple(factors))))
        tensors = [factor.tensor for factor, _, _ in likelihoods.values()]
        found = torch.autograd.grad(total, tensors)
    result = {}
    for (name, (factor, indices, best)), posterior in zip(likelihoods.items(), found, strict=True):
        inverse = posterior.log() - factor.tensor.detach()
        inverse = inverse.logsumexp(indices) if indices else inverse
        possible = best.squeeze(indices) > -torch.inf
        result[name] = _ordinary(summed, graph, factor, torch.where(possible, -inverse, -torch.inf))
    return result


def _ordinary(summed: Summed, graph: FactorGraph, factor: LogFactor, tensor: Tensor) -> Tensor:
    """Bring ``(draws and plates in the factor's order)`` to ``(draws, *batch shape)``."""
    dims = [symbol for symbol in factor.dims if symbol not in graph.index_plates]
    if summed.draw not in dims:
        tensor, dims = tensor.unsqueeze(0), [summed.draw, *dims]
    plates = "".join(symbol for symbol in dims if symbol != summed.draw)
    tensor = tensor.movedim(dims.index(summed.draw), 0)
    batch_shape = summed.structure.model[factor.name].batch_shape
    return graph.to_batch(tensor, plates, batch_shape, left=1)
