# SPDX-License-Identifier: Apache-2.0
"""
Random programs whose supports depend on latents, masked and scaled, against brute force.

The programs are :mod:`random_supports`, the sums :mod:`singles`.
"""

import pyro
import pytest
from compared import check_posterior, problem_of, run_recorded
from random_supports import Supports
from singles import Singles, exact

from pyro_mpis import MPImportance

pytestmark = pytest.mark.usefixtures("float64")

EVERY_DAY = range(40)
SLOW = range(1000, 1400)
IMPOSSIBLE = ("probability zero for all particles", "the evidence is zero")
DRAWS = 60  # of all particles, until some combination is possible


def run_possible(seed: int) -> tuple[MPImportance, Singles]:
    """Run the program of a seed with particles of which some are possible."""
    program = Supports(seed).program()
    print(program.source)
    model, guide = program.programs()
    for draw in range(DRAWS):
        pyro.clear_param_store()
        pyro.set_rng_seed(1000 * seed + draw)
        try:
            posterior, drawn = run_recorded(model, guide, num_samples=program.num_particles)
        except ValueError as error:
            if not any(text in str(error) for text in IMPOSSIBLE):
                raise
            continue
        assert bool(posterior._sums[0].traces) == program.branches
        with pyro.validation_enabled(False):
            return posterior, problem_of(posterior, drawn, model, guide)
    raise AssertionError("no particles are possible")


@pytest.mark.parametrize(
    "seed", [*EVERY_DAY, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW)]
)
def test_generated_program(seed: int) -> None:
    posterior, problem = run_possible(seed)
    check_posterior(posterior, exact(problem))
