# SPDX-License-Identifier: Apache-2.0
"""Densities at combinations that mix the elements of plates find code that mixes elements."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from compared import compare

from pyro_mpis.particles.mixtures import _telling_apart

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([-0.2, -1.1, 0.4])


@pytest.mark.parametrize(
    ("elements", "size", "rows"), [(3, 3, 1), (8, 2, 3), (9, 3, 2), (50, 7, 4)]
)
def test_rows_tell_any_two_elements_apart(elements: int, size: int, rows: int) -> None:
    for seed in range(20):
        chosen = _telling_apart(elements, size, rows, torch.Generator().manual_seed(seed))
        assert chosen.shape == (rows, elements)
        assert 0 <= int(chosen.min()) <= int(chosen.max()) < size
        for one, other in itertools.combinations(chosen.unbind(-1), 2):
            assert bool((one != other).any())


def test_more_rows_are_numbered_anew() -> None:
    """A pair is told apart in about one in two rows, in place of one row of eight."""
    chosen = _telling_apart(200, 2, 64, torch.Generator().manual_seed(0))
    differ = (chosen[:, 0] != chosen[:, 1]).sum()
    assert 8 < int(differ) < 56  # false alarm 1e-9 for coins
    assert bool((_telling_apart(5, 1, 4, torch.Generator()) == 0).all())


@pytest.mark.parametrize("num_samples", [2, 3, 4])
@pytest.mark.parametrize("order", [[0, 2, 1], [2, 1, 0], [1, 0, 2], [1, 2, 0]])
def test_permuted_elements_share(num_samples: int, order: list[int]) -> None:
    """Every exchange of two elements is found, whichever particles the check happens to take."""

    def model() -> None:
        with pyro.plate("p", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z[order], 1.0), obs=Y)
        with pyro.plate("q", 3):
            pyro.sample("x", dist.Normal(z[torch.tensor([0, 2, 2])], 1.0), obs=Y)

    posterior = compare(model, None, num_samples)
    assert posterior._sums[0].replicate.structure.shared == {"z": ("p",)}


@pytest.mark.parametrize("num_samples", [2, 3])
def test_whole_plate_read_outside_of_it(num_samples: int) -> None:
    """A factor without plates, of an index that has some."""

    def model() -> None:
        with pyro.plate("p", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)
        pyro.sample("x", dist.Normal(z.norm(), 1.0), obs=Y[0])

    posterior = compare(model, None, num_samples)
    assert posterior._sums[0].replicate.structure.shared == {"z": ("p",)}
