# SPDX-License-Identifier: Apache-2.0
"""Names for the types that several modules share."""

from collections.abc import Callable, Mapping
from typing import TypeAlias, TypedDict

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.indep_messenger import CondIndepStackFrame

# A Pyro program: a function with sample statements, a PyroModule, a handler around either.
Program: TypeAlias = Callable[..., object]

# A function of one value of each of its sites: event shapes in, one tensor out.
MomentFunction: TypeAlias = Callable[..., torch.Tensor]

# How many particles: of each site, or by site and, under None, of all others.
NumSamples: TypeAlias = int | Mapping[str, int] | Mapping[str | None, int]

Distribution: TypeAlias = TorchDistribution

# The plates that a factor or an index sits in, by their symbols.
Ordinal: TypeAlias = frozenset[str]


class SampleMessage(TypedDict):
    """What a handler sees of one sample statement, and what a trace keeps of it."""

    type: str
    name: str
    fn: Distribution
    value: torch.Tensor
    is_observed: bool
    args: tuple[object, ...]
    kwargs: dict[str, object]
    infer: dict[str, object]
    scale: float | torch.Tensor
    mask: torch.Tensor | bool | None
    cond_indep_stack: tuple[CondIndepStackFrame, ...]
    done: bool
