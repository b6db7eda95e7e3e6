# SPDX-License-Identifier: Apache-2.0
"""Check that the model and the guide that are given with a file are those of the run in it."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from pyro_mpis._text import quoted
from pyro_mpis.factor_graph.evidence import log_evidence
from pyro_mpis.programs.environment import seeded
from pyro_mpis.programs.not_mappable import Name
from pyro_mpis.programs.structure import Origin, Site, Structure
from pyro_mpis.replicate import BlockSum

OF_LEARNED = "_mpis_"  # what names of a learned guide's own sites begin with
MADE_BY_ADAPT = (
    "the model and the guide that adapt made: .load(path, posterior.model, posterior.guide)"
)

ORIGINS: dict[Origin, str] = {
    "guide": "drawn by the guide",
    "prior": "drawn from the prior",
    "enumerated": "summed over its support",
    "guide_delta": "computed by the guide",
    "model_delta": "computed by the model",
}


def check_structure(
    path: str | os.PathLike[str],
    stored: Structure,
    structure: Structure,
    *,
    sampled: Collection[str] = (),
    together: bool = False,
) -> bool:
    """
    Check that the model and guide given are those of the file.

    :param sampled: latents that the run sampled, whether a plain run would sum them or not.
    :param together: whether the run was ordinary importance sampling, which samples all of them,
        and only weighs latents that are met in every run.
    :return: whether a site read more in the run than a plain run shows, as the run has found out.
    :raises ValueError: if not; names a site that differs.
    """
    advice = "Load it with the model, the guide, and, if given, the arguments of that run."
    if any(name.startswith(OF_LEARNED) for name in stored.guide):
        advice = f"The run had a learned proposal: give {MADE_BY_ADAPT}."
    where = f"'{os.fspath(path)}'"
    programs: tuple[Name, ...] = ("guide", "model")
    reads_more = False
    sampled = set(stored.origins) if together else {*stored.shared, *sampled}
    origins = {
        name: stored.origins.get(name, origin)
        if origin == "enumerated" and name in sampled
        else origin
        for name, origin in structure.origins.items()
        if name in stored.origins or not together
    }
    structure = replace(structure, origins=origins)
    for program in programs:
        before: Mapping[str, Site] = getattr(stored, program)
        now = dict[str, Site](getattr(structure, program))
        for name in before.keys() & now.keys():
            if now[name].reads < before[name].reads:
                reads_more = True
                now[name] = replace(now[name], reads=before[name].reads)
        old, new = _described(stored, before), _described(structure, now)
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{where}: site '{name}' of the {program} is not as it was in the run: "
                    f"{new.get(name, 'absent')}; it was {old.get(name, 'absent')}. {advice}"
                )
    return reads_more


def _described(structure: Structure, sites: Mapping[str, Site]) -> dict[str, str]:
    """Describe the sites of a program in words; symbols would depend on how many there are."""
    result = {}
    for name, site in sites.items():
        plates = quoted({p.name for symbol, p in structure.plates.items() if symbol in site.plates})
        event_shape = tuple(site.shape[len(site.shape) - site.event_dim :])
        origin = structure.origins.get(name)
        how = "not a latent of the model" if origin is None else ORIGINS[origin]
        if origin == "enumerated" and name in structure.index_of:
            how += f" of {structure.index_of[name].support} values"
        result[name] = (
            f"batch shape {tuple(site.batch_shape)}, event shape {event_shape}, "
            f"in plates {plates or 'none'}, reading {quoted(set(site.reads)) or 'nothing'}, {how}"
        )
    return result


def check_evaluation(path: str | os.PathLike[str], block_sum: BlockSum) -> None:
    """
    Check that a sum whose factors are not kept is evaluated as it was.

    :raises ValueError: if a block's evidence is another than in the file.
    """
    if block_sum.whole.factors:
        return
    block = int(block_sum.log_evidences.argmax())
    before = block_sum.log_evidences[block]
    with seeded(0):
        now = block_sum.job(block, log_evidence)().double()
    if not torch.allclose(now, before, rtol=1e-4, atol=1e-3):
        raise ValueError(
            f"'{os.fspath(path)}': particles that were weighed at log evidence "
            f"{float(before):.4f} in the run are at {float(now):.4f} now. A "
            "result of several blocks or replicates, or saved without factors, is evaluated again "
            "by model and guide: give them the parameters that they had (the param store's, a "
            "module's state_dict), and the arguments of that run."
        )
