# SPDX-License-Identifier: Apache-2.0
r"""
Weighted particles of one site, or of several jointly, as a distribution.

The marginal weights of a site are (32)-(35) of [1], joint ones (43)-(44); ``source_terms`` computes
them. How far to trust them: the effective sample size :math:`1 / \sum_k w_k^2` says how many
particles carry the answer. Pareto k-hat (Vehtari et al., 2024, "Pareto smoothed importance
sampling", JMLR 25) says whether the weights' tail is too heavy (above 0.7) for any answer, but
needs about 50 particles to be a number worth reading.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pyro.distributions import Empirical
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_mpis._text import data_frame, html_table, scalars
from pyro_mpis.factor_graph.logspace import running_total

if TYPE_CHECKING:
    from pandas import DataFrame

MIN_TAIL = 10  # weights in the tail, below which no k-hat is given (Pyro's psis_diagnostic too)
NEGLIGIBLE = 1e-15  # relative to the heaviest


class Marginal(Empirical):
    """
    The posterior marginal of a site, or the joint marginal of several, on its particles.

    It is batched over the plates. Batch dims without a plate are the first of the event dims.
    :attr:`samples` have shape ``batch_shape + (K,) + event_shape``, and :attr:`log_weights`
    ``batch_shape + (K,)``, normalised over K.

    A joint marginal has a point for each combination of the sites' particles, those of the last
    site running fastest. Its event is the events of all sites, flattened, one after the other:
    :meth:`unpack` takes them apart.

    >>> marginal = Marginal(
    ...     torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.2, 0.5, 0.3]).log(), {"x": torch.Size()}
    ... )
    >>> marginal.mean.item(), marginal.quantile(0.5).item()
    (0.4, 0.0)
    >>> marginal.ess.item()  # 1 / (0.2**2 + 0.5**2 + 0.3**2)
    2.63

    :param samples: the particles.
    :param log_weights: their log weights.
    :param event_shapes: event shape of each site, in the order of their events in the samples.
    """

    def __init__(
        self,
        samples: Tensor,
        log_weights: Tensor,
        event_shapes: Mapping[str, torch.Size],
        validate_args: bool | None = None,
    ) -> None:
        self.event_shapes = dict(event_shapes)
        super().__init__(samples, log_weights, validate_args)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        """Say whose it is, and its shapes."""
        names = ", ".join(f"'{name}'" for name in self.event_shapes)
        return (
            f"Marginal({names}: {self.log_weights.shape[-1]} particles, "
            f"batch shape {tuple(self.batch_shape)}, event shape {tuple(self.event_shape)})"
        )

    @property
    def samples(self) -> Tensor:
        """The particles: ``batch_shape + (K,) + event_shape``."""
        samples: Tensor = self._samples
        return samples

    @property
    def log_weights(self) -> Tensor:
        """Normalised log weights of the particles: ``batch_shape + (K,)``."""
        log_weights: Tensor = self._log_weights
        return log_weights

    @property
    def weights(self) -> Tensor:
        """Weights of the particles, linear scale: ``batch_shape + (K,)``; they sum to one."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """Posterior mean: ``batch_shape + event_shape``; of a discrete site in floating point."""
        return self._weighted(self._floating())

    @property
    def variance(self) -> Tensor:
        """Posterior variance: ``batch_shape + event_shape``."""
        samples = self._floating()
        centre = self._weighted(samples).unsqueeze(len(self.batch_shape))
        return self._weighted((samples - centre).square())

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights: ``batch_shape``, between 1 and K."""
        return self.weights.square().sum(-1).reciprocal()

    @property
    def pareto_k(self) -> Tensor:
        """
        Pareto k-hat of the weights' tail: ``batch_shape``.

        It is nan with fewer than about 50 particles, as so few have no tail to speak of. It is -inf
        if the weights are even, and inf if a few particles have all the weight.
        """
        flat = self.log_weights.reshape(-1, self.log_weights.shape[-1])
        k_hats = flat.new_tensor([_pareto_k(row) for row in flat])
        return k_hats.reshape(self.batch_shape)

    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """
        Return posterior quantiles: the smallest particle at or below which ``q`` of the weight is.

        :param q: a probability, or several.
        :return: ``batch_shape + event_shape``, with a dim for several ``q`` on the left.
        :raises ValueError: if a probability is outside [0, 1].
        """
        probs = torch.as_tensor(q, dtype=torch.double, device=self.samples.device)
        if bool((probs < 0).any()) or bool((probs > 1).any()):
            raise ValueError(f"q: expected probabilities between 0 and 1, but found {q}.")
        dim = len(self.batch_shape)
        values, order = self.samples.sort(dim)
        weights = self._expanded_weights().gather(dim, order)
        total = running_total(weights, dim)
        cumulative = total.movedim(dim, -1).contiguous()  # (*batch, *event, K)
        values = values.movedim(dim, -1).contiguous()
        shares = self._rounded_down(probs.reshape(-1)) * cumulative[..., -1:]
        position = torch.searchsorted(cumulative, shares)
        result = values.gather(-1, position).movedim(-1, 0)
        return result.reshape(probs.shape + result.shape[1:])

    def to_dataframe(self) -> "DataFrame":
        """
        Return particles and weights as a pandas ``DataFrame``, a row for each particle and scalar.

        Its columns are ``scalar`` (such as ``theta[3]``), ``particle``, ``value`` and ``weight``.

        :raises ImportError: without pandas.
        """
        num_batch, num = len(self.batch_shape), self.log_weights.shape[-1]
        values = self.samples.movedim(num_batch, -1).reshape(-1, num)
        weights = self._expanded_weights().movedim(num_batch, -1).reshape(-1, num)
        names = self._scalars()
        return data_frame(
            {
                "scalar": [name for name in names for _ in range(num)],
                "particle": list(range(num)) * len(names),
                "value": values.reshape(-1).tolist(),
                "weight": weights.reshape(-1).tolist(),
            }
        )

    def _repr_html_(self) -> str:
        """Return a table of all scalars, for a notebook."""
        probs = (0.05, 0.5, 0.95)
        columns = [self.mean, self.variance.sqrt(), *self.quantile(probs)]
        numbers = torch.stack([column.double().reshape(-1) for column in columns], 1).tolist()
        rows = [
            (name, *(f"{x:.3g}" for x in row))
            for name, row in zip(self._scalars(), numbers, strict=True)
        ]
        header = ("", "mean", "sd", *(f"{prob:.0%}" for prob in probs))
        ess = f"{float(self.ess.min()):.1f}" if self.ess.numel() else "-"
        num = self.log_weights.shape[-1]
        return html_table([header, *rows], f"{num} particles, lowest effective sample size {ess}")

    def _scalars(self) -> list[str]:
        """Return the names of all scalars, those of the last site fastest."""
        if len(self.event_shapes) == 1:
            (name,) = self.event_shapes
            return scalars(name, self.batch_shape + self.event_shape)
        one = [label for site, shape in self.event_shapes.items() for label in scalars(site, shape)]
        positions = scalars("", self.batch_shape)
        return [f"{label}{position}" for position in positions for label in one]

    def unpack(self, value: Tensor) -> dict[str, Tensor]:
        """
        Split values of a joint marginal into its sites.

        :param value: ``(*left, *event_shape)``, for example :attr:`samples` or :attr:`mean`.
        :return: ``{site: (*left, *event shape of the site)}``.
        """
        if len(self.event_shapes) == 1:
            return dict.fromkeys(self.event_shapes, value)
        sizes = [shape.numel() for shape in self.event_shapes.values()]
        parts = value.split(sizes, -1)
        return {
            name: part.reshape(part.shape[:-1] + shape)
            for part, (name, shape) in zip(parts, self.event_shapes.items(), strict=True)
        }

    def _rounded_down(self, probs: Tensor) -> Tensor:
        """
        Lower probabilities by what weights are rounded, so that a sum of weights reaches its share.

        A weight is the exponential of a rounded logarithm: it is off by ``eps * (1 - log w)`` of
        itself, and all of them together by no more than ``eps * (1 + log K)``. Adding them up in
        float64 adds an ``eps`` of its own for each. None is lowered to zero, which particles
        without weight would reach too, and one stays one, which takes all that have any.
        """
        num = self.log_weights.shape[-1]
        slack = torch.finfo(self.log_weights.dtype).eps * (1 + math.log(num))
        slack += torch.finfo(probs.dtype).eps * num
        lowered = (probs * (1 - slack)).clamp(min=torch.finfo(probs.dtype).tiny)
        return torch.where(probs == 1, probs, lowered)

    def _floating(self) -> Tensor:
        samples = self.samples
        return samples if samples.is_floating_point() else samples.to(self.log_weights.dtype)

    def _expanded_weights(self) -> Tensor:
        weights = self.weights.double()
        weights = weights.reshape(weights.shape + (1,) * len(self.event_shape))
        return weights.expand(self.samples.shape)

    def _weighted(self, values: Tensor) -> Tensor:
        weights = self._expanded_weights()
        products = torch.where(weights > 0, weights * values, 0.0)  # not 0 * inf
        return products.sum(len(self.batch_shape)).to(values.dtype)


