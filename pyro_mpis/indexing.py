# SPDX-License-Identifier: Apache-2.0
r"""
Latents of one plate read in another, through an index array.

The commonest hierarchical model draws effects in one plate and reads them by index in another::

    with pyro.plate("county", 85):
        alpha = pyro.sample("alpha", Normal(mu, sigma))
    with pyro.plate("house", 919):
        pyro.sample("y", Normal(alpha[..., county], 1), obs=y)

The factor of ``y`` has the particles of ``alpha`` and the plate of the houses, but not that of the
counties; multiplied over the houses as it is, it would let all counties share one particle. Summed
over the houses **of each county** it is a factor of ``alpha`` and of its plate, and exact.

Which element each observation reads is found from outside, in one vectorised run: element ``e`` of
``alpha`` is nan in run ``b`` where bit ``b`` of ``e`` is set, and in run ``B + b`` where it is not.
An observation of one element becomes nan in exactly one run of each such pair; so the number of
runs is logarithmic in the size of the plate. A discrete latent has another particle's value in
place of nan. The same runs check that within a plate each element reads only its own element of
the latents.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal, SampleMessage
from pyro_mpis.contraction import packed, regroup
from pyro_mpis.dependencies import Structure
from pyro_mpis.factors import ElementMap, FactorGraph, LogFactor
from pyro_mpis.handlers import Name, Programs, is_delta, place, replay
from pyro_mpis.proposals import Particles, model_value

NONE, SEVERAL = -1, -2  # in place of an element


@dataclass(frozen=True)
class ElementReads:
    """Which element of the plates of an index each element of a site's plates reads."""

    inner: str  # the site's plates
    elements: Mapping[Ordinal, Tensor]  # plates of an index -> flat element, NONE or SEVERAL


SiteReads = Mapping[str, ElementReads]


def find_reads(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    *,
    check: bool,
) -> SiteReads:
    """
    Find which elements of the latents' plates each site reads.

    :param check: probe models without reads of other plates too, to verify that the elements of a
        plate are independent.
    :return: for each site; empty if there is nothing to find.
    :raises NotImplementedError: if the model cannot be probed, and must be.
    """
    foreign = [factor for factor in graph.factors if _foreign(graph, factor)]
    plated = any(graph.index_plates.values())
    if not plated or not (foreign or check):
        return {}
    try:
        return _probe(graph, structure, particles, programs)
    except ValueError as error:
        if not foreign:
            return {}  # the check is a courtesy; a model that cannot take nan goes without
        raise NotImplementedError(
            f"site '{foreign[0].name}': it reads latents of a plate that it is not in, and which "
            f"element it reads could not be found out, since the model stopped at a nan: {error}"
        ) from error


def regroup_indexed(graph: FactorGraph, reads: SiteReads) -> FactorGraph:
    """
    Regroup the factors that read latents of other plates by index.

    :raises NotImplementedError: if an element reads several elements, or plates cross.
    """
    if not reads and not any(_foreign(graph, factor) for factor in graph.factors):
        return graph
    factors: list[LogFactor] = []
    for factor in sorted(graph.factors, key=lambda f: not _has_local(graph, f)):
        if factor.name in reads:
            _check_own_elements(graph, factor, reads[factor.name])
        if _foreign(graph, factor):
            if factor.name not in reads:
                raise _unknown(graph, factor)
            graph, factor = _resolve(graph, factor, reads[factor.name])
        factors.append(factor)
    return replace(graph, factors=tuple(factors))


def _indices(graph: FactorGraph, factor: LogFactor) -> list[str]:
    return [symbol for symbol in factor.dims if symbol in graph.index_plates]


def _foreign(graph: FactorGraph, factor: LogFactor) -> list[Ordinal]:
    """Return the plates of the indices that a factor reads from outside of them."""
    ordinals = {graph.index_plates[symbol] for symbol in _indices(graph, factor)}
    return [plates for plates in sorted(ordinals, key=sorted) if not plates <= factor.plates]


def _has_local(graph: FactorGraph, factor: LogFactor) -> bool:
    """Whether each of the factor's plates holds an index that it reads."""
    inside = {p for symbol in _indices(graph, factor) for p in graph.index_plates[symbol]}
    return factor.plates <= inside


