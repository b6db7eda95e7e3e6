# SPDX-License-Identifier: Apache-2.0
"""The inference class: what the user holds."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import overload

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_mpis import moments as _moments
from pyro_mpis._typing import MomentFunction, Program
from pyro_mpis._warnings import warn
from pyro_mpis.blocks import (
    BlockSum,
    Build,
    Ranges,
    evaluate,
    joint_weights_of_blocks,
    sample_of_blocks,
    split,
)
from pyro_mpis.dependencies import Structure, analyse, check_same_site
from pyro_mpis.factors import FactorGraph, build_graph
from pyro_mpis.handlers import Programs, first_line, quoted, run_plainly, sample_sites
from pyro_mpis.indexing import SiteReads, check_provenance, find_reads, regroup_indexed
from pyro_mpis.marginals import Marginal
from pyro_mpis.memory import default_limit, plan_blocks
from pyro_mpis.proposals import Particles, check_arguments, draw_particles
from pyro_mpis.summary import Summary, summarise

DEFAULT_NUM_SAMPLES = 10  # as pyro.infer.Importance has it


class MPImportance:
    """
    Massively parallel importance sampling of a model's posterior.

    Draws ``num_samples`` particles of each latent site from the guide and weighs all their
    combinations [1]. Stands where :class:`pyro.infer.Importance` stood::

        posterior = MPImportance(model, guide, num_samples=30).run(data)
        posterior.evidence()           # log p(data)
        posterior.moments()            # {site: posterior mean}
        posterior.marginals("mu")      # weighted particles, an Empirical distribution
        posterior.sample(1000)         # {site: joint posterior draws}, for Predictive

    [1] Bowyer, Heap and Aitchison (2024), "Using Autodiff to Estimate Posterior Moments, Marginals
    and Samples", UAI, PMLR 244:394-417.

    :param model: a Pyro model, vectorised over batch dims left of its plates.
    :param guide: a guide for all, some or none of the model's latent sites, autoguides included;
        the rest is drawn from the prior, as all are without a guide.
    :param num_samples: K, the number of particles of each latent site.
    :param groups: groups of latent sites that share one particle index, for sites that are
        strongly dependent or that one likelihood reads many of.
    :param max_plate_nesting: number of batch dims for plates; found by default.
    :param memory_limit: bytes that the largest tensors may take together; half of what is free by
        default. A larger sum is evaluated in blocks of particles, with the same result.
    :param disable_progbar: whether to show no progress bar over blocks in a terminal.
    :raises ValueError: if an argument is not as described.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        num_samples: int | None = None,
        *,
        groups: Sequence[Sequence[str]] = (),
        max_plate_nesting: int | None = None,
        memory_limit: int | None = None,
        disable_progbar: bool = False,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model: expected a callable, but found {type(model).__name__}.")
        if guide is not None and not callable(guide):
            raise ValueError(
                f"guide: expected a callable or None, but found {type(guide).__name__}."
            )
        if num_samples is None:
            num_samples = DEFAULT_NUM_SAMPLES
            warn(f"num_samples not given: {num_samples} particles of each latent site are drawn.")
        num_samples = _positive(num_samples)
        if memory_limit is not None and (isinstance(memory_limit, bool) or memory_limit <= 0):
            raise ValueError(
                f"memory_limit: expected a positive number of bytes, but found {memory_limit!r}."
            )
        self.model = model
        self.guide = guide
        self.num_samples = num_samples
        self.groups = tuple(groups)
        self.max_plate_nesting = max_plate_nesting
        self.memory_limit = memory_limit
        self.disable_progbar = disable_progbar
        self._sum: BlockSum | None = None
        self._weights: dict[str, Tensor] = {}

    def run(self, *args: object, **kwargs: object) -> "MPImportance":
        """
        Draw the particles and weigh them; the arguments go to model and guide.

        Draws random numbers; leaves the param store and the handlers' stack as they were.

        :return: this object.
        :raises ValueError: if model, guide or data do not fit; the message names the site.
        :raises NotImplementedError: if the sum over all combinations is intractable.
        :raises MemoryError: if a factor would not fit into free memory.
        """
        guide = self.guide if self.guide is not None else _no_guide
        programs = Programs(self.model, guide, args, kwargs)
        with _isolated():
            guide_trace, model_trace = _run_plainly(programs)
            structure = analyse(
                guide_trace,
                model_trace,
                guide=guide,
                groups=self.groups,
                max_plate_nesting=self.max_plate_nesting,
            )
            limit = self.memory_limit
            if limit is None:
                limit = default_limit(_device(model_trace))
            block_sizes = plan_blocks(structure, self.num_samples, limit)
            particles = draw_particles(structure, programs, self.num_samples)
            build = _builder(structure, particles, programs)
            total = evaluate(
                build,
                split(particles.sizes, block_sizes),
                particles.sizes,
                show_progress=not self.disable_progbar,
            )
            if is_validation_enabled():
                check_arguments(structure, programs, particles)
            _check_positive(total)
        self._sum, self._weights = total, {}
        for problem in _weaknesses(structure, self.groups, guide_trace, model_trace):
            warn(problem)
        return self

    def evidence(self, log_scale: bool = True) -> Tensor:
        """
        Estimate the evidence p(x): (18) of [1].

        :param log_scale: whether to return log p(x), in nats. Its exponential is unbiased; the
            log itself is biased low.
        :return: a scalar.
        """
        total = self._ran()
        log_p = total.log_evidence
        return (log_p if log_scale else log_p.exp()).to(total.whole.dtype)

    @overload
    def moments(self) -> dict[str, Tensor]: ...
    @overload
    def moments(self, functions: MomentFunction, *sites: str) -> Tensor: ...
    @overload
    def moments(
        self, functions: Mapping[str, tuple[MomentFunction | str, ...]]
    ) -> dict[str, Tensor]: ...

    def moments(
        self,
        functions: MomentFunction | Mapping[str, tuple[MomentFunction | str, ...]] | None = None,
        *sites: str,
    ) -> Tensor | dict[str, Tensor]:
        """
        Estimate posterior expectations: (27)-(28) of [1].

        ``moments()`` gives the mean of every latent site, ``moments(torch.log, "tau")`` that of a
        function of sites, ``moments({"xy": (torch.mul, "x", "y"), "x2": (torch.square, "x")})``
        those of many functions in one pass.

        A function is given **one** value of each of its sites, of the site's event shape; it is
        run under :func:`torch.vmap` over particles and plate elements. Sites of nested plates may
        be mixed, such as a global site with a plated one.

        :return: for each moment ``batch_shape + shape of the function's result``, with the batch
            shape of the deepest site; a mean has the shape of the site.
        :raises ValueError: if a site is unknown, sites sit in different plates, or a function fails
            or does not return a tensor.
        """
        graph = self._ran().whole
        if functions is None:
            weights = self._joint_weights([[name] for name in graph.values])
            return {name: _moments.mean(graph, weights, name) for name in graph.values}
        if isinstance(functions, Mapping):
            asked = {name: _split_moment(name, spec) for name, spec in functions.items()}
            weights = self._joint_weights([names for _, names in asked.values()])
            return {
                name: _moments.expectation(graph, weights, function, names)
                for name, (function, names) in asked.items()
            }
        function, names = _split_moment("", (functions, *sites))
        weights = self._joint_weights([names])
        return _moments.expectation(graph, weights, function, names)

    @overload
    def marginals(self) -> dict[str, Marginal]: ...
    @overload
    def marginals(self, site: str, /, *sites: str) -> Marginal: ...

    def marginals(self, *sites: str) -> Marginal | dict[str, Marginal]:
        """
        Return posterior marginals on the particles: (32)-(35), joint ones (43)-(44) of [1].

        ``marginals()`` gives that of every latent site, ``marginals("mu")`` one, and
        ``marginals("mu", "tau")`` the joint marginal of several sites of nested plates.

        :raises ValueError: if a site is unknown or sites sit in different plates.
        """
        graph = self._ran().whole
        if sites:
            weights = self._joint_weights([sites])
            return _moments.marginal(graph, weights, sites)
        weights = self._joint_weights([[name] for name in graph.values])
        return {name: _moments.marginal(graph, weights, [name]) for name in graph.values}

    def sample(self, num_samples: int = 1) -> dict[str, Tensor]:
        """
        Draw joint posterior samples of all latent sites; draws random numbers.

        :return: ``{site: (num_samples, *shape)}``, equally weighted, independent given the
            particles; goes into :class:`pyro.infer.Predictive` as ``posterior_samples``.
        """
        total = self._ran()
        num_samples = _positive(num_samples)
        with _isolated():
            return sample_of_blocks(total, num_samples)

    def summary(self) -> Summary:
        """
        Make a table of mean, sd, quantiles, ESS and Pareto k-hat of every scalar.

        Warns (:class:`~pyro_mpis.MPISWarning`) of low ESS and high k-hat, and says what helps.
        """
        summary, problems = summarise(self.marginals(), float(self.evidence()), self.num_samples)
        for problem in problems:
            warn(problem)
        return summary

    def _ran(self) -> BlockSum:
        if self._sum is None:
            raise RuntimeError("no particles yet: call .run(*args, **kwargs) before any query.")
        return self._sum

    def _joint_weights(self, tuples: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Compute the joint weights that are not known yet, in one pass."""
        total = self._ran()
        wanted = [_moments.joint_indices(total.whole, sites) for sites in tuples]
        missing = [symbols for symbols in wanted if symbols not in self._weights]
        if missing:
            with _isolated():
                self._weights |= joint_weights_of_blocks(total, missing)
        return self._weights


def _positive(num_samples: int) -> int:
    """Return a number of samples, of any integer type."""
    try:
        number = operator.index(num_samples)
    except TypeError:
        number = 0
    if isinstance(num_samples, bool) or number < 1:
        raise ValueError(f"num_samples: expected a positive integer, but found {num_samples!r}.")
    return number


def _no_guide(*args: object, **kwargs: object) -> None:
    """Sample nothing: every latent is proposed from the prior."""


@contextmanager
def _isolated() -> Iterator[None]:
    """Run programs without gradients and without a trace in the param store."""
    param_store = pyro.get_param_store()
    with torch.no_grad(), param_store.scope(param_store.get_state()):
        yield


def _builder(structure: Structure, particles: Particles, programs: Programs) -> Build:
    """Return the function that evaluates the factors of a block of particles."""
    check = is_validation_enabled()
    reads: list[SiteReads] = []  # the same for all blocks: found once

    def build(ranges: Ranges) -> FactorGraph:
        part = particles.block(structure, ranges) if ranges else particles
        graph = build_graph(structure, part, programs)
        if not reads:
            if not structure.unique_dims:
                check_provenance(graph, structure, part, programs)
            reads.append(find_reads(graph, structure, part, programs, check=check))
        return regroup_indexed(graph, reads[0])

    return build


def _run_plainly(programs: Programs) -> tuple[Trace, Trace]:
    """Run guide and model once, with errors that say what to do."""
    try:
        return run_plainly(programs, check_same_site)
    except RuntimeError as error:
        if "Multiple sample sites" in str(error):
            raise ValueError(
                f"{first_line(error)}. Each sample statement needs a name of its own: in a loop, "
                "number them, as in pyro.sample(f'x_{i}', ...). A plate entered twice is to be "
                "made once: plate = pyro.plate(...), then with plate: ..."
            ) from error
        raise


def _device(trace: Trace) -> torch.device:
    """Return the device that a program computes on."""
    devices = [site["value"].device for site in sample_sites(trace).values()]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _split_moment(
    name: str, spec: tuple[MomentFunction | str, ...]
) -> tuple[MomentFunction, tuple[str, ...]]:
    where = f"moment '{name}'" if name else "moments"
    if not isinstance(spec, tuple) or not spec or not callable(spec[0]):
        raise ValueError(
            f"{where}: expected a function and the names of its sites, found {spec!r}."
        )
    function, *sites = spec
    names = tuple(site for site in sites if isinstance(site, str))
    if not names or len(names) != len(sites) or isinstance(function, str):
        raise ValueError(
            f"{where}: give the names of the function's sites after it, found {sites}."
        )
    return function, names


def _check_positive(total: BlockSum) -> None:
    """Refuse an evidence of zero, and name the site that rules everything out."""
    if bool(torch.isfinite(total.log_evidence)):
        return
    _, graph = next(total.graphs([0]))
    for factor in graph.factors:
        particle_dims = [d for d, s in enumerate(factor.dims) if s in graph.index_plates]
        best = factor.tensor.amax(particle_dims) if particle_dims else factor.tensor
        if bool((best == -torch.inf).any()):
            count = int((best == -torch.inf).sum())
            raise ValueError(
                f"site '{factor.name}': probability zero for all particles at {count} of "
                f"{best.numel()} plate elements, so the evidence is zero. Check the data against "
                "the distribution's support, or use a guide that reaches where the data have "
                "positive probability."
            )
    names = {factor.name for factor in graph.factors if bool((factor.tensor == -torch.inf).any())}
    raise ValueError(
        f"the evidence is zero: no combination of particles has positive probability at all of "
        f"{quoted(names)} together. Draw more particles, or use a guide nearer to the posterior."
    )


def _weaknesses(
    structure: Structure,
    groups: Sequence[Sequence[str]],
    guide_trace: Trace,
    model_trace: Trace,
) -> list[str]:
    """Say where the guide leaves less than massively parallel importance sampling."""
    result = []
    carried = [name for name, origin in structure.origins.items() if origin == "guide_delta"]
    points = {name for name in carried if not structure.reads(structure.guide[name])}
    if points:
        result.append(
            f"the guide fixes {quoted(points)} at a point (Delta): evidence() is the log of the "
            "joint density of the data and this point, not of p(x), and all else is conditional "
            "on it. For a posterior of these sites use AutoNormal instead."
        )
    indices = [index for index in structure.indices if not index.enumerated]
    sharing = set(carried) - points
    if not groups and len(indices) == 1 and len(sharing) > 1:
        result.append(
            f"the guide draws {len(sharing)} sites as one vector, '{indices[0].sites[0]}', so "
            "there is a single particle index, and massively parallel importance sampling equals "
            "ordinary importance sampling with num_samples draws. A guide with a distribution for "
            "each site (AutoNormal, AutoGuideList of several parts) combines them all."
        )
    guide_sites = sample_sites(guide_trace)
    flat = {
        name
        for name, site in sample_sites(model_trace).items()
        if structure.origins.get(name) in ("guide", "guide_delta")
        and site["mask"] is not None
        and site["mask"] is not True
        and guide_sites[name]["mask"] is None
    }
    strange = {
        name
        for name, origin in structure.origins.items()
        if origin == "guide"
        and structure.guide[name].plates - structure.model[name].plates
        and structure.model[name].plates - structure.guide[name].plates
    }
    if strange:
        result.append(
            f"{quoted(strange)}: in other plates in the guide than in the model, so that all plate "
            "elements share one particle index. Give the guide's plates the model's names."
        )
    if flat:
        result.append(
            f"{quoted(flat)}: masked in the model but not in the guide. Where masked, the prior "
            "counts as flat; if those elements are padding, mask them in the guide too."
        )
    return result
