# SPDX-License-Identifier: Apache-2.0
"""
The model at posterior draws: log likelihoods, deterministic values, predictions.

The model is run once more, vectorised over the draws in the dim left of the plates in which
particles were drawn, so that any model that could be weighed can be run here. Draws are taken in
chunks, since each of them has a value of every site.
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

from pyro_mpis._typing import Program, SampleMessage
from pyro_mpis.dependencies import Structure
from pyro_mpis.handlers import PARTICLES, Programs, broadcast_shape, is_subsample, replay

CHUNK_ELEMENTS = 2**22  # of a site's value or argument, over the draws that are run together

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
) -> Replayed:
    """
    Run the model at joint draws of its latent sites; draws nothing.

    A log likelihood is that of an observation alone: summed over event dims, not over plates,
    and without ``poutine.scale``. It is nan where ``poutine.mask`` hides the observation, and 0
    at the draws that hide it, where the mask depends on a latent.

    :param draws: ``{site: (draws, *shape)}``, as ``sample`` gives them.
    :param likelihood: whether to keep the log likelihoods.
    :raises ValueError: if a site has another value in an ordinary run than among many draws.
    """
    ordinary = ordinary_sites(structure, programs, {n: d[-1] for n, d in draws.items()})
    size = _chunk_size(ordinary)
    parts = []
    for start in range(0, num_draws, size):
        chunk = {name: draw[start : start + size] for name, draw in draws.items()}
        number = min(size, num_draws - start)
        sites = replay(
            programs, "model", values=_placed(structure, chunk), enumerated={}, num_samples=number
        )
        parts.append(_evaluate(sites, ordinary, number, likelihood=likelihood))
    _check_last(ordinary, parts[-1])
    kept = parts[0].kept
    together = {name: torch.cat([part.kept[name] for part in parts]) for name in kept}
    log_likelihoods = {
        name: _masked(value, [part.masks.get(name) for part in parts])
        for name, value in together.items()
        if ordinary[name].kind == "observed"
    }
    return Replayed(
        sites=ordinary,
        log_joint=torch.cat([part.log_joint for part in parts]),
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
    unobserved = replace(programs, model=_Unobserved(programs.model))
    size = _chunk_size(ordinary)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for start in range(0, num_draws, size):
        number = min(size, num_draws - start)
        chunk = {name: draw[start : start + size] for name, draw in draws.items()}
        with pyro.plate(PARTICLES, number, dim=structure.shared_dim):
            sites = replay(
                unobserved,
                "model",
                values=_placed(structure, chunk),
                enumerated={},
                num_samples=number,
            )
        for name in wanted:
            shape = ordinary[name].value.shape
            found[name].append(_per_draw(name, sites[name]["value"], shape, number))
    return {name: torch.cat(values) for name, values in found.items()}


def ordinary_sites(
    structure: Structure, programs: Programs, values: Mapping[str, Tensor]
) -> dict[str, OrdinarySite]:
    """
    Run the model once, with given values of its latent sites.

    :param values: of ordinary shape.
    """
    sites = replay(programs, "model", values=values, enumerated={}, num_samples=1)
    with pyro.validation_enabled(False):
        return {
            name: _ordinary(structure, site)
            for name, site in sites.items()
            if not (structure.model[name].silent and _kind(site) in ("observed", "factor"))
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
    event_dim = site["fn"].event_dim
    if kind == "deterministic":
        value = site["value"]
        event_dim = _deterministic_event_dim(value, sizes, event_dim)
        return OrdinarySite(kind, value, event_dim, plates, None, value.numel())
    shape = broadcast_shape(site["value"].shape, site["fn"].shape())
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


def _chunk_size(ordinary: Mapping[str, OrdinarySite]) -> int:
    largest = max((site.elements for site in ordinary.values()), default=1)
    return max(1, CHUNK_ELEMENTS // max(largest, 1))


def _placed(structure: Structure, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the draws' dim to the left of the plates: (draws, *plates, *event)."""
    result = {}
    for name, draw in draws.items():
        num_dims = structure.max_plate_nesting + structure.model[name].event_dim
        missing = num_dims - (draw.dim() - 1)
        result[name] = draw.reshape(draw.shape[:1] + (1,) * missing + draw.shape[1:])
    return result


