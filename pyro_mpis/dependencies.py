# SPDX-License-Identifier: Apache-2.0
r"""
Who reads whom, which sites share a particle index, and which batch dim each index gets.

Everything is read off one plain run of guide and model (:func:`pyro_mpis.handlers.run_plainly`),
before any particle is drawn. Words used throughout the package:

* a **random site** is a latent site that draws: sampled in the guide, proposed from the model's
  prior because the guide lacks it, or summed over its whole support;
* a site of the model that the guide gives a ``Delta`` has no particles of its own and is
  **carried** by the random sites that its value was computed from (autoguides work so);
* an **index** is one :math:`k_i` of (18)-(25): the particle of one random site, or of a group of
  them, one for each element of the plates it sits in;
* an **undeclared** dim of a site is a batch dim for which the site is in no plate. It counts as an
  event dim: one particle index for all of it, densities summed over it. It keeps its place among
  the batch dims while programs run, left of which particles are then; so the number of dims for
  plates includes it. The same dim may be a plate's at one site and undeclared at another.

A factor may read only a few indices, however many there are, so two indices that no factor reads
together may share a batch dim (greedy colouring); torch has 64 dims in all.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias, cast

import torch
from opt_einsum import get_symbol
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis._typing import Distribution, SampleMessage
from pyro_mpis.handlers import (
    broadcast_shape,
    first_line,
    is_delta,
    is_enumerated,
    is_latent,
    is_subsample,
    quoted,
    sample_sites,
)

UNIQUE_DIMS = 16  # up to here every index has a dim of its own, and shapes tell what is read
MAX_DIMS = 64  # of a torch tensor

EventDims: TypeAlias = tuple[Mapping[str, int], Mapping[str, int]]  # of sites of guide and model
NO_EVENT_DIMS: EventDims = ({}, {})

Origin = Literal["guide", "prior", "enumerated", "guide_delta", "model_delta"]


@dataclass(frozen=True)
class Plate:
    """A vectorised ``pyro.plate`` of size above one."""

    name: str
    dim: int
    size: int
    symbol: str


@dataclass(frozen=True)
class Site:
    """What a plain run says of one sample site of guide or model."""

    name: str
    event_dim: int
    batch_shape: torch.Size  # of its log_prob
    plates: frozenset[str]  # symbols
    reads: frozenset[str]  # random sites
    silent: bool  # adds nothing to the density, as pyro.deterministic
    event_size: int = 1  # number of elements of an event
    undeclared: tuple[int, ...] = ()  # batch dims without a plate, from the left
    adopted: frozenset[str] = frozenset()  # plates of what it reads, along its undeclared dims

    @property
    def factor_plates(self) -> frozenset[str]:
        """The plates of its ``log_prob``."""
        return self.plates | self.adopted


@dataclass(frozen=True)
class Index:
    """One particle index: :math:`k_i`."""

    symbol: str
    sites: tuple[str, ...]  # random sites that share it
    plates: frozenset[str]  # symbols of the plates it sits in
    dim: int  # batch dim in a replay
    support: int | None = None  # number of values, if summed over its whole support

    @property
    def enumerated(self) -> bool:
        """Whether the index runs over the support of a site, not over particles."""
        return self.support is not None


@dataclass(frozen=True)
class Structure:
    """The static structure of a model and its guide."""

    max_plate_nesting: int
    plates: Mapping[str, Plate]  # by symbol
    guide: Mapping[str, Site]
    model: Mapping[str, Site]
    origins: Mapping[str, Origin]  # of the model's latent sites, in order
    indices: tuple[Index, ...]
    guide_factors: tuple[str, ...]  # pyro.factor in the guide: belongs to the proposal
    event_dims: EventDims = NO_EVENT_DIMS  # batch dims that the programs are run with as such

    @property
    def shared_dim(self) -> int:
        """The batch dim in which particles are drawn."""
        return -1 - self.max_plate_nesting

    @cached_property
    def index_of(self) -> dict[str, Index]:
        """The index of each random site that has one."""
        return {site: index for index in self.indices for site in index.sites}

    @cached_property
    def by_symbol(self) -> dict[str, Index]:
        """The indices by their symbols."""
        return {index.symbol: index for index in self.indices}

    @cached_property
    def plates_of_indices(self) -> frozenset[str]:
        """The plates that hold an index."""
        return frozenset[str]().union(*(index.plates for index in self.indices))

    @cached_property
    def unique_dims(self) -> bool:
        """Whether every index has a dim of its own, so that shapes tell what a tensor reads."""
        return len({index.dim for index in self.indices}) == len(self.indices)

    def proposal_site(self, name: str) -> Site:
        """Return the statement that a random site is drawn from: the guide's or the model's."""
        in_guide = name in self.guide and self.origins.get(name) != "prior"
        return self.guide[name] if in_guide else self.model[name]

    @cached_property
    def undeclared(self) -> dict[str, torch.Size]:
        """The model's sites with batch dims above size one that no plate declares, and shapes."""
        return {
            name: site.batch_shape
            for name, site in self.model.items()
            if not site.silent and any(site.batch_shape[dim] > 1 for dim in site.undeclared)
        }

    def num_particles(self, num_samples: int) -> dict[str, int]:
        """Return the number of particles, or of values, of each index by symbol."""
        return {index.symbol: index.support or num_samples for index in self.indices}

    def elements(self, site: Site) -> int:
        """Return the number of elements, of events too, that one particle's log_prob comes from."""
        plates = math.prod(self.plates[symbol].size for symbol in site.plates)
        undeclared = math.prod(site.batch_shape[dim] for dim in site.undeclared)
        return plates * undeclared * site.event_size

    def summed_dims(self, site: Site) -> list[int]:
        """Return the batch dims of a site that its ``log_prob`` is to be summed over."""
        adopted = {self.plates[symbol].dim for symbol in site.adopted}
        return [dim for dim in site.undeclared if dim not in adopted]

    def reads(self, site: Site) -> frozenset[str]:
        """Return the symbols of the indices that a site depends on, its own included."""
        index_of = self.index_of
        names = site.reads | {site.name}
        return frozenset(index_of[name].symbol for name in names if name in index_of)


