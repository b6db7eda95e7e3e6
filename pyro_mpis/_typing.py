# SPDX-License-Identifier: Apache-2.0
"""Names for the types that the public signatures share."""

from collections.abc import Callable

import torch

# A Pyro program: a function with sample statements, a PyroModule, a handler around either.
Program = Callable[..., object]

# A function of one value of each of its sites: event shapes in, one tensor out.
MomentFunction = Callable[..., torch.Tensor]
