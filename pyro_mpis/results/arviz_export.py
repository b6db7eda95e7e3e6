# SPDX-License-Identifier: Apache-2.0
"""
The posterior as ArviZ has it: groups of named arrays.

ArviZ takes no weights, so its ``posterior`` group holds equally weighted joint draws; particles and
weights are in groups of our own. Dims are named after the plates; those of events are
``<site>_dim_0`` and so on. Names of plates and sites are the model's, all else is ArviZ's habit.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_mpis._typing import Program
from pyro_mpis._version import __version__
from pyro_mpis.factor_graph.graph import SiteValue
from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.programs.runs import Programs
from pyro_mpis.replicate import Replicate
from pyro_mpis.results.at_draws import OrdinarySite, predict, replay_draws
from pyro_mpis.results.pointwise import summed_latents

if TYPE_CHECKING:
    from arviz import InferenceData
    from numpy.typing import ArrayLike, NDArray
    from xarray import Dataset, DataTree

    ArvizData: TypeAlias = "DataTree | InferenceData"
    Array: TypeAlias = "NDArray[np.generic]"

RESERVED = ("chain", "draw", "particle")  # dims that a plate may not be named as

Arrays = Mapping[str, tuple[tuple[str, ...], "Array"]]  # variable -> names of its dims, values


@dataclass(frozen=True)
class Names:
    """
    Names for dims, as ``arviz.from_dict`` takes them.

    :param coords: dim -> names or numbers of its elements.
    :param dims: site, or argument of the model -> names of its dims: of all, or of those that no
        plate names.
    """

    coords: Mapping[str, "ArrayLike"] = field(default_factory=dict)
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def of_site(self, name: str, site: OrdinarySite) -> tuple[str | None, ...]:
        """Return a name for each dim of a site's ordinary value; None for one to drop."""
        shape = site.value.shape
        num_batch = len(shape) - site.event_dim
        plates = {num_batch + dim: plate for dim, plate in site.plates.items()}
        dropped = {p for p in range(num_batch) if shape[p] == 1 and p not in plates}
        exported = [p for p in range(len(shape)) if p not in dropped]
        free = [p for p in exported if p not in plates]
        names = plates | {p: f"{name}_dim_{number}" for number, p in enumerate(free)}
        given = self.dims.get(name)
        if given is not None:
            if isinstance(given, str) or len(given) not in (len(exported), len(free)):
                raise ValueError(
                    f"dims: '{name}' has {len(exported)} dims, "
                    f"{_listed(names[p] for p in exported)}, but {given!r} names {len(given)}. "
                    f"Name all of them, or the {len(free)} that no plate names."
                )
            names |= zip(exported if len(given) == len(exported) else free, given, strict=True)
        for p in exported:
            if names[p] in RESERVED:
                raise ValueError(
                    f"site '{name}': a dim is named '{names[p]}', as one of ArviZ's own. Rename "
                    f"the plate, or name the site's dims: dims={{'{name}': [...]}}."
                )
        return tuple(names[p] if p in exported else None for p in range(len(shape)))

    def of_argument(self, name: str, num_dims: int) -> tuple[str, ...]:
        """Return a name for each dim of an argument of the model."""
        given = self.dims.get(name)
        if given is None:
            return tuple(f"{name}_dim_{number}" for number in range(num_dims))
        if isinstance(given, str) or len(given) != num_dims:
            raise ValueError(
                f"dims: the argument '{name}' has {num_dims} dims, but {given!r} names "
                f"{len(given)}."
            )
        return tuple(given)


@dataclass(frozen=True)
class Wanted:
    """How many draws, under which names, with which groups that take a run of the model more."""

    num_samples: int
    names: Names
    log_likelihood: bool
    posterior_predictive: bool
    prior: bool


