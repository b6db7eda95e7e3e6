# SPDX-License-Identifier: Apache-2.0
"""
Which elements of masked latents are read by something that no mask hides, and what follows.

``poutine.mask`` of a latent that is summed over its support does not count, as in Pyro's
TraceEnum_ELBO. Of all others:

The model runs once more, mapped over **slots**. In each, some masked elements are changed: if no
density that counts differs, nothing reads them. First all are changed together, which settles
padded sequences; then those of one site after the other; then elements by the bits of their
numbers, so that a density which reads one element tells which; then what is left, one by one. All
this is done at several values of the latents (**rows**), and elements are changed to several
**others**: random values, near and far, or each value of a finite support. A discrete element may
select between entries that happen to be equal, so programs run with other ones, and data are moved
(:mod:`~pyro_mpis.programs.generic`). What is multiplied by zero is not read.
"""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import pyro
import torch
from pyro.ops.provenance import detach_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis._typing import SampleMessage
from pyro_mpis.particles.other_values import (
    differing,
    far_from,
    redrawn,
    small_support,
    values_near,
)
from pyro_mpis.particles.probes import PROBE_ELEMENTS, differs_from, num_bits
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.generic import DifferentEntries
from pyro_mpis.programs.masks import Masks, masks_seen, taken_apart, widened
from pyro_mpis.programs.messages import (
    batch_shape_of,
    counted,
    is_delta,
    is_enumerated,
    is_latent,
    is_silent,
    statements,
)
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.runs import Programs, Wanted, evaluate, run_at
from pyro_mpis.programs.structure import Structure

MORE_ROWS = 2  # values of the latents besides those of the plain run
RANDOM = 4  # random values that an element is changed to, half of them far


def find_masks(
    programs: Programs, structure: Structure, guide_trace: Trace, model_trace: Trace
) -> Masks:
    """
    Find how the masks of latents count.

    :param guide_trace: of a plain run, as is ``model_trace``.
    """
    seen = masks_seen(model_trace)
    if not seen or structure.obstacle is not None:  # masks differ from particle to particle
        return Masks()
    guide_sites, model_sites = statements(guide_trace), statements(model_trace)
    summed = {
        name: _own_mask(model_sites[name], mask)
        for name, mask in seen.items()
        if structure.origins[name] == "enumerated"
    }
    unread = unread_elements(programs, model_sites, seen, summed, mapped=True)
    lifted, left_out, not_proposed = dict(summed), {}, {}
    for name, elements in unread.items():
        if structure.origins[name] == "guide_delta" and not structure.guide[name].reads:
            continue  # fixed at a point: no proposal would balance its density
        site = model_sites[name]
        drawn = _drawn_for(structure, name)
        if drawn is not None and batch_shape_of(guide_sites[drawn]["fn"]) == batch_shape_of(
            site["fn"]
        ):
            dims = taken_apart(site["fn"]).event_dims
            left = elements.flatten(-dims).all(-1) if dims else elements
            if drawn != name:
                left = _by_index_element(structure, drawn, left)
                not_proposed[drawn] = left
            left_out[name] = not_proposed[name] = left
        lifted[name] = elements | lifted[name] if name in summed else elements
    return Masks(seen, lifted, left_out, not_proposed)


def _own_mask(site: SampleMessage, mask: Tensor) -> Tensor:
    """Return the mask of ``.mask()`` alone, of the shape of all masks together."""
    own = taken_apart(site["fn"]).mask
    return torch.as_tensor(True if own is None else own, device=mask.device).expand(mask.shape)


def same_masks(masks: Masks, model_trace: Trace) -> bool:
    """Whether the latents of a run are under the masks of the plain run, and no others are."""
    return _are_equal(masks_seen(model_trace), masks.seen)


