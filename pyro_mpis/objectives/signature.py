# SPDX-License-Identifier: Apache-2.0
"""
When the structure of programs has to be analysed again, and when only what they read by index.

The structure follows from the shapes of the arguments, and from numbers such as sizes. Which
elements are read by an index array follows from what is in them.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call."""

    leaves: tuple[object, ...]  # kept alive, so that no other object has the same id
    versions: tuple[int, ...]  # of the tensors among them
    layout: str

    @property
    def signature(self) -> Hashable:
        """What the structure may depend on."""
        return (self.layout, *(_signature_of(leaf) for leaf in self.leaves))

    def has_data_of(self, other: "Arguments") -> bool:
        """Whether arguments of the same signature have the same numbers in their tensors."""
        ours, theirs = self._tensors(), other._tensors()
        same_objects = all(a is b for a, b in zip(ours, theirs, strict=True))
        unchanged = other.versions == tuple(tensor._version for tensor in theirs)
        if same_objects or not unchanged:
            return same_objects and self.versions == other.versions
        return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def _tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


def arguments_of(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Arguments:
    """Take the arguments of a call apart."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    versions = tuple(leaf._version for leaf in leaves if isinstance(leaf, Tensor))
    return Arguments(tuple(leaves), versions, repr(spec))


def _signature_of(leaf: object) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    if isinstance(leaf, float):  # such as a factor that is annealed: it changes no shape
        return float
    if leaf is None or isinstance(leaf, bool | int | str):
        return type(leaf), leaf
    return type(leaf), getattr(leaf, "shape", None) or id(leaf)
