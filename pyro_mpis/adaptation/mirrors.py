# SPDX-License-Identifier: Apache-2.0
"""
Find exact mirror images of a posterior: latents whose signs can be turned together.

A sign may turn if no density changes. Each density reads few latents, so all of their signs are
tried at one generic point. What a density allows is a set of vectors over the field of two
elements, where adding is turning one after the other. Vectors that all densities allow are the
solutions of linear equations.
"""

import itertools
from collections.abc import Iterator, Sequence

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis._text import quoted
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.start import Start
from pyro_mpis.programs.handlers import isolated
from pyro_mpis.programs.messages import statements

MOST_READ = 6  # latents of a density, above which their signs are taken as fixed
MOST_RUNS = 200  # of the model, above which nothing is said
TOLERANCE = 1e-4
FAR = 3.0  # sds between zero and a median, from which on a mirror image is another mode

Signs = int  # a bit for each latent: whether its sign turns


def mirrors(start: Start) -> list[frozenset[str]]:
    """
    Return sets of latents whose signs can be turned together.

    All others are unions of these, without what two have in common.
    """
    names = [name for name in start.priors if _is_real(start, name)]
    bit = {name: 1 << number for number, name in enumerate(names)}
    reads = {
        site.name: sorted((site.reads | {site.name}) & set(names))
        for site in start.structure.model.values()
    }
    small = {site: read for site, read in reads.items() if read and len(read) <= MOST_READ}
    runs = {turned for read in small.values() for turned in _subsets(read)}
    if len(runs) > MOST_RUNS:
        return []
    with torch.no_grad(), pyro.validation_enabled(False):
        at = {turned: _densities(start, turned) for turned in runs}
    equations: list[Signs] = []
    for site, read in reads.items():
        bits = [bit[name] for name in read]
        if site not in small:
            equations += bits
            continue
        allowed = {
            sum(bit[name] for name in turned)
            for turned in _subsets(read)
            if _are_same(at[turned].get(site), at[()].get(site))
        }
        equations += _equations(allowed, bits)
    return [
        frozenset(name for name in names if bit[name] & solution)
        for solution in _solutions(equations, list(bit.values()))
    ]


def _is_real(start: Start, name: str) -> bool:
    support = getattr(start.sites[name]["fn"], "support", None)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def _densities(start: Start, turned: tuple[str, ...]) -> dict[str, Tensor]:
    """Return each site's log density where the signs of some latents turn; none where it fails."""
    values = {
        name: -site["value"].detach() if name in turned else site["value"].detach()
        for name, site in start.sites.items()
        if name in start.priors or name in start.others
    }
    try:
        with isolated():
            conditioned = poutine.condition(start.programs.call, data=values)
            trace = poutine.trace(conditioned).get_trace("model")
        trace.compute_log_prob()
    except (ValueError, RuntimeError, ArithmeticError):  # as where a scale gets negative
        return {}
    return {name: trace.nodes[name]["log_prob"] for name in statements(trace)}


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    sizes = range(len(names) + 1)
    return itertools.chain.from_iterable(itertools.combinations(names, n) for n in sizes)


def _are_same(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether densities are the same; those that are nan are not."""
    if found is None or expected is None:
        return False
    scale = expected.abs().max().clamp(min=1.0)
    return bool((found - expected).abs().max() <= TOLERANCE * scale)


def _equations(allowed: set[Signs], bits: list[Signs]) -> list[Signs]:
    """Return linear equations of the allowed vectors; none but zero is, if these are no space."""
    if any(one ^ other not in allowed for one in allowed for other in allowed):
        return bits
    sizes = range(len(bits) + 1)
    candidates = [sum(chosen) for n in sizes for chosen in itertools.combinations(bits, n)]
    return [c for c in candidates if all((c & a).bit_count() % 2 == 0 for a in allowed)]


def _solutions(equations: list[Signs], bits: list[Signs]) -> list[Signs]:
    """Return a basis of the vectors that meet all equations, by elimination."""
    rows: dict[Signs, Signs] = {}  # of the leading bit
    for equation in equations:
        for lead, row in rows.items():
            if equation & lead:
                equation ^= row
        if equation:
            lead = 1 << (equation.bit_length() - 1)
            rows = {k: row ^ equation if row & lead else row for k, row in rows.items()}
            rows[lead] = equation
    free = [bit for bit in bits if bit not in rows]
    return [bit + sum(lead for lead, row in rows.items() if row & bit) for bit in free]


def halves(
    images: Sequence[frozenset[str]], start: Start, guide: AutoPlateNormal, far: float = FAR
) -> list[frozenset[str]]:
    """
    Return the sets of latents that turn together, for which a guide is in one half.

    :param far: sds between zero and a median.
    """
    if not images:  # mostly, and quantiles of many latents take long
        return []
    call = start.programs
    ends = guide.quantiles([0.16, 0.5, 0.84], *call.args, **call.kwargs)
    one_sided = {
        name
        for name, (low, median, high) in ends.items()
        if bool((median.abs() > far * 0.5 * (high - low)).any())
    }
    return [names for names in images if names & one_sided]


def told_of_halves(found: Sequence[frozenset[str]]) -> str:
    """Say which mirror images a guide does not reach."""
    sets = "; ".join(quoted(sorted(names)) for names in found)
    number = len(found)
    return (
        f"the posterior has exact mirror images: the signs of {sets} can be turned together. The "
        f"learned proposal is in one of {2**number} of the same evidence. Add {number} times log 2 "
        f"= {number * 0.6931:.4f} to the log evidence, and take moments of these latents as those "
        "of one image: over all of them their means are zero. A prior that fixes a sign would make "
        "the posterior one."
    )