def find_max_plate_nesting(traces: Iterable[Trace]) -> int:
    """Return the number of batch dims that the plates of these traces take, as Pyro guesses it."""
    dims = [
        frame.dim
        for trace in traces
        for site in sample_sites(trace).values()
        for frame in site["cond_indep_stack"]
        if frame.dim is not None
    ]
    return -min(dims, default=0)


def analyse(
    guide_trace: Trace,
    model_trace: Trace,
    *,
    guide: object,
    groups: Sequence[Sequence[str]] = (),
    max_plate_nesting: int | None = None,
) -> Structure:
    """
    Work out the structure of a plain run.

    :param guide_trace: of the guide, with provenance; see :func:`~pyro_mpis.handlers.run_plainly`.
    :param model_trace: of the model with the guide's values.
    :param guide: the guide itself: effect-based ones trace the model's own observations too.
    :param groups: sites that share one particle index.
    :param max_plate_nesting: the number of dims reserved for plates, if not to be found here.
    :raises ValueError: if guide and model do not fit each other, or a shape is wrong.
    """
    guide_sites = sample_sites(guide_trace)
    model_sites = sample_sites(model_trace)
    if isinstance(_unwrapped(guide), GuideMessenger):  # it runs the model, observations and all
        guide_sites = {name: site for name, site in guide_sites.items() if is_latent(site)}

    refuse_subsampling((guide_trace, model_trace))
    found_nesting = find_max_plate_nesting((guide_trace, model_trace))
    if max_plate_nesting is None:
        max_plate_nesting = found_nesting
    elif max_plate_nesting < found_nesting:
        raise ValueError(
            f"max_plate_nesting={max_plate_nesting}, but plates reach dim -{found_nesting}. Leave "
            "max_plate_nesting out, or give at least that number."
        )
    _check_guide_matches_model(guide_sites, model_sites)

    origins = _origins(guide_sites, model_sites)
    random = [name for name, site in guide_sites.items() if _is_random(site)]
    random += [name for name, origin in origins.items() if origin in ("prior", "enumerated")]
    plates = _plates((guide_sites, model_sites), first_symbol=len(random))
    read_guide = {name: _read(site, plates) for name, site in guide_sites.items()}
    read_model = {name: _read(site, plates) for name, site in model_sites.items()}
    for name, origin in origins.items():
        if origin == "enumerated":
            read_model[name] = _without_undeclared(read_model[name])
    for site in (*read_guide.values(), *read_model.values()):
        max_plate_nesting = max(max_plate_nesting, len(site.batch_shape))

    guide_factors = tuple(
        name for name, site in guide_sites.items() if site["is_observed"] and not _is_silent(site)
    )
    carried = {
        name: read_guide[name].reads for name, origin in origins.items() if origin == "guide_delta"
    }
    clusters = _clusters(origins, read_guide, carried, guide_factors, groups)
    unplaced = []
    for number, names in enumerate(clusters):
        inside = [_index_plates(name, read_guide, read_model, carried, origins) for name in names]
        unplaced.append(
            Index(
                symbol=get_symbol(number),
                sites=names,
                plates=frozenset.intersection(*inside),
                dim=0,
                support=_support_size(model_sites[names[0]])
                if origins.get(names[0]) == "enumerated"
                else None,
            )
        )
    structure = Structure(
        max_plate_nesting=max_plate_nesting,
        plates={plate.symbol: plate for plate in plates.values()},
        guide=read_guide,
        model=read_model,
        origins=origins,
        indices=tuple(unplaced),
        guide_factors=guide_factors,
    )
    return _with_dims(_with_adopted(structure))


