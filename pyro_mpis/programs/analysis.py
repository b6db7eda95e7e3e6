# SPDX-License-Identifier: Apache-2.0
"""
Work out the structure of a model and its guide from one plain run, before any particle is drawn.

The values of that run carry the names of the random sites that they were computed from
(:func:`pyro_mpis.programs.runs.run_plainly`). Marks can be lost, by a write in place or in code
outside of torch; what the mapped runs read corrects them later.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from opt_einsum import get_symbol
from pyro.distributions import MaskedDistribution
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis._text import broadcast_shape, first_line, quoted
from pyro_mpis._typing import Distribution, SampleMessage
from pyro_mpis.programs.agreement import check_guide_matches_model
from pyro_mpis.programs.densities import inside_of, is_checked, unchecked
from pyro_mpis.programs.indices import clusters_of, index_plates
from pyro_mpis.programs.masks import taken_apart
from pyro_mpis.programs.messages import (
    batch_shape_of,
    event_shape_of,
    has_log_density,
    is_delta,
    is_enumerated,
    is_latent,
    is_silent,
    statements,
)
from pyro_mpis.programs.structure import Index, Obstacle, Origin, Plate, Site, Structure
from pyro_mpis.programs.subsampling import refuse_sequential, scale_of
from pyro_mpis.programs.tensors import tensors_of


def find_max_plate_nesting(traces: Iterable[Trace]) -> int:
    """Return the number of batch dims that the plates of these traces take, as Pyro guesses it."""
    dims = [
        frame.dim
        for trace in traces
        for site in statements(trace).values()
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

    :param guide_trace: of the guide, with provenance; see
        :func:`~pyro_mpis.programs.runs.run_plainly`.
    :param model_trace: of the model with the guide's values.
    :param guide: the guide itself: effect-based ones trace the model's own observations too.
    :param groups: sites that share one particle index.
    :param max_plate_nesting: the number of dims reserved for plates, if not to be found here.
    :raises ValueError: if guide and model do not fit each other, or a shape is wrong.
    """
    guide_sites = statements(guide_trace)
    model_sites = statements(model_trace)
    if isinstance(_unwrapped(guide), GuideMessenger):  # it runs the model, observations and all
        guide_sites = {name: site for name, site in guide_sites.items() if is_latent(site)}

    refuse_sequential((guide_trace, model_trace))
    found_nesting = find_max_plate_nesting((guide_trace, model_trace))
    if max_plate_nesting is None:
        max_plate_nesting = found_nesting
    elif max_plate_nesting < found_nesting:
        raise ValueError(
            f"max_plate_nesting={max_plate_nesting}, but plates reach dim -{found_nesting}. Leave "
            "max_plate_nesting out, or give at least that number."
        )
    check_guide_matches_model(guide_sites, model_sites)

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
        name
        for name, site in guide_sites.items()
        if not is_silent(site)
        and (site["is_observed"] or (name not in origins and has_log_density(site["fn"])))
    )
    carried = {
        name: read_guide[name].reads for name, origin in origins.items() if origin == "guide_delta"
    }
    indices = []
    clusters = clusters_of(origins, read_guide, carried, guide_factors, groups)
    for number, names in enumerate(clusters):
        inside = [index_plates(name, read_guide, read_model, carried, origins) for name in names]
        is_sum = origins.get(names[0]) == "enumerated"
        indices.append(
            Index(
                symbol=get_symbol(number),
                sites=names,
                plates=frozenset.intersection(*inside),
                support=_support_size(model_sites[names[0]]) if is_sum else None,
            )
        )
    structure = Structure(
        max_plate_nesting=max_plate_nesting,
        plates={plate.symbol: plate for plate in plates.values()},
        guide=read_guide,
        model=read_model,
        origins=origins,
        indices=tuple(indices),
        guide_factors=guide_factors,
    )
    return with_implicit_plates(structure)


