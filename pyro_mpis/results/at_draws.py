# SPDX-License-Identifier: Apache-2.0
"""
The model at posterior draws: log likelihoods, deterministic values, predictions.

The model is run once more, mapped over the draws, so that it sees single values; or, where torch
cannot map it, once for each draw. Draws are taken in chunks, since each of them has a value of
every site.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import pyro
import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_mpis._text import broadcast_shape
from pyro_mpis._typing import Program, SampleMessage
from pyro_mpis.programs.mapped import log_prob_of
from pyro_mpis.programs.messages import batch_shape_of, event_shape_of, is_subsample, statements
from pyro_mpis.programs.meter import Meter
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.runs import Collect, Programs, Wanted, evaluate, run_at
from pyro_mpis.programs.structure import Structure
from pyro_mpis.results.pointwise import Summed, summed_log_likelihoods

CHUNK_BYTES = 2**27  # of sums over enumerated latents, over the draws that are run together
CHUNK_ELEMENTS = 2**22  # of a site's value or argument, over the draws that are run together
HOLES = 2  # times as much as is held: what allocators keep of freed tensors

Kind = Literal["latent", "deterministic", "observed", "factor"]


@dataclass(frozen=True)
class OrdinarySite:
    """A sample site of the model, as an ordinary run has it."""

    kind: Kind
    value: Tensor  # (*batch, *event)
    event_dim: int
    plates: Mapping[int, str]  # batch dim, negative, of each plate that the site is in -> its name
    log_prob: Tensor | None  # (*batch), without scale and mask; None where it does not count
    elements: int  # of the largest tensor: the value, or an argument of the distribution


@dataclass(frozen=True)
class Replayed:
    """What the model says of posterior draws; the draws' dim is the first of each tensor."""

    sites: Mapping[str, OrdinarySite]  # at the last draw
    log_joint: Tensor  # (draws,): log p(x, z), float64
    log_likelihoods: Mapping[str, Tensor]  # of each observed site, (draws, *batch)
    deterministics: Mapping[str, Tensor]  # (draws, *shape)


class _Unobserve(Messenger):
    """Sample what is observed; ``pyro.deterministic`` and ``pyro.factor`` stay as they are."""

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if msg["is_observed"] and _kind(msg) == "observed" and not is_subsample(msg):
            msg["is_observed"] = False
            msg["value"] = None  # type: ignore[typeddict-item]


@dataclass(frozen=True)
class _Unobserved:
    """A model without its observations; a class, so that it can be pickled as the model can."""

    model: Program

    def __call__(self, *args: object, **kwargs: object) -> object:
        with _Unobserve():
            return self.model(*args, **kwargs)


