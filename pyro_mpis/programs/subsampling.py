# SPDX-License-Identifier: Apache-2.0
r"""
Plates that select a minibatch: one subsample for guide and model, and its scale.

Pyro multiplies the log density of every site in a subsampled plate by size / subsample size. Where
latents of the plate are summed out, that has to happen afterwards: what is estimated is

.. math:: \sum_i \log \sum_k f_i(k) \approx \frac{N}{|B|} \sum_{i \in B} \log \sum_k f_i(k).

So the scale is taken out of the sites here, and multiplies the plate's product in
:mod:`~pyro_mpis.factor_graph.evidence`.
"""

import math
from collections.abc import Iterable
from typing import cast

from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis._typing import SampleMessage
from pyro_mpis.programs.messages import is_latent, is_subsample, statements


def scale_of(frame: CondIndepStackFrame) -> float:
    """Return what a plate multiplies densities by: one, if it has no subsample."""
    full, size = frame.full_size, frame.size
    return 1.0 if full is None or int(full) == int(size) or int(size) < 1 else int(full) / int(size)


def scale_of_plates(site: SampleMessage) -> float:
    """Return the scale of all the vectorised plates that a site is in."""
    frames = site["cond_indep_stack"]
    return math.prod(scale_of(frame) for frame in frames if frame.dim is not None)


def subsamples_of(traces: Iterable[Trace]) -> dict[str, tuple[int, int]]:
    """Return the plates that select a minibatch: how many elements, and of how many."""
    found = {}
    for trace in traces:
        for name, node in trace.nodes.items():
            site = cast(SampleMessage, node)
            if site["type"] == "sample" and is_subsample(site):
                size = int(site["fn"].size)
                if len(site["value"]) < size:
                    found[name] = len(site["value"]), size
    return found


def refuse_sequential(traces: Iterable[Trace]) -> None:
    """Refuse latents in a loop over a subsample: how often each counts, no plate says."""
    for trace in traces:
        for name, site in statements(trace).items():
            for frame in site["cond_indep_stack"]:
                if frame.dim is None and scale_of(frame) != 1.0 and is_latent(site):
                    raise NotImplementedError(
                        f"site '{name}': a latent in a loop over plate '{frame.name}', which "
                        f"takes a subsample of {frame.size} of {frame.full_size}. The log of the "
                        "sum over this latent would have to be scaled, which only a vectorised "
                        "plate can say: with pyro.plate(...) as ind: ..."
                    )


class Subsamples:
    """The subsample of each plate: the first that is drawn stays until :meth:`renew`."""

    def __init__(self) -> None:
        self.chosen: dict[str, Tensor] = {}

    def renew(self) -> None:
        """Let the next run draw others."""
        self.chosen.clear()


class OneSubsample(Messenger):
    """
    Let a program have the subsamples that others have, and take their scales out of its sites.

    :param subsamples: shared with the other programs.
    """

    def __init__(self, subsamples: Subsamples) -> None:
        super().__init__()
        self.subsamples = subsamples

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_subsample(msg):
            chosen = self.subsamples.chosen.get(msg["name"])
            if chosen is not None:
                msg["value"] = chosen
                msg["done"] = True
            return
        scale = scale_of_plates(msg)
        if scale != 1.0:
            rest = msg["scale"] / scale
            is_one = isinstance(rest, float) and math.isclose(rest, 1.0, rel_tol=1e-12)
            msg["scale"] = 1.0 if is_one else rest

    def _pyro_post_sample(self, msg: SampleMessage) -> None:
        if is_subsample(msg):
            self.subsamples.chosen.setdefault(msg["name"], msg["value"])
