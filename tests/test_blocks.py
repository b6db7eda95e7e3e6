# SPDX-License-Identifier: Apache-2.0
"""Sums over blocks of particles equal the sum over all of them."""

import gc
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, AutoStructured

from pyro_mpis import MPImportance
from pyro_mpis.particles import memory
from pyro_mpis.pieces import split

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([[0.3, -0.5, 1.2], [0.8, 0.1, -0.2]], dtype=torch.float64)
COUNTY = torch.tensor([0, 1, 1])


def model() -> None:
    """Three globals, two levels of plates, one plate read by index."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
    c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.8])))
    with pyro.plate("county", 2, dim=-1):
        v = pyro.sample("v", dist.Normal(a, b))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        pyro.sample("y", dist.Normal(v[..., COUNTY] + a * c, b), obs=Y)


GUIDES = {
    "prior": lambda: None,
    "AutoNormal": lambda: AutoNormal(pyro.poutine.block(model, hide=["c"])),
    "AutoStructured": lambda: AutoStructured(
        pyro.poutine.block(model, hide=["c"]),
        conditionals={"a": "normal", "b": "normal", "v": "normal"},
        dependencies={"b": {"a": "linear"}},
    ),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_every_query_is_that_of_the_whole(guide: str) -> None:
    """Given the same particles, to rounding; down to blocks of a single particle."""
    pyro.set_rng_seed(0)
    program = GUIDES[guide]()  # type: ignore[no-untyped-call]
    if program is not None:
        program()  # makes its params
    whole = None
    for limit in (None, 2_500) if program else (None, 6_000, 2_500):
        pyro.set_rng_seed(1)
        posterior = MPImportance(model, program, num_samples=4, memory_limit=limit).run()
        assert len(posterior._sums) == 1
        assert (len(posterior._sums[0].blocks) > 1) == (limit is not None)
        marginals = {
            name: {"weights": m.log_weights, "samples": m.samples}
            for name, m in posterior.marginals().items()
        }
        found = {
            "evidence": posterior.evidence(),
            **posterior.moments(),
            "product": posterior.moments(torch.mul, "a", "v"),
            "joint": posterior.marginals("a", "b", "c").weights,
            "marginals": marginals,
        }
        whole = whole or found
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize(
    ("guide", "num_samples"), [("prior", 4), ("prior", 7), ("AutoNormal", 4), ("AutoStructured", 7)]
)
def test_factors_evaluated_in_pieces_are_those_of_the_whole(
    guide: str, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put together, they are one block: the same factors, and no part of it evaluated again."""
    pyro.set_rng_seed(0)
    program = GUIDES[guide]()  # type: ignore[no-untyped-call]
    if program is not None:
        program()  # makes its params
    graphs = []
    for piece in (2**24, 2000):
        monkeypatch.setattr(memory, "PIECE_BYTES", piece)
        monkeypatch.setattr(memory, "MORE_WORK", 1e9)
        pyro.set_rng_seed(1)
        posterior = MPImportance(model, program, num_samples=num_samples).run()
        (total,) = posterior._sums
        assert len(total.blocks) == 1
        assert bool(total.replicate.plan.cut.pieces) == (piece == 2000)
        graphs.append(total.whole)
    whole, pieces = graphs
    assert pieces.sizes == whole.sizes
    for factor, same in zip(pieces.factors, whole.factors, strict=True):
        assert (factor.name, factor.dims, factor.plates) == (same.name, same.dims, same.plates)
        torch.testing.assert_close(factor.tensor, same.tensor, rtol=1e-12, atol=1e-12)
    for name, value in pieces.values.items():
        torch.testing.assert_close(value.tensor, whole.values[name].tensor)


def test_pieces_are_not_cut_where_most_of_the_work_would_be_done_again() -> None:
    """Two factors are large, and what one of them reads is not read by the other."""

    def local(number: int) -> None:
        with pyro.plate("inner", 3000):
            for n in range(number):
                v = pyro.sample(f"v_{n}", dist.Normal(0.0, 1.0))
                w = pyro.sample(f"w_{n}", dist.Normal(0.0, 1.0))
                pyro.sample(f"y_{n}", dist.Normal(v + w, 1.0), obs=torch.zeros(3000))

    two = MPImportance(local, num_samples=40).run(2)
    assert not two._sums[0].replicate.plan.cut.pieces
    one = MPImportance(local, num_samples=40).run(1)
    assert one._sums[0].replicate.plan.cut.pieces