def _probe(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
) -> dict[str, ElementReads]:
    """Run guide and model with nan in place of elements, by the bits of their numbers."""
    slots: dict[Ordinal, tuple[int, int]] = {}
    total = 1  # the first run changes nothing
    for plates in sorted({p for p in graph.index_plates.values() if p}, key=sorted):
        bits = max(1, math.ceil(math.log2(math.prod(graph.sizes[s] for s in plates))))
        slots[plates] = (total, bits)
        total += 2 * bits
    patterns = {
        plates: _pattern(graph, plates, start, bits, total)
        for plates, (start, bits) in slots.items()
    }
    slot_dim = min(index.dim for index in structure.indices) - 1
    values = _probing_values(graph, structure, particles, patterns, slot_dim)

    def run(name: Name, values: Mapping[str, Tensor]) -> dict[str, SampleMessage]:
        return replay(programs, name, values=values, enumerated={}, num_samples=total)

    model_values = {}
    if "guide_delta" in structure.origins.values():
        guide_sites = run("guide", {n: v for n, v in values.items() if n in structure.guide})
        for name, origin in structure.origins.items():
            if origin == "guide_delta":
                model_values[name] = guide_sites[name]["value"]
    for name, origin in structure.origins.items():
        if origin in ("guide", "prior", "enumerated"):
            model_values[name] = values[name]
    reads = {}
    for name, site in run("model", model_values).items():
        if site["mask"] is False or site["infer"].get("_deterministic"):
            continue
        log_prob = site["fn"].log_prob(site["value"])
        if isinstance(site["mask"], Tensor):
            log_prob = log_prob.where(site["mask"], 0.0)
        inner = "".join(sorted(structure.model[name].plates))
        changed = _changes(graph, log_prob, inner, slot_dim, total)
        elements = {p: _decode(changed, start, bits) for p, (start, bits) in slots.items()}
        reads[name] = ElementReads(inner, elements)
    return reads


def _probing_values(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    patterns: Mapping[Ordinal, Tensor],
    slot_dim: int,
) -> dict[str, Tensor]:
    """
    Return the random sites' values of each run, in the slots' dim.

    A continuous site has one particle, with nan at the elements of the run. A discrete one cannot
    be nan, and others may be read by its value: it has all its particles, in the dim of its index,
    and the next particle in place of each at the elements of the run.
    """
    values = {}
    known = {name: drawn.value for name, drawn in particles.draws.items() if not is_delta(drawn.fn)}
    for index in structure.indices:
        if index.enumerated:
            known[index.sites[0]] = graph.values[index.sites[0]].tensor
    index_of = structure.index_of
    for name, value in known.items():
        dim, plates = structure.shared_dim, frozenset[str]()
        if name in index_of:
            plates = index_of[name].plates
        if name in structure.model:
            value = model_value(structure, name, value)
        event_dim = value.dim() - 1 - structure.max_plate_nesting
        discrete = name in index_of and not value.is_floating_point()
        if discrete:
            dim, other = index_of[name].dim, value.roll(1, 0)
        else:
            other = torch.full_like(value, torch.nan if value.is_floating_point() else 0)
        value, other = (
            place(x if discrete else x[:1], dim, shared_dim=structure.shared_dim)
            for x in (value, other)
        )
        if plates:  # (slots, 1, .., 1, *plates, 1, .., 1)
            pattern = patterns[plates]
            ones = (1,) * (-slot_dim - 1 - structure.max_plate_nesting)
            pattern = pattern.reshape(
                pattern.shape[:1] + ones + pattern.shape[1:] + (1,) * event_dim
            )
            value = torch.where(pattern, other, value)
        values[name] = value
    return values


def _flat_elements(graph: FactorGraph, plates: Ordinal) -> Tensor:
    """Return the number of each element of some plates, in the batch dims of the plates."""
    shape = [1] * graph.max_plate_nesting
    for symbol in plates:
        shape[graph.plate_dims[symbol]] = graph.sizes[symbol]
    number = torch.zeros(shape, dtype=torch.long)
    for symbol in sorted(plates):
        own = [1] * graph.max_plate_nesting
        own[graph.plate_dims[symbol]] = graph.sizes[symbol]
        number = number * graph.sizes[symbol] + torch.arange(graph.sizes[symbol]).reshape(own)
    return number.to(graph.device)