def model_groups(
    replicate: Replicate, draws: Mapping[str, Tensor], wanted: Wanted
) -> tuple[dict[str, Arrays], Mapping[str, OrdinarySite]]:
    """
    Return ArviZ's own groups, and the model's sites; predictions draw random numbers.

    :param draws: ``{site: (draws, *shape)}``, joint posterior draws.
    """
    structure, programs, names = replicate.structure, replicate.programs, wanted.names
    number = wanted.num_samples
    with replicate.environment.entered():
        replayed = replay_draws(
            structure,
            programs,
            draws,
            number,
            likelihood=wanted.log_likelihood,
            summed=summed_latents(replicate),
            memory_limit=replicate.plan.memory_limit,
        )
        sites = replayed.sites
        values = {"posterior": {**draws, **replayed.deterministics}}
        values["log_likelihood"] = dict(replayed.log_likelihoods)
        if wanted.posterior_predictive:
            predicted = predict(structure, programs, draws, sites, number)
            observed = [name for name in predicted if sites[name].kind == "observed"]
            values["posterior_predictive"] = {name: predicted[name] for name in observed}
        if wanted.prior:
            drawn = predict(structure, programs, {}, sites, number)
            observed = [name for name in drawn if sites[name].kind == "observed"]
            values["prior"] = {name: v for name, v in drawn.items() if name not in observed}
            values["prior_predictive"] = {name: drawn[name] for name in observed}
        groups: dict[str, Arrays] = {
            group: draw_arrays(arrays, sites, names) for group, arrays in values.items()
        }
        log_joint = replayed.log_joint.unsqueeze(0).cpu().numpy()
        groups["sample_stats"] = {"lp": (RESERVED[:2], log_joint)}
        data = {name: site.value for name, site in sites.items() if site.kind == "observed"}
        groups["observed_data"] = site_arrays(data, sites, names)
        groups["constant_data"] = constant_arrays(programs, sites, names)
    return groups, sites


def site_arrays(
    values: Mapping[str, Tensor], sites: Mapping[str, OrdinarySite], names: Names, *left: str
) -> dict[str, tuple[tuple[str, ...], "Array"]]:
    """
    Name the dims of sites' values.

    :param values: ``{site: (*left, *shape)}``, the shape being the ordinary one, or its first dims
        (those of a log_prob).
    :param left: names of the dims on the left.
    """
    arrays = {}
    for name, value in values.items():
        dims = names.of_site(name, sites[name])[: value.dim() - len(left)]
        sizes = [size for size, dim in zip(value.shape[len(left) :], dims, strict=True) if dim]
        array = value.detach().reshape((*value.shape[: len(left)], *sizes)).cpu().numpy()
        arrays[name] = (*left, *(dim for dim in dims if dim)), array
    return arrays


def draw_arrays(
    values: Mapping[str, Tensor], sites: Mapping[str, OrdinarySite], names: Names
) -> Arrays:
    """Name the dims of draws, ``{site: (draws, *shape)}``: a chain of one, the draws, its own."""
    return site_arrays({n: v.unsqueeze(0) for n, v in values.items()}, sites, names, *RESERVED[:2])


def particle_arrays(
    marginals: Mapping[str, Marginal],
    particles: Mapping[str, SiteValue],
    sampled: Set[str],
    sites: Mapping[str, OrdinarySite],
    names: Names,
) -> dict[str, Arrays]:
    """
    Name the dims of particles, their weights and effective sample sizes.

    Of sites that follow several others, with a point for each combination of their particles, only
    the effective sample size is given. Sites may have different numbers of particles: the dim is
    ``particle`` for the first site and those with as many, ``<site>_particle`` for each other.

    :param sampled: the sites that have particles, not their whole support or a fixed value.
    """
    values: dict[str, tuple[tuple[str, ...], Array]] = {}
    weights: dict[str, tuple[tuple[str, ...], Array]] = {}
    sizes: dict[str, tuple[tuple[str, ...], Array]] = {}
    usual: int | None = None  # number of particles of the first site
    for name, marginal in marginals.items():
        one, num_batch, site = {name: sites[name]}, len(marginal.batch_shape), particles[name]
        shape = one[name].value.shape
        batch_shape = shape[: len(shape) - one[name].event_dim]
        if len(site.indices) == 1:
            left = f"{name}_value"
            if name in sampled:
                usual = usual or marginal.log_weights.shape[-1]
                is_usual = marginal.log_weights.shape[-1] == usual
                left = "particle" if is_usual else f"{name}_particle"
            samples = site.padded(marginal.samples.movedim(num_batch, 0), left=1)
            weight = site.padded(marginal.weights.movedim(num_batch, 0), left=1)
            weight = weight.expand((len(weight), *batch_shape))
            samples = site.ordinary(samples, left=1)
            values |= site_arrays({name: samples}, one, names, left)
            weights |= site_arrays({name: weight}, one, names, left)
        if name in sampled:
            ess = site.padded(marginal.ess, left=0).expand(batch_shape)
            sizes |= site_arrays({name: ess}, one, names)
    return {"particles": values, "particle_weights": weights, "particle_ess": sizes}