def merge(parts: Sequence[Marginal], log_shares: Tensor, *, are_same: bool = False) -> Marginal:
    """
    Put the particles of several marginals of the same sites together.

    :param log_shares: the log of each one's weight in the whole, ``(parts,)``.
    :param are_same: whether all have the same particles, each of which then stands there once.
    """
    if len(parts) == 1:
        return parts[0]
    dim = len(parts[0].batch_shape)
    if are_same:
        shares = log_shares.to(parts[0].log_weights.dtype).reshape(-1, *(1,) * (dim + 1))
        together = (torch.stack([part.log_weights for part in parts]) + shares).logsumexp(0)
        return Marginal(parts[0].samples, together, parts[0].event_shapes)
    samples = torch.cat([part.samples for part in parts], dim)
    log_weights = [
        part.log_weights + share.to(part.log_weights.dtype)
        for part, share in zip(parts, log_shares, strict=True)
    ]
    return Marginal(samples, torch.cat(log_weights, dim), parts[0].event_shapes)


def _pareto_k(log_weights: Tensor) -> float:
    """Fit the tail of one set of weights; size of the tail as in Vehtari et al. (2024)."""
    num = log_weights.numel()
    tail = min(math.ceil(num / 5), math.ceil(3 * math.sqrt(num)))
    if tail < MIN_TAIL:
        return math.nan
    weights = (log_weights - log_weights.max()).double().exp().cpu().sort().values
    cutoff = weights[-tail - 1].clamp(min=NEGLIGIBLE)
    excess = weights[weights > cutoff] - cutoff
    if excess.numel() == 0 or bool(excess[0] == excess[-1]):
        return -math.inf if bool(cutoff > NEGLIGIBLE) else math.inf
    if excess.numel() < MIN_TAIL:  # ties, or all the weight on a few particles
        return math.nan if bool(cutoff > NEGLIGIBLE) else math.inf
    with torch.device("cpu"):  # where Pyro makes its own tensors
        k_hat, _ = fit_generalized_pareto(excess)
    return float(k_hat)