def _pattern(graph: FactorGraph, plates: Ordinal, start: int, bits: int, total: int) -> Tensor:
    """Return which elements each run changes: (total, *plates)."""
    number = _flat_elements(graph, plates)
    pattern = torch.zeros((total, *number.shape), dtype=torch.bool, device=graph.device)
    for bit in range(bits):
        is_set = number.bitwise_right_shift(bit).bitwise_and(1).bool()
        pattern[start + bit] = is_set
        pattern[start + bits + bit] = ~is_set
    return pattern


def _changes(graph: FactorGraph, log_prob: Tensor, inner: str, slot_dim: int, total: int) -> Tensor:
    """Return which elements of a log_prob differ from the first run's: (total, *inner)."""
    log_prob = log_prob.reshape((1,) * (-slot_dim - log_prob.dim()) + log_prob.shape)
    changed = log_prob != log_prob[:1]  # nan differs from everything
    plates = changed.shape[changed.dim() - graph.max_plate_nesting :]
    changed = changed.reshape((changed.shape[0], -1, *plates)).any(1)
    changed = graph.to_plates(changed, inner, left=1)
    return changed.expand((total, *changed.shape[1:]))


def _decode(changed: Tensor, start: int, bits: int) -> Tensor:
    """Read off which element matters: the flat element, NONE or SEVERAL."""
    ones = changed[start : start + bits]
    zeros = changed[start + bits : start + 2 * bits]
    weights = 2 ** torch.arange(bits, device=changed.device)
    element = (ones.long() * weights.reshape((-1,) + (1,) * (ones.dim() - 1))).sum(0)
    nothing = ~(ones | zeros).any(0)
    single = (ones ^ zeros).all(0)
    element = element.masked_fill(~single, SEVERAL)
    return element.masked_fill(nothing, NONE)


def _check_own_elements(graph: FactorGraph, factor: LogFactor, reads: ElementReads) -> None:
    """Refuse a factor whose plate elements read other elements than their own."""
    ordinals = {graph.index_plates[symbol] for symbol in _indices(graph, factor)}
    for plates in sorted(ordinals, key=sorted):
        if not plates or not plates <= factor.plates:
            continue
        found = reads.elements[plates]
        own = graph.to_plates(_flat_elements(graph, plates), reads.inner, left=0)
        if bool(((found != own) & (found != NONE)).any()):
            raise NotImplementedError(
                f"site '{factor.name}': an element of {_names(graph, plates)} reads a latent at "
                f"other elements of it than its own. Elements of a plate must be independent. "
                "Draw the latent outside the plate with .to_event(1), which gives the whole "
                "vector one particle index, or write the plate as a Python loop."
            )


def _names(graph: FactorGraph, plates: Ordinal) -> str:
    names = ", ".join(f"'{graph.plate_names[symbol]}'" for symbol in sorted(plates))
    return f"plate {names}" if len(plates) == 1 else f"plates {names}"


def _unknown(graph: FactorGraph, factor: LogFactor) -> NotImplementedError:
    plates = frozenset[str]().union(*_foreign(graph, factor))
    return NotImplementedError(
        f"site '{factor.name}': it reads latents of {_names(graph, plates)} from outside, and "
        "which element could not be found out (discrete latents, comparisons and integers "
        "hide it). Mark a discrete latent for enumeration and draw it where it is read, or give "
        "the vector of latents one particle index with .to_event(1)."
    )


