# SPDX-License-Identifier: Apache-2.0
"""The static structure of programs: plates, what sites read, indices and their levels."""

import itertools
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from models import random_case
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.options import Options
from pyro_mpis.planning import plan_of, programs_of
from pyro_mpis.programs.structure import UNIQUE_LEVELS, Structure, levels_of

pytestmark = pytest.mark.usefixtures("float64")

Program = Callable[..., object]


def structure_of(model: Program, guide: Program | None = None, **options: object) -> Structure:
    wanted = Options(num_samples=3, **options)  # type: ignore[arg-type]
    return plan_of(programs_of(model, guide, (), {}), wanted)[0].structure


def names(structure: Structure, symbols: frozenset[str]) -> set[str]:
    """The names of plates."""
    return {structure.plates[symbol].name for symbol in symbols}


def indices(structure: Structure) -> dict[tuple[str, ...], set[str]]:
    """The sites of each index, and the plates that it sits in."""
    return {index.sites: names(structure, index.plates) for index in structure.indices}


# Programs.


def hierarchy() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("school", 3):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.deterministic("double", 2 * theta)
        with pyro.plate("year", 2):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.zeros(2, 3))


def test_plates_and_reads() -> None:
    structure = structure_of(hierarchy)
    plates = {plate.name: (plate.dim, plate.size) for plate in structure.plates.values()}
    assert plates == {"school": (-1, 3), "year": (-2, 2)}
    assert structure.max_plate_nesting == 2
    assert structure.origins == {"mu": "prior", "theta": "prior"}
    assert {name: set(site.reads) for name, site in structure.model.items()} == {
        "mu": set(),
        "theta": {"mu"},
        "double": {"theta"},
        "y": {"theta"},
    }
    assert [name for name, site in structure.model.items() if site.silent] == ["double"]
    assert indices(structure) == {("mu",): set(), ("theta",): {"school"}}
    y = structure.model["y"]
    assert names(structure, y.plates) == {"school", "year"}
    assert (y.batch_shape, y.event_dim, y.undeclared) == ((2, 3), 0, ())
    assert structure.elements(y) == 6
    theta = structure.index_of["theta"]
    assert structure.indices_read(y) == {theta.symbol}
    assert structure.num_particles == {index.symbol: 3 for index in structure.indices}


def test_sites_of_a_guide() -> None:
    """Drawn there, carried by what a Delta was computed from, or left to the prior."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Normal(b, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(a + c + z, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        b = pyro.sample("b", dist.Normal(0.0, 1.2))
        pyro.sample("a", dist.Delta(u + b))

    structure = structure_of(model, guide)
    assert structure.origins == {
        "a": "guide_delta",
        "b": "guide",
        "c": "prior",
        "z": "enumerated",
    }
    assert structure.carried == ("a",)
    assert structure.guide["a"].reads == {"u", "b"}
    assert indices(structure) == {("u",): set(), ("b",): set(), ("c",): set(), ("z",): set()}
    assert structure.index_of["z"].support == 2
    assert structure.index_of["z"].enumerated
    assert structure.model["y"].reads == {"u", "b", "c", "z"}
    grouped = structure_of(model, guide, groups=(("b", "c"),))
    assert list(indices(grouped)) == [("u",), ("b", "c"), ("z",)]


def test_plate_without_a_size() -> None:
    """Its size is that of the sites in it."""

    def model(sized: bool) -> None:
        with pyro.plate("data", 3) if sized else pyro.plate("data", dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(3))

    structure = structure_of(lambda: model(False))
    assert [(p.name, p.size) for p in structure.plates.values()] == [("data", 3)]
    assert indices(structure) == {("z",): {"data"}}
    evidences = []
    for sized in (True, False):
        pyro.set_rng_seed(0)
        evidences.append(MPImportance(model, num_samples=4).run(sized).evidence())
    torch.testing.assert_close(*evidences)


def test_plate_of_size_one_is_none() -> None:
    def model() -> None:
        with pyro.plate("one", 1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(1))

    structure = structure_of(model)
    assert not structure.plates
    assert indices(structure) == {("z",): set()}


GROUP = torch.tensor([0, 1, 1, 2])


def without_its_plate() -> None:
    with pyro.plate("group", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(a[..., GROUP], s), obs=torch.arange(4.0))


def test_undeclared_dims_of_an_observation_are_plates_where_it_reads_plated_latents() -> None:
    """Each element reads one of the plate's: exact, and there is nothing to be told."""
    structure = structure_of(without_its_plate)
    y = structure.model["y"]
    assert y.undeclared == (-1,)
    assert names(structure, y.implicit) == {"y[-1]"}
    assert y.factor_plates == y.implicit
    assert structure.summed_dims(y) == []
    assert structure.undeclared == {}
    compare(without_its_plate, num_samples=3)


def test_undeclared_dims_that_read_no_plate_are_summed() -> None:
    def model() -> None:
        with pyro.plate("group", 3):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        pyro.sample("y", dist.Normal(0.0, s), obs=torch.arange(4.0))

    structure = structure_of(model)
    assert not structure.model["y"].implicit
    assert structure.summed_dims(structure.model["y"]) == [-1]
    assert structure.undeclared == {"y": (4,)}


