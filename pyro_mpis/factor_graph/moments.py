# SPDX-License-Identifier: Apache-2.0
r"""
Posterior expectations and marginals: sites' particles under their joint weights.

A function of some sites' values has an expectation for each element of the deepest plates that they
sit in:

.. math:: \sum_k P_z(k)\, m(z^k), \quad (24)

where a function of few sites needs no more than their joint weights (29). This is the derivative
(27)-(28) of [1] in one source term for each combination of their particles. The function is
applied with :func:`torch.vmap`, so that it sees one value of each site, without particles or
plates, and cannot mix them.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_mpis._text import broadcast_shape, first_line, quoted
from pyro_mpis._typing import MomentFunction
from pyro_mpis.factor_graph.graph import FactorGraph, SiteValue
from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.factor_graph.selection import at_plates

Weights = Mapping[str, Tensor]  # as source_terms.joint_weights returns them


def joint_indices(graph: FactorGraph, sites: Sequence[str]) -> str:
    """
    Return the indices of some sites, in the sites' order.

    :raises ValueError: if a site is unknown, or two sit in plates of which neither holds the other.
    """
    for name in sites:
        if not isinstance(name, str):
            raise ValueError(
                f"site {name!r}: expected the name of a site, but found {type(name).__name__}. "
                "Give several names one by one, as in .marginals('a', 'b')."
            )
        if name not in graph.values:
            names = quoted(graph.values)
            raise ValueError(f"site '{name}': the model has no such latent site, only {names}.")
    for one in sites:
        for other in sites:
            plates = [graph.with_enclosing(graph.values[name].plates) for name in (one, other)]
            if not (plates[0] <= plates[1] or plates[1] <= plates[0]):
                raise ValueError(
                    f"sites '{one}' and '{other}': they sit in different plates, so they have no "
                    "joint marginal for each plate element. Use joint draws: .sample(n)."
                )
    return "".join(dict.fromkeys(s for name in sites for s in graph.values[name].indices))


def mean(graph: FactorGraph, weights: Weights, name: str) -> Tensor:
    """Return the posterior mean of a site, in the shape of an ordinary run."""
    value, weight, plates = _aligned(graph, weights, [name])
    site = graph.values[name]
    result = _expectation(graph, value[0], weight, plates, [name], site.event_dim)
    return site.ordinary(result, left=0)


def expectation(
    graph: FactorGraph, weights: Weights, function: MomentFunction, sites: Sequence[str]
) -> Tensor:
    """
    Return the posterior expectation of a function of sites.

    :return: ``batch_shape + shape of the function's result``; the batch shape is that of the
        deepest site.
    :raises ValueError: if the function fails, or returns something else than a tensor.
    """
    values, weight, plates = _aligned(graph, weights, sites)
    joint = joint_indices(graph, sites)
    squeezed = [
        value.reshape(
            [size for size, s in zip(value.shape, joint, strict=False) if s in site.indices]
            + list(value.shape[len(joint) :])
        )
        for value, site in zip(values, (graph.values[name] for name in sites), strict=True)
    ]

    def checked(*values: Tensor) -> Tensor:
        result = function(*values)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"it returned {type(result).__name__}, not a tensor; stack several results of one "
                "shape, or ask for several moments in a dictionary"
            )
        return result

    mapped: MomentFunction = checked
    for _ in plates:
        mapped = torch.vmap(mapped)
    for symbol in reversed(joint):
        in_dims = tuple(0 if symbol in graph.values[name].indices else None for name in sites)
        mapped = torch.vmap(mapped, in_dims=in_dims)
    try:
        result = mapped(*squeezed)
    except Exception as error:
        raise ValueError(
            f"the moment function of {quoted(sites)} failed: {first_line(error)}. It is given one "
            "value of each site, of its event shape, and must return one tensor, by torch "
            "operations without branches on values (it runs under torch.vmap)."
        ) from error
    right = result.dim() - len(joint) - len(plates)
    result = _expectation(graph, result, weight, plates, sites, right)
    return _deepest(graph, sites).declared(result, left=0)


def marginal(graph: FactorGraph, weights: Weights, sites: Sequence[str]) -> Marginal:
    """Return the marginal of one site, or the joint marginal of several."""
    values, weight, plates = _aligned(graph, weights, sites)
    num = len(joint_indices(graph, sites))
    events = {name: _event_shape(graph, name) for name in sites}
    deepest = _deepest(graph, sites)
    lead = broadcast_shape(*(value.shape[:num] for value in values))
    middle = weight.shape[num:]
    parts = [value.expand(lead + middle + value.shape[num + len(plates) :]) for value in values]
    if len(sites) > 1:
        dtype = parts[0].dtype
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        left = num + len(plates)
        parts = [part.reshape((*part.shape[:left], -1)).to(dtype) for part in parts]
    samples = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    samples = samples.reshape((lead.numel(), *samples.shape[num:]))
    flat_weight = weight.expand(lead + middle).reshape((lead.numel(), *middle))
    samples = graph.to_batch(samples, plates, deepest.batch_shape, left=1)
    log_weights = graph.to_batch(flat_weight, plates, deepest.batch_shape, left=1).log()
    samples, log_weights = (deepest.declared(x, left=1) for x in (samples, log_weights))
    samples, log_weights = samples.movedim(0, log_weights.dim() - 1), log_weights.movedim(0, -1)
    return Marginal(samples, log_weights.to(graph.dtype), events)


def _event_shape(graph: FactorGraph, name: str) -> torch.Size:
    site = graph.values[name]
    return site.tensor.shape[site.tensor.dim() - site.event_dim :]


def _deepest(graph: FactorGraph, sites: Sequence[str]) -> SiteValue:
    """Return the deepest site, whose batch shape is that of all of them together."""

    def depth(name: str) -> tuple[int, int]:  # plates of size one have no symbol
        site = graph.values[name]
        return len(graph.with_enclosing(site.plates)), len(site.batch_shape)

    return graph.values[max(sites, key=depth)]


def _aligned(
    graph: FactorGraph, weights: Weights, sites: Sequence[str]
) -> tuple[list[Tensor], Tensor, str]:
    """
    Bring sites and their joint weights to common dims.

    :return: values ``(*joint indices, *plates, *event)``, size one where a site lacks an index;
        weights ``(*joint indices, *plates)``; and the plates.
    """
    joint = joint_indices(graph, sites)
    inside = frozenset[str]().union(
        *(graph.with_enclosing(graph.values[name].plates) for name in sites)
    )
    plates = graph.tensor_plates(inside)
    values = []
    for name in sites:
        site = graph.values[name]
        site_plates = graph.tensor_plates(graph.with_enclosing(site.plates))
        value = graph.to_plates(
            site.tensor, site_plates, left=len(site.indices), right=site.event_dim
        )
        lead = value.shape[: len(site.indices)]
        value = at_plates(
            graph, value.flatten(0, len(lead) - 1) if lead else value[None], site_plates, plates
        )
        shape = list(value.shape[1:])
        shape[: len(plates)] = [graph.sizes[symbol] for symbol in plates]
        value = value.expand((value.shape[0], *shape))
        order = sorted(range(len(lead)), key=lambda d: joint.index(site.indices[d]))
        value = value.reshape((*lead, *shape))
        value = value.permute((*order, *range(len(lead), value.dim())))
        for position, symbol in enumerate(joint):
            if symbol not in site.indices:
                value = value.unsqueeze(position)
        values.append(value)
    weight = weights[joint]
    lead = weight.shape[: len(joint)]
    around = frozenset[str]().union(*(graph.with_enclosing(graph.index_plates[s]) for s in joint))
    flat = weight.reshape(lead.numel(), *weight.shape[len(joint) :])
    flat = at_plates(graph, flat, graph.tensor_plates(around), plates)
    flat = flat.expand((flat.shape[0], *(graph.sizes[symbol] for symbol in plates)))
    return values, flat.reshape((*lead, *flat.shape[1:])), plates


def _expectation(
    graph: FactorGraph,
    values: Tensor,
    weight: Tensor,
    plates: str,
    sites: Sequence[str],
    right: int,
) -> Tensor:
    """Sum values under weights over the indices, and give the result an ordinary batch shape."""
    num = weight.dim() - len(plates)
    dtype = values.dtype if values.is_floating_point() else graph.dtype
    spread = weight.reshape(weight.shape + (1,) * right)
    values = torch.where(spread > 0, values.double() * spread, 0.0)  # not 0 * inf
    sums = values.sum(tuple(range(num))) if num else values  # (24)
    return graph.to_batch(sums, plates, _deepest(graph, sites).batch_shape, left=0).to(dtype)
