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
place of nan. All this is done at many combinations of particles, since which element is read may
depend on a latent (a change point, a mixture's component): then several are. The same runs check
that within a plate each element reads only its own element of the latents.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import pyro
import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal, SampleMessage
from pyro_mpis.dependencies import Structure
from pyro_mpis.factor_graph.evidence import over_plates
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor, RaggedPlate
from pyro_mpis.factor_graph.packed import packed
from pyro_mpis.factor_graph.ragged import regroup
from pyro_mpis.handlers import Name, Programs, replay
from pyro_mpis.proposals import Particles, model_inputs

NONE, SEVERAL = -1, -2  # in place of an element
# Elements of a probe's tensors, event dims aside: where which element is read is to be found, at
# MIN_ROWS combinations of particles or more; and where all is only to be checked, at one or more.
PROBE_ELEMENTS = 2**22
CHECK_ELEMENTS = 2**16
MIN_BITS = 2  # of an element's number in a check; in a plate of more elements than these tell apart
MIN_ROWS = 4


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
    foreign = [factor.name for factor in graph.factors if _foreign(graph, factor)]
    foreign += [name for name, site in structure.model.items() if site.adopted]
    plated = any(graph.index_plates.values())
    if not plated or not (foreign or check):
        return {}
    largest = max(
        math.prod(graph.sizes[symbol] for symbol in site.factor_plates)
        for site in structure.model.values()
    )
    elements, min_rows = (PROBE_ELEMENTS, MIN_ROWS) if foreign else (CHECK_ELEMENTS, 1)
    max_runs = elements // largest
    numbers = _numbers(graph, None if foreign else max_runs)
    try:
        reads = _probe(graph, structure, particles, programs, numbers, max_runs, min_rows)
    except ValueError as error:
        if not foreign:
            return {}
        raise NotImplementedError(
            f"site '{foreign[0]}': it reads latents of a plate that it is not in, and which "
            f"element it reads could not be found out: {error}"
        ) from error
    for factor in graph.factors:
        if factor.name in reads:
            _check_own_elements(graph, factor, reads[factor.name], numbers)
    return reads if foreign else {}


def check_provenance(
    graph: FactorGraph, structure: Structure, particles: Particles, programs: Programs
) -> None:
    """
    Check that sites depend on no latent but those that they were seen to read.

    Needed where indices share dims: there, shapes do not tell. Each index is changed in the runs
    of the bits of its number, as elements of plates are.

    :raises NotImplementedError: if a dependence was missed.
    """
    numbers = {index.symbol: number for number, index in enumerate(structure.indices)}
    bits = _num_bits(len(numbers))
    codes = {symbol: _code(torch.tensor(n), bits).reshape(-1) for symbol, n in numbers.items()}
    patterns = {
        name: codes[index.symbol].reshape((-1,) + (1,) * structure.max_plate_nesting)
        for name, index in structure.index_of.items()
    }
    values = _known_values(graph, structure, particles)
    log_probs = _probed_log_probs(structure, programs, values, patterns, range(1))
    for name, log_prob in log_probs.items():
        changed = _differs(log_prob, log_prob[:1]).flatten(1).any(1)
        expected = torch.zeros(1 + 2 * bits, dtype=torch.bool)
        for symbol in structure.reads(structure.model[name]):
            expected |= codes[symbol]
        if bool((changed & ~expected.to(changed.device)).any()):
            raise NotImplementedError(
                f"site '{name}': it depends on latents besides those that it was seen to be "
                "computed from, which matters with this many latents. Compute it by torch "
                "operations, without writing into a tensor in place and without leaving torch."
            )


def regroup_indexed(graph: FactorGraph, reads: SiteReads) -> FactorGraph:
    """
    Regroup the factors that read latents of other plates by index.

    :raises NotImplementedError: if an element reads several elements, or plates cross.
    """
    if not reads and not any(_foreign(graph, factor) for factor in graph.factors):
        return graph
    factors: list[LogFactor] = []
    for factor in sorted(graph.factors, key=lambda f: (not _has_local(graph, f), len(f.plates))):
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


def _numbers(graph: FactorGraph, max_runs: int | None) -> dict[Ordinal, tuple[Tensor, int]]:
    """
    Give each element of the plates of an index a number.

    :param max_runs: where a check is to take no more runs, numbers of few bits, drawn at random,
        which two elements may share; at least :data:`MIN_BITS`.
    :return: for each ordinal the numbers, in its batch dims, and how many bits they have.
    """
    ordinals = sorted({plates for plates in graph.index_plates.values() if plates}, key=sorted)
    numbers = {}
    for plates in ordinals:
        size = math.prod(graph.sizes[symbol] for symbol in plates)
        bits = _num_bits(size)
        number = _flat_elements(graph, plates)
        fitting = bits if max_runs is None else max(MIN_BITS, max_runs // (2 * len(ordinals)))
        if fitting < bits:
            generator = torch.Generator().manual_seed(0)
            number = torch.randint(2**fitting, number.shape, generator=generator).to(graph.device)
        numbers[plates] = number, min(fitting, bits)
    return numbers


def _probe(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    numbers: Mapping[Ordinal, tuple[Tensor, int]],
    max_runs: int,
    min_rows: int,
) -> SiteReads:
    """
    Change elements of the latents by the bits of their numbers, and see what else changes.

    :param numbers: of the elements of each ordinal, with their numbers of bits.
    :param max_runs: how many runs to take together, at as many combinations of particles as fit.
    :param min_rows: at how many combinations at least, if there are as many particles.
    """
    slots: dict[Ordinal, tuple[int, int]] = {}
    total = 1  # the first run changes nothing
    for plates, (_, bits) in numbers.items():
        slots[plates] = (total, bits)
        total += 2 * bits
    patterns = {}
    for name, index in structure.index_of.items():
        if index.plates:
            start, bits = slots[index.plates]
            code = _code(numbers[index.plates][0], bits)[1:]
            pattern = code.new_zeros((total, *code.shape[1:]))
            pattern[start : start + 2 * bits] = code
            patterns[name] = pattern
    fitting, available = max(1, max_runs // total), max(particles.sizes.values())
    wanted = min(available, max(fitting, min_rows))
    values = _known_values(graph, structure, particles)
    changed: dict[str, list[Tensor]] = {}
    for first in range(0, wanted, fitting):
        rows = range(first, min(first + fitting, wanted))
        log_probs = _probed_log_probs(structure, programs, values, patterns, rows)
        for name, log_prob in log_probs.items():
            inner = "".join(sorted(structure.model[name].factor_plates))
            part = _differs(log_prob, log_prob[:1])
            for dim in structure.summed_dims(structure.model[name]):
                part = part.any(dim, keepdim=True)
            changed.setdefault(name, []).append(graph.to_plates(part, inner, left=2))
    reads = {}
    for name, parts in changed.items():
        inner = "".join(sorted(structure.model[name].factor_plates))
        together = torch.cat(parts, 1)
        ordinals = {
            structure.by_symbol[symbol].plates for symbol in structure.reads(structure.model[name])
        }
        elements = {p: _decode(together, *slots[p]) for p in slots if p in ordinals}
        reads[name] = ElementReads(inner, elements)
    return reads


def _known_values(
    graph: FactorGraph, structure: Structure, particles: Particles
) -> dict[str, Tensor]:
    """Return the values of every random site: (K, *plates, *event), or its whole support."""
    drawn = particles.values.items()
    values = {name: value for name, value in drawn if name not in particles.deltas}
    for index in structure.indices:
        if index.enumerated:
            values[index.sites[0]] = graph.values[index.sites[0]].tensor
    return values


def _probed_log_probs(
    structure: Structure,
    programs: Programs,
    known: Mapping[str, Tensor],
    patterns: Mapping[str, Tensor],
    rows: range,
) -> dict[str, Tensor]:
    """Change latents to nan, or, where that stops the model, to another particle's value."""
    try:
        return _probing_runs(structure, programs, known, patterns, rows, with_nan=True)
    except ValueError:  # as a Cholesky factor does
        return _probing_runs(structure, programs, known, patterns, rows, with_nan=False)


def _probing_runs(
    structure: Structure,
    programs: Programs,
    known: Mapping[str, Tensor],
    patterns: Mapping[str, Tensor],
    rows: range,
    *,
    with_nan: bool,
) -> dict[str, Tensor]:
    """
    Evaluate the model with some of its latents' elements changed.

    :param known: the random sites' values, ``(number, *plates, *event)``.
    :param patterns: for the sites to change, the elements that each run changes,
        ``(runs, *plates)``; the first run changes none.
    :param rows: which of the combinations of particles, in a random order, to do it at.
    :param with_nan: whether to change continuous latents to nan; otherwise, and discrete ones
        always, to the value of the next particle.
    :return: for each site that reads one of these its log_prob, ``(runs, rows, *plates)``.
    """
    runs = max((len(pattern) for pattern in patterns.values()), default=1)
    generator = torch.Generator().manual_seed(0)  # the same rows for all blocks and queries
    values = {}
    for name, value in known.items():
        size = len(value)
        shuffled = partial(torch.randperm, size, generator=generator, device="cpu")
        order = torch.cat([shuffled() for _ in range(math.ceil(rows.stop / size))])
        order = order[rows.start : rows.stop].to(value.device)
        other = value[(order + 1) % size]
        value = value[order]
        if with_nan and value.is_floating_point():
            other = torch.full_like(value, torch.nan)
        value, other = value.unsqueeze(0), other.unsqueeze(0)
        if name in patterns:
            pattern = patterns[name].to(value.device).unsqueeze(1)  # (runs, 1, *plates)
            event_dim = value.dim() - 2 - structure.max_plate_nesting
            value = torch.where(pattern.reshape(pattern.shape + (1,) * event_dim), other, value)
        value = value.expand((runs, len(rows), *value.shape[2:]))
        values[name] = value.reshape((runs * len(rows), *value.shape[2:]))

    def run(name: Name, values: Mapping[str, Tensor]) -> dict[str, SampleMessage]:
        return replay(programs, name, values=values, enumerated={}, num_samples=runs * len(rows))

    carried = {}
    if "guide_delta" in structure.origins.values():
        guide_values = {name: value for name, value in values.items() if name in structure.guide}
        carried = {name: site["value"] for name, site in run("guide", guide_values).items()}
    log_probs = {}
    with pyro.validation_enabled(False):
        for name, site in run("model", model_inputs(structure, values, carried)).items():
            own = structure.model[name]
            if own.silent or not any(other in patterns for other in own.reads | {name}):
                continue
            log_prob = site["fn"].log_prob(site["value"])
            if isinstance(site["mask"], Tensor):
                log_prob = log_prob.where(site["mask"], 0.0)
            dims = 1 + structure.max_plate_nesting
            log_prob = log_prob.reshape((1,) * (dims - log_prob.dim()) + log_prob.shape)
            log_prob = log_prob.expand((runs * len(rows), *log_prob.shape[1:]))
            log_probs[name] = log_prob.reshape((runs, len(rows), *log_prob.shape[1:]))
    return log_probs


def _differs(x: Tensor, y: Tensor) -> Tensor:
    """Return where two tensors differ by more than rounding; nan differs from everything."""
    finite = y[y.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    noise = 100.0 * torch.finfo(y.dtype).eps * (1.0 + largest)
    return (x != y) & ~((x - y).abs() <= noise)


def _num_bits(size: int) -> int:
    """Return how many bits tell ``size`` numbers apart, one or more."""
    return max(1, math.ceil(math.log2(size)))


def _code(numbers: Tensor, bits: int) -> Tensor:
    """Return in which runs each number is changed: (1 + 2 bits, *shape); in the first, none is."""
    shifts = torch.arange(bits, device=numbers.device).reshape((-1,) + (1,) * numbers.dim())
    is_set = numbers.bitwise_right_shift(shifts).bitwise_and(1).bool()
    return torch.cat([torch.zeros_like(is_set[:1]), is_set, ~is_set])


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


def _decode(changed: Tensor, start: int, bits: int) -> Tensor:
    """
    Read off which element matters.

    :param changed: ``(runs, rows, *inner)``.
    :return: the flat element, ``(*inner)``; NONE, or SEVERAL where rows differ too.
    """
    ones = changed[start : start + bits]
    zeros = changed[start + bits : start + 2 * bits]
    weights = 2 ** torch.arange(bits, device=changed.device)
    element = (ones.long() * weights.reshape((-1,) + (1,) * (ones.dim() - 1))).sum(0)
    nothing = ~(ones | zeros).any(0)
    single = (ones ^ zeros).all(0)
    highest = element.masked_fill(nothing, NONE).amax(0)
    lowest = element.masked_fill(nothing, int(2**bits)).amin(0)
    several = (~single & ~nothing).any(0) | ((lowest != highest) & (highest != NONE))
    return highest.masked_fill(several, SEVERAL)


def _check_own_elements(
    graph: FactorGraph,
    factor: LogFactor,
    reads: ElementReads,
    numbers: Mapping[Ordinal, tuple[Tensor, int]],
) -> None:
    """Refuse a factor whose plate elements read other elements than their own."""
    ordinals = {graph.index_plates[symbol] for symbol in _indices(graph, factor)}
    for plates in sorted(ordinals, key=sorted):
        if not plates or not plates <= factor.plates:
            continue
        found = reads.elements[plates]
        own = graph.to_plates(numbers[plates][0], reads.inner, left=0)
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
        "which element could not be found out (discrete latents, comparisons and integers hide it, "
        "and so does writing into a tensor). Put values among data by torch.where(missing, "
        "x[..., index], data), mark a discrete latent for enumeration and draw it where it is "
        "read, or give the vector of latents one particle index with .to_event(1)."
    )


def _resolve(
    graph: FactorGraph, factor: LogFactor, reads: ElementReads
) -> tuple[FactorGraph, LogFactor]:
    """Regroup one factor, or note that its plates are ragged parts of others."""
    foreign = _foreign(graph, factor)
    graph = _with_nested(graph, reads, foreign)
    deepest = max(foreign, key=lambda plates: len(graph.with_enclosing(plates)))
    maps: dict[str, Tensor] = {}  # NONE where nothing is read
    for plates in sorted(foreign, key=lambda plates: len(graph.with_enclosing(plates))):
        if not graph.with_enclosing(plates) <= graph.with_enclosing(deepest):
            raise _crossing(graph, factor, plates, deepest)
        elements = _known_elements(graph, factor, reads, plates)
        for symbol, element in _unravel(graph, elements, plates).items():
            if symbol in factor.plates:
                own = graph.to_plates(_flat_elements(graph, frozenset(symbol)), reads.inner, left=0)
                maps[symbol] = own
            before = maps.get(symbol, element)
            if not _agree(before, element):
                raise _crossing(graph, factor, plates, deepest)
            maps[symbol] = torch.where(before == NONE, element, before)
    _check_nested_maps(graph, factor, maps, deepest)
    outer = graph.tensor_plates(graph.with_enclosing(deepest))
    maps = {s: maps[s] for s in outer if s not in factor.plates}
    held = {p for symbol in _indices(graph, factor) for p in graph.index_plates[symbol]}
    alone = factor.plates - held
    if not _local_plates(graph, factor) <= graph.with_enclosing(deepest):
        return _ragged(graph, over_plates(factor, alone), reads.inner, maps, alone)
    tensor = packed(factor.tensor, factor.dims)
    tensor = regroup(tensor, alone, _element_map(reads.inner, maps), maps, graph.sizes)
    dims: str = tensor._pyro_dims  # type: ignore[attr-defined]
    plates = (factor.plates - alone) | graph.with_enclosing(deepest)
    return graph, LogFactor(factor.name, tensor, dims, plates)


def _with_nested(graph: FactorGraph, reads: ElementReads, foreign: list[Ordinal]) -> FactorGraph:
    """
    Note which plates lie in others by the elements that are read together.

    As classes in schools, where a pupil reads the effect of its class and that of its school.
    """
    for inner, outer in itertools.permutations(sorted(foreign, key=sorted), 2):
        ((inside, *more), (around, *others)) = sorted(inner), sorted(outer)
        related = graph.with_enclosing(inner) | graph.with_enclosing(outer)
        if more or others or len(related) > 2 or any(inner <= key for key in graph.ragged):
            continue
        read, position = reads.elements[outer], reads.elements[inner]
        if bool(((read < 0) | (position < 0)).any()):
            continue
        element = torch.zeros(graph.sizes[inside], dtype=read.dtype, device=read.device)
        element[position.flatten()] = read.flatten()
        if bool((element[position] == read).all()):
            element_map = RaggedPlate(inside, {around: element})
            return replace(graph, ragged={**graph.ragged, inner: element_map})
    return graph


def _element_map(inner: str, maps: Mapping[str, Tensor]) -> RaggedPlate:
    """Return a map; where nothing is read any element will do: what it gets is a constant."""
    return RaggedPlate(inner, {s: element.clamp(min=0).contiguous() for s, element in maps.items()})


def _local_plates(graph: FactorGraph, factor: LogFactor) -> Ordinal:
    """Return the plates of the indices that a factor reads inside of them."""
    ordinals = {graph.index_plates[symbol] for symbol in _indices(graph, factor)}
    return frozenset[str]().union(*(plates for plates in ordinals if plates <= factor.plates))


def _ragged(
    graph: FactorGraph, factor: LogFactor, inner: str, maps: Mapping[str, Tensor], alone: Ordinal
) -> tuple[FactorGraph, LogFactor]:
    """
    Note that the plates of a factor are ragged parts of others.

    Those of them along which the same elements are read are left out: as the occasions, of houses
    that each lie in one county. If all could be, those stay that another site's map has, or that
    hold an index of their own.

    :param maps: the elements that are read, NONE where nothing is, by plate: ``(*inner)``.
    :param alone: plates that the factor has been summed over, which must be among these.
    """
    implied = [
        known
        for key, known in graph.ragged.items()
        if key <= factor.plates and known.outer.keys() == maps.keys()
    ]
    local = [plates for plates in graph.index_plates.values() if plates <= factor.plates]
    kept = set(implied[0].inner) if implied else min(filter(None, local), key=len)
    for symbol in sorted(inner, key=lambda symbol: (symbol not in alone, symbol in kept)):
        dim = inner.index(symbol)
        some = {s: element.amax(dim) for s, element in maps.items()}
        constant = all(_agree(maps[s], element.unsqueeze(dim)) for s, element in some.items())
        if constant and len(inner) > 1:
            inner, maps = inner.replace(symbol, ""), some
        elif symbol in alone:
            raise _crossing(graph, factor, frozenset(maps), factor.plates)
    key = frozenset(inner)
    known = graph.ragged.get(key)
    both = [key | k for k, other in graph.ragged.items() if other.outer.keys() & maps.keys()]
    if known is None and not any(p <= f.plates for p in both for f in graph.factors):
        graph = replace(graph, ragged={**graph.ragged, key: _element_map(inner, maps)})
    elif (
        known is None
        or known.outer.keys() != maps.keys()
        or not all(_agree(known.outer[s], maps[s]) for s in known.outer)
    ):
        raise NotImplementedError(
            f"site '{factor.name}': the elements of {_names(graph, key)} read latents of "
            f"{_names(graph, frozenset(maps))} by another index than another site of "
            "the plate does. With latents of their own, they must read one element each: draw the "
            "latents read by index with .to_event(1), or put them into a group with a global site."
        )
    return graph, factor


def _known_elements(
    graph: FactorGraph, factor: LogFactor, reads: ElementReads, plates: Ordinal
) -> Tensor:
    """Return the element that each element reads, or NONE."""
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
                varies = _differs(tensor, first.unsqueeze(factor.dims.index(symbol)))
                others = [d for d, s in enumerate(factor.dims) if s not in reads.inner]
                varies = varies.permute(
                    (*others, *(factor.dims.index(s) for s in reads.inner))
                ).reshape(-1, *elements.shape)
                if bool((varies.any(0) & none).any()):
                    raise _unknown(graph, factor)
    return elements


def _agree(x: Tensor, y: Tensor) -> bool:
    """Whether two maps have the same elements wherever both have one."""
    return bool(((x == y) | (x == NONE) | (y == NONE)).all())


def _unravel(graph: FactorGraph, elements: Tensor, plates: Ordinal) -> dict[str, Tensor]:
    """Split flat elements of some plates into one element of each; NONE stays NONE."""
    result = {}
    none = elements == NONE
    for symbol in sorted(plates, reverse=True):
        result[symbol] = (elements % graph.sizes[symbol]).masked_fill(none, NONE)
        elements = elements // graph.sizes[symbol]
    return result


def _check_nested_maps(
    graph: FactorGraph,
    factor: LogFactor,
    maps: Mapping[str, Tensor],
    deepest: Ordinal,
) -> None:
    """Check that reading a ragged plate and the plate around it agrees with its own nesting."""
    for ragged, element_map in graph.ragged.items():
        if not ragged <= set(maps):
            continue
        position = tuple(maps[symbol].clamp(min=0) for symbol in element_map.inner)
        for symbol, around in element_map.outer.items():
            if symbol in maps and not _agree(around[position], maps[symbol]):
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