def _are_equal(seen: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> bool:
    return seen.keys() == known.keys() and all(torch.equal(seen[n], known[n]) for n in seen)


def _drawn_for(structure: Structure, name: str) -> str | None:
    """
    Return the random site of the guide whose proposal can be left out with a latent.

    None where the latent is not the guide's, or where the guide computes something else from it.
    """
    origin = structure.origins[name]
    if origin not in ("guide", "guide_delta"):
        return None
    drawn = name
    if origin == "guide_delta":
        sources = structure.guide[name].reads
        if len(sources) != 1:
            return None
        (drawn,) = sources
    others = {*structure.carried, *structure.guide_factors} - {name}
    if any(drawn in structure.guide[other].reads for other in others):
        return None
    return drawn


def _by_index_element(structure: Structure, name: str, left: Tensor) -> Tensor:
    """Return what is left out of all batch elements that share an element of an index."""
    held = {structure.plates[symbol].dim for symbol in structure.index_of[name].plates}
    for dim in range(-left.dim(), 0):
        if dim not in held:
            left = left.all(dim, keepdim=True).expand(left.shape)
    return left


def masks_at(programs: Programs, guide_trace: Trace, model_trace: Trace) -> Masks:
    """
    Find how masks count at one particle of ordinary importance sampling.

    A site that the guide draws is left out alone: its density is a factor of its own.

    :param programs: with the masks of the plain run, which count if the particle has the same.
    """
    if same_masks(programs.masks, model_trace):
        return programs.masks
    seen = masks_seen(model_trace)
    guide_sites, model_sites = statements(guide_trace), statements(model_trace)
    summed = {
        name: _own_mask(model_sites[name], mask)
        for name, mask in seen.items()
        if is_enumerated(model_sites[name])
    }
    unread = unread_elements(programs, model_sites, seen, summed, mapped=False)
    computed = any(is_delta(s["fn"]) or s["is_observed"] for s in guide_sites.values())
    lifted, left_out = {**summed, **unread}, {}
    for name, elements in unread.items():
        own = guide_sites.get(name)
        fn = model_sites[name]["fn"]
        if own is not None and not computed and batch_shape_of(own["fn"]) == batch_shape_of(fn):
            dims = taken_apart(fn).event_dims
            left_out[name] = elements.flatten(-dims).all(-1) if dims else elements
        if name in summed:
            lifted[name] = lifted[name] | summed[name]
    return Masks(seen, lifted, left_out, left_out)


def unread_elements(
    programs: Programs,
    sites: Mapping[str, SampleMessage],
    seen: Mapping[str, Tensor],
    summed: Mapping[str, Tensor],
    *,
    mapped: bool,
) -> dict[str, Tensor]:
    """
    Return where latents are masked, and no density that counts reads them.

    :param sites: the model's, of a plain run.
    :param seen: their masks, False where masked.
    :param summed: of those of them that are summed, the masks of ``.mask()``, which alone count.
    :param mapped: whether to run many values at once, at several values of all latents; otherwise
        at those of the plain run alone.
    """
    seen = {name: summed.get(name, mask) for name, mask in seen.items()}
    seen = {name: mask for name, mask in seen.items() if name not in summed or not mask.all()}
    if not seen:
        return {}
    programs = replace(programs, masks=Masks(summed, summed))
    sites = {name: programs.masks.of_model(site) for name, site in sites.items()}
    state = pyro.util.get_rng_state()
    try:
        with pyro.validation_enabled(False):
            pyro.set_rng_seed(0)  # what is found is not to depend on the draws
            probe = _probe_of(programs, sites, seen, mapped)
            for handler in (DifferentEntries(), nullcontext()):
                try:
                    with handler:
                        return _unread(probe, seen)
                except ValueError:
                    continue  # sites are not the same at all values, or other entries fail
    finally:
        pyro.util.set_rng_state(state)
    return {name: torch.zeros_like(mask) for name, mask in seen.items()}  # for all we know


@dataclass(frozen=True)
class _Probe:
    """A model, and the values that its latents are changed from and to."""

    programs: Programs
    rows: Mapping[str, Tensor]  # of all latents: (rows, *shape)
    others: Mapping[str, Tensor]  # of the masked ones: (others, *shape)
    counting: tuple[str, ...]  # sites with a density
    largest: int  # number of entries of the largest density
    mapped: bool

    def changed(self, patterns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Return which entries of each density differ if some elements are changed.

        :param patterns: ``(patterns, *inner batch shape)`` of masked sites.
        :return: ``(patterns, entries)``.
        """
        number = len(next(iter(patterns.values())))
        num_rows = len(next(iter(self.rows.values())))
        num_others = len(next(iter(self.others.values())))
        step = max(1, PROBE_ELEMENTS // (num_rows * num_others * self.largest))
        plain = self._log_probs(self.rows)
        parts: dict[str, list[Tensor]] = {name: [] for name in self.counting}
        for start in range(0, number, step):
            count = min(step, number - start)
            lead = (count, num_others, num_rows)
            values = {}
            for name, row in self.rows.items():
                value = row.expand((*lead, *row.shape[1:]))
                if name in patterns:
                    pattern = patterns[name][start : start + count]
                    pattern = widened(pattern, row.dim() - pattern.dim())
                    other = self.others[name].unsqueeze(1)
                    value = torch.where(pattern[:, None, None], other, value)
                values[name] = value.flatten(0, 2)
            for name, log_prob in self._log_probs(values).items():
                log_prob = log_prob.reshape((*lead, -1))
                differs = differs_from(log_prob, plain[name].reshape((num_rows, -1)))
                parts[name].append(differs.any(2).any(1))
        return {name: torch.cat(part) for name, part in parts.items()}

    def _log_probs(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Evaluate the densities as they count, at each of the data: ``(slots, entries)``."""
        number = len(next(iter(values.values())))
        for patched in (False, True) if self.mapped else ():
            programs = replace(self.programs, patched=patched)
            collect = dict.fromkeys(self.counting, _counted)
            try:
                _, said = evaluate(
                    programs, [dict(values)], model=Wanted(collect, frozenset(collect)), shapes={}
                )
            except NotMappableError:
                continue
            return {
                name: torch.cat([p.of_each(number).reshape(number, -1) for p in parts.values()], 1)
                for name, parts in said.items()
            }
        rows = [
            self._log_probs_at({n: value[k] for n, value in values.items()}) for k in range(number)
        ]
        shapes = next((row for row in rows if row), {})
        if not shapes:
            raise ValueError("the model fails at all values of its masked latents")
        failed = {name: torch.full_like(log_prob, torch.nan) for name, log_prob in shapes.items()}
        return {
            name: torch.stack([(row or failed)[name] for row in rows]) for name in self.counting
        }

    @cached_property
    def _masks(self) -> dict[str, Tensor]:
        """Those of the plain run. A program that looks at values may have others elsewhere."""
        plain = {name: row[0] for name, row in self.rows.items()}
        return masks_seen(run_at(self.programs, "model", plain))

    def _log_probs_at(self, values: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Evaluate the densities at single values; None where the program refuses these."""
        try:
            trace = run_at(self.programs, "model", values)
            sites = statements(trace)
            densities = {n: _counted(sites[n], {}) for n in self.counting if n in sites}
        except Exception:  # an assertion of its own, say: it reads what it refuses
            return None
        if not _are_equal(masks_seen(trace), self._masks):  # what is read there tells nothing
            return None
        for name in self.counting:
            if name not in sites:
                raise ValueError(f"site '{name}' is met in some runs only")
        return {n: torch.cat([p.flatten() for p in d.values()]) for n, d in densities.items()}


def _counted(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the density of a site as it counts, at its value and at other data."""
    return {
        name: counted(site, density_of(site["fn"], value, validate=False))
        for name, value in values_near(site).items()
    }


def _probe_of(
    programs: Programs,
    sites: Mapping[str, SampleMessage],
    masked: Collection[str],
    mapped: bool,
) -> _Probe:
    latents = {n: s for n, s in sites.items() if is_latent(s) and not is_delta(s["fn"])}
    supports = {name: small_support(site) for name, site in latents.items()}
    most = max([0, *(len(support) for support in supports.values() if support is not None)])
    others = {}
    num_others = RANDOM + most
    num_rows = 1 + max(MORE_ROWS, most) if mapped else 1
    rows = {}
    for name, site in latents.items():
        value, support = detach_provenance(site["value"]), supports[name]
        if support is None:
            drawn = redrawn(site["fn"], value, num_others + num_rows)
        else:
            drawn = support[torch.arange(num_others + num_rows) % len(support)]
        drawn = differing(drawn)
        rows[name] = torch.cat([value.unsqueeze(0), drawn[: num_rows - 1]])
        if name in masked:
            others[name] = drawn[num_rows:].clone()
            if support is None:
                others[name][::2] = far_from(site["fn"], others[name][::2])
    counting = tuple(
        name
        for name, site in sites.items()
        if not is_silent(site) and not (is_latent(site) and is_delta(site["fn"]))
    )
    entries = [2 * batch_shape_of(sites[name]["fn"]).numel() for name in counting]
    largest = max([*entries, *(value[0].numel() for value in rows.values())])
    return _Probe(programs, rows, others, counting, largest, mapped)


def _unread(probe: _Probe, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find what nothing reads: together, site by site, then element by element."""
    result = {name: ~mask for name, mask in seen.items()}
    hidden = [name for name, masked in result.items() if bool(masked.any())]
    if not hidden or not probe.counting:
        return result
    if not _any(probe.changed({name: result[name][None] for name in hidden})):
        return result
    for name in hidden:
        if len(hidden) > 1 and not _any(probe.changed({name: result[name][None]})):
            continue
        result[name] = result[name] & ~_read_elements(probe, name, result[name])
    return result


def _any(changed: Mapping[str, Tensor]) -> bool:
    return any(bool(entries.any()) for entries in changed.values())


def _read_elements(probe: _Probe, name: str, masked: Tensor) -> Tensor:
    """Return which of a site's masked elements are read."""
    elements = masked.flatten().nonzero().squeeze(1)  # in the order of their numbers
    count = len(elements)
    if count == 1:
        return masked
    bits = num_bits(count)
    numbers = torch.arange(count, device=masked.device)
    is_set = numbers.bitwise_right_shift(torch.arange(bits, device=masked.device)[:, None]) & 1
    code = torch.cat([is_set.bool(), ~is_set.bool()])  # (2 bits, elements)
    changed = probe.changed({name: _pattern(masked, elements, code)})
    together = torch.cat(list(changed.values()), 1)  # (2 bits, entries)
    together = together.unique(dim=1)
    single = (together[:bits] ^ together[bits:]).all(0)
    weights = 2 ** torch.arange(bits, device=masked.device)
    read = torch.zeros(count, dtype=torch.bool, device=masked.device)
    read[(together[:bits, single].long() * weights[:, None]).sum(0)] = True
    possible = torch.zeros_like(read)
    for entry in together[:, ~single].unbind(1):
        possible |= (entry[:, None] | ~code).all(0)
    alone = (possible & ~read).nonzero().squeeze(1)
    if len(alone):
        changed = probe.changed({name: _pattern(masked, elements[alone], torch.eye(len(alone)))})
        read[alone] = torch.cat(list(changed.values()), 1).any(1)
    result = torch.zeros_like(masked).flatten()
    result[elements[read]] = True
    return result.reshape(masked.shape)


def _pattern(masked: Tensor, elements: Tensor, code: Tensor) -> Tensor:
    """Lay out which elements are changed: ``(patterns, *shape)``."""
    result = masked.new_zeros((len(code), masked.numel()))
    result[:, elements] = code.to(masked.device).bool()
    return result.reshape((len(code), *masked.shape))
