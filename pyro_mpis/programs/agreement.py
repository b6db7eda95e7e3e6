# SPDX-License-Identifier: Apache-2.0
"""Whether a guide fits its model: the same sites, shapes and supports; all of the data."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis._text import quoted
from pyro_mpis._typing import Distribution, SampleMessage
from pyro_mpis.programs.messages import (
    batch_shape_of,
    event_shape_of,
    is_delta,
    is_latent,
    is_subsample,
)


def refuse_subsampling(traces: Iterable[Trace], instead: str = "") -> None:
    """
    Refuse plates that select a minibatch.

    :param instead: a sentence that says what else takes one.
    """
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
                    f"it (leave out subsample_size= and subsample=). {instead}".rstrip()
                )


def check_guide_matches_model(
    guide_sites: Mapping[str, SampleMessage], model_sites: Mapping[str, SampleMessage]
) -> None:
    """Check that the model has every site of the guide, as a latent."""
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
                "the guide (make an autoguide from the conditioned model)."
            )


def check_same_site(guide_site: SampleMessage, model_site: SampleMessage) -> None:
    """
    Check that guide and model agree on the support and the shape of a site that both sample.

    :raises ValueError: if not.
    """
    name = model_site["name"]
    _check_supports(name, guide_site["fn"], model_site["fn"])
    guide_shape, model_shape = _shape(guide_site["value"]), _model_shape(model_site)
    if _squeezed(guide_shape) != _squeezed(model_shape):
        raise ValueError(
            f"site '{name}': the guide's value has shape {guide_shape}, the model's {model_shape}. "
            "Give both the same plates and event shape."
        )


def _model_shape(site: SampleMessage) -> tuple[int, ...]:
    """Return the shape that the model's distribution gives a value."""
    fn = site["fn"]
    return tuple(batch_shape_of(fn) + event_shape_of(fn, site["value"]))


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Drop the dims of size one on the left."""
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        del sizes[0]
    return tuple(sizes)


def _check_supports(name: str, guide: Distribution, model: Distribution) -> None:
    """Refuse a guide of another kind of values than the model's."""
    ours, theirs = _interval(guide), _interval(model)
    if is_delta(guide) or is_delta(model) or ours is None or theirs is None:
        return
    if ours[0] != theirs[0]:
        raise ValueError(
            f"site '{name}': the guide's {type(guide).__name__} has support "
            f"{_describe(ours)}, the model's {type(model).__name__} {_describe(theirs)}. Use a "
            "guide with the model's support, for example a Normal pushed through "
            "torch.distributions.biject_to(support)."
        )


def unreachable(name: str, guide: Distribution, model: Distribution) -> str | None:
    """
    Say what part of the model's support a guide cannot reach.

    A guide may reach beyond: there its particles weigh nothing.

    :return: None if it reaches all of it, or there is no saying.
    """
    ours, theirs = _interval(guide), _interval(model)
    if is_delta(guide) or is_delta(model) or ours is None or theirs is None:
        return None
    if ours[0] != theirs[0] or ours[0] not in ("integer", "real"):
        return None
    are_numbers = not any(isinstance(bound, Tensor) for bound in (*ours, *theirs))
    if are_numbers and ours[1] <= theirs[1] and ours[2] >= theirs[2]:  # type: ignore[operator]
        return None
    (low, high), (lowest, highest) = (
        [torch.as_tensor(bound).double() for bound in interval[1:]] for interval in (ours, theirs)
    )
    try:
        reached = bool(
            (low <= lowest + _slack(lowest)).all() & (high >= highest - _slack(highest)).all()
        )
    except RuntimeError:  # bounds of other shapes
        return None
    if reached:
        return None
    return (
        f"'{name}': the guide's {type(guide).__name__} reaches {_describe(ours)} only, of the "
        f"model's {_describe(theirs)}. evidence() and the posterior are those of the part that it "
        "reaches. That is right if you cut off the rest on purpose; else use a wider guide."
    )


def _slack(bound: Tensor) -> Tensor:
    """Return what rounding may change of a bound."""
    return 1e-6 * bound.abs().nan_to_num(0.0, posinf=0.0, neginf=0.0)


Interval = tuple[str, object, object]  # kind, lower, upper


def _interval(fn: Distribution) -> Interval | None:
    """Return a comparable description of a support; None where there is nothing to compare."""
    support = getattr(fn, "support", None)
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


def _shape(value: object) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
