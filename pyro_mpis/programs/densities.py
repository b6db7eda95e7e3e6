# SPDX-License-Identifier: Apache-2.0
"""
The density of a site at single values: zero outside of the support, nan at invalid arguments.

Torch's formulas give numbers there too: with validation on, such values are refused before the
formula is applied. Among all combinations of particles some are bound to be outside of a support,
and they count as impossible. So do values that a distribution gives a probability of zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions import MaskedDistribution, MaskedMixture, TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.ops.provenance import get_provenance
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)

from pyro_mpis.programs.mapped import innermost, log_prob_of
from pyro_mpis.programs.masks import Parts, taken_apart
from pyro_mpis.programs.rewritten import CholeskyOrNan
from pyro_mpis.programs.tensors import exchange, unwrapped
from pyro_mpis.programs.zeros import given_probs, possible_values

UNBOUNDED = (constraints.real, constraints.real_vector, constraints.dependent)
NOT_NOW = 0  # a distribution that does not check values, but for no wish of the user's


def density_of(fn: Distribution, value: Tensor, *, validate: bool, latent: bool = False) -> Tensor:
    """
    Return a site's log density: ``(*batch shape)``.

    :param validate: whether to look at the support and the arguments. The support of a Categorical,
        whose values are places in a table, is always looked at.
    :param latent: whether what ``.mask()`` hides is flat on the support, as a latent's prior is,
        not one everywhere.
    """
    parts = taken_apart(fn)
    if parts.mask is not None:
        return _masked_density(parts, value, validate=validate, latent=latent)
    is_index = isinstance(innermost(fn), Categorical)
    if not isinstance(fn, Distribution) or not (validate or is_index):
        return log_prob_of(fn, value)
    inside = inside_of(fn, value)
    fn = _by_components(fn)
    if inside is not None and _is_false_somewhere(inside):
        log_prob = torch.where(inside, log_prob_of(fn, _as_an_index(fn, value)), -torch.inf)
    else:
        log_prob = log_prob_of(fn, value)
    possible = possible_values(fn, value) if validate else None
    if possible is not None and _is_false_somewhere(possible):
        log_prob = torch.where(possible, log_prob, -torch.inf)
    for _, _, valid in _valid_arguments(fn) if validate else ():
        if not _is_false_somewhere(valid):
            continue
        if not _fits(valid.shape, log_prob.shape):
            valid = valid.all()  # dims of an argument that the batch shape does not have
        log_prob = torch.where(valid, log_prob, torch.nan)
    return log_prob


def zero_unless_finite(log_prob: Tensor) -> Tensor:
    """Count a density that is nan or infinite as zero."""
    return torch.where(log_prob < torch.inf, log_prob, -torch.inf)


def _is_false_somewhere(condition: Tensor) -> bool:
    """
    Whether a condition is false for any of the values.

    Densities are often much larger than what the condition looks at, and a choice between them and
    another number takes longer.
    """
    return not bool(unwrapped(condition).tensor.all())


def _as_an_index(fn: Distribution, value: Tensor) -> Tensor:
    """Bring integers into their support: a Categorical looks them up."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if not isinstance(support, constraints.integer_interval):
        return value
    lower, upper = (torch.as_tensor(b) for b in (support.lower_bound, support.upper_bound))
    return value.clamp(lower.to(value.device), upper.to(value.device))


class _SameFamily(MixtureSameFamily):
    """A mixture in which each component has a density of zero outside of its own support."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Sum over the components: ``(*batch shape)``."""
        value: Tensor = self._pad(x)  # type: ignore[no-untyped-call]
        of_each = density_of(self.component_distribution, value, validate=True)
        shares = self.mixture_distribution.logits.log_softmax(-1)
        probs = given_probs(self.mixture_distribution)
        if probs is not None:
            shares = torch.where(probs > 0, shares, -torch.inf)
        return (of_each + shares).logsumexp(-1)


class _Chosen(MaskedMixture):
    """Likewise; what the other component's density would be does not matter."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Choose by the mask: ``(*batch shape)``."""
        one, zero = (
            density_of(part, value, validate=True) for part in (self.component1, self.component0)
        )
        chosen: Any = self.mask  # a method of the base class by that name hides it from types
        result: Tensor = torch.where(chosen, one, zero)
        return result


_BY_COMPONENTS: dict[type, type] = {
    MixtureSameFamily: _SameFamily,
    pyro.distributions.MixtureSameFamily: _SameFamily,
    MaskedMixture: _Chosen,
}


def _by_components(fn: Any) -> Any:
    """Return a distribution whose mixtures, at any depth, look at each component's support."""
    part = fn
    while type(part) not in _BY_COMPONENTS:
        if not hasattr(part, "base_dist"):
            return fn
        part = part.base_dist
    copies: dict[int, Any] = {}
    result = exchange(fn, lambda tensor: tensor, copies)
    for copy in copies.values():
        copy.__class__ = _BY_COMPONENTS.get(type(copy), type(copy))
    return result