def _over_plates(log_prob: Tensor, site: SampleMessage) -> Tensor:
    """Expand a log_prob to the plates of its site."""
    for frame in site["cond_indep_stack"]:
        if frame.dim is not None:
            log_prob = log_prob.reshape((1,) * (-frame.dim - log_prob.dim()) + log_prob.shape)
            shape = list(log_prob.shape)
            shape[frame.dim] = int(frame.size)
            log_prob = log_prob.expand(shape)
    return log_prob


@dataclass(frozen=True)
class _Part:
    """What is kept of a chunk of draws."""

    log_joint: Tensor  # (draws,)
    kept: Mapping[str, Tensor]  # log_probs of observed sites, values of deterministic ones
    masks: Mapping[str, Tensor]


def _evaluate(
    sites: Mapping[str, SampleMessage],
    ordinary: Mapping[str, OrdinarySite],
    num_draws: int,
    *,
    likelihood: bool,
) -> _Part:
    """Evaluate the densities of a chunk of draws."""
    log_joint = torch.zeros(num_draws, dtype=torch.double)
    kept: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, known in ordinary.items():
        site = sites[name]
        if known.kind == "deterministic":
            kept[name] = _per_draw(name, site["value"], known.value.shape, num_draws)
        if known.log_prob is None:
            continue
        with pyro.validation_enabled(False):
            log_prob = _over_plates(site["fn"].log_prob(site["value"]), site)
        mask, shape = site["mask"], known.log_prob.shape
        if isinstance(mask, Tensor):
            log_prob, mask = torch.broadcast_tensors(log_prob, mask)
            masks[name] = _per_draw(name, mask, shape, num_draws)
        counted = scale_and_mask(log_prob, site["scale"], mask)
        counted = _per_draw(name, counted, shape, num_draws).double()
        log_joint = log_joint.to(counted.device)
        log_joint = log_joint + counted.reshape(num_draws, shape.numel()).sum(1)
        if likelihood and known.kind == "observed":
            kept[name] = _per_draw(name, log_prob, shape, num_draws)
    return _Part(log_joint, kept, masks)


def _per_draw(name: str, tensor: Tensor, shape: torch.Size, num_draws: int) -> Tensor:
    """
    Bring a tensor of a run over draws to ``(draws, *shape)``.

    :param shape: that of the same tensor in an ordinary run.
    """
    if tensor.dim() and len(tensor) == num_draws and _packed(tensor.shape[1:]) == _packed(shape):
        return tensor.reshape((num_draws, *shape))
    if _packed(tensor.shape) == _packed(shape):  # the same for all draws
        return tensor.reshape(shape).expand((num_draws, *shape))
    raise _not_vectorised(name, f"shape {tuple(tensor.shape)}, not {tuple(shape)} for each of them")


def _packed(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def _masked(log_prob: Tensor, masks: list[Tensor | None]) -> Tensor:
    """Put nan where every draw hides an observation, zero where only some do."""
    known = [mask for mask in masks if mask is not None]
    if not known:
        return log_prob
    mask = torch.cat(known).bool()
    log_prob = log_prob.masked_fill(~mask, 0.0)
    return log_prob.masked_fill(~mask.any(0), math.nan)


def _check_last(ordinary: Mapping[str, OrdinarySite], part: _Part) -> None:
    """
    Compare deterministic sites at the last draw with an ordinary run at it.

    Nothing else has checked that their code is vectorised: they have no log_prob. The tolerance is
    for rounding, which differs between the two.
    """
    for name, value in part.kept.items():
        if ordinary[name].kind != "deterministic":
            continue
        found, expected = value[-1].double(), ordinary[name].value.double()
        largest = expected.abs().nan_to_num(0.0, posinf=0.0).max() if expected.numel() else 0.0
        atol = 1e-2 * float(largest)
        if not torch.allclose(found, expected, rtol=1e-2, atol=atol, equal_nan=True):
            raise _not_vectorised(name, "another value at the last of them than when it is alone")


def _not_vectorised(name: str, found: str) -> ValueError:
    return ValueError(
        f"site '{name}': with many posterior draws at once it has {found}. Draws are in a batch "
        "dim left of the plates: index from the right (x[..., 0], not x[0]), and keep batch dims "
        "when reshaping."
    )
