# SPDX-License-Identifier: Apache-2.0
"""Which latents share a particle index where nothing fits into memory; see also test_memory."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.particles import memory

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0, 1, 1, 2, 0, 2, 1, 0, 0, 2])


def chain(states: int) -> None:
    """Rows of a transition matrix in a plate, one for each state of a chain that is summed."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("states", states):
        rows: Tensor = pyro.sample("rows", dist.Dirichlet(torch.ones(states)))
        shares: Tensor = pyro.sample("shares", dist.Dirichlet(scale * torch.ones(3)))
    x: int | Tensor = 0
    for t, y in enumerate(Y):
        row = dist.Categorical(rows[x])
        x = pyro.sample(f"x_{t}", row, infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Categorical(shares[x]), obs=y)
    with pyro.plate("others", 2):
        other = pyro.sample("other", dist.Normal(0.0, scale))
        pyro.sample("z", dist.Normal(other + x, 1.0), obs=torch.zeros(2))


def test_elements_share_where_too_many_latents_choose_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain is still summed over, and latents of other plates keep indices of their own."""
    pyro.set_rng_seed(0)
    expected = MPImportance(chain, num_samples=4, shared_plates=["states"]).run(10)
    monkeypatch.setattr(memory, "default_limit", lambda device: 2**30)
    pyro.set_rng_seed(0)
    notice = r"many latents outside of plate 'states'.*sum over 'rows', 'shares' for.*shared_plates"
    with pytest.warns(MPISWarning, match=notice) as warned:
        posterior = MPImportance(chain, num_samples=4).run(10)
    assert len(warned) == 1
    torch.testing.assert_close(posterior.evidence(), expected.evidence())
    structure = posterior._sums[0].replicate.structure
    plates = {index.sites[0]: len(index.plates) for index in structure.indices}
    assert [plates[name] for name in ("rows", "shares", "other")] == [0, 0, 1]
    assert all(structure.origins[f"x_{t}"] == "enumerated" for t in range(len(Y)))
