# SPDX-License-Identifier: Apache-2.0
"""What is measured of a case: runs, Pyro's own estimate, and the least that a run can cost."""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from unittest import mock

import pyro
import torch
from _cases import Case
from _measure import GIB
from pyro.infer import TraceTMC_ELBO, config_enumerate

from pyro_mpis import MPImportance
from pyro_mpis import blocks as package_blocks
from pyro_mpis import replicate as package_replicate
from pyro_mpis.particles import evaluation, memory
from pyro_mpis.particles.drawing import Drawn
from pyro_mpis.pieces import Ranges
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.tensors import Said, Values
from pyro_mpis.replicate import BlockSum, Replicate
from pyro_mpis.workers import Workers

Function = Callable[[], float | None]
MEMORY_LIMIT = 3 * GIB // 2  # of runs in blocks


def inference(
    case: Case,
    num_samples: int,
    memory_limit: int | None = None,
    executor: Executor | None = None,
) -> MPImportance:
    return MPImportance(
        case.model,
        case.guide,
        num_samples,
        max_plate_nesting=case.max_plate_nesting,
        memory_limit=memory_limit,
        executor=executor,
    ).run(**case.data)


def functions(case: Case, num_samples: int) -> dict[str, Function]:
    """Return functions that give the error of the log evidence."""

    def evidence() -> float:
        return inference(case, num_samples).evidence().item() - case.truth

    def queries() -> float:
        posterior = inference(case, num_samples)
        posterior.moments()
        posterior.marginals()
        return posterior.evidence().item() - case.truth

    guide = config_enumerate(case.guide, "parallel", num_samples=num_samples)
    elbo = TraceTMC_ELBO(max_plate_nesting=case.max_plate_nesting)

    def tmc() -> float:
        return -elbo.loss(case.model, guide, **case.data) - case.truth

    def blocks() -> float:
        return inference(case, num_samples, MEMORY_LIMIT).evidence().item() - case.truth

    return {"evidence": evidence, "queries": queries, "tmc": tmc, "blocks": blocks}


def samples(case: Case, num_samples: int) -> Function:
    """Return a function that draws 1,000 joint samples, after a run."""
    posterior = inference(case, num_samples)

    def draw() -> None:
        posterior.sample(1000)

    return draw


def floor(case: Case, num_samples: int) -> Function:
    """
    Return a function that evaluates every log_prob of the model once, at all combinations.

    It gives the number of entries of the largest.
    """
    calls: list[Callable[[], tuple[Said, Said]]] = []
    evaluate = evaluation.evaluate

    def recorded(programs: Programs, levels: list[Values], **kwargs: object) -> tuple[Said, Said]:
        calls.append(functools.partial(evaluate, programs, levels, **kwargs))
        return evaluate(programs, levels, **kwargs)

    with (
        mock.patch.object(evaluation, "evaluate", recorded),
        mock.patch.object(memory, "PIECE_BYTES", 2**62),  # all at once, not in pieces
        mock.patch.object(package_replicate, "rows_beside", return_value=None),  # no check beside
    ):
        inference(case, num_samples)

    def evaluated() -> float:
        with torch.no_grad(), pyro.validation_enabled(False):
            _, said = calls[-1]()
            log_probs = [parts["log_prob"].tensor for parts in said.values() if "log_prob" in parts]
            return float(max(log_prob.numel() for log_prob in log_probs))

    return evaluated


def one_block(case: Case, num_samples: int) -> tuple[float, int]:
    """Time a run of the first block alone; and say how many blocks there are."""
    evaluate = package_blocks.evaluate
    counts: list[int] = []

    def first(
        replicate: Replicate, blocks: Sequence[Ranges], drawn: Drawn, workers: Workers
    ) -> BlockSum:
        counts.append(len(blocks))
        return evaluate(replicate, blocks[:1], drawn, workers)

    package_blocks.evaluate = first
    try:
        begin = time.perf_counter()
        inference(case, num_samples, MEMORY_LIMIT)
        return time.perf_counter() - begin, counts[0]
    finally:
        package_blocks.evaluate = evaluate