def vector_dims(sites: Mapping[str, Site], latents: Iterable[str]) -> dict[str, int]:
    """
    Return the latent sites outside of all plates that have batch dims, and how many.

    As event dims they would be read by programs that sum over them.
    """
    return {
        name: len(site.batch_shape)
        for name, site in sites.items()
        if name in latents and site.undeclared and len(site.undeclared) == len(site.batch_shape)
    }


def _unwrapped(program: object) -> object:
    while hasattr(program, "func") and callable(program.func):
        program = program.func
    return getattr(program, "fn", program)


def _is_silent(site: SampleMessage) -> bool:
    """Whether an observed site adds nothing to the density."""
    return bool(site["infer"].get("_deterministic")) or site["mask"] is False


def _is_random(site: SampleMessage) -> bool:
    return is_latent(site) and not is_delta(site["fn"])


def _origins(
    guide_sites: Mapping[str, SampleMessage], model_sites: Mapping[str, SampleMessage]
) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    for name, site in model_sites.items():
        if not is_latent(site):
            continue
        in_guide = guide_sites.get(name)
        marked = is_enumerated(site) or (in_guide is not None and is_enumerated(in_guide))
        if marked and not (in_guide is not None and is_delta(in_guide["fn"])):
            if not site["fn"].has_enumerate_support:
                raise ValueError(
                    f"site '{name}': marked infer={{'enumerate': 'parallel'}}, but "
                    f"{type(site['fn']).__name__} has no finite support to sum over. Remove the "
                    "mark: the site is then sampled."
                )
            origins[name] = "enumerated"
        elif in_guide is not None:
            origins[name] = "guide_delta" if is_delta(in_guide["fn"]) else "guide"
        else:
            origins[name] = "model_delta" if is_delta(site["fn"]) else "prior"
    return origins


def _support_size(site: SampleMessage) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return len(site["fn"].enumerate_support(expand=False))


def _clusters(
    origins: Mapping[str, Origin],
    guide: Mapping[str, Site],
    carried: Mapping[str, frozenset[str]],
    guide_factors: Sequence[str],
    groups: Sequence[Sequence[str]],
) -> list[tuple[str, ...]]:
    """Return the random sites that need an index, those of one group together."""
    carriers = frozenset[str]().union(*carried.values(), *(guide[f].reads for f in guide_factors))
    names = [name for name in guide if name in carriers and origins.get(name) != "enumerated"]
    names += [
        name
        for name, origin in origins.items()
        if origin in ("guide", "prior", "enumerated") and name not in names
    ]
    cluster_of: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    grouped: dict[str, tuple[str, ...]] = {}
    for group in groups:
        if isinstance(group, str):
            raise ValueError(f"groups: expected a sequence of site names, but found '{group}'.")
        members: list[str] = []
        for name in group:
            if name not in origins:
                raise ValueError(
                    f"groups: the model has no latent site '{name}'. Its latent sites are "
                    f"{quoted(set(origins))}."
                )
            if origins[name] in ("enumerated", "model_delta"):
                raise ValueError(
                    f"groups: site '{name}' has no particles to share: it is summed over its "
                    "support, or a Delta. Leave it out of the group."
                )
            own = sorted(carried.get(name, {name}), key=names.index)
            members += [site for site in own if site not in members]
        for site in members:
            if site in grouped and grouped[site] != tuple(group):
                raise ValueError(
                    f"groups: site '{site}' is in {grouped[site]} and in {tuple(group)}. A site "
                    "has one particle index: merge the two groups."
                )
            grouped[site] = tuple(group)
            cluster_of[site] = tuple(members)
    return list(dict.fromkeys(cluster_of[name] for name in names))