def replay_draws(
    structure: Structure,
    programs: Programs,
    draws: Mapping[str, Tensor],
    num_draws: int,
    *,
    likelihood: bool,
    summed: Summed | None = None,
    memory_limit: int | None = None,
) -> Replayed:
    """
    Run the model at joint draws of its latent sites; draws nothing.

    A log likelihood is that of an observation alone: summed over event dims, not over plates,
    and without ``poutine.scale``. It is nan where ``poutine.mask`` hides the observation, and 0
    at the draws that hide it, where the mask depends on a latent.

    :param draws: ``{site: (draws, *shape)}``, as ``sample`` gives them.
    :param likelihood: whether to keep the log likelihoods.
    :param summed: enumerated latents to sum them over.
    :param memory_limit: bytes that draws which are run together may take; None if not known.
    """
    meter = Meter(num_levels=0)
    with meter:
        ordinary = ordinary_sites(structure, programs, {n: d[-1] for n, d in draws.items()})
    meter.finish()
    size = _chunk_size(ordinary, meter.highest, memory_limit)
    if summed is not None and likelihood:
        most = CHUNK_BYTES if memory_limit is None else min(CHUNK_BYTES, memory_limit // HOLES)
        size = min(size, max(1, most // summed.bytes))
    masks = []
    together: dict[str, Tensor] = {}
    for start in range(0, num_draws, size):
        chunk = {name: draw[start : start + size] for name, draw in draws.items()}
        number = min(size, num_draws - start)
        said = _said(structure, programs, ordinary, chunk, number)
        # put into their places at once: a small tensor that stays, above large ones that were
        # freed, keeps the heap from giving their room back
        kept = {"": _log_joint(said, number)}
        kept |= _kept(ordinary, said, likelihood=likelihood)
        if summed is not None and likelihood:
            for name, log_prob in summed_log_likelihoods(summed, programs, chunk).items():
                given = kept.get(name)  # not of a pyro.factor
                if given is not None:
                    kept[name] = log_prob.to(given.dtype).expand(given.shape)
        for name, value in kept.items():
            if name not in together:
                together[name] = value.new_empty((num_draws, *value.shape[1:]))
            together[name][start : start + number] = value
        masks.append({name: parts["mask"] for name, parts in said.items() if "mask" in parts})
    log_likelihoods = {
        name: _masked(value, [part.get(name) for part in masks])
        for name, value in together.items()
        if name and ordinary[name].kind == "observed"
    }
    return Replayed(
        sites=ordinary,
        log_joint=together.pop(""),
        log_likelihoods=log_likelihoods,
        deterministics={n: v for n, v in together.items() if n not in log_likelihoods},
    )


def predict(
    structure: Structure,
    programs: Programs,
    draws: Mapping[str, Tensor],
    ordinary: Mapping[str, OrdinarySite],
    num_draws: int,
) -> dict[str, Tensor]:
    """
    Draw what the model would have observed, given draws of its latent sites; random numbers.

    :param draws: of the latent sites; without any, they are drawn from the prior too.
    :param ordinary: the model's sites.
    :return: ``{site: (draws, *shape)}`` of the sites that ``draws`` does not have.
    """
    wanted = [name for name, s in ordinary.items() if s.kind != "factor" and name not in draws]
    unobserved = replace(programs, model=_Unobserved(programs.model), sites={})
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    with pyro.validation_enabled(False):
        for number in range(num_draws):
            values = {name: draw[number] for name, draw in draws.items()}
            sites = statements(run_at(unobserved, "model", values))
            for name in wanted:
                rows[name].append(sites[name]["value"].expand(ordinary[name].value.shape))
    return {name: torch.stack(values) for name, values in rows.items()}


def ordinary_sites(
    structure: Structure, programs: Programs, values: Mapping[str, Tensor]
) -> dict[str, OrdinarySite]:
    """
    Run the model once, with given values of its latent sites.

    :param values: of ordinary shape.
    """
    with pyro.validation_enabled(False):
        sites = statements(run_at(programs, "model", values))
        return {
            name: _ordinary(structure, site)
            for name, site in sites.items()
            if name in structure.model
            and not (structure.model[name].silent and _kind(site) in ("observed", "factor"))
        }


def _kind(site: SampleMessage) -> Kind:
    if not site["is_observed"]:
        return "latent"
    if site["infer"].get("_deterministic"):
        return "deterministic"
    return "factor" if isinstance(_base(site), Unit) else "observed"


def _base(site: SampleMessage) -> object:
    fn: object = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _ordinary(structure: Structure, site: SampleMessage) -> OrdinarySite:
    kind = _kind(site)
    plates = {f.dim: f.name for f in site["cond_indep_stack"] if f.dim is not None}
    sizes = {f.dim: int(f.size) for f in site["cond_indep_stack"] if f.dim is not None}
    sizes = {dim: size for dim, size in sizes.items() if size != -1}  # a plate without a size
    event_dim = len(event_shape_of(site["fn"], site["value"]))
    if kind == "deterministic":
        value = site["value"]
        event_dim = _deterministic_event_dim(value, sizes, event_dim)
        return OrdinarySite(kind, value, event_dim, plates, None, value.numel())
    fn_shape = batch_shape_of(site["fn"]) + event_shape_of(site["fn"], site["value"])
    shape = broadcast_shape(site["value"].shape, fn_shape)
    value = site["value"] if kind == "factor" else site["value"].expand(shape)
    log_prob = None
    if not structure.model[site["name"]].silent:
        log_prob = _over_plates(site["fn"].log_prob(site["value"]), site)
    elements = max(value.numel(), _largest_argument(site["fn"]))
    return OrdinarySite(kind, value, event_dim, plates, log_prob, elements)


def _largest_argument(fn: object) -> int:
    """Return the number of elements of the largest tensor that a distribution holds."""
    sizes = [0]
    for value in vars(fn).values():
        if isinstance(value, Tensor):
            sizes.append(value.numel())
        elif isinstance(value, torch.distributions.Distribution):
            sizes.append(_largest_argument(value))
    return max(sizes)


def _deterministic_event_dim(value: Tensor, plates: Mapping[int, int], declared: int) -> int:
    """Return the event dims of a deterministic site, which by default calls all dims its event."""
    for event_dim in range(declared, -1, -1):
        if all(
            value.dim() >= event_dim - dim and value.shape[dim - event_dim] == size
            for dim, size in plates.items()
        ):
            return event_dim
    return declared


def _chunk_size(
    ordinary: Mapping[str, OrdinarySite], held: int = 0, memory_limit: int | None = None
) -> int:
    """
    Return how many draws to run together.

    :param held: bytes that the model holds in a run for one draw.
    """
    largest = max((site.elements for site in ordinary.values()), default=1)
    size = max(1, CHUNK_ELEMENTS // max(largest, 1))
    if memory_limit is not None:
        size = min(size, max(1, memory_limit // HOLES // max(held, 1)))
    return size


def _over_plates(log_prob: Tensor, site: SampleMessage) -> Tensor:
    """Expand a log_prob to the plates of its site."""
    for frame in site["cond_indep_stack"]:
        if frame.dim is not None and frame.size != -1:
            log_prob = log_prob.reshape((1,) * (-frame.dim - log_prob.dim()) + log_prob.shape)
            shape = list(log_prob.shape)
            shape[frame.dim] = int(frame.size)
            log_prob = log_prob.expand(shape)
    return log_prob


Parts = Mapping[str, Tensor]  # what is kept of a site at draws, each (draws, *shape)


def _said(
    structure: Structure,
    programs: Programs,
    ordinary: Mapping[str, OrdinarySite],
    draws: Mapping[str, Tensor],
    number: int,
) -> dict[str, Parts]:
    """Evaluate the model's sites at draws: all at once, or one after the other."""
    collect = {name: _collecting(site) for name, site in ordinary.items()}
    shapes = {name: structure.model[name].shape for name in draws}
    wanted = Wanted(collect, frozenset(structure.model))
    with pyro.validation_enabled(False):
        try:
            return at_all(programs, wanted, draws, number, shapes)
        except NotMappableError:
            return _one_by_one(programs, collect, draws, number)


def at_all(
    programs: Programs,
    wanted: Wanted,
    draws: Mapping[str, Tensor],
    number: int,
    shapes: Mapping[str, torch.Size],
) -> dict[str, Parts]:
    """
    Evaluate the model's sites at all draws in one mapped run.

    :param shapes: of the latent sites.
    :return: what is kept of each site: ``(number, *shape)``.
    :raises NotMappableError: if torch cannot map the model.
    """
    _, said = evaluate(programs, [draws] if draws else [], model=wanted, shapes=shapes)
    result: dict[str, Parts] = {}
    for name, parts in said.items():
        tensors = {key: mapped.along(0) for key, mapped in parts.items()}
        result[name] = {k: t.expand((number, *t.shape[1:])) for k, t in tensors.items()}
    return result


def _one_by_one(
    programs: Programs, collect: Mapping[str, Collect], draws: Mapping[str, Tensor], number: int
) -> dict[str, Parts]:
    """Evaluate the model's sites by a run for each draw."""
    rows: dict[str, dict[str, list[Tensor]]] = {name: {} for name in collect}
    with pyro.validation_enabled(False):
        for draw in range(number):
            values = {name: value[draw] for name, value in draws.items()}
            sites = statements(run_at(programs, "model", values))
            for name, of_site in collect.items():
                if name not in sites:
                    raise ValueError(
                        f"site '{name}': only in some runs of the model, so it has no log "
                        "likelihood at some draws. Ask for .exec_traces, which hold each run."
                    )
                for key, tensor in of_site(sites[name], values).items():
                    rows[name].setdefault(key, []).append(tensor)
    return {
        name: {key: torch.stack(tensors) for key, tensors in parts.items()}
        for name, parts in rows.items()
    }


def _collecting(known: OrdinarySite) -> Collect:
    """Return what a site says of a draw, in the shapes of an ordinary run."""

    def collect(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if known.kind == "deterministic":
            return {"value": site["value"]}
        if known.log_prob is None:
            return {}
        log_prob = _over_plates(log_prob_of(site["fn"], site["value"]), site)
        result = {}
        mask, shape = site["mask"], known.log_prob.shape
        if isinstance(mask, Tensor):
            result["mask"] = mask.expand(shape)
            log_prob = log_prob.expand(shape)
        result["log_prob"] = log_prob
        result["counted"] = scale_and_mask(log_prob, site["scale"], mask)
        return result

    return collect


def _log_joint(said: Mapping[str, Parts], number: int) -> Tensor:
    """Add up the densities of all sites: (draws,), float64."""
    log_joint = torch.zeros(number, dtype=torch.double)
    for parts in said.values():
        if "counted" in parts:
            counted = parts["counted"].double()
            log_joint = log_joint.to(counted.device) + counted.reshape(number, -1).sum(1)
    return log_joint


def _kept(
    ordinary: Mapping[str, OrdinarySite], said: Mapping[str, Parts], *, likelihood: bool
) -> dict[str, Tensor]:
    """Return log_probs of observed sites, and values of deterministic ones."""
    result = {}
    for name, parts in said.items():
        if ordinary[name].kind == "deterministic":
            result[name] = parts["value"]
        elif likelihood and ordinary[name].kind == "observed" and "log_prob" in parts:
            result[name] = parts["log_prob"]
    return result


def _masked(log_prob: Tensor, masks: list[Tensor | None]) -> Tensor:
    """Put nan where every draw hides an observation, zero where only some do."""
    known = [mask for mask in masks if mask is not None]
    if not known:
        return log_prob
    mask = torch.cat(known).bool()
    log_prob = log_prob.masked_fill(~mask, 0.0)
    return log_prob.masked_fill(~mask.any(0), math.nan)