def test_indices_inside_of_plates_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of whole supports, and those that are read by an index array, too."""
    county = torch.tensor([0, 2, 1, 2, 2, 0])

    def program() -> None:
        with pyro.plate("county", 3):
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(torch.ones(8)), infer={"enumerate": "parallel"})
        with pyro.plate("house", 6):
            loc = v[county] + 0.2 * c[county]
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.arange(6.0))

    results = []
    for size in (memory.PIECE_BYTES, 400):
        monkeypatch.setattr(memory, "PIECE_BYTES", size)
        pyro.set_rng_seed(0)
        results.append(MPImportance(program, num_samples=12).run())
    whole, pieces = results
    plan = pieces._sums[0].replicate.plan
    structure = plan.structure
    assert {"v", "c"} <= {n for s in plan.cut.pieces for n in structure.by_symbol[s].sites}
    torch.testing.assert_close(pieces.evidence(), whole.evidence())
    torch.testing.assert_close(pieces.moments(), whole.moments())


def test_groups_are_cut_together() -> None:
    results = []
    for limit in (None, 10_000):
        pyro.set_rng_seed(1)
        options = {"groups": [("a", "b")], "memory_limit": limit}
        posterior = MPImportance(model, num_samples=11, **options).run()  # type: ignore[arg-type]
        results.append(posterior)
    whole, blocked = results
    assert len(blocked._sums[0].blocks) > 1
    assert blocked.marginals("a", "b").samples.shape == (11, 2)
    torch.testing.assert_close(blocked.evidence(), whole.evidence())
    torch.testing.assert_close(blocked.marginals("a", "b").mean, whole.marginals("a", "b").mean)
    torch.testing.assert_close(blocked.moments()["v"], whole.moments()["v"])


def test_samples_have_the_moments() -> None:
    """Means over joint draws from all blocks, within 6 standard errors, at a fixed seed."""
    pyro.set_rng_seed(1)
    posterior = MPImportance(model, num_samples=6, memory_limit=10_000).run()
    draws = posterior.sample(20_000)
    assert draws["c"].dtype == torch.long
    for site, mean in posterior.moments().items():
        values = draws[site].double()
        error = values.std(0) / math.sqrt(20_000)
        assert bool(((values.mean(0) - mean).abs() <= 6 * error + 1e-9).all()), site
    product = (draws["a"][:, None] * draws["v"]).mean(0)
    spread = (draws["a"][:, None] * draws["v"]).std(0) / math.sqrt(20_000)
    exact = posterior.moments(torch.mul, "a", "v")
    assert bool(((product - exact).abs() <= 6 * spread).all())
    halves = draws["a"][:10_000].mean(), draws["a"][10_000:].mean()
    assert abs(float(halves[0] - halves[1])) < 12 * float(draws["a"].std()) / 100.0


def test_no_piece_of_several_has_a_single_particle() -> None:
    """Dims of size one would not tell whether a factor has them."""
    for whole in range(2, 12):
        for size in range(1, whole + 1):
            pieces = [len(range(whole)[part["a"]]) for part in split({"a": whole}, {"a": size}, 2)]
            assert sum(pieces) == whole
            assert min(pieces) >= 2


def test_blocks_cover_all_particles_once() -> None:
    blocks = split({"a": 7, "b": 3}, {"a": 3, "b": 2})
    seen = [
        (i, j) for ranges in blocks for i in range(7)[ranges["a"]] for j in range(3)[ranges["b"]]
    ]
    assert sorted(seen) == [(i, j) for i in range(7) for j in range(3)]
    assert split({"a": 7}, {}) == ({},)


def test_no_block_is_small_enough() -> None:
    with pytest.raises(MemoryError, match=r"site 'v'.*v: 7.*memory_limit.*groups"):
        MPImportance(model, num_samples=7, memory_limit=300).run()


@pytest.mark.parametrize("memory_limit", [0, -5, True])
def test_limit_that_makes_no_sense(memory_limit: int) -> None:
    with pytest.raises(ValueError, match="memory_limit: expected a positive number of bytes"):
        MPImportance(model, num_samples=7, memory_limit=memory_limit)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_it_was(enabled: bool) -> None:
    """Whether a run ends or fails; and it pauses while a model runs in one part."""
    seen = []

    def watched(scale: float) -> None:
        seen.append(gc.isenabled())
        pyro.sample("x", dist.Normal(0.0, scale))

    try:
        (gc.enable if enabled else gc.disable)()
        MPImportance(watched, num_samples=4).run(1.0)
        assert gc.isenabled() == enabled
        assert not any(seen)
        with pytest.raises(ValueError, match="scale"):
            MPImportance(watched, num_samples=4).run(-1.0)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("memory_limit", [None, 10_000])
def test_garbage_is_collected_during_work_in_many_parts(memory_limit: int | None) -> None:
    """Lest cycles of the user's pile up; it pauses while all is taken at once."""
    seen = []

    def watched() -> None:
        seen.append(gc.isenabled())
        model()

    MPImportance(watched, num_samples=7, memory_limit=memory_limit).run()
    assert not seen[0], "the plain run"
    assert len(seen) > 2
    in_parts = memory_limit is not None
    assert all(enabled == in_parts for enabled in seen[1 + in_parts :])  # less the run to measure