def _index_plates(
    name: str,
    guide: Mapping[str, Site],
    model: Mapping[str, Site],
    carried: Mapping[str, frozenset[str]],
    origins: Mapping[str, Origin],
) -> frozenset[str]:
    """Return the plates in which a random site is drawn independently, in guide and in model."""
    inside = [model[name].plates] if name in model else []
    if origins.get(name) not in ("prior", "enumerated"):
        inside.append(guide[name].plates)
        for carried_site, carriers in carried.items():
            if name in carriers:
                inside += [model[carried_site].plates, guide[carried_site].plates]
    return frozenset.intersection(*inside)


def _with_dims(structure: Structure) -> Structure:
    """Give each index a batch dim; two that are read together get different ones."""
    sites = [*structure.model.values(), *structure.guide.values()]
    together = [structure.reads(site) for site in sites if not site.silent]
    colour: dict[str, int] = {}
    if len(structure.indices) <= UNIQUE_DIMS:
        colour = {index.symbol: number for number, index in enumerate(structure.indices)}
    else:
        conflicts: dict[str, set[str]] = {index.symbol: set() for index in structure.indices}
        for symbols in together:
            for symbol in symbols:
                conflicts[symbol] |= symbols
        for index in structure.indices:
            taken = {colour[other] for other in conflicts[index.symbol] if other in colour}
            colour[index.symbol] = next(c for c in range(len(taken) + 1) if c not in taken)
    needed = structure.max_plate_nesting + max(colour.values(), default=0) + 3
    needed += max((site.event_dim for site in structure.model.values()), default=0)
    if needed > MAX_DIMS:
        worst = max(structure.model.values(), key=lambda site: len(structure.reads(site)))
        raise NotImplementedError(
            f"site '{worst.name}': it reads {len(structure.reads(worst))} latent sites, each with "
            f"particles in a dim of its own: {needed} dims, and a tensor has {MAX_DIMS}. Let some "
            "of them share one particle index: groups=[(...), ...]."
        )
    indices = tuple(
        replace(index, dim=structure.shared_dim - colour[index.symbol])
        for index in structure.indices
    )
    return replace(structure, indices=indices)


def _with_adopted(structure: Structure) -> Structure:
    """
    Put densities into the plates of what they read, where undeclared dims lie along these.

    As of an observation outside of the plate of its latent: element j of it reads element j of the
    latent, so its density is a factor of the plate. That it does is checked on the particles.
    """

    def adopting(site: Site) -> Site:
        inside = (structure.by_symbol[symbol].plates for symbol in structure.reads(site))
        around = frozenset[str]().union(*inside) - site.plates
        adopted = [
            symbol
            for symbol in around
            if structure.plates[symbol].dim in site.undeclared
            and structure.plates[symbol].size == site.batch_shape[structure.plates[symbol].dim]
        ]
        dims = {structure.plates[symbol].dim for symbol in adopted}
        return replace(site, adopted=frozenset(adopted)) if len(dims) == len(adopted) else site

    return replace(
        structure, model={name: adopting(site) for name, site in structure.model.items()}
    )


def _plates(
    programs: Sequence[Mapping[str, SampleMessage]], *, first_symbol: int
) -> dict[str, Plate]:
    """Return the plates of size above one by name."""
    plates: dict[str, Plate] = {}
    for sites in programs:
        for site in sites.values():
            for frame in site["cond_indep_stack"]:
                if frame.dim is None or frame.size == 1:
                    continue
                symbol = get_symbol(first_symbol + len(plates))
                plate = Plate(frame.name, frame.dim, int(frame.size), symbol)
                known = plates.setdefault(frame.name, plate)
                if (known.dim, known.size) != (plate.dim, plate.size):
                    raise ValueError(
                        f"plate '{frame.name}': dim {plate.dim} and size {plate.size} at site "
                        f"'{site['name']}', but dim {known.dim} and size {known.size} before. Give "
                        "a plate the same dim= and size in guide and model, and two different "
                        "plates different names."
                    )
    return plates


