# SPDX-License-Identifier: Apache-2.0
"""What does not fit into memory: from sizes alone, before anything is allocated."""

from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from failing import fails

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.options import Options
from pyro_mpis.particles import memory
from pyro_mpis.particles.sizing import Sizing
from pyro_mpis.planning import Plan, plan_of, structure_of
from pyro_mpis.programs.runs import Programs

LIMIT = 2**20  # bytes


def total_of(number: int, plate: int = 1) -> None:
    """Observe the sum of many latents."""
    total = torch.tensor(0.0)
    for i in range(number):
        total = total + pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
    with pyro.plate("p", plate):
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.zeros(plate))


def test_a_factor_of_many_latents_names_some() -> None:
    match = r"(z_\d+: 50, ){6}and 14 more: .*split the site"
    fails(MemoryError, match, partial(total_of, 20), K=50, memory_limit=LIMIT)


def test_more_latents_in_a_factor_than_a_tensor_has_dims() -> None:
    match = r"site 'y': its log_prob has.*and 64 more.*groups"
    fails(MemoryError, match, partial(total_of, 70), memory_limit=LIMIT)


def test_too_much_memory() -> None:
    match = r"site 'y': its log_prob has one element for each.*z_0: 100.*p: 2.*groups"
    fails(MemoryError, match, partial(total_of, 6, 2), K=100, memory_limit=LIMIT)


@pytest.mark.usefixtures("float64")
def test_latents_share_an_index_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the largest factor reads, where the user has set no limit."""
    groups = [("z_0", "z_1")]
    message = r"too many latents are read together.*'z_0', 'z_1' share particle indices.*groups="
    model = partial(total_of, 4)
    posterior, _ = compare(model, num_samples=4, groups=groups)
    monkeypatch.setattr(memory, "default_limit", lambda device: 5000)  # bytes
    monkeypatch.setattr(memory, "MAX_BLOCKS", 1)
    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=message):
        shared = MPImportance(model, num_samples=4).run()
    indices = shared._sums[0].replicate.structure.indices
    assert [index.sites for index in indices] == [("z_0", "z_1"), ("z_2",), ("z_3",)]
    torch.testing.assert_close(shared.evidence(), posterior.evidence())


def logits(num_sites: int = 0, side: int = 500) -> None:
    """Compute more than a density holds, before the site; and read other latents elsewhere."""
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    for i in range(num_sites):
        z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=torch.tensor(0.3))
    x = torch.linspace(-1.0, 1.0, 50 * side).reshape(50, side)
    with pyro.plate("n", 50):
        fn = dist.Categorical(logits=a * x + b * x**2)
        pyro.sample("y", fn, obs=torch.zeros(50).long())


@pytest.mark.parametrize("number", [1, 1000])
def test_what_programs_hold_is_measured_where_it_may_matter(number: int) -> None:
    """It may be 512 tensors of the size of what a distribution holds, or a read that was missed."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.MultivariateNormal(z * torch.ones(20), torch.eye(20)), obs=zeros)

    zeros = torch.zeros(20)
    structure = structure_of(Programs(model, lambda: None), Options(num_samples=number))
    held = 8 * 20 * 20 * number  # bytes of its matrices alone, in float64
    largest = held * max(512, 3 * number)
    assert memory.is_worth_measuring(structure, {"a": number}, largest // 2)
    assert not memory.is_worth_measuring(structure, {"a": number}, 3 * largest)
    assert not memory.is_worth_measuring(structure, {"a": number}, None)


def planned(model: Callable[[], None], number: int, limit: int) -> tuple[Plan, Sizing]:
    programs = Programs(model, lambda: None)
    plan, _, _ = plan_of(programs, Options(num_samples=number, memory_limit=limit))
    return plan, Sizing(plan.structure, plan.footprint, plan.device)


def test_pieces_leave_room_for_holes_of_the_heap() -> None:
    """Where there were none: peaks were up to 2.7 times what pieces of all of the limit take."""
    limit = 64 * 2**20
    plan, sizing = planned(logits, 100, limit)
    whole = plan.structure.num_particles
    assert sizing.evaluation(whole).bytes > 2**30
    assert not plan.cut.blocks
    assert sizing.evaluation({**whole, **plan.cut.pieces}).bytes < limit / 2


def test_pieces_are_cut_along_what_the_largest_tensor_reads() -> None:
    plan, sizing = planned(partial(logits, 3), 30, 64 * 2**20)
    a, b = (plan.structure.index_of[name].symbol for name in "ab")
    assert sizing.largest_tensor(plan.structure.num_particles).symbols == {a, b}
    assert sizing.evaluation(plan.structure.num_particles).symbols == {a, b}
    assert plan.cut.pieces.keys() <= {a, b}


def mixture() -> None:
    """A site that reads one latent more than its largest tensors do."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    probs = torch.softmax(a * b * torch.linspace(-1.0, 1.0, 300) * torch.ones(4, 1), -1)
    with pyro.plate("n", 60):
        components = dist.Categorical(probs.expand(60, 4, 300))
        fn = dist.MixtureSameFamily(dist.Categorical(weights), components)
        pyro.sample("y", fn, obs=torch.zeros(60).long())


def test_pieces_are_not_cut_where_it_saves_little() -> None:
    """They were 900, as the weights were cut first: a run took nine times as long as now."""
    plan, sizing = planned(mixture, 30, 50 * 10**6)
    whole = plan.structure.num_particles
    sizes = {**whole, **plan.cut.pieces}
    assert plan.structure.index_of["weights"].symbol not in plan.cut.pieces
    assert sizing.evaluation(sizes).bytes < 25 * 10**6
    assert memory.number_of_parts(whole, sizes) <= 100


def test_programs_of_many_sites_do_not_run_for_small_pieces() -> None:
    """Each run of theirs takes longer than what it would save."""
    for num_sites, least, most in ((0, 10, 100), (40, 1, 4)):
        plan, _ = planned(partial(logits, num_sites, 50), 100, 2**30)
        whole = plan.structure.num_particles
        parts = memory.number_of_parts(whole, {**whole, **plan.cut.pieces})
        assert least <= parts <= most, num_sites
