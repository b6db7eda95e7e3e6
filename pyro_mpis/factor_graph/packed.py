# SPDX-License-Identifier: Apache-2.0
"""
Tensors whose dims have names: one letter each, as Pyro's contraction keeps them.

The names are an attribute of the tensor that the next operation forgets, so that each function that
returns a packed tensor names its dims itself.
"""

from collections.abc import Sequence

from torch import Tensor


def packed(tensor: Tensor, dims: str) -> Tensor:
    """Name the dims of a tensor, by Pyro's convention; the next operation forgets them."""
    assert tensor.dim() == len(dims)
    tensor._pyro_dims = dims  # type: ignore[attr-defined]
    return tensor


def dims_of(tensor: Tensor) -> str:
    """Return the names of a packed tensor's dims."""
    dims: str = tensor._pyro_dims  # type: ignore[attr-defined]
    return dims


def aligned(term: Tensor, layout: str) -> Tensor:
    """View a packed tensor with the dims of ``layout``, size one where it has none of its own."""
    dims = dims_of(term)
    term = term.permute([dims.index(symbol) for symbol in layout if symbol in dims])
    for position, symbol in enumerate(layout):
        if symbol not in dims:
            term = term.unsqueeze(position)
    return term


def union(*dims: str) -> str:
    """Return the dims that any of some tensors has."""
    return "".join(sorted(set("".join(dims))))


def renaming(dims: Sequence[str]) -> dict[str, int]:
    """Return the number of each symbol in the order of their first appearance."""
    return {symbol: number for number, symbol in enumerate(dict.fromkeys("".join(dims)))}
