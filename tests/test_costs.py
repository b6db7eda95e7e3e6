# SPDX-License-Identifier: Apache-2.0
"""What a run would take, said before it is run."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from peaks import change, effects

from pyro_mpis import MPImportance
from pyro_mpis import costs as module
from pyro_mpis.costs import Machine
from pyro_mpis.factor_graph.sizes import Shape, Shapes, contraction_of
from pyro_mpis.run_plan import RunPlan

MEASURED = module._machine


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice is that for one machine, whatever runs beside the tests."""
    machine = Machine(byte=3e-10, multiplication=1e-10, sum=4e-9, run=3e-3)
    monkeypatch.setattr(module, "_machine", lambda *_: machine)


def plan_of(model: object, num_samples: int = 10, **options: object) -> RunPlan:
    sampler = MPImportance(model, num_samples=num_samples, **options)  # type: ignore[arg-type]
    return sampler.plan()


def test_entries_are_those_of_the_factors() -> None:
    """Counted by hand: y reads three latents at 100 times, each latent itself."""
    for cost in plan_of(change).costs:
        k = cost.num_samples
        assert cost.entries == 100 * k**3 + 3 * k


def test_costs_grow_with_the_number_of_particles() -> None:
    plan = plan_of(effects, 20)
    assert [cost.num_samples for cost in plan.costs] == [10, 20, 30, 100, 300, 1000]
    for quantity in ("entries", "memory", "seconds"):
        values = [getattr(cost, quantity) for cost in plan.costs]
        assert values == sorted(values)
        assert values[0] > 0


def test_numbers_of_particles_that_are_given() -> None:
    """By hand: y reads three latents at 100 times, each latent itself."""
    plan = MPImportance(change, num_samples={"before": 40, None: 5}, num_replicates=8).plan()
    assert plan.given is not None
    assert plan.given.entries == 100 * 40 * 5 * 5 + 40 + 5 + 5
    text = " ".join(str(plan).split())
    assert "with the numbers of particles given: 1.0e+05 entries" in text
    assert "all of this is for one replicate; there are 8" in text
    alike = plan_of(change, 5)
    assert alike.given is None
    assert "given" not in str(alike)
    assert "replicate" not in str(alike)


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_machine", MEASURED)
    assert all(cost.seconds > 0 for cost in plan_of(effects).costs)


def test_nothing_is_drawn_and_nothing_changes() -> None:
    pyro.set_rng_seed(0)
    expected = torch.rand(3)
    pyro.set_rng_seed(0)
    sampler = MPImportance(change, num_samples=10)
    sampler.plan()
    torch.testing.assert_close(torch.rand(3), expected)
    assert not pyro.get_param_store().keys()
    with pytest.raises(RuntimeError, match=r"call \.run"):
        sampler.evidence()


def test_globals_that_meet_in_a_message_are_to_be_grouped() -> None:
    """Each effect's location with its scale: the message over five globals is of three then."""
    plan = plan_of(effects)
    assert plan.advice[0].groups == (("loc_0", "spread_0"), ("loc_1", "spread_1"))
    names = ("loc_0", "loc_1", "spread_0", "spread_1", "noise")
    assert all(name in plan.largest for name in names)
    assert "groups=[('loc_0', 'spread_0'), ('loc_1', 'spread_1')]" in str(plan)


def test_globals_that_one_site_reads_are_to_be_one_group_of_many_particles() -> None:
    (advice,) = plan_of(change).advice
    assert advice.groups == (("at", "before", "after"),)
    assert advice.num_samples is not None
    assert advice.num_samples > 10_000


def test_what_has_few_values_is_to_be_summed() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    assert plan_of(model).advice[-1].enumerate == ("z",)


def test_advice_can_be_followed() -> None:
    """Its options are those of the class, and what they take is less."""
    plan = plan_of(effects)
    grouped = plan_of(effects, groups=plan.advice[0].groups)
    for cost, less in zip(plan.costs, grouped.costs, strict=True):
        assert less.memory < cost.memory
        assert less.seconds <= cost.seconds


