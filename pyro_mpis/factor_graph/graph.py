# SPDX-License-Identifier: Apache-2.0
r"""
The graph of log factors: what all of the paper's sums are taken over.

:math:`r_k` of (19) of [1] is a product of small tensors, one or two for each site (20)-(22). Each
has a dim for every particle index :math:`k_i` that its site reads, (15)-(17), and a dim for every
plate. Its logarithm is a :class:`LogFactor`; all of them together are a :class:`FactorGraph`.

Factors are **packed**: no dims of size one, a letter for each dim. An **ordinal** is the set of
plates that a factor, or an index, sits in.

[1] Bowyer, Heap and Aitchison (2024), "Using Autodiff to Estimate Posterior Moments, Marginals and
Samples", UAI, PMLR 244:394-417.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_mpis._text import table
from pyro_mpis._typing import Ordinal


@dataclass(frozen=True)
class LogFactor:
    """A term of log r_k: a packed tensor in nats, with the dims of its indices and plates."""

    name: str  # the site
    tensor: Tensor
    dims: str  # one letter for each dim of the tensor
    plates: Ordinal


@dataclass(frozen=True)
class RaggedPlate:
    """
    Which element of some plates each element of other plates reads.

    A ragged plate: every element of ``inner`` belongs to one element of each plate of ``outer``.
    """

    inner: str  # plates of the reader, one letter for each dim of the tensors
    outer: Mapping[str, Tensor]  # plate -> element, integers in the shape of ``inner``


@dataclass(frozen=True)
class SiteValue:
    """
    The particles of a latent site of the model.

    Batch dims without a plate are dims of the event, on its left.
    """

    tensor: Tensor  # (*indices, *plates, *event), plates padded to max_plate_nesting
    indices: str  # one letter for each dim on the left
    event_dim: int
    batch_shape: torch.Size  # in an ordinary run of the model, undeclared dims of size one
    plates: Ordinal
    undeclared: tuple[int, ...] = ()  # where these dims are in the batch shape

    def ordinary(self, tensor: Tensor, *, left: int) -> Tensor:
        """
        Put the undeclared dims back into their places among the batch dims.

        :param tensor: ``(*left, *batch_shape, *undeclared, *event)``.
        :return: the shape of an ordinary run, with the dims on the left.
        """
        middle = left + len(self.batch_shape)
        tensor = exchange_dims(tensor, middle, self.undeclared)
        return tensor.squeeze(tuple(range(middle, middle + len(self.undeclared))))

    def padded(self, tensor: Tensor, *, left: int) -> Tensor:
        """Give undeclared dims size one again: ``(*left, *batch_shape, *right)``."""
        middle = left + len(self.batch_shape)
        for dim in self.undeclared:
            tensor = tensor.unsqueeze(middle + dim)
        return tensor

    def declared(self, tensor: Tensor, *, left: int) -> Tensor:
        """Drop the undeclared dims of size one of ``(*left, *batch_shape, *right)``."""
        middle = left + len(self.batch_shape)
        return tensor.squeeze(tuple(middle + dim for dim in self.undeclared))


@dataclass(frozen=True)
class FactorGraph:
    """
    All that the queries need: the factors, the sizes of their dims, the sites' values.

    :class:`str` makes a table of the factors, with the range of each, to look for a wrong number::

        >>> log_prob = torch.tensor([[-1.5, 0.0], [-3.0, -torch.inf], [2.0, 1.0]])
        >>> graph = FactorGraph(
        ...     factors=(LogFactor("x", log_prob, "ap", frozenset("p")),),
        ...     sizes={"a": 3, "p": 2},
        ...     index_plates={"a": frozenset()},
        ...     plate_dims={"p": -1},
        ...     max_plate_nesting=1,
        ...     values={},
        ...     plate_names={"p": "rows"},
        ...     index_sites={"a": ("mu",)},
        ...     dtype=torch.float32,
        ...     device=torch.device("cpu"),
        ... )
        >>> print(graph)
        factor  indices  plates  size  lowest  highest
        x       mu:3     rows:2     6    -inf     2.00
    """

    factors: tuple[LogFactor, ...]
    sizes: Mapping[str, int]  # of every index and plate
    index_plates: Mapping[str, Ordinal]  # the ordinal of each index
    plate_dims: Mapping[str, int]  # batch dim of each plate
    max_plate_nesting: int
    values: Mapping[str, SiteValue]  # of the model's latent sites
    plate_names: Mapping[str, str]
    index_sites: Mapping[str, tuple[str, ...]]
    dtype: torch.dtype
    device: torch.device
    ragged: Mapping[Ordinal, RaggedPlate] = field(default_factory=dict)
    plate_scales: Mapping[str, float] = field(default_factory=dict)  # of those that are not one

    def __str__(self) -> str:
        """Return a table of the factors: whose indices and plates each has, its range in nats."""
        lines = [("factor", "indices", "plates", "size", "lowest", "highest")]
        for factor in self.factors:
            tensor = factor.tensor
            indices = (
                f"{'+'.join(self.index_sites[symbol])}:{self.sizes[symbol]}"
                for symbol in factor.dims
                if symbol in self.index_plates
            )
            plates = (f"{self.plate_names[s]}:{self.sizes[s]}" for s in sorted(factor.plates))
            lowest, highest = (
                (f"{tensor.min():.2f}", f"{tensor.max():.2f}") if tensor.numel() else ("", "")
            )
            size = str(tensor.numel())
            lines.append((factor.name, " ".join(indices), " ".join(plates), size, lowest, highest))
        return table(lines, left=(0, 1, 2))

    def scale_of(self, plates: Iterable[str]) -> float:
        """Return what the log of a product over some plates is multiplied by."""
        return math.prod(self.plate_scales.get(symbol, 1.0) for symbol in plates)

    def with_enclosing(self, plates: Ordinal) -> Ordinal:
        """Add the plates that ragged plates lie in."""
        outer = {inner: frozenset(plate.outer) for inner, plate in self.ragged.items()}
        return with_enclosing(outer, plates)

    def tensor_plates(self, plates: Ordinal) -> str:
        """Return the plates that the tensors of an ordinal have dims for."""
        implied: set[str] = set()
        for inner, plate in self.ragged.items():
            if inner <= plates:
                implied |= set(plate.outer)
        return "".join(sorted(plates - implied))

    def to_plates(self, tensor: Tensor, plates: str, *, left: int, right: int = 0) -> Tensor:
        """
        Bring the padded batch dims of a tensor to the given plates, expanded to their sizes.

        :param tensor: ``(*left, *max_plate_nesting dims, *right)``; other plates have size one.
        :return: ``(*left, *plates, *right)``.
        """
        middle = left + self.max_plate_nesting
        order = [middle + self.plate_dims[symbol] for symbol in plates]
        rest = [d for d in range(left, middle) if d not in order]
        tensor = tensor.permute((*range(left), *order, *rest, *range(middle, tensor.dim())))
        tail = tensor.shape[tensor.dim() - right :]
        tensor = tensor.reshape(tensor.shape[: left + len(plates)] + tail)
        return tensor.expand(
            (*tensor.shape[:left], *(self.sizes[symbol] for symbol in plates), *tail)
        )

    def to_batch(
        self, tensor: Tensor, plates: str, batch_shape: torch.Size, *, left: int
    ) -> Tensor:
        """
        Bring a tensor with the given plates to the batch shape of an ordinary run.

        :param tensor: ``(*left, *plates, *right)``.
        :return: ``(*left, *batch_shape, *right)``, expanded.
        """
        order = sorted(range(len(plates)), key=lambda position: self.plate_dims[plates[position]])
        right = range(left + len(plates), tensor.dim())
        tensor = tensor.permute((*range(left), *(left + position for position in order), *right))
        present = {self.plate_dims[symbol] for symbol in plates}
        for dim in range(-len(batch_shape), 0):
            if dim not in present:
                tensor = tensor.unsqueeze(left + len(batch_shape) + dim)
        tail = tensor.shape[left + len(batch_shape) :]
        return tensor.expand((*tensor.shape[:left], *batch_shape, *tail))


def with_enclosing(ragged: Mapping[Ordinal, Ordinal], plates: Ordinal) -> Ordinal:
    """
    Add the plates that ragged plates lie in.

    :param ragged: the plates around each ragged plate.
    """
    while True:
        around = {symbol for inner, outer in ragged.items() if inner <= plates for symbol in outer}
        if around <= plates:
            return plates
        plates |= around


def exchange_dims(tensor: Tensor, middle: int, undeclared: Sequence[int]) -> Tensor:
    """Exchange batch dims, left of ``middle``, with as many dims of the event right of it."""
    for number, dim in enumerate(undeclared):
        tensor = tensor.transpose(middle + dim, middle + number)
    return tensor
