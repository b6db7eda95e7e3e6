# SPDX-License-Identifier: Apache-2.0
r"""
Which latents make one Gaussian: the blocks of the learned guide, and how their values are laid out.

A **block** holds the continuous latents of the same plates. In each element of these plates it is
one vector of D unconstrained numbers: ``(*plates, D)``, where the plates have their own batch dims,
other batch dims have size one, and all blocks have the same number of dims. So tensors of different
blocks broadcast against each other. A block's **parents** are the blocks of fewer plates around it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyro
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.programs.structure import Plate, Structure

MOST_READERS = 4  # densities that read a latent of a chain or tree
FEWEST_LINKED = 8  # latents that are worth an index each
LARGEST_LINKED = 2  # numbers of each


@dataclass(frozen=True)
class Part:
    """The place of one site in its block."""

    name: str
    start: int
    stop: int
    batch_shape: torch.Size
    event_dim: int
    free_shape: torch.Size  # event shape of the unconstrained value
    own_dims: tuple[int, ...]  # batch dims that are no plates of the block, negative
    nesting: int  # batch dims that all blocks have
    dtype: torch.dtype
    frames: tuple[CondIndepStackFrame, ...]  # the plates of the site

    @property
    def own_elements(self) -> int:
        """Number of elements of the site's batch shape that one element of the block holds."""
        return math.prod(self.batch_shape[dim] for dim in self.own_dims)

    def flat(self, free: Tensor) -> Tensor:
        """
        Lay out an unconstrained value.

        :param free: ``(*left, *batch_shape, *free_shape)``.
        :return: ``(*left, *plates, numbers)``.
        """
        left = free.dim() - len(self.batch_shape) - len(self.free_shape)
        ones = (1,) * (self.nesting - len(self.batch_shape))
        batch, event = free.shape[left : left + len(self.batch_shape)], self.free_shape
        own = (1,) * len(self.own_dims)
        free = free.reshape((*free.shape[:left], *ones, *batch, *own, *event))
        free = self._exchanged(free, left)
        return free.reshape((*free.shape[: left + self.nesting], -1))

    def unflat(self, numbers: Tensor) -> Tensor:
        """
        Undo :meth:`flat`; without dims on the left the result has the shape of an ordinary run.

        :param numbers: ``(*left, *plates, numbers)``.
        """
        left = numbers.dim() - 1 - self.nesting
        own = [self.batch_shape[dim] for dim in self.own_dims]
        free = numbers.reshape((*numbers.shape[:-1], *own, *self.free_shape))
        free = self._exchanged(free, left)
        middle = left + self.nesting
        batch = free.shape[left:middle]
        if left == 0:
            batch = batch[self.nesting - len(self.batch_shape) :]
        return free.reshape((*free.shape[:left], *batch, *self.free_shape))

    def of_elements(self, log_density: Tensor) -> Tensor:
        """Sum ``(*left, *batch_shape)`` to the plates of the block: ``(*left, *plates)``."""
        left = log_density.dim() - len(self.batch_shape)
        ones = (1,) * (self.nesting - len(self.batch_shape))
        log_density = log_density.reshape((*log_density.shape[:left], *ones, *self.batch_shape))
        return log_density.sum(self.own_dims, keepdim=True) if self.own_dims else log_density

    def _exchanged(self, tensor: Tensor, left: int) -> Tensor:
        """Exchange the own batch dims with as many dims right of the batch."""
        middle = left + self.nesting
        for number, dim in enumerate(self.own_dims):
            tensor = tensor.transpose(middle + dim, middle + number)
        return tensor


@dataclass(frozen=True)
class Block:
    """Latents that are one Gaussian vector in each element of some plates."""

    number: int
    plates: tuple[Plate, ...]
    parts: tuple[Part, ...]
    parents: tuple[int, ...]  # numbers of the blocks whose plates are some of these
    shape: torch.Size  # batch dims, of size one but for the plates

    @property
    def size(self) -> int:
        """D: unconstrained numbers in an element."""
        return self.parts[-1].stop

    @property
    def is_outer(self) -> bool:
        """Whether it is the first block, outside of plates: many particles are drawn of it."""
        return self.number == 0 and not self.plates

    @property
    def elements(self) -> int:
        """Number of elements of its plates."""
        return self.shape.numel()

    def joined(self, values: Mapping[str, Tensor]) -> Tensor:
        """Lay out the unconstrained values of all its sites: ``(*left, *plates, D)``."""
        return torch.cat([part.flat(values[part.name]).double() for part in self.parts], -1)

    def padded(self, numbers: Tensor) -> Tensor:
        """Give numbers the batch dims of all blocks: ``(*left, *batch dims, D)``."""
        missing = len(self.shape) + 1 - numbers.dim()
        return numbers.reshape((*(1,) * missing, *numbers.shape)) if missing > 0 else numbers

    def split(self, numbers: Tensor) -> dict[str, Tensor]:
        """Undo :meth:`joined`."""
        return {
            part.name: part.unflat(numbers[..., part.start : part.stop].to(part.dtype))
            for part in self.parts
        }


