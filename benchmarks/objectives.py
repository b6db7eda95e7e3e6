# SPDX-License-Identifier: Apache-2.0
"""
What a step of SVI costs: this package's objectives beside Pyro's ELBO with as many particles.

    PYRO_MPIS_DATA=... PYTHONPATH=benchmarks python benchmarks/objectives.py

Prints milliseconds of CPU for a step, optimiser included, the least of several rounds in which the
objectives take turns, and ratios to ``Trace_ELBO``.
"""

import time
import warnings
from collections.abc import Callable

import _cases
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_mpis import MPReweightedWakeSleep, TraceMP_ELBO

CASES = {"eight_schools": 30, "bus_breakdown": 10}  # particles
ROUNDS, STEPS = 8, 15


def measure(name: str, num_particles: int) -> dict[str, float]:
    """Return the milliseconds of a step with each objective."""
    case = _cases.load(name)
    elbo = Trace_ELBO(
        num_particles=num_particles,
        vectorize_particles=True,
        max_plate_nesting=case.max_plate_nesting,
    )
    objectives = {
        "Trace_ELBO": elbo,
        "TraceMP_ELBO": TraceMP_ELBO(num_particles),
        "MPReweightedWakeSleep": MPReweightedWakeSleep(num_particles),
    }
    steps: dict[str, Callable[[], object]] = {}
    guide = AutoNormal(case.model)
    for title, objective in objectives.items():
        svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 1e-4}), objective)
        steps[title] = lambda svi=svi: svi.step(**case.data)  # type: ignore[misc]
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(ROUNDS):
        for title, step in steps.items():
            step()
            start = time.process_time()
            for _ in range(STEPS):
                step()
            best[title] = min(best[title], (time.process_time() - start) / STEPS * 1e3)
    return best


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pyro.set_rng_seed(0)
    for name, num_particles in CASES.items():
        if name in _cases.TRUTHS and not _cases.HAS_DATA:
            continue
        times = measure(name, num_particles)
        print(f"{name}, AutoNormal, {num_particles} particles")
        for title, milliseconds in times.items():
            print(f"  {title:22} {milliseconds:6.2f} ms  {milliseconds / times['Trace_ELBO']:5.2f}")
