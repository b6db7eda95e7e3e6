# SPDX-License-Identifier: Apache-2.0
"""What a run tells its user of model and guide: where they give less than they could."""

from collections.abc import Sequence

from pyro.poutine.trace_struct import Trace

from pyro_mpis._text import quoted
from pyro_mpis.programs.agreement import unreachable
from pyro_mpis.programs.masks import taken_apart
from pyro_mpis.programs.messages import statements
from pyro_mpis.programs.structure import Structure
from pyro_mpis.programs.subsampling import subsamples_of


def weaknesses(
    structure: Structure,
    groups: Sequence[Sequence[str]],
    guide_trace: Trace,
    model_trace: Trace,
) -> list[str]:
    """Say where the guide leaves less than massively parallel importance sampling."""
    result = []
    for name, (number, size) in subsamples_of((guide_trace, model_trace)).items():
        result.append(
            f"plate '{name}': a subsample of {number} of {size}. All answers are for this one "
            f"minibatch, whose elements count as {size / number:.4g} each: another would give "
            "other answers, and none of them is the evidence of all data. Use a subsample for "
            "learning with TraceMP_ELBO. For a posterior, run on all of the data (leave "
            "out subsample_size= and subsample=)."
        )
    points = {
        name for name in structure.carried if not structure.indices_read(structure.guide[name])
    }
    if structure.undeclared:
        shapes = ", ".join(f"'{name}' {tuple(s)}" for name, s in structure.undeclared.items())
        result.append(
            f"batch dims that no pyro.plate declares ({shapes}) count as event dims: a latent has "
            "one particle index for all of them, and an observation is summed over them. Enclose "
            "the site in a plate, which gives each element an index of its own, or silence this "
            "by .to_event."
        )
    if points:
        result.append(
            f"the guide fixes {quoted(points)} at a point (Delta): evidence() is then the log of "
            "the joint density of the data and this point, not of p(x). All other answers are "
            "conditional on the point. For a posterior of these sites use AutoNormal instead."
        )
    indices = [index for index in structure.indices if not index.enumerated]
    sharing = set(structure.carried) - points
    if not groups and len(indices) == 1 and len(sharing) > 1:
        result.append(
            f"the guide draws {len(sharing)} sites as one vector, '{indices[0].sites[0]}', so "
            "there is a single particle index, and massively parallel importance sampling equals "
            "ordinary importance sampling with num_samples draws. A guide with a distribution for "
            "each site (AutoNormal, AutoGuideList of several parts) combines them all."
        )
    guide_sites, model_sites = statements(guide_trace), statements(model_trace)
    for name, origin in structure.origins.items():
        if origin == "guide":
            cut_off = unreachable(name, guide_sites[name]["fn"], model_sites[name]["fn"])
            result += [] if cut_off is None else [cut_off]
    return result + _strange_plates(structure) + _flat_priors(model_trace, structure)


def _strange_plates(structure: Structure) -> list[str]:
    """Say which sites sit in other plates in the guide than in the model."""
    strange = {
        name
        for name, origin in structure.origins.items()
        if origin == "guide"
        and structure.guide[name].plates - structure.model[name].plates
        and structure.model[name].plates - structure.guide[name].plates
    }
    if not strange:
        return []
    return [
        f"{quoted(strange)}: in other plates in the guide than in the model, so that all plate "
        "elements share one particle index. Give the guide's plates the model's names."
    ]


def _flat_priors(model_trace: Trace, structure: Structure) -> list[str]:
    """Say which latents are masked although something reads them."""
    flat = {
        name
        for name, site in statements(model_trace).items()
        if name in structure.origins and taken_apart(site["fn"]).mask is not None
    }
    if not flat:
        return []
    return [
        f"{quoted(flat)}: masked, but a site that is not masked reads it. Where it is masked, its "
        "prior counts as flat, with a density of one, as in SVI and HMC. The evidence is computed "
        "with that. A latent that the guide lacks is still drawn from the distribution behind the "
        "mask: give a guide if that distribution is far from the posterior."
    ]
