# SPDX-License-Identifier: Apache-2.0
r"""
Massively parallel reweighted wake-sleep.

Particles are held fixed, so that they may be discrete. With P of (18) of [1], a product of model
densities over proposal densities summed over all combinations, the model's parameters follow the
gradient of log P in the model's factors, and the guide's parameters that of **minus** log P in the
proposal's (wake-phi): that raises the proposal's density at the particles of large weight [2, 3].

Both gradients come from one pass: the derivative of log P in each factor is the posterior weight of
its entries.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
[2] Heap, Laurence and Aitchison (2023), "Massively parallel reweighted wake-sleep", UAI.
[3] Le, Kosiorek, Siddharth, Teh and Wood (2019), "Revisiting reweighted wake-sleep for models with
stochastic control flow", UAI.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from pyro.infer import ReweightedWakeSleep
from pyro.infer.elbo import ELBO
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_mpis._text import quoted
from pyro_mpis._typing import Program
from pyro_mpis.factor_graph.evidence import log_evidence
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.objectives.compiled import Compiler, Weighed, options_of
from pyro_mpis.options import positive
from pyro_mpis.programs.structure import Structure


class MPReweightedWakeSleep(ELBO):
    """
    Reweighted wake-sleep over all combinations of particles, for :class:`pyro.infer.SVI`.

    Has the interface of :class:`pyro.infer.ReweightedWakeSleep`, and is the same with all latents
    in one group. No gradient goes through the particles, so latents may be discrete. Returns two
    losses: that of the model, which is minus the log evidence, and that of the guide.

    :param num_particles: K, the number of particles of each latent site, two or more.
    :param insomnia: the share of wake-phi in the guide's loss; the rest is sleep-phi. Sleep-phi
        works as in Pyro's class: the guide needs an argument ``observations``.
    :param model_has_params: whether the model has parameters to learn. If not, and with
        ``insomnia=0``, no particles are drawn from the guide.
    :param num_sleep_particles: number of draws of the model for sleep-phi; K by default.
    :param vectorize_particles: whether these draws are made at once.
    :param max_plate_nesting: number of batch dims for plates; found by default.
    :param groups: groups of latent sites that share one particle index.
    :param shared_plates: names of plates whose latents have one particle index for all elements.
    :param memory_limit: bytes that the largest tensors may take together.
    """

    def __init__(
        self,
        num_particles: int = 2,
        insomnia: float = 1.0,
        model_has_params: bool = True,
        num_sleep_particles: int | None = None,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        strict_enumeration_warning: bool = True,
        *,
        groups: Sequence[Sequence[str]] = (),
        shared_plates: Sequence[str] = (),
        memory_limit: int | None = None,
    ) -> None:
        if positive("num_particles", num_particles) < 2:
            raise ValueError("num_particles: one particle has no weight to learn from; give two.")
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia: expected a share in [0, 1], but found {insomnia!r}.")
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
        )
        self.insomnia = insomnia
        self.model_has_params = model_has_params
        self.num_sleep_particles = num_sleep_particles or num_particles
        self._sleep = ReweightedWakeSleep(
            num_particles=num_particles,
            insomnia=0.0,
            model_has_params=False,
            num_sleep_particles=self.num_sleep_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )
        options = options_of(num_particles, groups, shared_plates, max_plate_nesting, memory_limit)
        self._compiler = Compiler(
            options, "pyro.infer.ReweightedWakeSleep: then it is that.", detached=True
        )

    def loss(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of model and guide, in nats; draws random numbers."""
        with torch.no_grad():
            return self._loss(model, guide, args, kwargs)

    def loss_and_grads(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> tuple[float, float]:
        """
        Add the derivatives of both losses to those of the parameters; draws random numbers.

        :return: the losses of model and guide.
        """
        theta, phi = self._loss(model, guide, args, kwargs)
        if (theta + phi).requires_grad:
            (theta + phi).backward()
        return float(theta.detach()), float(phi.detach())

    def _loss(
        self,
        model: Program,
        guide: Program,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[Tensor, Tensor]:
        theta = wake_phi = sleep_phi = torch.zeros(())
        if self.model_has_params or self.insomnia > 0:
            weighed = self._compiler.weighed(model, guide, args, kwargs, _nothing)
            _refuse_moving(weighed)
            theta, wake_phi = wake_losses(weighed.structure, weighed.graph())
            if not math.isfinite(float(theta.detach())):
                theta, wake_phi = wake_losses(weighed.structure, weighed.graph(checked=True))
            warn_if_nan(theta, "wake theta loss")
            warn_if_nan(wake_phi, "wake phi loss")
        if self.insomnia < 1:
            _, sleep_phi = self._sleep._loss(model, guide, args, kwargs)
        if self.insomnia in (0, 1):
            return theta, wake_phi if self.insomnia else sleep_phi
        return theta, self.insomnia * wake_phi + (1 - self.insomnia) * sleep_phi

    def _get_trace(self, *_: object) -> None:
        """Refuse: there are no traces of single particles."""
        raise NotImplementedError("MPReweightedWakeSleep has no traces: particles run at once")


def _nothing(*_: object) -> None:
    """Check nothing: particles of any kind will do."""


def _refuse_moving(weighed: Weighed) -> None:
    """Refuse sites that parameters move, though the particles are held fixed."""
    said = weighed.evaluated.model
    moving = [
        name
        for name in weighed.structure.carried
        if "value" in said[name] and said[name]["value"].tensor.requires_grad
    ]
    if moving:
        raise NotImplementedError(
            f"{quoted(moving)}: the guide gives a Delta at values that depend on parameters. Wake-"
            "sleep learns densities at fixed values, and would leave these parameters as they "
            "are. Use TraceMP_ELBO, or let the guide draw the sites from distributions that have "
            "these parameters."
        )


def wake_losses(structure: Structure, graph: FactorGraph) -> tuple[Tensor, Tensor]:
    """Return the losses of wake-theta and wake-phi, with their derivatives."""
    log_k, of_guide, of_prior = _proposals(structure)
    with torch.inference_mode(False), torch.enable_grad():
        fixed = [_fixed(factor) for factor in graph.factors]
        log_p = log_evidence(graph, fixed)
        weights = torch.autograd.grad(log_p, [factor.tensor for factor in fixed])
    log_p = log_p.detach().to(graph.dtype)
    theta: list[Tensor] = []
    phi: list[Tensor] = []
    for factor, weight in zip(graph.factors, weights, strict=True):
        if factor.name in of_prior:
            continue
        into = phi if factor.name in of_guide else theta
        into.append(_weighted(weight, factor.tensor))
        if factor.name in log_k:  # -log q, without the -log K of its factor
            into.append(weight.sum() * math.log(graph.sizes[log_k[factor.name]]))
    # the value of log P, and the derivative of the factors' mean
    mean = _total(theta, log_p)
    return -(log_p + mean - mean.detach()), _total(phi, log_p)


def _fixed(factor: LogFactor) -> LogFactor:
    return replace(factor, tensor=factor.tensor.detach().requires_grad_())


def _weighted(weight: Tensor, log_factor: Tensor) -> Tensor:
    """Return the mean of a log factor, where it counts."""
    return (weight * log_factor.masked_fill(weight == 0, 0.0)).sum()


def _total(terms: Iterable[Tensor], like: Tensor) -> Tensor:
    return sum((term.to(like.dtype) for term in terms), torch.zeros_like(like))


def _proposals(structure: Structure) -> tuple[dict[str, str], set[str], set[str]]:
    """
    Return which factors are proposals.

    :return: the index of those that have -log K; those of the guide; those that are priors.
    """
    log_k: dict[str, str] = {}
    of_guide = {f"{name} (guide)" for name in (*structure.carried, *structure.guide_factors)}
    of_prior: set[str] = set()
    for index in structure.indices:
        if index.enumerated:
            continue
        name = " and ".join(index.sites) + " (proposal)"
        log_k[name] = index.symbol
        priors = [site for site in index.sites if structure.origins.get(site) == "prior"]
        if priors and len(priors) < len(index.sites):
            raise NotImplementedError(
                f"groups: {quoted(index.sites)} share a particle index, but {quoted(priors)} is "
                "drawn from the prior and the others by the guide. Give the guide all of them."
            )
        (of_prior if priors else of_guide).add(name)
    return log_k, of_guide, of_prior
