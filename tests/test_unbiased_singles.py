# SPDX-License-Identifier: Apache-2.0
"""
The expected evidence of programs for single values is p(x), to rounding.

All draws of small binary programs are enumerated: the evidence of each outcome, times its
probability, summed. Each plain run draws one particle; particles that are drawn together come in
one piece.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_exact_mean, check_frequencies
from compared import problem_of, run_recorded
from singles import Exact, Program, Singles, exact, sites_at
from torch import Tensor

from pyro_mpis.options import Options
from pyro_mpis.particles import drawing
from pyro_mpis.planning import plan_of, programs_of
from pyro_mpis.programs.structure import Structure

K = 2  # particles
Draws = dict[str, Tensor]  # site -> (K, *shape)

pytestmark = pytest.mark.usefixtures("float64")


class Script:
    """What comes next: at a vectorised run all particles, at plain runs one after the other."""

    def __init__(self) -> None:
        self.draws: Draws = {}
        self.plain_runs: dict[str, int] = {}

    def start(self, draws: Draws) -> None:
        self.draws = draws
        self.plain_runs = {}

    def next_draw(self, name: str, shape: torch.Size) -> Tensor | None:
        draws = self.draws.get(name)
        if draws is None:
            return None
        if draws.numel() == shape.numel():
            return draws.reshape(shape)
        assert draws[0].numel() == shape.numel()
        number = self.plain_runs.get(name, 0)
        self.plain_runs[name] = number + 1
        return draws[(number - 1) % K].reshape(shape)  # the first run only tells the structure


class Scripted(dist.Bernoulli):  # type: ignore[misc]
    """Draws what the script says."""

    def __init__(self, script: Script, name: str, probs: Tensor | float) -> None:
        super().__init__(torch.as_tensor(probs))
        self.name, self.script = name, script

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Scripted":
        return Scripted(self.script, self.name, self.probs.expand(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape
        draws = self.script.next_draw(self.name, shape)
        if draws is None:
            result = super().sample(sample_shape)
            assert isinstance(result, Tensor)
            return result
        return draws


Shapes = dict[str, tuple[int, ...]]
Case = tuple[Program, Program | None, Shapes]


def draw(script: Script, name: str, probs: Tensor | float) -> Tensor:
    result: Tensor = pyro.sample(name, Scripted(script, name, probs))
    return result


def not_vectorised(script: Script) -> Case:
    """Three copies of a value in a vector: no batch dim can stand left of it."""

    def guide() -> None:
        a = draw(script, "a", 0.45)
        b = draw(script, "b", torch.stack([a, a, 1 - a]) @ torch.tensor([0.2, 0.1, 0.5]) + 0.1)
        draw(script, "c", torch.stack([b, a, a]) @ torch.tensor([0.4, 0.1, 0.1]) + 0.2)

    def model() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.3))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
        c = pyro.sample("c", dist.Bernoulli(0.1 + 0.8 * b))
        pyro.sample("x", dist.Bernoulli(0.1 + 0.3 * a + 0.5 * c), obs=torch.tensor(1.0))

    return model, guide, {"a": (), "b": (), "c": ()}


def as_many_as_rows(script: Script) -> Case:
    """
    With two particles the vector of a and 1 - a would make a matrix of two rows: no error.

    If particles were drawn with it, they would be right for some values of a alone; to keep these
    and to draw the others again would favour some.
    """

    def guide() -> None:
        a = draw(script, "a", 0.45)
        draw(script, "b", torch.stack([a, 1 - a]) @ torch.tensor([0.5, 0.2]) + 0.1)

    def model() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.3))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
        pyro.sample("x", dist.Bernoulli(0.1 + 0.3 * a + 0.5 * b), obs=torch.tensor(1.0))

    return model, guide, {"a": (), "b": ()}


def read_together(script: Script) -> Case:
    """The elements of a plate are added up: they share an index, be their particles all equal."""

    def model() -> None:
        a = draw(script, "a", 0.3)
        with pyro.plate("time", 2):
            b = draw(script, "b", 0.3 + 0.4 * a)
            probs = 0.1 + 0.35 * b.cumsum(0)
            pyro.sample("x", dist.Bernoulli(probs), obs=torch.tensor([1.0, 0.0]))

    return model, None, {"a": (), "b": (2,)}


def component(script: Script) -> Case:
    """One latent says which element of a plate is read."""

    def model() -> None:
        with pyro.plate("component", 2):
            a = draw(script, "a", torch.tensor([0.3, 0.6]))
        z = draw(script, "z", 0.4)
        pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * a[z.long()]), obs=torch.tensor(1.0))
        pyro.sample("y", dist.Bernoulli(0.3 + 0.4 * z), obs=torch.tensor(0.0))

    return model, None, {"a": (2,), "z": ()}


def crossed(script: Script) -> Case:
    """A latent in each of two plates that cross."""

    def model() -> None:
        person, item = pyro.plate("person", 2, dim=-2), pyro.plate("item", 2, dim=-1)
        with person:
            a = draw(script, "a", torch.tensor([[0.3], [0.6]]))
        with item:
            b = draw(script, "b", torch.tensor([0.5, 0.2]))
        with person, item:
            x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
            pyro.sample("x", dist.Bernoulli(0.2 + 0.4 * a + 0.3 * b), obs=x)

    return model, None, {"a": (2, 1), "b": (2,)}


def branch(script: Script) -> Case:
    """A branch on a latent: ordinary importance sampling."""

    def model() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.3))
        b = draw(script, "b", 0.7 if a > 0 else 0.2)
        probs = 0.1 + 0.5 * b if a > 0 else 0.8 - 0.3 * b
        pyro.sample("x", dist.Bernoulli(probs), obs=torch.tensor(1.0))

    def guide() -> None:
        draw(script, "a", 0.45)

    return model, guide, {"a": (), "b": ()}


def branch_below(script: Script) -> Case:
    """A branch on a latent that reads another: also where all particles take the same way."""

    def model() -> None:
        b = draw(script, "b", 0.4)
        a = draw(script, "a", 0.2 + 0.6 * b)
        probs = 0.1 + 0.5 * b if a > 0 else 0.8 - 0.3 * b
        pyro.sample("x", dist.Bernoulli(probs), obs=torch.tensor(1.0))

    return model, None, {"b": (), "a": ()}


CASES: dict[str, tuple[Callable[[Script], Case], list[tuple[str, str]]]] = {
    "not vectorised": (not_vectorised, []),
    "not vectorised, grouped": (not_vectorised, [("a", "b")]),
    "as many particles as rows": (as_many_as_rows, []),
    "read together": (read_together, []),
    "read together, grouped": (read_together, [("a", "b")]),
    "component": (component, []),
    "component, grouped": (component, [("a", "z")]),
    "branch": (branch, []),
    "branch below": (branch_below, []),
    "crossed": (crossed, []),
}
SLOW = ("crossed",)


def outcomes(shapes: Shapes, copies: int) -> Iterator[Draws]:
    """Every value of some copies of binary sites: ``(copies, *shape)`` each."""
    numels = [copies * math.prod(shape) for shape in shapes.values()]
    for bits in itertools.product([0.0, 1.0], repeat=sum(numels)):
        parts = torch.tensor(bits).split(numels)
        yield {
            name: part.reshape((copies, *shape))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }


def joint(model: Program, values: Draws) -> float:
    sites = sites_at(model, values, ())
    return math.exp(sum(float(s["fn"].log_prob(s["value"]).sum()) for s in sites.values()))


def probability(model: Program, guide: Program | None, draws: Draws) -> float:
    """Probability that plain runs draw these particles."""
    log_prob = 0.0
    for k in range(K):
        values = {name: draw[k] for name, draw in draws.items()}
        sites = sites_at(model, values, ())
        if guide is not None:
            sites |= sites_at(guide, values, ())
        log_prob += sum(float(sites[n]["fn"].log_prob(v).sum()) for n, v in values.items())
    return math.exp(log_prob)


Estimate = Callable[[Program, Program | None, Sequence[Sequence[str]], Draws], float]


def expected(
    make: Callable[[Script], Case], groups: Any, estimate: Estimate
) -> tuple[float, float]:
    """Return the expected estimate and the evidence."""
    script = Script()
    model, guide, shapes = make(script)
    truth = sum(
        joint(model, {name: v[0] for name, v in values.items()}) for values in outcomes(shapes, 1)
    )
    mean = total = 0.0
    for draws in outcomes(shapes, K):
        weight = probability(model, guide, draws)
        script.start(draws)
        mean += weight * estimate(model, guide, groups, draws)
        script.start({})
        total += weight
    check_exact_mean(total, 1.0)
    return mean, truth


def by_package(
    model: Program, guide: Program | None, groups: Sequence[Sequence[str]], draws: Draws
) -> float:
    posterior, drawn = run_recorded(model, guide, num_samples=K, groups=groups)
    for name, value in draws.items():
        torch.testing.assert_close(drawn[name], value)  # it did draw what the script says
    return float(posterior.evidence(log_scale=False))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_expected_evidence_is_exact(name: str) -> None:
    make, groups = CASES[name]
    check_exact_mean(*expected(make, groups, by_package))


def with_mistake(mistake: Callable[[Singles], Exact]) -> Estimate:
    def estimate(
        model: Program, guide: Program | None, groups: Sequence[Sequence[str]], draws: Draws
    ) -> float:
        posterior, drawn = run_recorded(model, guide, num_samples=K, groups=groups)
        return float(mistake(problem_of(posterior, drawn, model, guide, groups)).log_evidence.exp())

    return estimate


class GivenOneParticle(Singles):
    """Weighs by the density given the parents' first particle."""

    def log_mixtures(self, index: Any) -> Tensor:
        values = {name: value[0] for name, value in self.drawn.items()}
        sites = self.run_model(values, {}) | self.run_guide(values)
        rows = []
        for k in range(K):
            parts = [
                self._by_cell(index, name, sites[name]["fn"].log_prob(self.drawn[name][k]))
                for name in index.sites
            ]
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)