def sum_to(tensor: Tensor, shape: Sequence[int], right: int) -> Tensor:
    """
    Sum over the plates that a block does not have.

    :param tensor: ``(*batch dims, *right)``.
    :param shape: of the block's batch dims.
    :param right: number of dims that are no batch dims.
    """
    first = tensor.dim() - right - len(shape)
    dims = [first + n for n, size in enumerate(shape) if size == 1 and tensor.shape[first + n] > 1]
    return tensor.sum(dims, keepdim=True) if dims else tensor


Grouping = Callable[[str, Ordinal], object]


def by_plates(name: str, plates: Ordinal) -> object:
    """Put latents of the same plates into one block."""
    return plates


def by_site(name: str, plates: Ordinal) -> object:
    """Give each latent a block of its own."""
    return name


def trees(structure: Structure, names: Iterable[str]) -> frozenset[str]:
    """
    Return the latents that form chains or trees: each is read by few densities.

    These are many, and no density reads more than two of them, without a circle. A Gaussian of all
    together would be one particle index; with an index each, all combinations of neighbours count.

    :param names: of the continuous latents.
    :return: their names; empty if there are few, or circles.
    """
    readers = dict.fromkeys(names, 0)
    for site in structure.model.values():
        for name in site.reads & readers.keys():
            readers[name] += 1
    linked = {name for name, number in readers.items() if number <= MOST_READERS}
    root = {name: name for name in linked}  # of its tree so far

    def root_of(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    links = {frozenset((s.reads | {s.name}) & linked) for s in structure.model.values()}
    pairs = [tuple(link) for link in links if len(link) > 1]
    if any(len(pair) > 2 for pair in pairs):
        return frozenset()
    for one, other in pairs:
        if root_of(one) == root_of(other):
            return frozenset()  # a circle
        root[root_of(one)] = root_of(other)
    joined = {name for pair in pairs for name in pair}
    small = all(structure.model[name].event_size <= LARGEST_LINKED for name in joined)
    return frozenset(joined) if small and len(joined) >= FEWEST_LINKED else frozenset()


def depth_of(block: Block, blocks: Sequence[Block]) -> int:
    """Return how many levels of plates and of what is outside are around a block."""
    return len({blocks[parent].shape for parent in block.parents})


def blocks_of(
    structure: Structure,
    shapes: Mapping[str, torch.Size],
    dtypes: Mapping[str, torch.dtype],
    frames: Mapping[str, Iterable[CondIndepStackFrame]],
    grouping: Grouping = by_plates,
) -> tuple[Block, ...]:
    """
    Put continuous latents into blocks, those of the fewest plates first.

    :param structure: of the model without a guide.
    :param shapes: of the unconstrained values of these latents, batch dims included.
    :param dtypes: of their values.
    :param frames: the plates that each is in.
    """
    groups: dict[object, list[str]] = {}
    plates_of = {name: structure.index_of[name].plates for name in shapes}
    for name, plates in plates_of.items():
        groups.setdefault(grouping(name, plates), []).append(name)
    members = sorted(groups.values(), key=lambda names: len(plates_of[names[0]]))
    nesting = structure.max_plate_nesting
    blocks: list[Block] = []
    for number, names in enumerate(members):
        plates = plates_of[names[0]]
        shape = [1] * nesting
        for symbol in plates:
            shape[structure.plates[symbol].dim] = structure.plates[symbol].size
        parts: list[Part] = []
        for name in names:
            start = parts[-1].stop if parts else 0
            site = structure.model[name]
            dims = {structure.plates[symbol].dim for symbol in plates}
            batch_shape = site.batch_shape
            own = tuple(
                dim
                for dim in range(-len(batch_shape), 0)
                if dim not in dims and batch_shape[dim] > 1
            )
            free_shape = shapes[name][len(batch_shape) :]
            size = free_shape.numel() * math.prod(batch_shape[dim] for dim in own)
            parts.append(
                Part(
                    name,
                    start,
                    start + size,
                    batch_shape,
                    site.event_dim,
                    free_shape,
                    own,
                    nesting,
                    dtypes[name],
                    tuple(f for f in frames[name] if f.dim is not None),
                )
            )
        parents = tuple(
            n for n, other in enumerate(members[:number]) if plates_of[other[0]] < plates
        )
        blocks.append(
            Block(
                number,
                tuple(structure.plates[symbol] for symbol in sorted(plates)),
                tuple(parts),
                parents,
                torch.Size(shape),
            )
        )
    return tuple(blocks)


def plates_of(blocks: Iterable[Block]) -> dict[str, pyro.plate]:
    """Make the plates of all sites of a guide, each once."""
    frames = {frame.name: frame for b in blocks for part in b.parts for frame in part.frames}
    return {f.name: pyro.plate(f.name, f.size, dim=f.dim) for f in frames.values()}
