# SPDX-License-Identifier: Apache-2.0
"""
Let what a program chooses between be different, whatever its numbers are.

Which value a discrete latent has does not show where the entries that it selects happen to be
equal: the components' means of a mixture, say, that all start from zero. So entries of the tables
that are looked up, and the first branch of a choice, are moved by a few per cent, each by its own
share: the same in every run, and such that probabilities stay between zero and one. What is *not*
chosen still does not matter, nor does what is multiplied by zero.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_mpis.programs.tensors import is_mapped, tensors_of

MOST = 0.05  # share of an entry that it is moved by at most
FLOOR = 0.1  # of the share: what zero is moved by
STEP = 0.6180339887  # multiples of the golden ratio are spread evenly, and no two are equal


class DifferentEntries(TorchFunctionMode):
    """Run programs, mapped over values, in which no two entries of a table are the same number."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Apply an operation, a choice to other entries."""
        table, by = _CHOICES.get(func, (0, 0))
        if len(args) > max(table, by) and table != by and any(map(is_mapped, tensors_of(args[by]))):
            args = [moved(arg) if n == table else arg for n, arg in enumerate(args)]
        return func(*args, **(kwargs or {}))


# Which argument is chosen from, and by which one.
_CHOICES: dict[Any, tuple[int, int]] = {
    Tensor.__getitem__: (0, 1),
    Tensor.gather: (0, 2),
    torch.gather: (0, 2),
    Tensor.index_select: (0, 2),
    torch.index_select: (0, 2),
    Tensor.take: (0, 1),
    torch.take: (0, 1),
    Tensor.take_along_dim: (0, 1),
    torch.take_along_dim: (0, 1),
    torch.nn.functional.embedding: (1, 0),
    torch.where: (1, 0),
    Tensor.where: (0, 1),
}


def moved(table: Any) -> Any:
    """Move each entry of a floating table, or a number, by its own share."""
    if isinstance(table, float):
        return table * (1 - MOST) + MOST * FLOOR
    if not isinstance(table, Tensor) or not table.is_floating_point():
        return table
    numbers = torch.arange(1, table.numel() + 1, device=table.device, dtype=torch.double)
    share = ((numbers * STEP).frac() * MOST).to(table.dtype).reshape(table.shape)
    return table * (1 - share) + FLOOR * share