def given_one_particle(problem: Singles) -> Exact:
    return exact(
        GivenOneParticle(
            problem.model,
            problem.guide,
            problem.drawn,
            problem.supports,
            problem.shared,
            problem.groups,
        )
    )


def test_expected_sum_is_exact() -> None:
    check_exact_mean(*expected(not_vectorised, [], with_mistake(exact)))


def test_density_given_one_particle_is_rejected() -> None:
    mean, truth = expected(not_vectorised, [], with_mistake(given_one_particle))
    with pytest.raises(AssertionError):
        check_exact_mean(mean, truth)


# Fewer particles of a site than of what it is proposed from.


def below_a_plate(script: Script) -> Case:
    """One particle of each element of b, chosen from the draws given the two particles of a."""

    def model() -> None:
        a = draw(script, "a", 0.3)
        with pyro.plate("p", 2):
            b = draw(script, "b", 0.2 + 0.6 * a)
            x = torch.tensor([1.0, 0.0])
            pyro.sample("x", dist.Bernoulli(0.1 + 0.7 * b), obs=x)

    return model, None, {"a": (), "b": (2,)}


def expected_given(choice: Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the expected evidence over draws, given a choice of the particles of b."""
    script = Script()
    model, guide, shapes = below_a_plate(script)

    def chosen(structure: Structure) -> Draws:
        assert structure.num_draws[structure.index_of["b"].symbol] == K
        return {structure.index_of["b"].symbol: choice}

    monkeypatch.setattr(drawing, "_chosen", chosen)
    mean = 0.0
    for draws in outcomes(shapes, K):
        script.start(draws)
        posterior, _ = run_recorded(model, guide, num_samples={"a": K, "b": 1})
        mean += probability(model, guide, draws) * float(posterior.evidence(log_scale=False))
        script.start({})
    return mean


def test_expected_evidence_where_particles_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact if every element chooses by itself, and not if all choose alike."""
    model, _, shapes = below_a_plate(Script())
    truth = sum(
        joint(model, {name: v[0] for name, v in values.items()}) for values in outcomes(shapes, 1)
    )
    choices = [torch.tensor([pair]) for pair in itertools.product(range(K), repeat=2)]
    means = [expected_given(choice, monkeypatch) for choice in choices]
    check_exact_mean(sum(means) / len(means), truth)
    alike = [mean for mean, choice in zip(means, choices, strict=True) if len(choice.unique()) == 1]
    with pytest.raises(AssertionError):
        check_exact_mean(sum(alike) / len(alike), truth)


def test_choices_are_equally_likely() -> None:
    """Of two draws of two elements and of both together: chi-square, alarm 1e-6."""
    model, _, _ = below_a_plate(Script())
    options = Options(num_samples=1, numbers={"a": K})
    structure = plan_of(programs_of(model, None, (), {}), options)[0].structure
    pyro.set_rng_seed(0)
    chosen = [drawing._chosen(structure)[structure.index_of["b"].symbol] for _ in range(4000)]
    assert chosen[0].shape == (1, 2)
    counts = (torch.cat(chosen) @ torch.tensor([2, 1])).bincount(minlength=4)
    check_frequencies(counts, torch.full((4,), 0.25))
    with pytest.raises(AssertionError):
        check_frequencies(counts + torch.tensor([200, -200, -200, 200]), torch.full((4,), 0.25))
