# SPDX-License-Identifier: Apache-2.0
"""
Random programs, written for single values, against brute force over all combinations.

The programs are :mod:`generated`, the sums :mod:`singles`. Each test below the random ones puts one
mistake into the package, or into the sum, which the same comparison has to reject.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compared import check_draws, check_posterior, compare, problem_of, run_recorded
from generated import generate
from random_parts import Generated
from singles import Exact, Singles, exact

from pyro_mpis import MPImportance, replicate
from pyro_mpis.particles.probes import ElementReads

pytestmark = pytest.mark.usefixtures("float64")

EVERY_DAY = range(60)
SLOW = range(1000, 1400)


def check_generated(program: Generated, *, draws: bool) -> MPImportance | None:
    """Compare one program; None for a group that cannot be."""
    model, guide = program.programs()
    try:
        posterior = compare(
            model, guide, program.num_particles, program.groups, draws=draws, seed=program.seed
        )
    except ValueError as error:
        if "which is itself proposed given" not in str(error):
            raise
        return None  # members of the group read each other through a site outside of it
    total = posterior._sums[0]
    if total.traces:
        assert program.branches, total.replicate.plan.notices
    else:  # that holds of a branch too, if all particles take the same way
        check_not_shared(program, posterior)
    return posterior


def check_not_shared(program: Generated, posterior: MPImportance) -> None:
    """Each element has its own index where nothing reads several together."""
    shared = posterior._sums[0].replicate.structure.shared
    assert program.may_share or not shared, f"shared for nothing: {shared}"


@pytest.mark.parametrize("seed", EVERY_DAY)
def test_generated_program(seed: int) -> None:
    program = generate(seed, max_combinations=90)
    print(program.source)
    check_generated(program, draws=seed % 5 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW)
def test_larger_generated_program(seed: int) -> None:
    program = generate(seed, max_combinations=520)
    print(program.source)
    check_generated(program, draws=True)


def test_generated_programs_cover_what_they_should() -> None:
    """The set of every day has each kind of program several times."""
    programs = [generate(seed, max_combinations=90) for seed in EVERY_DAY]
    everything = [program.source for program in programs]

    def count(*parts: str) -> int:
        return sum(all(part in source for part in parts) for source in everything)

    assert sum(program.may_share for program in programs) > 20
    assert sum(not program.may_share for program in programs) > 8
    assert sum(bool(program.groups) for program in programs) > 4
    assert sum(program.branches for program in programs) > 0
    for part in (
        "def guide",
        "'parallel'",
        "Delta(",
        ".cumsum(",
        "mask(",
        "scale(",
        ".mask(",
        "dim=-2",
    ):
        assert count(part) > 2, part


# Programs, and mistakes that the comparison has to reject.

Y = torch.tensor([0.4, -1.1, 0.9])
COUNTY = torch.tensor([0, 1, 1])


def by_index() -> None:
    with pyro.plate("county", 2):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with pyro.plate("house", 3):
        pyro.sample("y", dist.Normal(alpha[COUNTY], 1.0), obs=Y)


def crossed() -> None:
    person, item = pyro.plate("person", 2, dim=-2), pyro.plate("item", 3, dim=-1)
    with person:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with item:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with person, item:
        pyro.sample("y", dist.Normal(a - b, 1.0), obs=torch.stack([Y, -Y]))


def by_component() -> None:
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.1, -0.3])))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=Y)


def walk() -> None:
    with pyro.plate("time", 3):
        step = pyro.sample("step", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(step.cumsum(0), 1.0), obs=Y)


def vector() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(w[0], 1.0))
    pyro.sample("y", dist.Normal(w @ w, 1.0), obs=Y[0])


def vector_guide() -> None:
    w = pyro.sample("w", dist.Normal(torch.ones(2), 1.5).to_event(1))
    pyro.sample("x", dist.Normal(w[1], 1.5))


PROGRAMS: dict[str, tuple[Callable[[], None], Callable[[], None] | None, set[str]]] = {
    "by index": (by_index, None, set()),
    "crossed": (crossed, None, {"a"}),
    "by component": (by_component, None, {"loc"}),
    "walk": (walk, None, {"step"}),
    "vector": (vector, vector_guide, set()),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("num_samples", [1, 2])
def test_program(name: str, num_samples: int) -> None:
    model, guide, shared = PROGRAMS[name]
    posterior = compare(model, guide, num_samples, draws=True)
    if num_samples > 1:
        assert set(posterior._sums[0].replicate.structure.shared) == shared


@pytest.mark.parametrize(
    ("parent", "child", "shares"),
    [
        ([0, 1], [0, 1], False),  # one child each
        ([1, 0], [1, 0], False),
        ([1, 0], [0, 1], True),  # the other's child
        ([0, 1, 1], [0, 2], False),
        ([0, 1, 1], [1, 2], True),
    ],
)
def test_plates_that_read_each_other(parent: list[int], child: list[int], shares: bool) -> None:
    """A plate lies in another only if what reads it from there agrees."""

    def model() -> None:
        outer, inner = pyro.plate("outer", 2), pyro.plate("inner", len(parent))
        with outer:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with inner:
            b = pyro.sample("b", dist.Normal(a[parent], 1.0))
        with outer:
            pyro.sample("y", dist.Normal(a.tanh() + b[child], 1.0), obs=Y[:2])

    posterior = compare(model, None, 2, draws=True)
    assert bool(posterior._sums[0].replicate.structure.shared) == shares


@pytest.mark.parametrize("element", [0, 1])
def test_plate_that_reads_one_element_of_one_that_it_crosses(element: int) -> None:
    """It would lie in the other plate, but that the data have all elements of both."""

    def model() -> None:
        p, q = pyro.plate("p", 2, dim=-2), pyro.plate("q", 3, dim=-1)
        with p:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with q:
            b = pyro.sample("b", dist.Normal(a[element, 0], 1.0))
        with p, q:
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.stack([Y, -Y]))

    assert compare(model, None, 2)._sums[0].replicate.structure.shared == {"a": ("p",)}


def test_plates_that_are_one_by_two_orders() -> None:
    """Each of two plates could lie in the other one."""

    def model() -> None:
        p, q = pyro.plate("p", 2), pyro.plate("q", 2)
        with p:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with q:
            b = pyro.sample("b", dist.Normal(a[torch.tensor([0, 1])], 1.0))
        order = torch.tensor([1, 0, 1])
        pyro.sample("y", dist.Normal(a[order] * b[order], 1.0), obs=Y)

    assert not compare(model, None, 2)._sums[0].replicate.structure.shared


def rejected(name: str, wrong: Callable[[Singles], Exact] = exact) -> None:
    """The comparison accepts the program, and rejects it with the mistake."""
    model, guide, _ = PROGRAMS[name]
    with pytest.raises(AssertionError, match=r"evidence|weights|mean"):
        compare(model, guide, 3, wrong=wrong)


def without_log_k_of_shared(problem: Singles) -> Exact:
    """Forget the 1/K of indices that the elements of a plate share."""
    right = exact(problem)
    forgotten = sum(bool(problem.shared.keys() & set(index.sites)) for index in problem.indices)
    assert forgotten
    more = forgotten * math.log(problem.num_particles)
    return replace(right, log_evidence=right.log_evidence + more)


def with_a_particle_for_each_element(problem: Singles) -> Exact:
    """Sum as if elements that share an index had one each."""
    return exact(replace(problem, shared={}))


def with_one_particle_for_a_plate(problem: Singles) -> Exact:
    """Sum as if the elements of all plates shared an index."""
    plates = ["county", "house", "component", "data", "time", "person", "item"]
    return exact(replace(problem, shared=dict.fromkeys(problem.drawn, plates)))


class OneParent(Singles):
    """Weighs a child by its density given one particle of its parents, not by the mixture."""

    def log_mixtures(self, index: Any) -> torch.Tensor:
        values = {name: value[0] for name, value in self.drawn.items()}
        sites = self.run_model(values, {}) | self.run_guide(values)
        rows = [
            sum(
                self._by_cell(index, name, sites[name]["fn"].log_prob(self.drawn[name][k]))
                for name in index.sites
            )
            for k in range(self.num_particles)
        ]
        return torch.stack([torch.as_tensor(row) for row in rows])


def with_one_parent(problem: Singles) -> Exact:
    wrong = OneParent(problem.model, problem.guide, problem.drawn, problem.supports)
    return exact(wrong)


def test_forgotten_log_k_is_rejected() -> None:
    for name in ("crossed", "by component", "walk"):
        rejected(name, without_log_k_of_shared)


def test_unshared_sum_is_rejected() -> None:
    for name in ("crossed", "by component", "walk"):
        rejected(name, with_a_particle_for_each_element)


def test_sum_shared_for_nothing_is_rejected() -> None:
    rejected("by index", with_one_particle_for_a_plate)


def test_density_given_one_parent_is_rejected() -> None:
    rejected("vector", with_one_parent)


def test_sharing_for_nothing_is_rejected() -> None:
    """The numbers are right for what is shared; that something is, is seen."""
    program = Generated(0, 2, "", "", [], may_share=False, branches=False)
    posterior = compare(by_index, None, 2, shared_plates=["county"])
    with pytest.raises(AssertionError, match="shared for nothing"):
        check_not_shared(program, posterior)


def test_regrouping_by_the_wrong_element_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own check is off without validation, and finds it with."""
    found = vars(replicate)["find_reads"]

    def mistaken(*args: Any) -> dict[str, ElementReads]:
        return {
            name: replace(reads, elements={p: (e + 1) % 2 for p, e in reads.elements.items()})
            for name, reads in found(*args).items()
        }

    monkeypatch.setattr(replicate, "find_reads", mistaken)
    with pyro.validation_enabled(False):
        rejected("by index")
    posterior = compare(by_index, None, 3)
    assert posterior._sums[0].replicate.structure.shared == {"alpha": ("county",)}


def test_elements_that_are_not_seen_to_be_mixed_are_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A factor of the diagonal stands for densities that read several elements."""
    monkeypatch.setattr(replicate, "check_graph", lambda *args, **kwargs: None)
    rejected("walk")


def test_wrong_draws_are_rejected() -> None:
    """Draws of weights that are those of other particles."""
    pyro.set_rng_seed(0)
    posterior, drawn = run_recorded(by_index, None, num_samples=2)
    truth = exact(problem_of(posterior, drawn, by_index, None))
    check_posterior(posterior, truth)
    check_draws(posterior, truth)
    with pytest.raises(AssertionError, match="chi-square"):
        check_draws(posterior, replace(truth, probs=truth.probs.flip(0)))
