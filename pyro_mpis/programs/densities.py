# SPDX-License-Identifier: Apache-2.0
"""
The density of a site at single values: zero outside of the support, nan at invalid arguments.

Torch's formulas give numbers there too: with validation on, such values are refused before the
formula is applied. Among all combinations of particles some are bound to be outside of a support,
and they count as impossible.
"""

from collections.abc import Iterator

import torch
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)

from pyro_mpis.programs.mapped import exchange, is_mapped, log_prob_of, unwrapped
from pyro_mpis.programs.masks import Parts, taken_apart

UNBOUNDED = (constraints.real, constraints.real_vector, constraints.dependent)


def density_of(fn: Distribution, value: Tensor, *, validate: bool, latent: bool = False) -> Tensor:
    """
    Return a site's log density: ``(*batch shape)``.

    :param validate: whether to look at the support and the arguments, where they depend on the
        values of a mapped run.
    :param latent: whether what ``.mask()`` hides is flat on the support, as a latent's prior is,
        not one everywhere.
    """
    parts = taken_apart(fn)
    if parts.mask is not None:
        return _masked_density(parts, value, validate=validate, latent=latent)
    log_prob = log_prob_of(fn, value)
    if not validate or not isinstance(fn, Distribution):
        return log_prob
    inside = inside_of(fn, value)
    if inside is not None and _is_false_somewhere(inside):
        log_prob = torch.where(inside, log_prob, -torch.inf)
    for valid in filter(_is_false_somewhere, _valid_arguments(fn)):
        if not _fits(valid.shape, log_prob.shape):
            valid = valid.all()  # dims of an argument that the batch shape does not have
        log_prob = torch.where(valid, log_prob, torch.nan)
    return log_prob


def _is_false_somewhere(condition: Tensor) -> bool:
    """
    Whether a condition that differs between values is false for any.

    Densities are often much larger than what the condition looks at, and a choice between them and
    another number takes longer. What is the same for all values, the plain run has looked at.
    """
    return is_mapped(condition) and not bool(unwrapped(condition).tensor.all())


def _masked_density(parts: Parts, value: Tensor, *, validate: bool, latent: bool) -> Tensor:
    """Return a density under a mask: hidden arguments do not matter, hidden data neither."""
    shape = torch.Size(parts.inner.batch_shape)
    if parts.mask is False:
        log_prob = torch.zeros(shape, device=value.device, dtype=torch.get_default_dtype())
    else:
        log_prob = density_of(parts.inner, value, validate=validate)
        log_prob = scale_and_mask(log_prob, mask=parts.mask)
    inside = inside_of(parts.inner, value) if validate and latent else None
    if inside is not None and is_mapped(inside):
        log_prob = torch.where(inside, log_prob, -torch.inf)
    dims = parts.event_dims
    return log_prob.expand(shape).sum(tuple(range(-dims, 0))) if dims else log_prob


def _fits(shape: torch.Size, batch_shape: torch.Size) -> bool:
    """Whether a tensor broadcasts to a batch shape."""
    pairs = zip(reversed(shape), reversed(batch_shape), strict=False)
    return len(shape) <= len(batch_shape) and all(size in (1, batch) for size, batch in pairs)


def is_checked(fn: object) -> bool:
    """Whether a distribution checks values, as it does unless made with ``validate_args=False``."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return bool(getattr(fn, "_validate_args", False))


def inside_of(fn: Distribution, value: Tensor) -> Tensor | None:
    """Return where values lie in the support, ``(*batch shape)``; None if all do."""
    try:
        if isinstance(fn, Independent):
            return _all_of_events(inside_of(fn.base_dist, value), fn.reinterpreted_batch_ndims)
        if isinstance(fn, MaskedDistribution | ExpandedDistribution):
            return inside_of(fn.base_dist, value)
        if isinstance(fn, TransformedDistribution):
            return _inside_transformed(fn, value)
        support = fn.support
        if support is None or any(support is unbounded for unbounded in UNBOUNDED):
            return None
        return support.check(value)  # type: ignore[no-any-return]
    except (RuntimeError, NotImplementedError, AttributeError):
        return None  # there is no saying


def unchecked(fn: TorchDistribution) -> TorchDistribution:
    """Return a copy of a distribution that takes any value, and any arguments."""
    copies: dict[int, object] = {}
    result: TorchDistribution = exchange(fn, lambda tensor: tensor, copies)
    for part in copies.values():
        if isinstance(part, Distribution):
            part._validate_args = False
    return result


def _inside_transformed(fn: TransformedDistribution, value: Tensor) -> Tensor | None:
    """Ask the base distribution at the inverted value: a last affine transform says "anywhere"."""
    inside: Tensor | None = None
    event_dim = len(fn.event_shape)
    for transform in reversed(fn.transforms):
        codomain = transform.codomain
        if not any(codomain is unbounded for unbounded in UNBOUNDED):
            check = codomain.check(value)
            check = _all_of_events(check, event_dim - codomain.event_dim)
            assert check is not None
            inside = check if inside is None else inside & check
        value = transform.inv(value)
        event_dim += transform.domain.event_dim - transform.codomain.event_dim
    base = _all_of_events(inside_of(fn.base_dist, value), event_dim - len(fn.base_dist.event_shape))
    if inside is None or base is None:
        return inside if base is None else base
    return inside & base


def _all_of_events(inside: Tensor | None, dims: int) -> Tensor | None:
    """Whether all of an event are inside: its dims are the last ones."""
    if inside is None or dims <= 0:
        return inside
    return inside.flatten(-dims).all(-1) if inside.dim() >= dims else inside.all()


def _valid_arguments(fn: Distribution, dims: int = 0) -> Iterator[Tensor]:
    """
    Yield where each argument meets its constraint, in dims of the batch shape.

    :param dims: batch dims of this distribution that are event dims of the site.
    """
    if isinstance(fn, Independent):
        yield from _valid_arguments(fn.base_dist, dims + fn.reinterpreted_batch_ndims)
        return
    if isinstance(fn, MaskedDistribution | ExpandedDistribution):
        yield from _valid_arguments(fn.base_dist, dims)
        return
    if isinstance(fn, TransformedDistribution):
        more = len(fn.base_dist.batch_shape) - len(fn.batch_shape)
        yield from _valid_arguments(fn.base_dist, dims + max(more, 0))
        return
    if isinstance(fn, MixtureSameFamily):
        yield from _valid_arguments(fn.mixture_distribution, dims)
        yield from _valid_arguments(fn.component_distribution, dims + 1)
        return
    for name, constraint in fn.arg_constraints.items():
        if constraints.is_dependent(constraint) or constraint is constraints.real:
            continue
        argument = fn.__dict__.get(name)  # others are computed from these when asked for
        if not isinstance(argument, Tensor) or not is_mapped(argument):
            continue  # the plain run has looked at what does not depend on particles
        try:
            valid = constraint.check(argument)
        except (RuntimeError, NotImplementedError):
            continue  # torch cannot map the check of some, as of positive definite matrices
        valid = _all_of_events(valid, min(dims, valid.dim()))
        assert valid is not None
        yield valid


def invalid_arguments(fn: Distribution) -> list[str]:
    """Return what the arguments of a distribution have to be, for a message."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    rules = getattr(fn, "arg_constraints", {})
    return [
        f"{name}: {constraint}"
        for name, constraint in rules.items()
        if not constraints.is_dependent(constraint) and constraint is not constraints.real
    ]
