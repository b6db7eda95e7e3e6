# SPDX-License-Identifier: Apache-2.0
"""Effect handlers: note what a plain run reads, give sites their values."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, Message
from torch import Tensor

from pyro_mpis._typing import SampleMessage
from pyro_mpis.programs.draws import draw_of
from pyro_mpis.programs.messages import (
    SCALED_PROPOSAL,
    is_delta,
    is_enumerated,
    is_latent,
    is_subsample,
)
from pyro_mpis.programs.provenance import tracked
from pyro_mpis.programs.stratified import Strata


class Track(Messenger):
    """Mark each random site's value with the site's name, in place of what it was computed from."""

    def __init__(self, is_random: Callable[[SampleMessage], bool]) -> None:
        super().__init__()
        self.is_random = is_random

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg) and self.is_random(msg) and not msg["done"]:
            with torch._C.DisableTorchFunctionSubclass():  # samplers write in place
                msg["value"] = msg["fn"]()
            msg["done"] = True

    def _pyro_post_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg) and self.is_random(msg):
            value = detach_provenance(msg["value"])
            msg["value"] = tracked(value, frozenset({msg["name"]}))


class Compare(Messenger):
    """Show each latent site that the guide has too to a function, before its value is used."""

    def __init__(
        self,
        sites: Mapping[str, SampleMessage],
        compare: Callable[[SampleMessage, SampleMessage], None],
    ) -> None:
        super().__init__()
        self.sites = sites
        self.compare = compare

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg) and msg["name"] in self.sites:
            self.compare(self.sites[msg["name"]], msg)


class Replay(ReplayMessenger):
    """Give the model the guide's values; a mark for enumeration counts in either program."""

    def _pyro_sample(self, msg: Any) -> None:
        own = msg["infer"] if is_latent(msg) and is_enumerated(msg) else {}
        super()._pyro_sample(msg)
        if own and "enumerate" not in msg["infer"]:
            msg["infer"] = {**msg["infer"], "enumerate": own["enumerate"]}


class AllMet(BaseException):
    """All the sites that a run was for have been met: it may end, whatever the program catches."""


class Substitute(Messenger):
    """
    Give latent sites the values of a dictionary, and note the last site met.

    :param values: in the shapes of the sites.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.last_site: str | None = None

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_subsample(msg):
            return
        self.last_site = msg["name"]
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class DrawMapped(Messenger):
    """
    Draw latent sites within a mapped run, a value for each particle.

    :param names: the sites to draw.
    :param number: the particle's number, mapped at the level of the particles.
    :param strata: how many there are, and which are to be spread evenly, by site.
    :param detached: whether to cut them off from what they are drawn from.
    """

    def __init__(
        self,
        names: Collection[str],
        number: Tensor,
        strata: Mapping[str, Strata],
        *,
        detached: bool,
    ) -> None:
        super().__init__()
        self.detached = detached
        self.names = names
        self.number = number
        self.strata = strata

    def _pyro_sample(self, msg: SampleMessage) -> None:
        wanted = is_latent(msg) and msg["name"] in self.names and not msg["done"]
        if wanted and not is_delta(msg["fn"]):
            value = draw_of(msg["fn"], self.number, self.strata[msg["name"]])
            msg["value"] = value.detach() if self.detached else value
            msg["done"] = True


class Stop(Messenger):
    """End a run once some sites have been met. Is to be outside of the tracer."""

    def __init__(self, sites: Collection[str]) -> None:
        super().__init__()
        self.waiting = set(sites)

    def _pyro_post_sample(self, msg: SampleMessage) -> None:
        self.waiting.discard(msg["name"])
        if not self.waiting:
            raise AllMet


@contextmanager
def isolated(*, params_are_seen: bool = False) -> Iterator[None]:
    """
    Let the handlers and plates around neither see nor change what programs do.

    :param params_are_seen: but for parameters, which optimisers learn of by a handler.
    """
    around, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []  # else plates would take other dims
    try:
        with poutine.block(hide_fn=_is_no_param) if params_are_seen else poutine.block():
            yield
    finally:
        _DIM_ALLOCATOR._stack = around


@contextmanager
def closing_plates() -> Iterator[None]:
    """Close the plates that a program entered by hand, if it ends before it leaves them."""
    around = list(_DIM_ALLOCATOR._stack)
    try:
        yield
    except BaseException:
        _DIM_ALLOCATOR._stack[:] = around
        raise


def _is_no_param(msg: Message[..., Any]) -> bool:
    return msg["type"] != "param"


class ScaleProposals(Messenger):
    """
    Let the scale of a latent count in its proposal's density too, as in Pyro's ELBOs.

    There ``poutine.scale`` around a latent, in guide and model, weighs the divergence between the
    two. Where nothing is learned, the scale of a proposal has no meaning, and is left out.
    """

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg) and not (isinstance(msg["scale"], float) and msg["scale"] == 1.0):
            msg["infer"] = {**msg["infer"], SCALED_PROPOSAL: True}