def test_dims_are_counted_with_those_that_are_undeclared() -> None:
    """Particles are drawn left of all batch dims, not only of the plates."""

    def model() -> None:
        pyro.sample("a", dist.Normal(torch.zeros(2, 3, 4), 1.0))
        with pyro.plate("p", 2):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    structure = structure_of(model)
    assert structure.max_plate_nesting == 3
    assert structure.shared_dim == -4
    assert structure_of(model, max_plate_nesting=5).max_plate_nesting == 5


# Indices that elements of a plate share.


def nested() -> None:
    outer, inner = pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1)
    with outer:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        with inner:
            pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    with inner:
        pyro.sample("c", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("plates", "expected"),
    [
        ({"inner"}, {"a": {"outer"}, "b": {"outer"}, "z": {"outer"}, "c": set()}),
        ({"outer"}, {"a": set(), "b": {"inner"}, "z": {"inner"}, "c": {"inner"}}),
        ({"outer", "inner"}, {"a": set(), "b": set(), "z": set(), "c": set()}),
    ],
)
def test_shared_plates(plates: set[str], expected: Mapping[str, set[str]]) -> None:
    before = structure_of(nested)
    assert before.index_of["z"].enumerated
    after = structure_of(nested, shared_plates=tuple(plates))
    for name, left in expected.items():
        index = after.index_of[name]
        assert names(after, index.plates) == left
        given_up = names(before, before.index_of[name].plates) - left
        assert set(after.shared.get(name, ())) == given_up
    assert not after.index_of["z"].enumerated
    assert after.origins["z"] == "prior"
    assert after.plates == before.plates


def test_sharing_leaves_other_indices_alone() -> None:
    before = structure_of(nested)
    symbol = before.index_of["b"].symbol
    inner = frozenset(s for s, plate in before.plates.items() if plate.name == "inner")
    after = before.sharing(frozenset(symbol), inner)
    assert names(after, after.index_of["b"].plates) == {"outer"}
    for name in ("a", "c", "z"):
        assert after.index_of[name] == before.index_of[name]
    assert after.shared == {"b": ("inner",)}


# Levels.


def check_levels(structure: Structure, sizes: Mapping[str, int]) -> list[list[str]]:
    """Every index is on one level; those of a level have one size and are never read together."""
    levels = levels_of(structure, sizes)
    assert sorted(itertools.chain(*levels)) == sorted(index.symbol for index in structure.indices)
    level_of = {symbol: number for number, level in enumerate(levels) for symbol in level}
    for level in levels:
        assert len({sizes[symbol] for symbol in level}) == 1
    for site in (*structure.model.values(), *structure.guide.values()):
        read = structure.indices_read(site)
        assert len({level_of[symbol] for symbol in read}) == len(read)
    return levels


def chain(length: int) -> Program:
    def model() -> None:
        x: Tensor = torch.tensor(0.0)
        for i in range(length):
            x = pyro.sample(f"x_{i}", dist.Normal(x, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(x, 1.0), obs=torch.tensor(0.0))

    return model


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 30])
def test_levels_of_a_chain(length: int) -> None:
    """Few indices have a level each; many share two."""
    structure = structure_of(chain(length))
    levels = check_levels(structure, structure.num_particles)
    assert len(levels) == (length if length <= UNIQUE_LEVELS else 2)


def test_levels_of_other_sizes() -> None:
    """Of enumerated sites, and of a block that is smaller."""

    def model() -> None:
        for i in range(6):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})

    structure = structure_of(model)
    sizes = structure.num_particles
    assert [len(level) for level in check_levels(structure, sizes)] == [6, 1]
    first = structure.index_of["x_0"].symbol
    assert [len(level) for level in check_levels(structure, {**sizes, first: 4})] == [1, 5, 1]
    assert [len(level) for level in check_levels(structure, {**sizes, first: 2})] == [2, 5]


@pytest.mark.parametrize("seed", range(40))
def test_levels_of_random_programs(seed: int) -> None:
    case = random_case(seed)
    structure = structure_of(case.model, case.guide)
    check_levels(structure, structure.num_particles)


def test_many_latents_of_one_site_have_a_level_each() -> None:
    def model() -> None:
        total = sum(pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0)) for i in range(7))
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(0.0))

    structure = structure_of(model)
    assert len(check_levels(structure, structure.num_particles)) == 7
    compare(model, num_samples=2)


def test_proposals_count_for_levels() -> None:
    """What the guide reads together is on different levels too."""

    def model() -> None:
        for i in range(6):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))

    def guide() -> None:
        x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
        for i in range(1, 6):
            pyro.sample(f"x_{i}", dist.Normal(0.5 * x, 1.0))

    structure = structure_of(model, guide)
    levels = check_levels(structure, structure.num_particles)
    assert [structure.index_of["x_0"].symbol] in levels
    assert len(levels) == 2
    compare(model, guide, num_samples=2)