def _read(site: SampleMessage, plates: Mapping[str, Plate]) -> Site:
    """Find the shape of one site of a plain run, and what it reads."""
    name, fn = site["name"], site["fn"]
    value = detach_provenance(site["value"])
    reads = get_provenance(site["value"])
    batch_shape = fn.batch_shape
    if not _is_silent(site):
        log_prob, read_by_log_prob = _log_prob(name, fn, value)
        reads |= read_by_log_prob
        factors = (_shape(site[key]) for key in ("mask", "scale"))
        batch_shape = broadcast_shape(batch_shape, log_prob.shape, *factors)
    if is_latent(site):  # the value is the guide's, and may have more dims of size one
        batch_shape = batch_shape[len(batch_shape) - len(fn.batch_shape) :]
    reads |= get_provenance(site["mask"]) | get_provenance(site["scale"])
    if is_latent(site) and get_provenance(site["mask"]):
        raise NotImplementedError(
            f"site '{name}': a latent site under a mask computed from {quoted(reads - {name})}. "
            "Where it is masked it has neither a prior nor a proposal to weigh. Mask what reads "
            "the site instead, choose its value with torch.where, or leave it out of the guide."
        )
    frames = site["cond_indep_stack"]
    declared = {frame.dim: int(frame.size) for frame in frames if frame.dim is not None}
    # size one, right of a plate: that is how Pyro itself expands a site of a plate on the left
    undeclared = tuple(
        dim
        for dim, size in enumerate(batch_shape, start=-len(batch_shape))
        if declared.get(dim) != size and (size != 1 or dim < min(declared, default=0))
    )
    return Site(
        name=name,
        event_dim=fn.event_dim,
        batch_shape=batch_shape,
        plates=frozenset(plates[frame.name].symbol for frame in frames if frame.name in plates),
        reads=reads - {name},
        silent=_is_silent(site),
        event_size=fn.event_shape.numel(),
        undeclared=undeclared,
    )


def _without_undeclared(site: Site) -> Site:
    """Refuse undeclared dims of an enumerated site: its support is summed at each plate element."""
    for dim in site.undeclared:
        if site.batch_shape[dim] > 1:
            raise ValueError(
                f"site '{site.name}': marked infer={{'enumerate': 'parallel'}}, but dim {dim} of "
                f"its batch shape {tuple(site.batch_shape)} is in no pyro.plate, so that the sum "
                "would be over all elements at once. Enclose the site in a pyro.plate of size "
                f"{site.batch_shape[dim]}, or remove the mark."
            )
    return replace(site, undeclared=())


def _log_prob(name: str, fn: Distribution, value: Tensor) -> tuple[Tensor, frozenset[str]]:
    """Return the log_prob of a site, and the random sites that it reads."""
    try:
        log_prob = fn.log_prob(value)
        return detach_provenance(log_prob), get_provenance(log_prob)
    except Exception:
        pass  # some code cannot take tensors with provenance: look at the arguments instead
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return fn.log_prob(value), _argument_provenance(fn)
    except Exception as error:
        if not isinstance(value, Tensor):
            raise ValueError(
                f"site '{name}': its value is not a tensor, but {type(value).__name__}. Convert "
                "data by torch.as_tensor."
            ) from error
        raise ValueError(
            f"site '{name}': no log_prob of a value of shape {_shape(value)} under "
            f"{type(fn).__name__} of batch shape {tuple(fn.batch_shape)} and event shape "
            f"{tuple(fn.event_shape)}: {first_line(error)}. {_remedy(value)}"
        ) from error


def _remedy(value: Tensor) -> str:
    """Say what to do with an observation that has no log_prob."""
    if value.dtype == torch.bool:
        return "Its dtype is bool: give it as numbers, by .float()."
    if bool(value.isnan().any()):
        return (
            "It has nan, which has no density even where poutine.mask hides it: put any number of "
            "the support there, by torch.nan_to_num(data), and mask it."
        )
    return "Give the value the shape of the distribution, and values inside its support."


def _argument_provenance(fn: object) -> frozenset[str]:
    """Return the provenance of the tensors that a distribution holds, parts included."""
    found: frozenset[str] = frozenset()
    for value in vars(fn).values():
        found |= get_provenance(value)
        if isinstance(value, torch.distributions.Distribution):
            found |= _argument_provenance(value)
    return found


