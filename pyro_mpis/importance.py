# SPDX-License-Identifier: Apache-2.0
"""The inference class: what the user holds."""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch

from pyro_mpis import planning, rendering
from pyro_mpis._text import range_of
from pyro_mpis._typing import NumSamples, Program
from pyro_mpis._warnings import warn
from pyro_mpis.adaptation.adapting import adapted
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.numbers import by_own_site
from pyro_mpis.adaptation.training import trained
from pyro_mpis.blocks import run_replicates
from pyro_mpis.options import (
    DEFAULT_NUM_SAMPLES,
    Options,
    checked_groups,
    checked_numbers,
    checked_program,
    number_of_bytes,
    number_of_dims,
    number_of_seconds,
    positive,
)
from pyro_mpis.particles import memory
from pyro_mpis.planning import plan_of, programs_of
from pyro_mpis.posterior import Posterior
from pyro_mpis.programs.turns import in_turn
from pyro_mpis.replicate import impossible
from pyro_mpis.results import saving
from pyro_mpis.run_plan import RunPlan
from pyro_mpis.weaknesses import weaknesses

if TYPE_CHECKING:
    from graphviz import Digraph

_logger = logging.getLogger("pyro_mpis")


class MPImportance(Posterior):
    """
    Massively parallel importance sampling of a model's posterior.

    Draws ``num_samples`` particles of each latent site, and weighs all combinations of them [1].
    Use it in place of :class:`pyro.infer.Importance`.

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> pyro.set_rng_seed(0)
    >>> posterior = MPImportance(model, num_samples=200).run(torch.tensor([0.8, 1.6]))
    >>> posterior.evidence().item()  # log p(y), here known to be -3.03
    -3.0
    >>> posterior.moments()["mu"].item()  # the posterior mean of each site, here known to be 0.80
    0.8
    >>> low, high = posterior.marginals("mu").quantile([0.05, 0.95])  # weighted particles
    >>> posterior.sample(1000)["mu"].shape  # joint posterior draws, for Predictive
    torch.Size([1000])

    ``diagnose()`` says what is poor and what would help. ``to_arviz()`` is for ``az.plot_forest``
    and ``az.loo``.

    It is a :class:`~pyro.infer.abstract_infer.TracePosterior`, and has all members of
    ``Importance``. So ``EmpiricalMarginal(posterior, "mu")`` works. Batch dims of a site that no
    plate declares count as event dims. Handlers around a run do not act on it: put them around the
    model.

    [1] Bowyer, Heap and Aitchison (2024), "Using Autodiff to Estimate Posterior Moments, Marginals
    and Samples", UAI, PMLR 244:394-417.

    :param model: a Pyro model. It runs at single values, in the shapes of an ordinary run.
    :param guide: a guide for all, some or none of the model's latent sites, such as an autoguide.
        Sites that it lacks are drawn from the prior.
    :param num_samples: K, the number of particles of each latent site. Sites may have numbers of
        their own, and ``None`` stands for all others: ``num_samples={"mu": 300, None: 10}``. To
        give a group a number, name any of its members. If no number is given, :meth:`run` chooses
        the largest that fits into ``time_limit`` and memory, and :meth:`summary` says it.
    :param groups: groups of latent sites that share one particle index. Use them for sites that
        depend strongly on each other, and where one observation reads many sites.
    :param shared_plates: names of plates whose latents have one particle index for all elements, in
        place of one for each. By default a plate shares only if its elements are read together, or
        if it crosses another plate. A warning then names it.
    :param max_plate_nesting: number of batch dims for plates. By default, and for infinity (the
        default of Pyro's ELBOs), it is found.
    :param memory_limit: bytes that a run, or a query, may take; it may exceed them by a factor of
        1.5, and by 100 MB for libraries. The default is half of what the process may still take. A
        larger sum is evaluated in blocks of particles, with the same result. If no block is small
        enough, latents share an index, or, with a limit that you gave, the run is an error. See
        :meth:`plan`.
    :param time_limit: seconds that all replicates of a run may take, where ``num_samples`` is not
        given. They are seconds of a usual machine, not of this one, so that a seed gives the same
        result everywhere.
    :param stratified: whether particles are spread evenly over their proposal, as a Latin
        hypercube. The evidence stays exactly unbiased, and its error gets smaller. This is for
        families with a quantile function: Normal, LogNormal, Uniform and others. Particles of
        other families are drawn independently, as are all with ``stratified=False``.
    :param num_replicates: number of independent sets of particles. Evidences are averaged; moments
        and marginals are averaged with the evidence as weight. The spread of the evidences gives
        :meth:`evidence_error`.
    :param executor: any :class:`concurrent.futures.Executor`, such as a process pool, or one of
        Dask, loky or mpi4py. It computes replicates, or the blocks of a single one. It must be able
        to pickle model and guide. The result is the same. Processes are faster than threads, which
        take turns because Pyro's handlers are global. See docs/many_processes.md.
    :param disable_progbar: whether to hide the progress bar. It appears in terminals and notebooks,
        over replicates, blocks and queries that take more than two seconds.
    :raises ValueError: if an argument is not as described.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None = None,
        num_samples: NumSamples | None = None,
        *,
        groups: Sequence[Sequence[str]] = (),
        shared_plates: Sequence[str] = (),
        max_plate_nesting: float | None = None,
        memory_limit: int | None = None,
        time_limit: float = 3.0,
        stratified: bool = True,
        num_replicates: int = 1,
        executor: Executor | None = None,
        disable_progbar: bool = False,
    ) -> None:
        self.model = checked_program("model", model)
        self.guide = None if guide is None else checked_program("guide", guide)
        self.num_samples = None if num_samples is None else checked_numbers(num_samples)
        self._is_number_given = num_samples is not None
        self.groups, self.shared_plates = tuple(groups), tuple(shared_plates)
        self.max_plate_nesting = number_of_dims(max_plate_nesting)
        self.memory_limit = number_of_bytes(memory_limit)
        self.time_limit = number_of_seconds(time_limit)
        self.stratified = bool(stratified)
        self.num_replicates = positive("num_replicates", num_replicates)
        self.executor, self.disable_progbar = executor, disable_progbar
        self._hold([], [], 0)
        self._told = self._told_of_error = False
        super().__init__()  # type: ignore[no-untyped-call]

    @in_turn
    def adapt(self, *args: object, **kwargs: object) -> "MPImportance":
        """
        Learn a proposal for these data, and choose numbers of particles, before :meth:`run`.

        One line goes from a model to accurate results::

            posterior = MPImportance(model).adapt(data).run(data)

        Without a guide, a new one is learned and kept as :attr:`guide`. It is Gaussian in
        unconstrained numbers, with the model's plates. Discrete latents of few values are summed
        exactly: :attr:`model` is then the model with marks at these sites.

        A guide of yours is trained in place instead. Its parameters climb the bound of
        :class:`~pyro_mpis.TraceMP_ELBO`, or follow :class:`~pyro_mpis.MPReweightedWakeSleep` if its
        draws have no gradient. Parameters of the model stay as they are.

        :meth:`run` then draws fresh particles, so that the evidence is unbiased. Also chooses
        :attr:`num_samples` and :attr:`num_replicates`, the latter no lower than you gave it. Draws
        random numbers, and leaves the handlers' stack as it was. Warns
        (:class:`~pyro_mpis.MPISWarning`) if no good proposal was found. See docs/adapting.md. The
        arguments are those of the model.

        :return: this object.
        :raises ValueError: if the model has no continuous latent, a guide given has no parameters,
            groups are given without a guide, or model and data do not fit.
        """
        if self.guide is not None and not isinstance(self.guide, AutoPlateNormal):
            return self._adapt_guide(self.guide, args, kwargs)
        if self.groups:
            raise ValueError(
                f"groups: the guide that adapt learns has one particle index for each set of "
                f"plates, so {list(self.groups)} cannot be kept. Give no groups, or a guide of "
                "your own: MPImportance(model, guide, groups=...).adapt(...) trains it."
            )
        options = replace(self._options, num_samples=None, numbers={}, time_limit=None)
        found = adapted(self.model, args, kwargs, options, show_progress=not self.disable_progbar)
        self.model, self.guide = found.model, found.guide
        self.num_samples, self._is_number_given = dict(found.num_samples), True
        return self._adapted(found.num_replicates, found.problems)

    def _adapt_guide(
        self, guide: Program, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> "MPImportance":
        """Train a guide of the user's own."""
        options = self._options
        if not self._is_number_given:
            options = replace(options, num_samples=None, numbers={}, time_limit=None)
        programs = programs_of(self.model, guide, args, kwargs)
        found = trained(programs, options, show_progress=not self.disable_progbar)
        if not self._is_number_given:
            self.num_samples, self._is_number_given = found.num_samples, True
        return self._adapted(found.num_replicates, found.problems)

    def _adapted(self, num_replicates: int, problems: Sequence[str]) -> "MPImportance":
        self.num_replicates = max(self.num_replicates, num_replicates)
        for problem in problems:
            warn(problem)
        return self

    @in_turn
    def run(self, *args: object, **kwargs: object) -> "MPImportance":
        """
        Draw the particles and weigh them; the arguments go to model and guide.

        Draws random numbers, and leaves the param store and the handlers' stack as they were. Warns
        (:class:`~pyro_mpis.MPISWarning`) if latents share a particle index, and if the programs run
        once for each particle.

        :return: this object.
        :raises ValueError: if model, guide or data do not fit; the message names the site.
        :raises NotImplementedError: if an enumerated site's support depends on other latents, or
            what the sites read could not be followed.
        :raises MemoryError: if a factor does not fit into the given ``memory_limit``.
        """
        programs = programs_of(self.model, self.guide, args, kwargs)
        plan, guide_trace, model_trace = plan_of(programs, self._options)
        if self.max_plate_nesting is None:
            _logger.info("Guessed max_plate_nesting = %d", plan.structure.max_plate_nesting)
        wait = memory.long_wait(plan.structure)
        if wait is not None and plan.device == "cpu":
            warn(wait)
        learned = self.guide if isinstance(self.guide, AutoPlateNormal) else None
        again = learned is not None  # adapt has run the programs before
        sums = run_replicates(plan, self.num_replicates, self._workers, keep=again, known=again)
        possible = [total for total in sums if bool(torch.isfinite(total.log_evidence))]
        if not possible:
            raise impossible(sums[0])
        self._hold(possible, [{} for _ in possible], len(sums))
        if not self._is_number_given:
            self.num_samples = possible[0].replicate.plan.num_samples
        self._told = self._told_of_error = False
        self._reset()
        notices = dict.fromkeys(n for total in sums for n in total.replicate.plan.notices)
        groups = self.groups if learned is None else (learned.latents,)  # they are to share
        weak = weaknesses(sums[0].replicate.structure, groups, guide_trace, model_trace)
        for problem in (*notices, *([] if sums[0].traces else weak)):
            warn(problem)
        return self

    @in_turn
    def plan(self, *args: object, **kwargs: object) -> RunPlan:
        """
        Say what :meth:`run` would take, and what would help; the arguments go to model and guide.

        Guide and model run a few times, at single values. No particles are drawn, and the global
        generator is left as it was. Sizes are exact for programs that run at many values at once.
        Seconds are right to a factor of about three on this machine.

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> plan = MPImportance(model, num_samples=100).plan(torch.tensor(0.8))
        >>> [(cost.num_samples, cost.entries) for cost in plan.costs]
        [(10, 20), (30, 60), (100, 200), (300, 600), (1000, 2000)]

        :return: entries, memory and seconds at several numbers of particles; what takes most of the
            memory; which sites to group or to enumerate, and how many particles then fit.
        :raises ValueError: if model, guide or data do not fit; the message names the site.
        """
        programs = programs_of(self.model, self.guide, args, kwargs)
        of_one = planning.run_plan(programs, self._options)
        return replace(of_one, num_replicates=self.num_replicates)

    @in_turn
    def render(self, *args: object, **kwargs: object) -> "Digraph":
        """
        Draw the factor graph that :meth:`run` would sum over; the arguments go to model and guide.

        Ellipses are particle indices, with their numbers of particles. Boxes are the log factors of
        the sites, with the sizes of their dims: those of the indices that the site reads, then
        those of its plates. Observed sites are grey, and the largest factor is red. Large boxes
        around them are plates.

        Draws no particles, as :meth:`plan`. Needs the Python package graphviz; showing or saving
        the picture needs Graphviz itself. ::

            MPImportance(model, num_samples=30).render(data)  # shows itself in a notebook
            MPImportance(model, num_samples=30).render(data).render("model", format="svg")

        :return: a graph, as :func:`pyro.render_model` returns one; its ``source`` is text.
        :raises ValueError: if model, guide or data do not fit; the message names the site.
        :raises ImportError: without the Python package graphviz.
        """
        programs = programs_of(self.model, self.guide, args, kwargs)
        return rendering.render(planning.structure_of(programs, self._options))

    @in_turn
    def save(self, path: str | os.PathLike[str], *, factors: bool = True) -> None:
        """
        Write the result to a file, for :meth:`load`: tensors and plain data, no code.

        The arguments of :meth:`run` are kept if they are tensors and plain data (numbers, strings,
        tuples, lists, dictionaries). Otherwise a warning says so. Model, guide, their parameters
        and the executor are not kept. The file is as large as :attr:`nbytes` and the arguments: for
        the eight schools with 100 particles 32 MB, or 32 kB without the factors.

        :param path: of the file; one that is there is overwritten.
        :param factors: whether to keep the log factors, by far the largest part, if they fitted
            into memory. Without them each query of the loaded result evaluates the model again.
        :raises NotImplementedError: if a plate selects a subsample.
        """
        given = {field.name: getattr(self, field.name) for field in fields(saving.Settings)}
        given |= {"groups": checked_groups(self.groups), "num_replicates": self._number}
        settings = saving.Settings(**given)
        saving.save(path, settings, self._ran(), self._weights, factors=factors)

    @classmethod
    @in_turn
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Program,
        guide: Program | None = None,
        *,
        args: Sequence[object] | None = None,
        kwargs: Mapping[str, object] | None = None,
        device: torch.device | str = "cpu",
    ) -> "MPImportance":
        """
        Read a result that :meth:`save` wrote; it then answers as the saved one did.

        The file cannot run code, wherever it comes from. Model and guide run once, to check that
        they have the sites and shapes of the saved run; this leaves the global generators as they
        were. If the result has several blocks or replicates, or was saved without factors, each
        query evaluates the programs again. They then need the parameters of the run, and this is
        checked too.

        :param path: of the file.
        :param model: the model of the saved run.
        :param guide: its guide.
        :param args: the arguments of the run, if the file does not hold them or to replace them.
        :param kwargs: likewise; without ``args``, the run had keyword arguments only.
        :param device: where to put the tensors.
        :raises ValueError: if the file is damaged, not a saved result or of another layout; if
            model, guide or arguments are not those of the run, or arguments are missing.
        """
        stored = saving.read(path, saving.resolved(device))
        called_with = saving.arguments(path, stored, args, kwargs)
        posterior = cls(model, guide, **vars(stored.settings))
        programs = programs_of(model, guide, called_with.args, called_with.kwargs)
        sums = saving.sums_of(path, stored, programs, posterior._options)
        weights = [dict(kept.weights) for kept in stored.sums]
        posterior._hold(sums, weights, posterior.num_replicates)
        return posterior

    @in_turn
    def to(self, device: torch.device | str) -> "MPImportance":
        """
        Return the result on another device; this one stays where it is, as with a tensor's ``to``.

        The tensors among the arguments of :meth:`run` are moved too, also those in tuples, lists
        and dictionaries. The parameters of modules are not, and neither are tensors that model and
        guide refer to by themselves. A result of several blocks or replicates needs them, because
        it is evaluated again: move them first, ``guide.to(device)``.
        """
        result = copy.copy(self)
        moved = saving.moved((self._sums, self._weights), saving.resolved(device))
        result._hold(*moved, self._number)
        result._reset()
        return result

    def __repr__(self) -> str:
        """Say what was drawn, and the log evidence."""
        options = self._options
        if self._sums or self._is_number_given:
            given = {options.num_samples or DEFAULT_NUM_SAMPLES, *options.numbers.values()}
            counts = self._counts() if self._sums else given
            particles = f"{range_of(counts)} particles a site"
        else:
            particles = f"as many particles as fit into {self.time_limit:g} s"
        if (number := self._number or self.num_replicates) > 1:
            particles += f", {number} replicates"
        result = f"log evidence {self.evidence().item():.2f}" if self._sums else "not run"
        return f"<MPImportance: {particles}, {result}>"

    @property
    def _options(self) -> Options:
        numbers = by_own_site(self.guide, self.num_samples if self._is_number_given else None)
        return Options(
            num_samples=numbers.get(None),
            numbers={name: number for name, number in numbers.items() if name is not None},
            groups=checked_groups(self.groups),
            shared_plates=self.shared_plates,
            max_plate_nesting=self.max_plate_nesting,
            memory_limit=self.memory_limit,
            stratified=self.stratified,
            time_limit=None if self._is_number_given else self.time_limit / self.num_replicates,
        )
