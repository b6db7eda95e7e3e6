# SPDX-License-Identifier: Apache-2.0
"""
Results of mapped runs that were made one after the other, put together as if they were one.

A program may look at the value of a latent, by a branch or by ``.item()``. Torch cannot map that.
It can map all other latents, in a run for each value of this one.
"""

from collections.abc import Sequence, Set

import torch

from pyro_mpis.programs.tensors import Mapped, Said


def put_together(runs: Sequence[Said], level: int, own: Set[str]) -> Said:
    """
    Put what was said in several runs into one result, with a level for the runs.

    :param runs: for one value after the other; levels are numbered without that of the runs.
    :param level: the number of that level.
    :param own: sites that had these values. Others do not read the level if all runs agree.
    """
    return {
        name: {key: _stacked([run[name][key] for run in runs], level, name in own) for key in parts}
        for name, parts in runs[0].items()
    }


def _stacked(parts: Sequence[Mapped], level: int, is_own: bool) -> Mapped:
    levels = sorted({number for part in parts for number in part.levels})
    dims = max(len(part.shape) for part in parts)
    tensors = [
        tensor.reshape(
            (*tensor.shape[: len(levels)], *(1,) * (dims - len(part.shape)), *part.shape)
        )
        for part in parts
        for tensor in (part.along(*levels),)
    ]
    first = tensors[0]
    shifted = [number + (number >= level) for number in levels]
    if not is_own and all(t.shape == first.shape and torch.equal(t, first) for t in tensors[1:]):
        return Mapped(first, tuple(shifted))
    place = sum(number < level for number in shifted)
    stacked = torch.stack(torch.broadcast_tensors(*tensors), place)
    return Mapped(stacked, (*shifted[:place], level, *shifted[place:]))