def with_implicit_plates(structure: Structure) -> Structure:
    """
    Treat undeclared dims of densities as plates where they read latents of plates.

    A density is a product over its batch dims, declared or not, as over those of a plate. So each
    element may read its own element of a latent, by position or by an index array. The particle
    index of a site is still one for all of its undeclared dims.
    """
    plates, model = dict(structure.plates), dict(structure.model)
    symbol_number = len(structure.indices) + len(plates)
    for name, site in structure.model.items():
        inside = (structure.by_symbol[s].plates for s in structure.indices_read(site))
        foreign = frozenset[str]().union(*inside) - site.plates
        is_sum = structure.origins.get(name) == "enumerated"
        if is_sum or site.silent or site.implicit or not foreign:
            continue
        implicit = set()
        for dim in site.undeclared:
            if site.batch_shape[dim] > 1:
                while (symbol := get_symbol(symbol_number)) in plates:
                    symbol_number += 1
                plates[symbol] = Plate(f"{name}[{dim}]", dim, site.batch_shape[dim], symbol)
                implicit.add(symbol)
        model[name] = replace(site, implicit=frozenset(implicit))
    return replace(structure, plates=plates, model=model)


def _unwrapped(program: object) -> object:
    while hasattr(program, "func") and callable(program.func):
        program = program.func
    return getattr(program, "fn", program)


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


def _plates(
    programs: Sequence[Mapping[str, SampleMessage]], *, first_symbol: int
) -> dict[str, Plate]:
    """Return the plates by name, those of size one left out that are no subsample."""
    sizes = _plate_sizes(programs)
    plates: dict[str, Plate] = {}
    for sites in programs:
        for site in sites.values():
            for frame in site["cond_indep_stack"]:
                size = sizes.get(frame.name, 1) if frame.size == -1 else int(frame.size)
                scale = scale_of(frame)
                if frame.dim is None or (size == 1 and scale == 1.0):
                    continue
                symbol = get_symbol(first_symbol + len(plates))
                plate = Plate(frame.name, frame.dim, size, symbol, scale)
                known = plates.setdefault(frame.name, plate)
                if (known.dim, known.size) != (plate.dim, plate.size):
                    raise ValueError(
                        f"plate '{frame.name}': dim {plate.dim} and size {plate.size} at site "
                        f"'{site['name']}', but dim {known.dim} and size {known.size} before. Give "
                        "a plate the same dim= and size in guide and model, and two different "
                        "plates different names."
                    )
    return plates


def _plate_sizes(programs: Sequence[Mapping[str, SampleMessage]]) -> dict[str, int]:
    """Return the sizes of plates that were made without one: those of the sites in them."""
    sizes: dict[str, int] = {}
    for sites in programs:
        for site in sites.values():
            shape = batch_shape_of(site["fn"])
            for frame in site["cond_indep_stack"]:
                if frame.dim is not None and frame.size == -1 and -frame.dim <= len(shape):
                    sizes[frame.name] = max(sizes.get(frame.name, 1), shape[frame.dim])
    return sizes


def _read(site: SampleMessage, plates: Mapping[str, Plate]) -> Site:
    """Find the shape of one site of a plain run, and what it reads."""
    name, fn = site["name"], site["fn"]
    value = detach_provenance(site["value"])
    reads = get_provenance(site["value"])
    batch_shape = batch_shape_of(fn)
    held, read_by_arguments = _arguments(fn)
    if is_latent(site) and isinstance(fn, torch.distributions.Distribution):
        reads |= read_by_arguments  # its log_prob reads nothing else but its own value
    elif not is_silent(site):
        log_prob, read_by_log_prob = _log_prob(name, fn, value, read_by_arguments)
        reads |= read_by_log_prob
        factors = (_shape(site[key]) for key in ("mask", "scale"))
        batch_shape = broadcast_shape(batch_shape, log_prob.shape, *factors)
    if is_latent(site):  # the value is the guide's, and may have more dims of size one
        batch_shape = batch_shape[len(batch_shape) - len(batch_shape_of(fn)) :]
    reads |= get_provenance(site["mask"]) | get_provenance(site["scale"])
    event_shape = event_shape_of(fn, value)
    frames = site["cond_indep_stack"]
    declared = {
        frame.dim: plates[frame.name].size if frame.name in plates else 1
        for frame in frames
        if frame.dim is not None
    }
    # A dim of size one to the right of a plate does not count: Pyro adds it when it expands a site
    # of a plate further left.
    undeclared = tuple(
        dim
        for dim, size in enumerate(batch_shape, start=-len(batch_shape))
        if declared.get(dim) != size and (size != 1 or dim < min(declared, default=0))
    )
    return Site(
        name=name,
        event_dim=len(event_shape),
        batch_shape=batch_shape,
        shape=batch_shape + event_shape if is_latent(site) else torch.Size(_shape(value)),
        plates=frozenset(plates[frame.name].symbol for frame in frames if frame.name in plates),
        reads=reads - {name},
        silent=is_silent(site),
        event_size=event_shape.numel(),
        undeclared=undeclared,
        checked=is_checked(fn),
        obstacle=_obstacle(site, reads - {name}),
        held=held,
    )


