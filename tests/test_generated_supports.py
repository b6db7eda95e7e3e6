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
from pyro_mpis.programs import densities

pytestmark = pytest.mark.usefixtures("float64")

MASKED_AND_LOOKED_AT = 1373  # whose proposal counts in full although the site is masked
EVERY_DAY = (*range(21), 22, 23, MASKED_AND_LOOKED_AT)  # 21 takes as long as ten others
SLOW = {21, *range(1000, 1400)} - set(EVERY_DAY)
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
        assert program.branches or not posterior._sums[0].traces
        with pyro.validation_enabled(False):
            return posterior, problem_of(posterior, drawn, model, guide)
    raise AssertionError("no particles are possible")


@pytest.mark.parametrize(
    "seed", [*EVERY_DAY, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW)]
)
def test_generated_program(seed: int) -> None:
    posterior, problem = run_possible(seed)
    check_posterior(posterior, exact(problem))


def test_counting_what_lies_outside_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's formulas in place of zeros, several programs differ."""
    monkeypatch.setattr(densities, "inside_of", lambda fn, value: None)
    wrong = 0
    for seed in range(12):
        try:
            posterior, problem = run_possible(seed)
            check_posterior(posterior, exact(problem))
        except (AssertionError, ValueError, RuntimeError):  # nan, or a table read outside
            wrong += 1
        if wrong == 3:
            return
    pytest.fail(f"{wrong} programs differ")