def _shape(value: object) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def refuse_subsampling(traces: Iterable[Trace]) -> None:
    """Refuse plates that select a minibatch."""
    for trace in traces:
        for name, node in trace.nodes.items():
            site = cast(SampleMessage, node)
            if site["type"] != "sample" or not is_subsample(site):
                continue
            size = int(site["fn"].size)
            if len(site["value"]) < size:
                raise ValueError(
                    f"plate '{name}': a subsample of {len(site['value'])} of {size}. The evidence "
                    "and the posterior of a minibatch are not those of the data: run on all of "
                    "it (leave out subsample_size= and subsample=)."
                )


def _check_guide_matches_model(
    guide_sites: Mapping[str, SampleMessage], model_sites: Mapping[str, SampleMessage]
) -> None:
    latents = {name for name, site in model_sites.items() if is_latent(site)}
    for name, site in guide_sites.items():
        if not is_latent(site) or (name not in model_sites and site["infer"].get("is_auxiliary")):
            continue
        if name not in model_sites:
            raise ValueError(
                f"site '{name}': in the guide, but not in the model, whose latent sites are "
                f"{quoted(latents)}. Rename or remove it, or mark it "
                "infer={'is_auxiliary': True} if other sites of the guide are computed from it."
            )
        if name not in latents:
            raise ValueError(
                f"site '{name}': observed in the model, but sampled in the guide. Remove it from "
                "the guide (an autoguide is to be made from the conditioned model)."
            )


def check_same_site(guide_site: SampleMessage, model_site: SampleMessage) -> None:
    """
    Check that guide and model agree on the support and the shape of a site that both sample.

    :raises ValueError: if not.
    """
    name = model_site["name"]
    _check_supports(name, guide_site["fn"], model_site["fn"])
    guide_shape, model_shape = _shape(guide_site["value"]), tuple(model_site["fn"].shape())
    if _squeezed(guide_shape) != _squeezed(model_shape):
        raise ValueError(
            f"site '{name}': the guide's value has shape {guide_shape}, the model's {model_shape}. "
            "Give both the same plates and event shape."
        )


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Drop the dims of size one on the left."""
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        del sizes[0]
    return tuple(sizes)


def _check_supports(name: str, guide: Distribution, model: Distribution) -> None:
    """Refuse a guide that draws outside the model's support, or cannot reach all of it."""
    if guide.support is model.support or is_delta(guide) or is_delta(model):
        return
    ours, theirs = _interval(guide), _interval(model)
    if ours is None or theirs is None:
        return
    same = ours[0] == theirs[0] and all(
        torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double())
        if _shape(a) == _shape(b) or not _shape(a) or not _shape(b)
        else True
        for a, b in zip(ours[1:], theirs[1:], strict=True)
    )
    if not same:
        raise ValueError(
            f"site '{name}': the guide's {type(guide).__name__} has support "
            f"{_describe(ours)}, the model's {type(model).__name__} {_describe(theirs)}. Use a "
            "guide with the model's support, for example a Normal pushed through "
            "torch.distributions.biject_to(support)."
        )


Interval = tuple[str, object, object]  # kind, lower, upper


def _interval(fn: Distribution) -> Interval | None:
    """Return a comparable description of a support; None where there is nothing to compare."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real and hasattr(fn, "transforms"):
        return None  # an affine transform says so of any interval
    infinite = float("inf")
    if support is constraints.boolean:
        return "integer", 0, 1
    if isinstance(support, constraints.integer_interval):
        return "integer", support.lower_bound, support.upper_bound
    if isinstance(support, type(constraints.nonnegative_integer)):
        return "integer", support.lower_bound, infinite
    if isinstance(support, constraints.interval | constraints.half_open_interval):
        return "real", support.lower_bound, support.upper_bound
    if isinstance(support, constraints.greater_than | constraints.greater_than_eq):
        return "real", support.lower_bound, infinite
    if isinstance(support, constraints.less_than):
        return "real", -infinite, support.upper_bound
    if support in (constraints.real, constraints.real_vector):
        return "real", -infinite, infinite
    special = (constraints.simplex, constraints.corr_cholesky, constraints.lower_cholesky)
    for constraint in special:
        if support is constraint:
            return str(constraint), 0, 0
    return None


def _describe(interval: Interval) -> str:
    kind, lower, upper = interval
    if kind not in ("integer", "real"):
        return kind

    def bound(value: object) -> str:
        number = value.flatten()[0] if isinstance(value, Tensor) else value
        return f"{float(number):g}"  # type: ignore[arg-type]

    return f"[{bound(lower)}, {bound(upper)}]" + (" (integers)" if kind == "integer" else "")