def _masked_density(parts: Parts, value: Tensor, *, validate: bool, latent: bool) -> Tensor:
    """Return a density under a mask: hidden arguments do not matter, hidden data neither."""
    shape = torch.Size(parts.inner.batch_shape)
    if parts.mask is False:
        log_prob = torch.zeros(shape, device=value.device, dtype=torch.get_default_dtype())
    else:
        log_prob = density_of(parts.inner, value, validate=validate)
        log_prob = scale_and_mask(log_prob, mask=parts.mask)
    inside = inside_of(parts.inner, value) if validate and latent else None
    if inside is not None:
        log_prob = torch.where(inside, log_prob, -torch.inf)
    dims = parts.event_dims
    return log_prob.expand(shape).sum(tuple(range(-dims, 0))) if dims else log_prob


def _fits(shape: torch.Size, batch_shape: torch.Size) -> bool:
    """Whether a tensor broadcasts to a batch shape."""
    pairs = zip(reversed(shape), reversed(batch_shape), strict=False)
    return len(shape) <= len(batch_shape) and all(size in (1, batch) for size, batch in pairs)


def is_checked(fn: object) -> bool:
    """Whether a distribution checks values, as it does unless made with ``validate_args=False``."""
    return getattr(innermost(fn), "_validate_args", False) is not False


@contextmanager
def taking_anything() -> Iterator[None]:
    """
    Let distributions be made of any arguments, and values be any: :func:`density_of` looks at them.

    A copy of a distribution keeps what the class says when it is made. It is a zero here, so that
    those that the user has made with ``validate_args=False`` can be told from it.
    """
    with pyro.validation_enabled(False), CholeskyOrNan():
        torch.distributions.Distribution._validate_args = NOT_NOW  # type: ignore[assignment]
        yield


def inside_of(fn: Distribution, value: Tensor) -> Tensor | None:
    """Return where values lie in the support, ``(*batch shape)``; None if all do."""
    try:
        if isinstance(fn, Independent):
            return _all_of_events(inside_of(fn.base_dist, value), fn.reinterpreted_batch_ndims)
        if isinstance(fn, MaskedDistribution | ExpandedDistribution):
            return inside_of(fn.base_dist, value)
        if isinstance(fn, TransformedDistribution):
            return _inside_transformed(fn, value)
        if isinstance(fn, MixtureSameFamily):
            inside = inside_of(fn.component_distribution, fn._pad(value))
            return None if inside is None else inside.any(-1)
        if isinstance(fn, MaskedMixture):
            chosen: Any = fn.mask
            parts = (inside_of(part, value) for part in (fn.component1, fn.component0))
            one, zero = (chosen.new_ones(()) if part is None else part for part in parts)
            result: Tensor = torch.where(chosen, one, zero)
            return result
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


def _valid_arguments(
    fn: Distribution, dims: int = 0
) -> Iterator[tuple[str, constraints.Constraint, Tensor]]:
    """
    Yield each argument's name, its constraint, and where it meets it, in dims of the batch shape.

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
        argument = fn.__dict__.get(name)
        if not isinstance(argument, Tensor):
            continue  # a number, or computed from the others when asked for
        try:
            valid = constraint.check(argument)
        except (RuntimeError, NotImplementedError):
            continue  # torch cannot map the check of some, as of positive definite matrices
        valid = _all_of_events(valid, min(dims, valid.dim()))
        assert valid is not None
        yield name, constraint, valid


def plain_density(fn: Distribution, value: Tensor, *, latent: bool = False) -> Tensor:
    """Return :func:`density_of` in a plain run, where the user's validation says what to check."""
    validate = is_validation_enabled() and is_checked(fn)
    with pyro.validation_enabled(False):
        return torch.as_tensor(density_of(fn, value, validate=validate, latent=latent))


def refuse_invalid(trace: Trace, program: str) -> None:
    """
    Refuse arguments that are invalid whatever the latents are.

    :param trace: of a plain run with provenance.
    :raises ValueError: names the site.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not isinstance(site["fn"], Distribution):
            continue
        for argument, wanted, valid in _valid_arguments(site["fn"]):
            if not get_provenance(valid) and not bool(valid.all()):
                raise ValueError(
                    f"site '{name}' of the {program}: '{argument}' of its "
                    f"{type(innermost(site['fn'])).__name__} must be {wanted}, and is not. Check "
                    "the data and parameters that it is computed from."
                )


def memoise(trace: Trace) -> None:
    """
    Evaluate the densities of a plain run, and keep them in its trace as Pyro does.

    One that is nan beside one that is zero is zero.
    """
    sites: list[Any] = [site for site in trace.nodes.values() if site["type"] == "sample"]
    log_probs = [plain_density(site["fn"], site["value"]) for site in sites]
    impossible = any(bool((log_prob == -torch.inf).any()) for log_prob in log_probs)
    for site, log_prob in zip(sites, log_probs, strict=True):
        if impossible:
            log_prob = torch.where(log_prob.isnan(), -torch.inf, log_prob)
        counted = scale_and_mask(log_prob, site["scale"], site["mask"])
        site["log_prob_sum"] = counted.sum()
        if impossible:  # Pyro would compute these later, and refuse the value
            site.update(unscaled_log_prob=log_prob, log_prob=counted)