def test_enumerated_globals_are_never_cut() -> None:
    """A block's sum is over all of their values: particles are cut in their place."""

    def program() -> None:
        c = pyro.sample("c", dist.Categorical(torch.ones(6)), infer={"enumerate": "parallel"})
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(a + 0.3 * c, 1.0), obs=torch.arange(5.0))

    def alone() -> None:
        c = pyro.sample("c", dist.Categorical(torch.ones(6)), infer={"enumerate": "parallel"})
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(0.3 * c, 1.0), obs=torch.arange(5.0))

    results = []
    for limit in (None, 1200):  # two particles of a, and all values of c
        pyro.set_rng_seed(0)
        results.append(MPImportance(program, num_samples=5, memory_limit=limit).run())
    whole, blocked = results
    structure = blocked._sums[0].replicate.structure
    cut = blocked._sums[0].replicate.plan.cut
    assert {*cut.blocks} == {structure.index_of["a"].symbol}
    torch.testing.assert_close(blocked.evidence(), whole.evidence())
    torch.testing.assert_close(blocked.moments(), whole.moments())
    with pytest.raises(MemoryError, match=r"site 'y'.*c: 6.*plate data: 5"):
        MPImportance(alone, num_samples=5, memory_limit=3 * 8 * 5 * 6 - 1).run()
    log_prob = dist.Normal(0.3 * torch.arange(6.0).unsqueeze(-1), 1.0).log_prob(torch.arange(5.0))
    evidence = MPImportance(alone, num_samples=5, memory_limit=2500).run().evidence()
    torch.testing.assert_close(evidence, log_prob.sum(-1).exp().mean().log())


def test_nothing_is_cut_that_fits() -> None:
    assert memory.Cut({}, {}).whole
    assert not memory.Cut({}, {"a": 2}).whole
    assert not memory.Cut({"a": 2}, {}).whole


@pytest.mark.parametrize("size", [1, 2])
def test_draws_where_a_latent_switches_between_elements(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a block of a single particle, as of the last of five, it decides nothing."""

    def switching() -> None:
        tau = pyro.sample("tau", dist.Normal(0.0, 1.0))
        with pyro.plate("county", 2):
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
        with pyro.plate("house", 3):
            loc = torch.where(tau > 0, v[COUNTY], v[1 - COUNTY])
            pyro.sample("y", dist.Normal(loc, 0.5), obs=Y[0])

    pyro.set_rng_seed(0)
    whole = MPImportance(switching, num_samples=5).run()
    monkeypatch.setattr(memory, "fit", lambda structure, *_: memory.Cut({"a": size}, {}))
    pyro.set_rng_seed(0)
    posterior = MPImportance(switching, num_samples=5).run()
    assert len(posterior._sums[0].blocks) == math.ceil(5 / size)
    torch.testing.assert_close(posterior.evidence(), whole.evidence())
    draws, means = posterior.sample(20_000), whole.moments()
    for site, mean in means.items():
        error = draws[site].std(0) / math.sqrt(20_000)
        assert bool(((draws[site].mean(0) - mean).abs() <= 6 * error).all()), site


@pytest.mark.parametrize("cut", [{"b": 2, "c": 2}, {"b": 2, "c": 3, "e": 2}, {"a": 3, "d": 2}])
def test_pieces_of_uneven_sizes(cut: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a factor's dims depends on which indices have as many particles."""

    def chain() -> None:
        x = torch.tensor(0.0)
        for step in range(6):
            x = pyro.sample(f"x_{step}", dist.Normal(x, 1.0))
            pyro.sample(f"y_{step}", dist.Normal(x, 1.0), obs=torch.tensor(0.1 * step))

    pyro.set_rng_seed(0)
    whole = MPImportance(chain, num_samples=5).run()
    monkeypatch.setattr(memory, "fit", lambda *_: memory.Cut({}, cut))
    pyro.set_rng_seed(0)
    pieces = MPImportance(chain, num_samples=5).run()
    torch.testing.assert_close(pieces.evidence(), whole.evidence())
    torch.testing.assert_close(pieces.moments(), whole.moments())
