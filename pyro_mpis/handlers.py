# SPDX-License-Identifier: Apache-2.0
r"""
Run a model and its guide: once plainly, once with particles, once with a dim for each index.

Three ways to run a program, in the order in which a run of the inference uses them:

* :func:`run_plainly`: one ordinary run of guide and model, to learn the structure. The values
  carry their provenance, so that a site's ``log_prob`` tells which sites it read.
* :func:`draw`: K particles of every site in **one shared dim**, just left of the plates. Cost
  O(K) a site. Component ``k`` of a child reads component ``k`` of its parents.
* :func:`replay`: the same particles, those of each index in **a dim of their own**, so that each
  ``log_prob`` comes out as the small tensor of (20)-(22) of [1].

Batch dims are counted from the right and are negative: the plates have ``-1`` to
``-max_plate_nesting``, the shared dim is the next one to the left, dims of indices start there too.

[1] Bowyer, Heap and Aitchison (2024), "Using Autodiff to Estimate Posterior Moments, Marginals and
Samples", UAI, PMLR 244:394-417.
"""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent, MaskedDistribution
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_mpis._text import broadcast_shape as broadcast_shape
from pyro_mpis._text import first_line as first_line
from pyro_mpis._text import quoted as quoted
from pyro_mpis._typing import Distribution, Program, SampleMessage
from pyro_mpis.provenance import LIBRARIES, tracked

if TYPE_CHECKING:
    from pyro.poutine.runtime import Message

Name: TypeAlias = Literal["model", "guide"]

VECTORISED = (
    "index from the right (x[..., 0], not x[0]; x[..., 0:1] keeps the dim of a plate), keep batch "
    "dims when reshaping, stack latents with torch.stack(torch.broadcast_tensors(a, b), -1), do "
    "not call .item() on a latent's value, and do not branch on it (torch.where does)."
)
MATRIX_PRODUCT = (
    "write (X * w).sum(-1) for X @ w, with w drawn as a vector by .to_event(1): a matrix product "
    "takes batch dims for rows."
)
LAYER = (
    "torch.nn.Linear takes weights of a single particle. Write x @ weight.transpose(-1, -2) + "
    "bias.unsqueeze(-2), and put the resulting vector along a plate by "
    "pyro.ops.indexing.Vindex(mean)[..., torch.arange(n)]."
)
BROADCAST = (
    "outside of plates, give a latent the dims of what it meets: x.unsqueeze(-1) for a vector, "
    "x[..., None, None] for a matrix. A latent whose elements are all read at once, as the sides "
    "of a covariance matrix, is to be drawn by .to_event(1), not in a plate."
)
EXPAND = (
    "an .expand to a fixed shape leaves no room for them. Give the distribution's arguments the "
    "dim, as in dist.Normal(0.0, scale.unsqueeze(-1) * torch.ones(n)).to_event(1). For "
    "MixtureSameFamily(Categorical(w), Normal(loc, 1.0)), first "
    "w, loc = torch.broadcast_tensors(w, loc)."
)
BRANCH = (
    "a latent's value is that of all its particles at once. Compute both branches and choose by "
    "torch.where, and do not call .item()."
)
INDEX = (
    "index from the right. A latent of a plate is read by an array of data as x[..., index]; one "
    "that is read by another latent's value is to be drawn outside of plates, as a vector by "
    ".to_event(1), and read as pyro.ops.indexing.Vindex(x)[..., index]."
)

PARTICLES = "_mpis_particles"  # name of the plate that draws K particles at once
# What a program did that takes single values only, by a part of what torch says of it.
REMEDIES = {
    "cannot be multiplied": MATRIX_PRODUCT,
    "dimensions of batch2": MATRIX_PRODUCT,
    "size mismatch, got input": MATRIX_PRODUCT,
    "1D tensors expected": MATRIX_PRODUCT,
    "t() expects a tensor": LAYER,
    "must match the size of tensor": BROADCAST,
    "number of sizes provided": EXPAND,
    "The expanded size of the tensor": EXPAND,
    "Boolean value of Tensor": BRANCH,
    "converted to Scalar": BRANCH,
    "indexing tensors could not be broadcast": INDEX,
}


