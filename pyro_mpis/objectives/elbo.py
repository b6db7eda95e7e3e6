# SPDX-License-Identifier: Apache-2.0
r"""
The log evidence of massively parallel importance sampling as a bound to maximise.

By Jensen's inequality :math:`\mathrm E \log P \le \log p(x)`, with P of (18) of [1]. The bound is
tighter than that of importance weighted autoencoders, which have K draws of all latents together in
place of :math:`K^n` combinations.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import math
from collections.abc import Sequence

import torch
from pyro.infer.elbo import ELBO
from pyro.infer.util import torch_item
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_mpis._text import quoted
from pyro_mpis._typing import Program
from pyro_mpis.factor_graph.evidence import log_evidence
from pyro_mpis.objectives.compiled import Compiler, options_of
from pyro_mpis.options import positive
from pyro_mpis.particles.drawing import Drawn
from pyro_mpis.programs.structure import Structure


class TraceMP_ELBO(ELBO):
    r"""
    A loss for :class:`pyro.infer.SVI`: minus the log evidence of massively parallel IS.

    Particles are drawn by reparametrisation, so that gradients go through them, for parameters of
    model and guide alike::

        svi = SVI(model, guide, Adam({"lr": 0.01}), TraceMP_ELBO(num_samples=10))
        for _ in range(1000):
            svi.step(data)
        posterior = MPImportance(model, guide, num_samples=100).run(data)

    With ``num_samples=1`` it is :class:`~pyro.infer.Trace_ELBO`, and with all latents in one group
    :class:`~pyro.infer.RenyiELBO` with ``alpha=0``. Latents that the guide lacks are drawn from
    the prior; those marked ``infer={"enumerate": "parallel"}`` are summed exactly.

    In a subsampled plate, guide and model see the same subsample, and each step draws another. The
    latents of the plate are summed out first. The log of the result is then scaled. The gradient is
    unbiased for the bound on all of the data if no latent lies outside of the plate, or with
    ``num_samples=1``. Otherwise it is nearly so.

    Model and guide are analysed in the first step, and again if arguments have other shapes or
    other integers. All further steps assume that they do the same.

    :param num_samples: K, the number of particles of each latent site.
    :param num_particles: the loss is the mean of this number of independent estimates.
    :param groups: groups of latent sites that share one particle index.
    :param shared_plates: names of plates whose latents have one particle index for all elements.
    :param max_plate_nesting: number of batch dims for plates; found by default.
    :param memory_limit: bytes that the largest tensors may take together; see
        :class:`~pyro_mpis.MPImportance`.
    :param retain_graph: whether to keep the autograd graph after a step.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        num_particles: int = 1,
        groups: Sequence[Sequence[str]] = (),
        shared_plates: Sequence[str] = (),
        max_plate_nesting: float = math.inf,
        memory_limit: int | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=positive("num_particles", num_particles),
            max_plate_nesting=max_plate_nesting,
            retain_graph=retain_graph,
        )
        self.num_samples = positive("num_samples", num_samples)
        options = options_of(
            self.num_samples, groups, shared_plates, max_plate_nesting, memory_limit
        )
        self._compiler = Compiler(
            options, f"pyro.infer.RenyiELBO(alpha=0, num_particles={num_samples}): then it is that."
        )

    def loss(self, model: Program, guide: Program, *args: object, **kwargs: object) -> float:
        """Return an estimate of the loss, in nats; draws random numbers."""
        with torch.no_grad():
            loss: float = torch_item(self._loss(model, guide, args, kwargs))
        return loss

    def differentiable_loss(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> Tensor:
        """
        Return an estimate of the loss that can be differentiated; draws random numbers.

        :raises NotImplementedError: names a site whose draws have no derivative.
        """
        return self._loss(model, guide, args, kwargs)

    def loss_and_grads(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> float:
        """
        Add the derivatives of the loss to those of the parameters; draws random numbers.

        :return: the loss.
        :raises NotImplementedError: names a site whose draws have no derivative.
        """
        loss = self._loss(model, guide, args, kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        number: float = torch_item(loss)
        return number

    def _loss(
        self,
        model: Program,
        guide: Program,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Tensor:
        losses = []
        for _ in range(self.num_particles):
            weighed = self._compiler.weighed(model, guide, args, kwargs, refuse_without_derivative)
            graph = weighed.graph()
            log_p = log_evidence(graph)
            if not math.isfinite(float(log_p.detach())):
                log_p = log_evidence(weighed.graph(checked=True))
            losses.append(-log_p.to(graph.dtype))
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        warn_if_nan(loss, "loss")
        return loss

    def _get_trace(self, *_: object) -> None:
        """Refuse: there are no traces of single particles."""
        raise NotImplementedError("TraceMP_ELBO has no traces: all particles are run at once")


def refuse_without_derivative(structure: Structure, drawn: Drawn) -> None:
    """
    Refuse draws that a gradient would have to go through, but cannot.

    Draws of distributions that nothing is learned of need no derivative.
    """
    for name, draw in drawn.draws.items():
        index = structure.index_of.get(name)
        if index is None or index.enumerated:
            continue
        if draw.log_prob.requires_grad and not draw.value.requires_grad:
            integers = bool((draw.value == draw.value.round()).all())
            where = "guide" if structure.origins.get(name) != "prior" else "model"
            kind = "discrete" if integers else "without reparametrised draws (rsample)"
            shared = structure.shared.get(name)
            because = (
                f", and not summed over, as its elements of {quoted(shared)} are read together"
                if shared
                else ""
            )
            sum_it = (
                "If it has few values, sum over them: mark it infer={'enumerate': 'parallel'} in "
                "the model. "
                if draw.support is not None and not shared
                else ""
            )
            raise NotImplementedError(
                f"site '{name}': {kind}{because}, and drawn by the {where} from a distribution "
                "that depends on parameters or on other latents. A gradient cannot go through the "
                f"draw. {sum_it}MPReweightedWakeSleep needs no such gradient; or draw the site "
                "from a distribution with rsample."
            )