def _resolve(
    graph: FactorGraph, factor: LogFactor, reads: ElementReads
) -> tuple[FactorGraph, LogFactor]:
    """Regroup one factor, or note that its plates are ragged parts of others."""
    foreign = _foreign(graph, factor)
    deepest = max(foreign, key=lambda plates: len(graph.closed(plates)))
    maps: dict[str, Tensor] = {}
    for plates in sorted(foreign, key=lambda plates: len(graph.closed(plates))):
        if not graph.closed(plates) <= graph.closed(deepest):
            raise _crossing(graph, factor, plates, deepest)
        elements = _known_elements(graph, factor, reads, plates)
        for symbol, element in _unravel(graph, elements, plates).items():
            shared = maps.setdefault(symbol, element)
            if symbol in factor.plates:
                own = graph.to_plates(_flat_elements(graph, frozenset(symbol)), reads.inner, left=0)
                shared = own
            if not torch.equal(*torch.broadcast_tensors(shared, element)):
                raise _crossing(graph, factor, plates, deepest)
    _check_nested_maps(graph, factor, maps, deepest, reads.inner)
    outer = graph.tensor_plates(graph.closed(deepest))
    element_map = ElementMap(
        reads.inner, {s: maps[s].contiguous() for s in outer if s not in factor.plates}
    )
    held = {p for symbol in _indices(graph, factor) for p in graph.index_plates[symbol]}
    alone = factor.plates - held
    if alone:
        tensor = packed(factor.tensor, factor.dims)
        tensor = regroup(tensor, alone, element_map, element_map.outer, graph.sizes)
        dims: str = tensor._pyro_dims  # type: ignore[attr-defined]
        plates = (factor.plates - alone) | graph.closed(deepest)
        return graph, LogFactor(factor.name, tensor, dims, plates)
    known = graph.nesting.get(factor.plates)
    if known is None:
        graph = replace(graph, nesting={**graph.nesting, factor.plates: element_map})
    elif known.outer.keys() != element_map.outer.keys() or not all(
        torch.equal(known.outer[s], element_map.outer[s]) for s in known.outer
    ):
        raise NotImplementedError(
            f"site '{factor.name}': the elements of {_names(graph, factor.plates)} read latents of "
            f"{_names(graph, frozenset(element_map.outer))} by another index than another site of "
            "the plate does. With latents of their own, they must read one element each: draw the "
            "latents read by index with .to_event(1), or put them into a group with a global site."
        )
    return graph, factor


def _known_elements(
    graph: FactorGraph, factor: LogFactor, reads: ElementReads, plates: Ordinal
) -> Tensor:
    """Return the element that each element reads; where it reads none, any will do."""
    elements = reads.elements[plates]
    if bool((elements == SEVERAL).any()):
        raise NotImplementedError(
            f"site '{factor.name}': an element of it reads several elements of "
            f"{_names(graph, plates)}. The exact sum over all of them at once is exponential in "
            "the size of the plate: give the latent one particle index for the whole plate, by "
            ".to_event(1) instead of the plate, in guide and model (read it with "
            "pyro.ops.indexing.Vindex)."
        )
    none = elements == NONE
    if bool(none.any()):
        tensor = factor.tensor
        for symbol in _indices(graph, factor):
            if graph.index_plates[symbol] == plates:
                first = tensor.select(factor.dims.index(symbol), 0)
                varies = tensor != first.unsqueeze(factor.dims.index(symbol))
                others = [d for d, s in enumerate(factor.dims) if s not in reads.inner]
                varies = varies.permute(
                    (*others, *(factor.dims.index(s) for s in reads.inner))
                ).reshape(-1, *elements.shape)
                if bool((varies.any(0) & none).any()):
                    raise _unknown(graph, factor)
    return elements.masked_fill(none, 0)


def _unravel(graph: FactorGraph, elements: Tensor, plates: Ordinal) -> dict[str, Tensor]:
    """Split flat elements of some plates into one element of each."""
    result = {}
    for symbol in sorted(plates, reverse=True):
        result[symbol] = elements % graph.sizes[symbol]
        elements = elements // graph.sizes[symbol]
    return result


def _check_nested_maps(
    graph: FactorGraph,
    factor: LogFactor,
    maps: Mapping[str, Tensor],
    deepest: Ordinal,
    inner: str,
) -> None:
    """Check that reading a ragged plate and the plate around it agrees with its own nesting."""
    for ragged, element_map in graph.nesting.items():
        if not ragged <= set(maps):
            continue
        position = tuple(maps[symbol] for symbol in element_map.inner)
        for symbol, around in element_map.outer.items():
            if symbol in maps and not torch.equal(around[position], maps[symbol]):
                raise _crossing(graph, factor, frozenset(symbol), deepest)


def _crossing(
    graph: FactorGraph, factor: LogFactor, one: Ordinal, other: Ordinal
) -> NotImplementedError:
    return NotImplementedError(
        f"site '{factor.name}': it reads latents of {_names(graph, one)} and of "
        f"{_names(graph, other)} by two indices that cross. Effects of one meet those of the other "
        "in loops, and the exact sum is exponential in their size. Give one of the two a single "
        "particle index: draw its vector with .to_event(1) outside the plate, in guide and model, "
        "and read it with pyro.ops.indexing.Vindex(x)[..., index]; or put it into a group with a "
        "global site."
    )
