# SPDX-License-Identifier: Apache-2.0
"""
Ordinary importance sampling: the programs run once for each particle.

For programs that cannot run at many values at once, whose sites may differ from run to run. All
latents share one particle index. Sites that every run has keep a factor and values of their own;
the densities of all others are added up in one factor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from opt_einsum import get_symbol
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis import _progress
from pyro_mpis._typing import SampleMessage
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.particles.factors import graph_of, site_value, without_ruled_out
from pyro_mpis.particles.masked import masks_at
from pyro_mpis.particles.proposals import Particles
from pyro_mpis.programs.densities import memoise, plain_density, taking_anything, zero_unless_finite
from pyro_mpis.programs.handlers import Replay
from pyro_mpis.programs.masks import unmasked
from pyro_mpis.programs.messages import counted, drawn_from, is_delta, is_latent, statements
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import Index, Origin, Structure
from pyro_mpis.programs.subsampling import scale_of_plates

NO_PLATE = 10_000  # number of a symbol that no plate has
OTHERS = "(sites of some runs)"


@dataclass(frozen=True)
class Run:
    """One run of guide and model, which draws one particle of all latents."""

    guide: Trace
    model: Trace
    densities: Mapping[str, Tensor]  # the log of each site's share of r_k


def run_one_by_one(programs: Programs, num_samples: int) -> list[Run]:
    """Run guide and model once for each particle; draws random numbers."""
    return [_one_run(programs) for _ in _progress.bar(range(num_samples), "particles")]


def weighed_together(
    structure: Structure, runs: Sequence[Run]
) -> tuple[Structure, Particles, FactorGraph, tuple[Trace, ...]]:
    """
    Weigh particles of all latents together.

    :param structure: of one run of the programs.
    :return: the structure with a single index, the particles, their factors, and the model's
        traces.
    """
    num_samples = len(runs)
    rows = [run.densities for run in runs]
    traces = [run.model for run in runs]
    values = [
        {name: s["value"] for name, s in statements(trace).items() if is_latent(s)}
        for trace in traces
    ]
    kept = _in_every_run(structure, values)
    structure = _with_one_index(structure, kept, num_samples)
    symbol = structure.indices[0].symbol
    by_name = {name: torch.stack([row[name] for row in values]) for name in kept}
    log_factors = _log_factors(rows)
    log_k = torch.full((num_samples,), -math.log(num_samples), dtype=torch.double)
    tensors = {**log_factors, "number of particles": log_k}
    dims = symbol if num_samples > 1 else ""
    factors = without_ruled_out(
        [
            LogFactor(name, tensor.reshape([num_samples] * len(dims)), dims, frozenset())
            for name, tensor in tensors.items()
        ],
        structure,
    )
    site_values = {
        name: site_value(structure, structure.model[name], value, symbol)
        for name, value in by_name.items()
    }
    graph = graph_of(structure, factors, {symbol: num_samples}, site_values)
    graph = replace(graph, dtype=torch.get_default_dtype())  # densities are added up in float64
    particles = Particles({symbol: num_samples}, {symbol: num_samples}, by_name, {})
    return structure, particles, graph, tuple(traces)


def _one_run(programs: Programs) -> Run:
    args, kwargs = programs.args, programs.kwargs
    with taking_anything():
        guide_trace = poutine.trace(programs.program("guide")).get_trace(*args, **kwargs)
        model = Replay(trace=guide_trace)(programs.model)
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    masks = masks_at(programs, guide_trace, trace)
    proposed = {name: masks.of_guide(site) for name, site in statements(guide_trace).items()}
    densities: dict[str, Tensor] = {}
    for name, site in statements(trace).items():
        site = masks.of_model(site)
        density = counted(site, plain_density(site["fn"], site["value"], latent=is_latent(site)))
        if programs.is_learned:
            density = zero_unless_finite(density)
        densities[name] = _sum(density, site)
        if is_latent(site) and name not in proposed and not is_delta(site["fn"]):
            densities[f"{name} (proposal)"] = -_sum(_log_proposal(site), site)
    for name, site in proposed.items():
        if is_latent(site) or (site["is_observed"] and name not in trace.nodes):
            densities[f"{name} (proposal)"] = -_sum(_log_proposal(site), site)
    memoise(trace)  # as the traces of pyro.infer.Importance have it
    return Run(guide_trace, trace, densities)


def _log_proposal(site: SampleMessage) -> Tensor:
    """Return the density that a site was drawn from."""
    fn = unmasked(site["fn"]) if is_latent(site) else site["fn"]
    return drawn_from(site, plain_density(fn, site["value"]))


def _sum(log_prob: Tensor, site: SampleMessage) -> Tensor:
    return log_prob.sum(dtype=torch.double) * scale_of_plates(site)


def _log_factors(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put densities together: (K,) of each site that is in every run, and of all others."""
    common = [name for name in rows[0] if all(name in row for row in rows)]
    result = {name: torch.stack([row[name] for row in rows]) for name in common}
    others = [_total([row[name] for name in row if name not in result]) for row in rows]
    if any(len(row) > len(common) for row in rows):
        result[OTHERS] = torch.stack(others)
    return result


def _total(densities: list[Tensor]) -> Tensor:
    """Add up log densities; one that is zero makes the others' nan impossible."""
    total = sum(densities, torch.zeros((), dtype=torch.double))
    impossible = any(bool(density == -math.inf) for density in densities)
    return torch.full_like(total, -math.inf) if impossible else total


def _in_every_run(structure: Structure, values: list[dict[str, Tensor]]) -> list[str]:
    """Return the latent sites that all runs have, in one shape."""
    return [
        name
        for name in structure.origins
        if all(
            isinstance(row.get(name), Tensor) and row[name].shape == structure.model[name].shape
            for row in values
        )
    ]


def _with_one_index(structure: Structure, names: list[str], num_samples: int) -> Structure:
    """Return the structure of ordinary importance sampling."""
    origins: dict[str, Origin] = {}
    for name in names:
        origin = structure.origins[name]
        if origin == "enumerated":
            origin = "guide" if name in structure.guide else "prior"
        origins[name] = origin
    symbol = structure.indices[0].symbol if structure.indices else get_symbol(NO_PLATE)
    index = Index(symbol, tuple(names), frozenset(), num_samples=num_samples)
    return replace(structure, indices=(index,), origins=origins)