def _obstacle(site: SampleMessage, reads: frozenset[str]) -> Obstacle | None:
    """Say what keeps a latent site from having an index of its own."""
    if not is_latent(site):
        return None
    if not isinstance(site["value"], Tensor):
        return Obstacle(
            f"the value of site '{site['name']}' is no tensor, but {type(site['value']).__name__}",
            "draw numbers, as tensors, and look objects up by them afterwards",
        )
    if get_provenance(taken_apart(site["fn"], site["mask"]).mask):
        return Obstacle(
            f"latent site '{site['name']}' is under a mask computed from {quoted(reads)}",
            "mask what reads the site instead, or choose its value with torch.where",
        )
    return None


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


def _log_prob(
    name: str, fn: Distribution, value: Tensor, read_by_arguments: frozenset[str]
) -> tuple[Tensor, frozenset[str]]:
    """Return the log_prob of a site, and the random sites that it reads."""
    try:
        if _is_of_torch(fn):
            with torch._C.DisableTorchFunctionSubclass():  # a third of the time
                return fn.log_prob(value), read_by_arguments
        log_prob = fn.log_prob(value)
        return detach_provenance(log_prob), get_provenance(log_prob)
    except Exception:  # perhaps outside of a support that depends on latents
        inside = inside_of(fn, value)
        is_inside = bool(get_provenance(inside)) or (inside is not None and bool(inside.all()))
        if is_inside and is_checked(fn):
            return _log_prob(name, unchecked(fn), value, read_by_arguments)
    # some code cannot take tensors with provenance: look at the arguments instead
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return fn.log_prob(value), read_by_arguments
    except Exception as error:
        if not isinstance(value, Tensor):
            raise ValueError(
                f"site '{name}': its value is not a tensor, but {type(value).__name__}. Convert "
                "data by torch.as_tensor."
            ) from error
        raise ValueError(
            f"site '{name}': no log_prob of a value of shape {_shape(value)} under "
            f"{type(fn).__name__} of batch shape {tuple(batch_shape_of(fn))} and event shape "
            f"{tuple(event_shape_of(fn, value))}: {first_line(error)}. {_remedy(value)}"
        ) from error


def _is_of_torch(fn: object) -> bool:
    """Whether a distribution's ``log_prob`` reads nothing but its value and tensors it holds."""
    while isinstance(fn, torch.distributions.Independent | MaskedDistribution):
        fn = fn.base_dist
    is_whole = not hasattr(fn, "base_dist") and not hasattr(fn, "component_distribution")
    return is_whole and type(fn).__module__ == "pyro.distributions.torch"


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


def _arguments(fn: object) -> tuple[int, frozenset[str]]:
    """Return the number of elements that a distribution holds, and the sites that they read."""
    number, reads = 0, frozenset[str]()
    for tensor in tensors_of(fn):
        plain, names = (
            (tensor._t, tensor._provenance)
            if isinstance(tensor, ProvenanceTensor)
            else (tensor, reads)
        )
        number += plain.numel()
        reads |= names
    return number, reads


def _shape(value: object) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def device_of(trace: Trace) -> torch.device:
    """Return the device that a program computes on."""
    values = [site["value"] for site in statements(trace).values()]
    devices = [value.device for value in values if isinstance(value, Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
