# SPDX-License-Identifier: Apache-2.0
"""What a finished run answers: evidence, moments, marginals, draws, and how far to trust them."""

import html
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, overload

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis._typing import MomentFunction, Program
from pyro_mpis._warnings import warn
from pyro_mpis.factor_graph import moments as _moments
from pyro_mpis.factor_graph.marginals import Marginal, merge
from pyro_mpis.options import (
    positive,
)
from pyro_mpis.programs.runs import trace_at
from pyro_mpis.programs.turns import in_turn
from pyro_mpis.queries import sample_of
from pyro_mpis.replicate import BlockSum
from pyro_mpis.results import diagnostics, saving
from pyro_mpis.results.arviz_export import Names, Wanted, build, model_groups, particle_arrays
from pyro_mpis.results.at_draws import replay_draws
from pyro_mpis.results.diagnostics import Diagnosis, diagnose, doubts_of_error
from pyro_mpis.results.pointwise import summed_latents
from pyro_mpis.results.spread import evidence_error
from pyro_mpis.results.summary import Summary, summarise
from pyro_mpis.results.trace_posterior import Draws, weighted_draws
from pyro_mpis.sums import Sums

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from pyro_mpis.results.arviz_export import ArvizData

Answer = TypeVar("Answer")


class Posterior(Sums):
    """
    The questions that can be asked after a run, of all its replicates together.

    [1] Bowyer, Heap and Aitchison (2024), "Using Autodiff to Estimate Posterior Moments, Marginals
    and Samples", UAI, PMLR 244:394-417.
    """

    model: Program
    time_limit: float
    _is_number_given: bool
    _told: bool  # whether the user has been told of what is poor
    _told_of_error: bool  # and of what makes the evidence's error wrong
    _diagnosed: tuple[tuple[float, float], Diagnosis] | None  # of this run, by which thresholds

    def _hold(self, sums: list[BlockSum], weights: list[dict[str, Tensor]], number: int) -> None:
        """Keep what a run of ``number`` replicates found, and what is known of its weights."""
        self._sums, self._weights, self._number = sums, weights, number
        self._diagnosed = None

    @in_turn
    def evidence(self, log_scale: bool = True) -> Tensor:
        """
        Estimate the evidence p(x): (18) of [1], the mean over replicates.

        :param log_scale: whether to return log p(x), in nats. Its exponential is unbiased, and so
            the log itself is a little too low on average.
        :return: a scalar.
        """
        sums = self._ran()
        log_evidences = torch.stack([total.log_evidence for total in sums])
        log_p = log_evidences.logsumexp(0) - math.log(self._number)
        return (log_p if log_scale else log_p.exp()).to(sums[0].whole.dtype)

    @in_turn
    def evidence_error(self) -> float:
        """
        Return the standard error of the log evidence, in nats, from the spread of the replicates.

        Warns (:class:`~pyro_mpis.MPISWarning`), once a run, if the error is not to be trusted.
        There are four reasons: few replicates; a replicate that has most of the evidence; particles
        that are narrower than the posterior; weights with a heavy tail. To see the last two, it
        computes the marginals of all sites, as :meth:`diagnose` does.

        :raises ValueError: with a single replicate.
        """
        self._ran()
        if self._number < 2:
            raise ValueError(
                "num_replicates: the error comes from the spread of several sets of particles, and "
                "there is one. Ask for more, num_replicates=8 for example."
            )
        error = evidence_error(self._replicates())
        if not self._told_of_error:
            doubts = doubts_of_error(self._diagnosis())
            if doubts:
                warn(f"evidence_error: {error:.2g} is not to be trusted. {' '.join(doubts)}")
        self._told_of_error = True
        return error

    @overload
    def moments(self) -> dict[str, Tensor]: ...
    @overload
    def moments(self, functions: MomentFunction, *sites: str) -> Tensor: ...
    @overload
    def moments(
        self, functions: Mapping[str, tuple[MomentFunction | str, ...]]
    ) -> dict[str, Tensor]: ...

    @in_turn
    def moments(
        self,
        functions: MomentFunction | Mapping[str, tuple[MomentFunction | str, ...]] | None = None,
        *sites: str,
    ) -> Tensor | dict[str, Tensor]:
        """
        Estimate posterior expectations: (27)-(28) of [1].

        There are three ways to call it:

        * ``moments()`` gives the mean of every latent site;
        * ``moments(torch.log, "tau")`` gives the mean of a function of sites;
        * ``moments({"xy": (torch.mul, "x", "y"), "x2": (torch.square, "x")})`` gives the means of
          many functions in one pass.

        A function is given **one** value of each of its sites, in the site's event shape. It runs
        under :func:`torch.vmap` over particles and plate elements. Its sites may be in nested
        plates: a global site may be mixed with a plated one.

        :return: for each moment ``batch_shape + shape of the function's result``, with the batch
            shape of the deepest site; a mean has the shape of the site.
        :raises ValueError: if a site is unknown, sites sit in different plates, or a function fails
            or does not return a tensor.
        """
        if functions is None:
            means = self._in_each(
                [[name] for name in self._sites()],
                lambda graph, weights: {n: _moments.mean(graph, weights, n) for n in graph.values},
            )
            return self._averaged(means)
        if isinstance(functions, Mapping):
            asked = {name: _split_moment(name, spec) for name, spec in functions.items()}
        else:
            asked = {"": _split_moment("", (functions, *sites))}
        values = self._in_each(
            [names for _, names in asked.values()],
            lambda graph, weights: {
                name: _moments.expectation(graph, weights, function, names)
                for name, (function, names) in asked.items()
            },
        )
        averaged = self._averaged(values)
        return averaged if isinstance(functions, Mapping) else averaged[""]

    @overload
    def marginals(self) -> dict[str, Marginal]: ...
    @overload
    def marginals(self, site: str, /, *sites: str) -> Marginal: ...

    @in_turn
    def marginals(self, *sites: str) -> Marginal | dict[str, Marginal]:
        """
        Return posterior marginals on the particles: (32)-(35), joint ones (43)-(44) of [1].

        ``marginals()`` gives that of every latent site, and ``marginals("mu")`` that of one.
        ``marginals("mu", "tau")`` gives the joint marginal of several sites, whose plates must be
        nested.

        :raises ValueError: if a site is unknown or sites sit in different plates.
        """
        asked = [list(sites)] if sites else [[name] for name in self._sites()]
        found = self._in_each(
            asked,
            lambda graph, weights: [_moments.marginal(graph, weights, names) for names in asked],
        )
        log_shares = self._log_shares()
        summed = set(self._sites()) - self._sampled()  # the same values in all replicates
        merged = [
            merge(parts, log_shares, are_same=summed.issuperset(names))
            for names, parts in zip(asked, zip(*found, strict=True), strict=True)
        ]
        return merged[0] if sites else dict(zip(self._sites(), merged, strict=True))

    def __getitem__(self, site: str) -> Marginal:
        """Return the posterior marginal of a site: ``posterior["mu"]``."""
        return self.marginals(site)

    @in_turn
    def sample(self, num_samples: int = 1) -> dict[str, Tensor]:
        """
        Draw joint posterior samples of all latent sites; draws random numbers.

        :return: ``{site: (num_samples, *shape)}``. All draws have equal weight, and they are
            independent given the particles. :class:`pyro.infer.Predictive` takes them as
            ``posterior_samples``.
        """
        return sample_of(self._ran(), positive("num_samples", num_samples), self._workers)

    @in_turn
    def summary(self, prob: float = 0.9) -> Summary:
        """
        Make a table of mean, sd, quantiles, ESS and Pareto k-hat of every scalar.

        Warns (:class:`~pyro_mpis.MPISWarning`), once a run, of what :meth:`diagnose` finds poor.

        :param prob: probability between the two outer quantiles, as in :meth:`MCMC.summary`.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob: expected a probability between 0 and 1, but found {prob!r}.")
        if not self._told:
            for problem in self._diagnosis().problems:
                warn(str(problem))
        self._told = True
        return self._summary(self.marginals(), prob)

    @in_turn
    def diagnose(self, *, show: bool | None = None) -> Diagnosis:
        """
        Say how far to trust the answers: what is poor, at which site, and what would help.

        Looks at four things, for every site and plate element: the effective sample size; Pareto
        k-hat, if there are enough particles (about 50); whether weights rise towards the outermost
        particles, as they do under a guide that is too narrow; and the spread of the replicates.
        Draws nothing.

        :param show: whether to print it. By default a script prints it. In a notebook, or at a
            prompt, the result shows itself: there nothing is printed.
        """
        diagnosis = self._diagnosis()
        at_prompt = hasattr(sys, "ps1")  # which shows what a call returns
        if show or (show is None and not at_prompt):
            print(diagnosis)
        self._told = True
        return diagnosis

    def _summary(self, marginals: Mapping[str, Marginal], prob: float = 0.9) -> Summary:
        log_evidences = self._replicates()
        return summarise(
            marginals,
            self._sampled(),
            float(log_evidences.logsumexp(0)) - math.log(self._number),
            evidence_error(log_evidences) if self._number > 1 else None,
            {m.log_weights.shape[-1] for name, m in marginals.items() if name in self._sampled()},
            prob,
            None if self._is_number_given else self.time_limit,
        )

    def _diagnosis(self) -> Diagnosis:
        """Return the diagnosis of this run, made when it is first asked for."""
        total, thresholds = self._ran()[0], (diagnostics.LOW_ESS, diagnostics.HIGH_K_HAT)
        if self._diagnosed is None or self._diagnosed[0] != thresholds:
            found = diagnose(total, self.marginals(), self._sampled(), self._replicates())
            self._diagnosed = thresholds, found
        return self._diagnosed[1]

    @in_turn
    def to_arviz(
        self,
        num_samples: int = 1000,
        *,
        coords: "Mapping[str, ArrayLike] | None" = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        log_likelihood: bool = True,
        posterior_predictive: bool = False,
        prior: bool = False,
    ) -> "ArvizData":
        """
        Return the posterior in ArviZ's data structure; draws random numbers.

        Needs the extra ``arviz``. Dims are named after the plates, those of events
        ``<site>_dim_0`` and so on; a batch dim of size one outside of all plates is dropped. The
        groups, each in an ordinary run's shapes:

        * ``posterior``: joint draws, with the values of ``pyro.deterministic``;
          ``sample_stats``: ``lp``, the log joint density of each. The draws are independent given
          the particles, and stored as one chain. ArviZ's ESS and r-hat are for Markov chains, so
          use ``az.summary(..., kind="stats")``.
        * ``log_likelihood``: of every observation, for ``az.loo``. ``poutine.scale`` does not count
          in it. Where ``poutine.mask`` hides an observation it is nan: drop these before
          ``az.loo``. A ``pyro.factor`` is not an observation.
        * ``observed_data``, ``constant_data`` (the arrays that the model was called with),
          ``posterior_predictive``, ``prior``, ``prior_predictive``.
        * ``particles``, ``particle_weights``, ``particle_ess``: what the draws were drawn from.

        The attributes hold the log evidence, its standard error (of several replicates), the
        number of particles (the largest of a site), and the version.

        :param num_samples: number of draws.
        :param coords: dim -> names of its elements.
        :param dims: site or argument -> names of its dims, of all or of those that are no plates.
        :param log_likelihood: whether to have that group, as large as data times draws.
        :param posterior_predictive: whether to draw the observed sites given each posterior draw.
        :param prior: whether to draw latent and observed sites from the prior.
        :return: an ``xarray.DataTree``; where ArviZ is older than 1.0 an ``InferenceData``.
        :raises ImportError: without xarray.
        :raises ValueError: if names do not fit the dims.
        """
        names = Names(coords or {}, dims or {})
        number = positive("num_samples", num_samples)
        wanted = Wanted(number, names, log_likelihood, posterior_predictive, prior)
        total = self._ran()[0]
        groups, sites = model_groups(total.replicate, self.sample(number), wanted)
        particles = total.whole.values
        groups |= particle_arrays(self.marginals(), particles, self._sampled(), sites, names)
        attributes: dict[str, object] = {
            "log_evidence": float(self.evidence()),
            "num_particles": max(self._counts()),
            "num_replicates": self._number,
        }
        if self._number > 1:
            attributes["log_evidence_error"] = evidence_error(self._replicates())
        return build(groups, attributes, names)

    @property
    def nbytes(self) -> int:
        """
        Bytes of memory that the result holds, without the arguments of :meth:`run`.

        If all factors fit into memory at once, they hold one number for each combination of
        particles and plate elements: for K particles and a site that reads one other site, ``K**2``
        for each element of its plates. A result of several blocks or replicates holds only the
        particles, and K weights of each site that you have asked for.
        """
        kept = [
            (t.replicate.particles, t.replicate.reads, t.whole, t.log_evidences) for t in self._sums
        ]
        return saving.num_bytes((kept, self._weights))

    def _repr_html_(self) -> str:
        """Show the posterior's table in a notebook; warns of nothing."""
        if not self._sums:
            return html.escape(repr(self))
        return self._summary(self.marginals())._repr_html_()

    def get_log_normalizer(self) -> Tensor:
        """Return the log evidence: :meth:`evidence`, under the name that ``Importance`` has."""
        if not self._sums:
            return super().get_log_normalizer()  # type: ignore[no-untyped-call, no-any-return]
        return self.evidence()

    def _weighted_draws(self) -> Draws | None:
        if not self._sums:
            return None
        return weighted_draws(self._sums, self.evidence(), max(self._counts()), self._workers)

    def _traces_at(self, values: Sequence[Mapping[str, Tensor]]) -> list[Trace]:
        sums = self._ran()
        if len(sums) == 1 and sums[0].traces:  # sites may differ from run to run
            return list(sums[0].traces)
        programs = replace(sums[0].replicate.programs, model=self.model)  # as the user wrote it
        with sums[0].replicate.environment.entered():
            return [trace_at(programs, row) for row in values]

    def _summed_log_likelihoods(self, draws: Draws) -> Mapping[str, Tensor]:
        replicate, number = self._ran()[0].replicate, len(draws.log_weights)
        summed = summed_latents(replicate)
        if summed is None:
            return {}
        with replicate.environment.entered():
            replayed = replay_draws(
                replicate.structure,
                replicate.programs,
                draws.values,
                number,
                likelihood=True,
                summed=summed,
                memory_limit=replicate.plan.memory_limit,
            )
        return replayed.log_likelihoods

    def _effective_samples(self) -> Tensor:
        sampled = self._sampled()
        sizes = [m.ess.min() for name, m in self.marginals().items() if name in sampled]
        return torch.stack(sizes).min() if sizes else torch.tensor(float(max(self._counts())))


def _split_moment(
    name: str, spec: tuple[MomentFunction | str, ...]
) -> tuple[MomentFunction, tuple[str, ...]]:
    where = f"moment '{name}'" if name else "moments"
    if not isinstance(spec, tuple) or not spec or not callable(spec[0]):
        raise ValueError(
            f"{where}: expected a function and the names of its sites, found {spec!r}. The means "
            "of all sites are .moments(); that of one is .moments()['mu']."
        )
    function, *sites = spec
    names = tuple(site for site in sites if isinstance(site, str))
    if not names or len(names) != len(sites) or isinstance(function, str):
        raise ValueError(
            f"{where}: give the names of the function's sites after it, as in "
            f".moments(torch.log, 'tau'); found {sites}."
        )
    return function, names
