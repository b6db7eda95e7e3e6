# SPDX-License-Identifier: Apache-2.0
"""
Estimators with a mistake, on the particles of a correct run: the tests have to reject them.
"""

import math

import torch
from oracles import BruteForce, Problem, brute_force, log_joint, normalise
from torch import Tensor


def without_proposal_weight(problem: Problem) -> BruteForce:
    """Leave out the 1/K of each site and plate element."""
    exact = brute_force(problem)
    log_num_choices = math.log(len(problem.choices))
    return BruteForce(problem, exact.log_evidence + log_num_choices, exact.probs)


def with_ancestral_ratio(problem: Problem) -> BruteForce:
    """Divide by q(z_i^{k_i} | z_pa^{k_pa}): the child's density given the chosen parents."""
    assert problem.guide is not None
    log_ratio = log_joint(problem, problem.model) - log_joint(problem, problem.guide)
    return normalise(problem, log_ratio)


def with_first_component(problem: Problem) -> BruteForce:
    """Divide by the density given the first particle of the parents, not by the mixture."""
    log_ratio = log_joint(problem, problem.model)
    for column, (unit, element) in enumerate(problem.cells):
        first = problem.component(unit, 0)
        log_ratio = log_ratio - first[element][problem.choices[:, column]]
    return normalise(problem, log_ratio)


def with_one_particle_per_plate(problem: Problem) -> BruteForce:
    """Let all elements of a plate share the choice."""
    exact = brute_force(problem)
    kept = torch.ones(len(problem.choices), dtype=torch.bool)
    for unit in problem.units:
        columns = [i for i, (other, _) in enumerate(problem.cells) if other == unit]
        kept &= (problem.choices[:, columns] == problem.choices[:, columns[:1]]).all(-1)
    log_ratio = exact.probs.log().masked_fill(~kept, -math.inf)
    wrong = normalise(problem, log_ratio + exact.log_evidence)
    return BruteForce(problem, wrong.log_evidence, wrong.probs)


def given_generative_parents(exact: BruteForce, parents: dict[str, list[str]]) -> Tensor:
    """
    Multiply the conditionals P(k_i | k_pa(i)), pa(i) the parents in the model.

    This is equation (38) of the paper read literally. It is P(k) only if the dependencies of the
    posterior go along the edges of the model.
    """
    problem = exact.problem
    result = torch.ones(len(problem.choices))
    for name, above in parents.items():
        column, *given = [problem.column(problem.unit(site), ()) for site in (name, *above)]
        _, joint = problem.choices[:, [column, *given]].unique(dim=0, return_inverse=True)
        joint_probs = torch.zeros(len(result)).index_add(0, joint, exact.probs)[joint]
        if given:
            _, condition = problem.choices[:, given].unique(dim=0, return_inverse=True)
            joint_probs /= torch.zeros(len(result)).index_add(0, condition, exact.probs)[condition]
        result *= joint_probs
    return result
