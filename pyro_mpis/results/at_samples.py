# SPDX-License-Identifier: Apache-2.0
"""
The data at posterior samples of any kind: the log-likelihood terms of a model's observed sites.

The model sees single values. It is mapped over the samples, or runs once for each of them where
torch cannot map it. What samples lack of a site is first drawn from the prior, in a run of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_mpis._typing import Distribution, SampleMessage
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.draws import draw_of
from pyro_mpis.programs.environment import rng_state, set_rng_state
from pyro_mpis.programs.mapped import run_mapped
from pyro_mpis.programs.messages import (
    batch_shape_of,
    counted,
    event_shape_of,
    is_latent,
    statements,
)
from pyro_mpis.programs.not_mappable import NotMappableError, is_out_of_memory, not_mappable
from pyro_mpis.programs.runs import PARTICLE, Programs, Wanted, run_at
from pyro_mpis.programs.stratified import Strata
from pyro_mpis.programs.tensors import Mapped, unwrapped
from pyro_mpis.results.at_draws import at_all

OTHERS = "sites that only some runs have"


def said_at(
    programs: Programs,
    sites: Mapping[str, SampleMessage],
    given: Mapping[str, Tensor],
    new: Sequence[str],
    number: int,
) -> dict[str, Tensor]:
    """
    Evaluate the observed sites at samples: all at once, or one after the other.

    :param given: of the latent sites, ``(number, *shape)``, where plates may be smaller.
    :param new: the sites that are drawn from the prior, in some plate elements or in all.
    :return: ``(number, *batch shape)``.
    """
    shapes = {name: site["value"].shape for name, site in sites.items() if is_latent(site)}
    collect = dict.fromkeys((n for n, site in sites.items() if is_data(site)), _log_prob)
    state = rng_state()
    with pyro.validation_enabled(False):
        for patched in (False, True):
            mapped = replace(programs, patched=patched)
            try:
                values = dict(given)
                if new:
                    values |= _drawn(mapped, given, new, number)
                said = at_all(mapped, Wanted(collect, frozenset(sites)), values, number, shapes)
            except NotMappableError:
                set_rng_state(state)
            else:
                return {name: _possible(name, parts["log_prob"]) for name, parts in said.items()}
    return _one_by_one(programs, given, number)


def _drawn(
    programs: Programs, given: Mapping[str, Tensor], new: Sequence[str], number: int
) -> dict[str, Tensor]:
    """Draw the elements that samples do not have from the prior, given the rest of each."""
    drawn: dict[str, Mapped] = {}

    def at_single_values(values: dict[str, Tensor]) -> None:
        particle = values.pop(PARTICLE)
        with _Given(values, lambda fn: draw_of(fn, particle, Strata(number, 0))) as handler:
            try:
                trace = run_at(programs, "model", {})
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise not_mappable("model", handler.last_site, error) from error
        drawn.update({name: unwrapped(statements(trace)[name]["value"]) for name in new})

    levels = [{PARTICLE: torch.arange(number), **given}]
    run_mapped(at_single_values, levels, patched=programs.patched)
    return {
        name: value.tensor if value.levels else value.tensor.expand((number, *value.shape))
        for name, value in drawn.items()
    }


def _one_by_one(programs: Programs, given: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Run the model once for each sample; a site that only some runs have is summed over."""
    rows: list[dict[str, Tensor]] = []
    for position in range(number):
        values = {name: value[position] for name, value in given.items()}
        with _Given(values, lambda fn: fn()):
            trace = run_at(programs, "model", {})
        with pyro.validation_enabled(False):
            rows.append(
                {
                    name: _possible(name, _log_prob(site, {})["log_prob"])
                    for name, site in statements(trace).items()
                    if is_data(site)
                }
            )
    names = dict.fromkeys(name for row in rows for name in row)
    same = [n for n in names if len({row[n].shape if n in row else None for row in rows}) == 1]
    result = {name: torch.stack([row[name] for row in rows]) for name in same}
    others = [
        sum((row[n].sum() for n in row if n not in same), torch.zeros((), dtype=torch.double))
        for row in rows
    ]
    if len(same) < len(names):
        result[OTHERS] = torch.stack(others)
    return result


def is_data(site: SampleMessage) -> bool:
    """Whether a site is observed; pyro.deterministic is, but only in name."""
    return site["is_observed"] and not site["infer"].get("_deterministic")


class _Given(Messenger):
    """
    Give latent sites a sample's values; draw the plate elements that it does not have.

    :param draw: how to draw from a distribution.
    """

    def __init__(
        self, values: Mapping[str, Tensor], draw: Callable[[Distribution], Tensor]
    ) -> None:
        super().__init__()
        self.values = values
        self.draw = draw
        self.last_site: str | None = None

    def _pyro_sample(self, msg: SampleMessage) -> None:
        self.last_site = msg["name"]
        if not is_latent(msg) or msg["done"]:
            return
        value = self.values.get(msg["name"])
        shape = batch_shape_of(msg["fn"]) + event_shape_of(msg["fn"], value)
        if value is None or value.shape != shape:
            drawn = self.draw(msg["fn"])
            if value is not None:
                drawn = drawn.to(value).clone()  # some distributions return an expanded tensor
                drawn[tuple(map(slice, value.shape))] = value
            value = drawn
        msg["value"] = value
        msg["done"] = True


def _log_prob(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the terms of the log-likelihood of one site."""
    return {"log_prob": counted(site, density_of(site["fn"], site["value"], validate=True))}


def _possible(name: str, log_prob: Tensor) -> Tensor:
    """Refuse nan."""
    if bool(log_prob.isnan().any()):
        raise ValueError(
            f"site '{name}': log_prob is nan at some posterior samples. Check the data, and that "
            "the samples are within the supports of their sites."
        )
    return log_prob