@dataclass(frozen=True)
class Programs:
    """A model, its guide, and what both are called with."""

    model: Program
    guide: Program
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    sites: Mapping[Name, frozenset[str]] = field(default_factory=dict)  # that a plain run met
    leaves_torch: bool = False  # with values of its latents, by ``if`` or .item()

    def program(self, name: Name) -> Program:
        """Return the model or the guide."""
        return self.model if name == "model" else self.guide


@dataclass(frozen=True)
class Draw:
    """The particles of one random site, as drawn in the shared dim."""

    fn: Distribution  # the proposal; batch shape (K, *plates)
    value: Tensor  # (K, *plates, *event), plates padded to max_plate_nesting
    mask: Tensor | bool | None  # of the program that drew the site
    reads_particles: bool  # whether the proposal differs between particles


def is_subsample(site: SampleMessage) -> bool:
    """Whether a message comes from a plate, not from a sample statement."""
    return bool(site_is_subsample(cast("Message[..., Tensor]", site)))


def is_latent(site: SampleMessage) -> bool:
    """Whether a message is a sample statement without observation, plates' subsamples aside."""
    return site["type"] == "sample" and not site["is_observed"] and not is_subsample(site)


def is_delta(fn: Distribution) -> bool:
    """Whether a distribution has no randomness of its own."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, pyro.distributions.Delta)


def is_enumerated(site: SampleMessage) -> bool:
    """
    Whether a site is marked for an exact sum (not for Tensor Monte Carlo's ``num_samples``).

    Pyro's two ways to sum, ``"parallel"`` and ``"sequential"``, have the same result.
    """
    infer = site["infer"]
    return bool(infer.get("enumerate")) and infer.get("num_samples") is None


def sample_sites(trace: Trace) -> dict[str, SampleMessage]:
    """Return the sample sites of a trace in order, those of the plates themselves left out."""
    nodes = prune_subsample_sites(trace).nodes.items()
    return {name: cast(SampleMessage, site) for name, site in nodes if site["type"] == "sample"}


class _Track(Messenger):
    """Mark each random site's value with the site's name, in place of what it was computed from."""

    def __init__(self, is_random: Callable[[SampleMessage], bool]) -> None:
        super().__init__()
        self.is_random = is_random

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg) and self.is_random(msg) and not msg["done"]:
            with torch._C.DisableTorchFunctionSubclass():  # samplers write in place
                msg["value"] = msg["fn"]()
            msg["done"] = True

    def _pyro_post_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg) and self.is_random(msg):
            value = detach_provenance(msg["value"])
            msg["value"] = tracked(value, frozenset({msg["name"]}))


class _Compare(Messenger):
    """Show each latent site that the guide has too to a function, before its value is used."""

    def __init__(
        self,
        sites: Mapping[str, SampleMessage],
        compare: Callable[[SampleMessage, SampleMessage], None],
    ) -> None:
        super().__init__()
        self.sites = sites
        self.compare = compare

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg) and msg["name"] in self.sites:
            self.compare(self.sites[msg["name"]], msg)


class _LiftMasks(Messenger):
    """
    Lift the masks of latent sites that no guide proposes, and note which had any.

    Such a site is drawn from the model's distribution where it is masked too. Were that not to
    count, its particles would be paired with those of the latents that it reads as if they had
    nothing to do with them, and a support would be summed with a weight of one for each value.

    :param kept: sites that the guide draws or gives a ``Delta``.
    """

    def __init__(self, kept: Set[str]) -> None:
        super().__init__()
        self.kept = kept
        self.lifted: set[str] = set()

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if not is_latent(msg) or msg["name"] in self.kept:
            return
        fn = _unmasked(msg["fn"])
        if msg["mask"] is not None or fn is not msg["fn"]:
            self.lifted.add(msg["name"])
            msg["mask"], msg["fn"] = None, fn


def _unmasked(fn: Distribution) -> Distribution:
    """Return a distribution without the masks of ``.mask()``."""
    if isinstance(fn, MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, Independent):
        base = _unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


@contextmanager
def isolated() -> Iterator[None]:
    """Let the handlers and plates around neither see nor change what programs do."""
    around, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []  # else plates would take other dims
    try:
        with poutine.block():
            yield
    finally:
        _DIM_ALLOCATOR._stack = around


def run_plainly(
    programs: Programs,
    compare: Callable[[SampleMessage, SampleMessage], None],
) -> tuple[Programs, Trace, Trace]:
    """
    Run the guide, then the model with the guide's values; draws random numbers.

    Values carry the names of the random sites that they were computed from.

    :param compare: called with the guide's and the model's message of each site that both sample;
        raises if they do not fit.
    :return: the programs, the model without masks of latents that no guide proposes; the traces of
        guide and model.
    """
    guide, args, kwargs = programs.guide, programs.args, programs.kwargs
    if isinstance(guide, torch.nn.Module):
        with poutine.block():  # autoguides make their params from the first values that they see
            guide(*args, **kwargs)
    with _Track(lambda site: not is_delta(site["fn"])):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    from_guide = {name: s for name, s in sample_sites(guide_trace).items() if is_latent(s)}
    guide_values = guide_trace.copy()
    for name in guide_trace.nodes:
        if name not in from_guide:
            guide_values.remove_node(name)
    lift = _LiftMasks(
        frozenset(n for n, s in from_guide.items() if is_delta(s["fn"]) or not is_enumerated(s))
    )
    with (
        _Compare(from_guide, compare),
        _Track(lambda site: not is_delta(site["fn"]) and site["name"] not in from_guide),
    ):
        replayed = poutine.replay(programs.model, trace=guide_values)
        model_trace = poutine.trace(lift(replayed)).get_trace(*args, **kwargs)
    if lift.lifted:
        programs = replace(programs, model=_LiftMasks(lift.kept)(programs.model))
    return programs, guide_trace, model_trace


class _Substitute(Messenger):
    """Give latent sites the values of a dictionary, and note the last site met."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.last_site: str | None = None
        self.batch_shapes: dict[str, torch.Size] = {}

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_subsample(msg):
            return
        self.last_site = msg["name"]
        self.batch_shapes[msg["name"]] = msg["fn"].batch_shape  # before the particles' plate
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class _Enumerate(Messenger):
    """Give marked sites their whole support, each in a batch dim of its own."""

    def __init__(self, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.dims = dims

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if msg["name"] not in self.dims or msg["is_observed"]:
            return
        fn = msg["fn"]
        support = fn.enumerate_support(expand=False)  # (S, 1, .., 1, *event)
        shape = [1] * (-self.dims[msg["name"]] - 1)
        value = support.reshape([len(support), *shape, *fn.event_shape])
        for frame in msg["cond_indep_stack"]:  # elements of the plates may be read by index
            if frame.dim is not None:
                shape[frame.dim] = frame.size
        msg["value"] = value.expand([len(support), *shape, *fn.event_shape])
        msg["done"] = True


class _ToEvent(Messenger):
    """Make the rightmost batch dims of some latent sites event dims."""

    def __init__(self, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.dims = dims

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if msg["name"] in self.dims and not msg["is_observed"]:
            msg["fn"] = msg["fn"].to_event(self.dims[msg["name"]])


def with_event_dims(
    programs: Programs, guide_dims: Mapping[str, int], model_dims: Mapping[str, int]
) -> Programs:
    """
    Return programs whose sites have event dims in place of some batch dims.

    :param guide_dims: for sites of the guide, how many of their batch dims, from the right.
    :param model_dims: for sites of the model.
    """
    guide = _ToEvent(guide_dims)(programs.guide) if guide_dims else programs.guide
    model = _ToEvent(model_dims)(programs.model) if model_dims else programs.model
    return replace(programs, guide=guide, model=model)


@contextmanager
def _explained(program: str, handler: _Substitute, size: int) -> Iterator[None]:
    """Turn an exception of a program that ran on single values into one that says why."""
    try:
        yield
    except Exception as error:
        where = f"at or after site '{handler.last_site}'" if handler.last_site else "at its start"
        where += _line(error)
        raise ValueError(
            f"the {program} runs on single values, but not on {size} particles at once ({where}): "
            f"{type(error).__name__}: {first_line(error)}. Particles are in batch dims left of the "
            f"plates: {_remedy(error)} pyro.infer.Importance, which runs a program once for each "
            "sample, allows all this."
        ) from error


def _remedy(error: Exception) -> str:
    """Say how to write what failed."""
    known = (remedy for part, remedy in REMEDIES.items() if part in str(error))
    return next(known, VECTORISED)


def _line(error: Exception) -> str:
    """Return the user's line that raised an error, for a message."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        ours = frame.filename.startswith(LIBRARIES) or frame.filename == contextlib.__file__
        if not ours and frame.line:
            return f", in {os.path.basename(frame.filename)}:{frame.lineno}, `{frame.line}`"
    return ""


def _run(programs: Programs, name: Name, handler: _Substitute, size: int) -> Trace:
    """Run a program under a handler; what fails after its last site is not needed."""
    tracer = poutine.trace()
    with _explained(name, handler, size), handler, tracer:
        try:
            programs.program(name)(*programs.args, **programs.kwargs)
        except Exception:  # a return value may take code that is not vectorised
            if name not in programs.sites or not programs.sites[name] <= set(tracer.trace.nodes):
                raise
    return tracer.trace


def run_at(programs: Programs, name: Name, values: Mapping[str, Tensor]) -> Trace:
    """Run a program once at one value of each of its latent sites, as ordinary runs have them."""
    with _Substitute(values):
        return poutine.trace(programs.program(name)).get_trace(*programs.args, **programs.kwargs)


def trace_at(programs: Programs, values: Mapping[str, Tensor]) -> Trace:
    """
    Run the model once at one value of each of its latent sites, and evaluate the densities.

    :return: an ordinary trace, return value included.
    """
    trace = run_at(programs, "model", values)
    trace.log_prob_sum()  # memoised in the trace, as the traces of pyro.infer.Importance have it
    return trace


def draw(
    programs: Programs,
    name: Name,
    *,
    num_samples: int,
    dim: int,
    given: Mapping[str, Tensor],
    event_dims: Mapping[str, int],
) -> dict[str, Draw]:
    """
    Draw ``num_samples`` particles of the program's latent sites in the shared batch dim ``dim``.

    Distributions do not check their arguments here: that is done once all sites are drawn.

    :param name: which of the two programs.
    :param given: values, with the shared dim, of the sites that are not to be drawn.
    :param event_dims: the sites whose particles to return, with their numbers of event dims.
    """
    handler = _Substitute(given)
    with pyro.validation_enabled(False), pyro.plate(PARTICLES, num_samples, dim=dim):
        trace = _run(programs, name, handler, num_samples)
    sites = sample_sites(trace)
    check_same_sites(name, set(event_dims), set(sites) & set(event_dims))
    draws = {}
    for site_name, event_dim in event_dims.items():
        site = sites[site_name]
        if site["fn"].event_dim != event_dim:
            raise ValueError(f"site '{site_name}': its event shape differs between runs.")
        batch_shape = handler.batch_shapes[site_name]
        draws[site_name] = Draw(
            fn=site["fn"],
            value=site["value"],
            mask=site["mask"],
            reads_particles=len(batch_shape) >= -dim and batch_shape[dim] > 1,
        )
    return draws


def replay(
    programs: Programs,
    name: Name,
    *,
    values: Mapping[str, Tensor],
    enumerated: Mapping[str, int],
    num_samples: int,
    validate: bool = False,
) -> dict[str, SampleMessage]:
    """
    Run a program with given values of its latent sites; draws nothing that counts.

    :param values: particles, in whatever batch dims.
    :param enumerated: batch dim for the support of each site to sum out exactly.
    :param validate: whether distributions check their arguments; for large tensors it takes time.
    :return: the sample sites of the run.
    """
    handler = _Substitute(values)
    with pyro.validation_enabled(validate), _Enumerate(enumerated):
        return sample_sites(_run(programs, name, handler, num_samples))


def check_same_sites(name: Name, expected: Set[str], found: Set[str]) -> None:
    """Refuse a program whose sites depend on the values of its latents."""
    different = expected ^ found
    if different:
        site = min(different)
        where = "only without particles" if site in expected else "only with particles"
        raise ValueError(
            f"site '{site}': met in the {name} {where}. The sites of a {name} must be the same for "
            "every value of its latents: replace branches on a latent's value by torch.where, "
            "poutine.mask or a fixed number of steps, or use pyro.infer.Importance, which allows "
            "them."
        )


def place(value: Tensor, dim: int, *, shared_dim: int) -> Tensor:
    """
    Move a site's particles from the shared dim to the batch dim ``dim`` on its left.

    :param value: ``(K, *plates, *event)``.
    :return: ``(K, 1, .., 1, *plates, *event)``.
    """
    return value.reshape(value.shape[:1] + (1,) * (shared_dim - dim) + value.shape[1:])