def test_a_run_that_does_not_fit_says_what_would() -> None:
    match = r"(?s)memory_limit.*K +entries.*largest: .*groups=\[\('loc_0', 'spread_0'\)"
    with pytest.raises(MemoryError, match=match):
        MPImportance(effects, num_samples=100, memory_limit=2**26).run()


def test_programs_that_run_once_for_each_particle() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(1.0 if x > 0 else -1.0, 1.0), obs=torch.tensor(0.3))

    plan = plan_of(model)
    assert plan.costs == ()
    assert "once for each particle" in str(plan)


def test_a_message_is_larger_than_the_factors() -> None:
    """a - x - b and c - x - d: what is left of x has all four, and its sum one multiplication."""
    sizes = {**dict.fromkeys("abcdx", 10), "y": 7}
    plates = {**dict.fromkeys("abcd", frozenset[str]()), "x": frozenset("y")}
    factors = [Shape(dims, dims, frozenset("y"), 4) for dims in ("abxy", "cdxy")]
    factors += [Shape(symbol, symbol, frozenset(), 4) for symbol in "abcd"]
    found = contraction_of(Shapes(tuple(factors), sizes, plates))
    assert found is not None
    assert found.work == 7 * 10**5
    assert found.largest.bytes == 7 * 10**4 * 4
    assert set(found.largest.dims) == set("abcdy")
    assert found.forward >= 7 * 10**4 * 4 + 10**4 * 8, "the message, and its product over y"


def test_products_of_matrices_also_pass_over_their_entries() -> None:
    """A loop of four: in small matrices that takes as long as the multiplications."""
    sizes = {"a": 100, "b": 200, "c": 300, "d": 50}
    factors = tuple(Shape(dims, dims, frozenset(), 8) for dims in ("ab", "bc", "cd", "da"))
    index_plates = dict.fromkeys("abcd", frozenset[str]())
    found = contraction_of(Shapes(factors, sizes, index_plates))
    assert found is not None
    assert found.work == 200 * 300 * 50 + 100 * 200 * 50, "c is summed out first, then b"
    of_products = (200 * 300 + 300 * 50 + 200 * 50) + (100 * 200 + 200 * 50 + 100 * 50)
    assert found.sums == of_products + 100 * 50 + 1


def test_sizes_beyond_any_machine() -> None:
    symbols = [chr(number) for number in range(200, 300)]
    factors = (Shape("all", "".join(symbols), frozenset(), 4),)
    index_plates = dict.fromkeys(symbols, frozenset[str]())
    found = contraction_of(Shapes(factors, dict.fromkeys(symbols, 1000), index_plates))
    assert found is not None
    assert found.needed > 10**300


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_programs_with_transforms_of_their_own(transform: str) -> None:
    """They are as the same program without."""

    def program(transformed: bool) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        rows = torch.arange(12.0).reshape(4, 3)
        if transform == "vmap":
            loc = torch.func.vmap(torch.dot, (0, None))(rows, w) if transformed else rows @ w
        else:
            loc = torch.func.grad(lambda x: (x**2).sum())(w) if transformed else 2.0 * w
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=torch.ones_like(loc.detach()))

    plain, own = (plan_of(lambda b=b: program(b)) for b in (False, True))
    assert [cost.entries for cost in own.costs] == [cost.entries for cost in plain.costs]
    for one, other in zip(own.costs, plain.costs, strict=True):
        assert 0.5 < one.memory / other.memory < 2.0, "but for temporaries"


def test_a_group_in_a_plate() -> None:
    """Its proposal is the first of the largest factors."""

    def model() -> None:
        with pyro.plate("data", 3):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3))

    plan = plan_of(model, groups=[("x", "z")])
    assert plan.largest == "the proposal of 'x', 'z', for each combination of 'x', 'z'"
    assert plan.costs[0].entries == 3 * 10 * 3
    with pytest.raises(MemoryError, match="the proposal of 'x', 'z'"):
        MPImportance(model, num_samples=10, groups=[("x", "z")], memory_limit=1000).run()
