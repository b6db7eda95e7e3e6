# SPDX-License-Identifier: Apache-2.0
r"""
Hold a factor graph against densities at combinations that mix the elements of plates.

A factor has one particle for all elements of a plate at a time, so it cannot show whether each
element reads its own element of a latent, or that of an index array at every combination. Here each
element of a plated latent takes a particle of its own, at random. If the graph is right, every
density must be the entry of its factor at the particles of the elements that it reads.

There are two ways. **Together**: indices outside of plates take random particles too, in a few
rows. That also finds a read which the plain run missed, where indices share a level. **Apart**:
indices outside of plates take all their particles, so that an element which is read only at some
of them is found. That is for factors that read by an index array.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.particles.mixtures import Mixture
from pyro_mpis.particles.probes import NONE, ElementReads, SiteReads, unravel
from pyro_mpis.programs.tensors import Mapped, Said

SMALL = 2**10  # entries of factors that are compared in one tensor
# Two entries differ if they are further apart than eps to this power, relative to one plus the
# entry. Rounding does not explain more.
TOLERANCE = 0.4


def differing(
    graph: FactorGraph, reads: SiteReads, mixture: Mixture, said: tuple[Said, Said]
) -> list[LogFactor]:
    """
    Return the factors that are not the densities of the programs, one of each site.

    :param graph: of the particles that the mixture chooses from, not regrouped.
    :param reads: which elements are read by index arrays.
    :param said: by guide and model, at the mixture.
    """
    said_by_guide, said_by_model = said
    found = {name: said["log_prob"] for name, said in said_by_model.items() if "log_prob" in said}
    found |= {
        f"{name} (guide)": _negative(said["log_prob"]) for name, said in said_by_guide.items()
    }
    factors = [factor for factor in graph.factors if factor.name in found]
    expected = [_at_mixture(graph, factor, reads, mixture) for factor in factors]
    aligned = (_aligned(graph, factor, found[factor.name], mixture) for factor in factors)
    actual = [tensor.to(graph.device) for tensor in aligned]
    return _different(factors, actual, expected)


def _different(
    factors: Sequence[LogFactor], actual: Sequence[Tensor], expected: Sequence[Tensor]
) -> list[LogFactor]:
    """Return the factors whose entries differ; compares small ones together."""
    small: dict[torch.dtype, list[int]] = {}
    wrong = []
    for number, (x, y) in enumerate(zip(actual, expected, strict=True)):
        if x.shape == y.shape and x.numel() < SMALL and x.dtype == y.dtype:
            small.setdefault(x.dtype, []).append(number)
        elif not _same(x, y):
            wrong.append(factors[number])
    for numbers in small.values():
        flat = [torch.cat([side[n].reshape(-1) for n in numbers]) for side in (actual, expected)]
        if not _same(*flat):
            wrong += [factors[n] for n in numbers if not _same(actual[n], expected[n])]
    return wrong


def _negative(mapped: Mapped) -> Mapped:
    return Mapped(-mapped.tensor, mapped.levels)


def _in_rows_alone(graph: FactorGraph, factor: LogFactor, mixture: Mixture) -> bool:
    """Whether a factor has no plates, reads none, and has all its indices in the rows."""
    return all(s in mixture.chosen and not graph.index_plates[s] for s in factor.dims)


def _at_mixture(
    graph: FactorGraph,
    factor: LogFactor,
    reads: SiteReads,
    mixture: Mixture,
) -> Tensor:
    """Look a factor up at the chosen particles: ``(*levels, rows, *plates)``."""
    if _in_rows_alone(graph, factor, mixture):
        return factor.tensor[tuple(mixture.chosen[symbol].reshape(-1) for symbol in factor.dims)]
    plates = "".join(symbol for symbol in factor.dims if symbol not in graph.index_plates)
    apart = [s for s in factor.dims if s in graph.index_plates and s not in mixture.chosen]
    dims = [*apart, "", *plates]  # "" is that of the rows
    selection = []
    for symbol in factor.dims:
        shape = [1] * len(dims)
        if symbol not in mixture.chosen:
            shape[dims.index(symbol)] = graph.sizes[symbol]
            selection.append(torch.arange(graph.sizes[symbol]).reshape(shape))
            continue
        ordinal = graph.index_plates[symbol]
        chosen = mixture.chosen[symbol]
        if ordinal <= factor.plates:
            chosen = graph.to_plates(chosen, plates, left=1)
        else:
            chosen = _read_by_index(graph, reads[factor.name], ordinal, mixture, chosen, plates)
        site = reads.get(factor.name)
        if site is not None and site.switch in apart and chosen.dim() > len(plates) + 1:
            for position, other in enumerate(apart):  # (particles of the switch, rows, *plates)
                chosen = chosen if other == site.switch else chosen.unsqueeze(position)
        else:
            chosen = chosen.reshape([1] * len(apart) + list(chosen.shape))
        selection.append(chosen)
    selected: tuple[Tensor, ...] = tuple(index.to(factor.tensor.device) for index in selection)
    return factor.tensor[selected] if selected else factor.tensor


def _read_by_index(
    graph: FactorGraph,
    site: ElementReads,
    ordinal: Ordinal,
    mixture: Mixture,
    chosen: Tensor,
    plates: str,
) -> Tensor:
    """
    Return the particle of the element that each plate element reads: ``(rows, *plates)``.

    Where another index switches between elements, and has all its particles: ``(particles of it,
    rows, *plates)``.
    """
    elements = site.elements[ordinal].to(chosen.device)
    elements = elements.masked_fill(elements == NONE, 0)
    ordinal_dims = "".join(sorted(ordinal))
    position = unravel(graph, elements, ordinal)
    of_elements = graph.to_plates(chosen, ordinal_dims, left=1)
    inner = site.inner.replace(site.switch, "") if site.switch else site.inner
    order = [inner.index(symbol) for symbol in plates]
    at: tuple[slice | Tensor, ...]
    if site.switch and site.switch in mixture.chosen:  # each row has a particle of its own
        rows = torch.arange(mixture.rows, device="cpu").reshape((-1,) + (1,) * len(inner))
        switch = mixture.chosen[site.switch].reshape(-1)
        at = (rows, *(position[s][switch] for s in ordinal_dims))
        return of_elements[at].permute((0, *(1 + dim for dim in order)))
    at = (slice(None), *(position[s] for s in ordinal_dims))
    result = of_elements[at]
    if site.switch:
        return result.permute((1, 0, *(2 + dim for dim in order)))
    return result.permute((0, *(1 + dim for dim in order)))


def _aligned(graph: FactorGraph, factor: LogFactor, log_prob: Mapped, mixture: Mixture) -> Tensor:
    """Bring a density of the mapped run to ``(*levels, rows, *plates)``."""
    if _in_rows_alone(graph, factor, mixture) and log_prob.tensor.numel() == mixture.rows:
        return log_prob.tensor.reshape(-1) if factor.dims else log_prob.tensor.reshape(-1)[0]
    plates = "".join(symbol for symbol in factor.dims if symbol not in graph.index_plates)
    apart = [s for s in factor.dims if s in graph.index_plates and s not in mixture.chosen]
    tensor, levels = log_prob.tensor, list(log_prob.levels)
    batch = tensor.dim() - len(levels)
    wanted = [next(n for n, level in enumerate(mixture.levels) if s in level) for s in apart]
    wanted.append(len(mixture.levels))
    extra = [level for level in levels if level not in wanted]
    if extra:  # of an index with one particle, or that was missed
        for level in extra:
            tensor = tensor.select(levels.index(level), 0)
            levels.remove(level)
    for position, level in enumerate(wanted):
        if level not in levels:
            tensor = tensor.unsqueeze(position)
            levels.insert(position, level)
    tensor = tensor.permute((*(levels.index(n) for n in wanted), *range(len(wanted), tensor.dim())))
    missing = graph.max_plate_nesting - batch
    lead, rest = tensor.shape[: len(wanted)], tensor.shape[len(wanted) :]
    tensor = tensor.reshape((*lead, *(1,) * missing, *rest))
    return graph.to_plates(tensor, plates, left=len(wanted))


def _same(actual: Tensor, expected: Tensor) -> bool:
    """
    Whether two tensors agree entry by entry.

    The check has not looked at supports and arguments: an entry that they rule out agrees with
    any density.
    """
    tolerance = expected.abs().add_(1.0).mul_(torch.finfo(actual.dtype).eps ** TOLERANCE)
    close = (actual - expected).abs_() <= tolerance
    if bool(close.all()):
        return True
    return bool((close | (actual == expected) | (expected == -torch.inf)).all())
