# SPDX-License-Identifier: Apache-2.0
"""What does not fit into memory: from sizes alone, before anything is allocated."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from failing import fails

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.particles import memory

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