def constant_arrays(programs: Programs, sites: Mapping[str, OrdinarySite], names: Names) -> Arrays:
    """Return the model's arguments that are arrays, by parameter name, observations left out."""
    observed = [s.value.detach().cpu().numpy() for s in sites.values() if s.kind == "observed"]
    arrays: dict[str, tuple[tuple[str, ...], Array]] = {}
    for name, value in _arguments(programs).items():
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        if not isinstance(value, np.ndarray):
            continue
        numeric = value.dtype.kind in "biuf"
        if not numeric or not any(np.array_equal(value, x, equal_nan=True) for x in observed):
            arrays[name] = names.of_argument(name, value.ndim), value
    return arrays


def build(
    groups: Mapping[str, Arrays], attributes: Mapping[str, object], names: Names
) -> "ArvizData":
    """
    Put groups of arrays together as the installed ArviZ wants them.

    :param attributes: of the whole, and of the posterior.
    :return: an ``InferenceData`` where ArviZ is of version 0, a ``DataTree`` otherwise.
    :raises ImportError: without xarray.
    :raises ValueError: if names do not fit.
    """
    try:
        import xarray
    except ImportError as error:
        raise ImportError(
            "to_arviz needs xarray and ArviZ, which are not installed: pip install arviz h5netcdf"
        ) from error
    _check_names(groups, names)
    datasets = {name: _dataset(arrays, names) for name, arrays in groups.items() if arrays}
    library = {"inference_library": "pyro_mpis", "inference_library_version": __version__}
    attributes = {**library, **attributes}
    if "posterior" in datasets:
        datasets["posterior"].attrs.update(attributes)
    tree = xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attributes), **datasets})
    try:
        old = version("arviz").startswith("0.")
    except PackageNotFoundError:
        old = False
    if not old:
        return tree
    import arviz

    return cast("ArvizData", arviz.from_datatree(tree))  # type: ignore[no-untyped-call]


def _dataset(arrays: Arrays, names: Names) -> "Dataset":
    import xarray

    sizes = {
        dim: size
        for dims, array in arrays.values()
        for dim, size in zip(dims, array.shape, strict=True)
    }
    coords = {
        dim: np.asarray(names.coords[dim]) if dim in names.coords else np.arange(size)
        for dim, size in sizes.items()
    }
    return xarray.Dataset(dict(arrays), coords=coords)


def _check_names(groups: Mapping[str, Arrays], names: Names) -> None:
    """Refuse names of dims that do not exist, or that are too many or too few."""
    variables = {name for arrays in groups.values() for name in arrays}
    for name in names.dims:
        if name not in variables:
            raise ValueError(
                f"dims: no site or argument '{name}' is exported, only {_listed(variables)}."
            )
    sizes: dict[str, int] = {}
    for group, arrays in groups.items():
        for dims, array in arrays.values():
            sizes |= zip(dims, array.shape, strict=True)
            both = set(dims) & set(arrays)
            if both:
                raise ValueError(
                    f"dims: {_listed(both)} is a dim in the group '{group}' and a variable of it. "
                    "Give the dim another name."
                )
    for dim, given in names.coords.items():
        if dim not in sizes:
            raise ValueError(
                f"coords: no dim '{dim}', only {_listed(sizes)}. Dims are named after plates; "
                "others get a name by dims={site: [names]}."
            )
        if np.asarray(given).shape != (sizes[dim],):
            raise ValueError(
                f"coords: '{dim}' has {sizes[dim]} elements, but its names are of shape "
                f"{np.asarray(given).shape}."
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _arguments(programs: Programs) -> dict[str, object]:
    """Return what the model was called with, by parameter name."""
    args, kwargs = programs.args, programs.kwargs
    try:
        signature = inspect.signature(_plain(programs.model))
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # code without a signature
        return {f"arg_{number}": value for number, value in enumerate(args)} | dict(kwargs)
    result: dict[str, object] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            result |= {f"{name}_{number}": item for number, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            result |= value
        else:
            result[name] = value
    return result


def _plain(program: Program) -> Program:
    """Return the function inside of handlers, which hide its parameters' names."""
    while True:
        if isinstance(program, functools.partial) and program.args:
            handler, *rest = program.args
            if isinstance(handler, Messenger) and rest and callable(rest[0]):
                program = rest[0]
                continue
        if isinstance(program, torch.nn.Module):
            return program.forward
        inner = getattr(program, "fn", None)
        if not callable(inner):
            return program
        program = inner
