# SPDX-License-Identifier: Apache-2.0
r"""
Posterior weights of particles, by differentiating the evidence.

A source term :math:`J` enters the product as one more factor, :math:`e^{J}`, (30)-(31) of [1], and
log P is differentiated at :math:`J = 0`, where that factor is one and changes nothing. With one J
for each combination of particles of some sites, the derivative is their joint marginal weight:

.. math:: P_z(k_i) = \partial \log P(z, J) / \partial J_{k_i} \big|_{J=0} \quad (32)\text{-}(35),

and (43)-(44) for the weights of several sites. A posterior moment (27)-(28) is the sum of the
moment's function under these weights. All sources of a query go into one forward and one backward
pass.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from pyro_mpis._text import quoted
from pyro_mpis.factor_graph.evidence import log_evidence
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor

TOLERANCE = 1e-3  # of the sum of weights; rounding is below 1e-6 in float32


def joint_weights(graph: FactorGraph, tuples: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Compute the joint marginal weights of tuples of indices, all in one pass.

    :param tuples: strings of distinct index symbols whose plates lie within one another.
    :raises NotImplementedError: if a tuple's plates cross with those of other latents.
    :return: the log evidence; and for each tuple its weights, linear scale, float64,
        ``(*indices, *plates)`` with the dims of the deepest ordinal's plates as
        :meth:`FactorGraph.tensor_plates` lists them. They sum to one over the indices for every
        plate element. Where the evidence is zero, they are all zero.
    """
    with torch.inference_mode(False), torch.enable_grad():
        graph = _differentiable(graph)
        sources = {symbols: _source(graph, symbols) for symbols in dict.fromkeys(tuples)}
        try:
            log_p = log_evidence(graph, [*graph.factors, *sources.values()])
        except NotImplementedError as error:  # the evidence could be computed
            raise _crossing(graph, sources) from error
        # (32)-(35) and (43)-(44), all tuples together
        grads = torch.autograd.grad(log_p, [source.tensor for source in sources.values()])
    weights = {}
    is_possible = bool(log_p != -math.inf)
    for (symbols, source), grad in zip(sources.items(), grads, strict=True):
        plates = graph.tensor_plates(source.plates)
        weight = grad.double().reshape([graph.sizes[symbol] for symbol in (*symbols, *plates)])
        scale = graph.scale_of(source.plates)
        if scale != 1.0:  # so often does log P have the sums of a minibatch's elements
            weight = weight / scale
        if is_possible:
            _check_total(graph, symbols, weight)
        weights[symbols] = weight
    return log_p.detach(), weights


def _crossing(graph: FactorGraph, tuples: Iterable[str]) -> NotImplementedError:
    """Say that indices in plates around one another, taken together, make plates cross."""
    several = sorted(symbols for symbols in tuples if len(symbols) > 1)
    sites = " or of ".join(
        quoted({name for symbol in symbols for name in graph.index_sites[symbol]})
        for symbols in several
    )
    plates = frozenset[str]().union(*(graph.index_plates[s] for tuple_ in several for s in tuple_))
    names = quoted({graph.plate_names[symbol] for symbol in plates})
    return NotImplementedError(
        f"joint weights of {sites} for each element of plates {names}: with the latents that meet "
        "there these make one factor. These plates cross in it, so the exact sum is exponential in "
        "their size. Use joint draws: .sample(n)."
    )


def _source(graph: FactorGraph, symbols: str) -> LogFactor:
    """Return J = 0 of (30)-(31): a factor of zeros over the indices and the deepest ordinal."""
    plates = frozenset[str]().union(*(graph.with_enclosing(graph.index_plates[s]) for s in symbols))
    dims = "".join(s for s in symbols if graph.sizes[s] > 1) + graph.tensor_plates(plates)
    shape = [graph.sizes[symbol] for symbol in dims]
    tensor = torch.zeros(shape, dtype=graph.dtype, device=graph.device, requires_grad=True)
    return LogFactor("source", tensor, dims, plates)


def _differentiable(graph: FactorGraph) -> FactorGraph:
    """Copy what was made under ``torch.inference_mode``, which autograd cannot record."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.is_inference() else tensor

    return replace(
        graph,
        factors=tuple(replace(factor, tensor=copy(factor.tensor)) for factor in graph.factors),
        ragged={
            inner: replace(plate, outer={s: copy(element) for s, element in plate.outer.items()})
            for inner, plate in graph.ragged.items()
        },
    )


def _check_total(graph: FactorGraph, symbols: str, weight: Tensor) -> None:
    """Make sure that weights sum to one over their indices: it shows a kernel that is wrong."""
    sums = weight.sum(tuple(range(len(symbols)))) if symbols else weight
    if bool((sums - 1.0).abs().lt(TOLERANCE).all()):
        return
    sites = quoted(name for symbol in symbols for name in graph.index_sites[symbol])
    worst = sums.flatten()[(sums - 1.0).abs().argmax()]
    raise AssertionError(f"the weights of {sites} sum to {float(worst):.6g}, not to one")
