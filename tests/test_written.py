# SPDX-License-Identifier: Apache-2.0
"""Programs that write latents into tensors: each keeps a particle index of its own."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_mpis import AutoPlateNormal, MPImportance, MPISWarning
from pyro_mpis.programs import written
from pyro_mpis.programs.mapped import run_mapped
from pyro_mpis.programs.tensors import unwrapped

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0.3, -0.5, 1.2], dtype=torch.double)
MISSING = torch.tensor([False, True, True])
KNOWN = torch.tensor([0.3, 0.0, 0.0], dtype=torch.double)


def scalars(number: int) -> list[Tensor]:
    return [pyro.sample(f"x_{n}", dist.Normal(0.0, 1.0)) for n in range(number)]


def observe(loc: Tensor) -> None:
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)


def one_by_one() -> None:
    loc = torch.zeros(3)
    for n, x in enumerate(scalars(3)):
        loc[n] = x
    observe(loc.cumsum(0))


def summed() -> None:
    total = torch.zeros(())
    for x in scalars(3):
        total += x
    pyro.sample("y", dist.Normal(total, 1.0), obs=Y[0])


def from_zero() -> None:
    """The first sum is a tensor of the first latent alone."""
    total = 0
    for x in scalars(2):
        total += x  # type: ignore[assignment]
    pyro.sample("y", dist.Normal(total, 1.0), obs=Y[0])


def chained() -> None:
    """What is written has been read from another tensor that is written into."""
    first, second = torch.zeros(2), torch.empty(3)
    x, z = scalars(2)
    first[0] = x
    second[:2] = first
    second[2] = z
    second.mul_(first.sum())
    observe(second)


def through_views() -> None:
    """Rows and diagonals are written, and the matrix is read."""
    matrix = torch.zeros(2, 2)
    row = matrix[1]
    row[0] = pyro.sample("x", dist.Normal(0.0, 1.0))
    torch.diagonal(matrix).add_(pyro.sample("scale", dist.LogNormal(0.0, 0.3)))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=matrix), obs=Y[:2])


def one_hot() -> None:
    z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    (x,) = scalars(1)
    chosen = torch.zeros(3).scatter_(0, z.reshape(1), 1.0)
    observe(chosen * x)


def by_mask() -> None:
    """A plate of which some elements are missing; the data stay as they are."""
    with pyro.plate("missing", 2):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    loc = KNOWN.clone()
    loc[MISSING] = x
    observe(loc)


def of_a_plate() -> None:
    """Some elements of a plate, beside a latent outside."""
    (s,) = scalars(1)
    with pyro.plate("group", 3):
        z = pyro.sample("z", dist.Normal(s, 1.0))
    loc = torch.empty(3)
    loc[0] = s
    loc[1:] = z[:2]
    observe(loc)


def long() -> None:
    """More latents than have a level each; a site reads three of them."""
    path = torch.zeros(7)
    for n, x in enumerate(scalars(6)):
        path[n + 1] = 0.5 * path[n] + x
    for n in range(3):
        pyro.sample(f"y_{n}", dist.Normal(path[n + 1], 1.0), obs=Y[n])


def by_keyword() -> None:
    """A view is known by its memory, however the operation is given what it views."""
    loc = torch.zeros(3)
    column = torch.reshape(input=loc, shape=(3, 1))
    for n, x in enumerate(scalars(2)):
        column[n] = x
    observe(loc)


def beside_sparse() -> None:
    """A sparse matrix has no memory of one piece."""
    matrix = torch.eye(3).to_sparse()
    loc = torch.zeros(3)
    for n, x in enumerate(scalars(2)):
        loc[n] = x
    observe(matrix.to_dense() @ loc)


def in_twos() -> None:
    """Each latent is written twice into a tensor."""
    out = torch.empty(20)
    for n, x in enumerate(scalars(10)):
        out[2 * n] = x
        out[2 * n + 1] = 0.5 * x
    pyro.sample("y", dist.Normal(out.sum(), 1.0), obs=Y[0])


def of_valid_scales() -> None:
    """What a run makes of tensors that are not yet found is checked as it goes."""
    for n in range(10):
        scale = torch.zeros(1)
        scale[0] = pyro.sample(f"s_{n}", dist.LogNormal(0.0, 0.5))
        pyro.sample(f"y_{n}", dist.Normal(0.0, scale.squeeze()), obs=Y[n % 3])


PROGRAMS: list[Callable[[], None]] = [
    one_by_one,
    summed,
    from_zero,
    chained,
    through_views,
    one_hot,
    by_mask,
    of_a_plate,
    long,
    by_keyword,
    beside_sparse,
]


@pytest.mark.parametrize("model", PROGRAMS)
def test_latents_keep_an_index_each(model: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(model, num_samples=2 if model is long else 3)
    assert KNOWN.tolist() == [0.3, 0.0, 0.0]


@pytest.mark.parametrize("model", [in_twos, of_valid_scales])
def test_tensors_are_found_in_few_runs(model: Callable[[], None]) -> None:
    """However many there are, and however often each is written into."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = MPImportance(model, num_samples=2).run()
    assert len({len(marginal.samples) for marginal in posterior.marginals().values()}) == 1


SHARED = np.zeros(3)
BUFFER = torch.zeros(3, dtype=torch.double)


def of_an_array() -> Tensor:
    return torch.as_tensor(SHARED)


def of_a_result() -> Tensor:
    return torch.add(torch.ones(3), 1.0, out=BUFFER)


def of_a_keyword() -> Tensor:
    return torch.reshape(input=BUFFER, shape=(3,))


@pytest.mark.parametrize("made", [of_an_array, of_a_result, of_a_keyword])
def test_memory_that_others_read(made: Callable[[], Tensor]) -> None:
    """It stays as it is, for a copy would not be read: the program runs once for each particle."""

    def model() -> None:
        loc = made()
        for n, x in enumerate(scalars(2)):
            loc[n] = x
        observe(torch.from_numpy(SHARED) if made is of_an_array else BUFFER)

    together = [["x_0", "x_1"]]
    compare(model, together=together, warning=r"once for each particle.*`loc\[n\] = x`")


def test_writes_within_a_transform_of_the_program() -> None:
    """Its levels are none of the run's."""

    def model() -> None:
        x, z = scalars(2)

        def doubled(value: Tensor) -> Tensor:
            pair = torch.stack([value, 0.0 * value])
            pair[1] = x
            return pair.sum()

        observe(torch.func.vmap(doubled)(torch.arange(3.0) * z))

    together = [["x_0", "x_1"]]
    compare(model, together=together, warning=r"once for each particle.*`pair\[1\] = x`")


def test_a_guide_that_writes() -> None:
    def guide() -> None:
        loc = torch.zeros(3)
        for n in range(3):
            loc[n] = pyro.sample(f"x_{n}", dist.Normal(loc.sum(), 1.0))

    compare(one_by_one, guide, num_samples=3)


def test_too_large_a_tensor_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dim for each latent that is written may be too much: then the programs run one by one."""
    monkeypatch.setattr(written, "MOST_ELEMENTS", 3 * 3**3 - 1)
    warning = r"once for each particle.*in test_written\.py:\d+, `loc\[n\] = x`"
    names = [f"x_{n}" for n in range(3)]
    compare(one_by_one, num_samples=3, together=[names], warning=warning)
    monkeypatch.setattr(written, "MOST_ELEMENTS", 3 * 3**3)
    compare(one_by_one, num_samples=3)


@pytest.mark.parametrize("number", [40, 70])
def test_more_latents_than_can_be_written(number: int) -> None:
    """The run is ordinary, without a search for latents that it need not look at."""

    def model() -> None:
        path = torch.zeros(number + 1)
        for n, x in enumerate(scalars(number)):
            path[n + 1] = 0.5 * path[n] + x
        pyro.sample("y", dist.Normal(path[-1], 1.0), obs=Y[0])

    elements: list[int] = []
    with (
        pytest.warns(MPISWarning, match=r"once for each particle, as in pyro\.infer"),
        TorchOperations(elements),
    ):
        posterior = MPImportance(model, num_samples=3).run()
    assert max(elements) <= 2**20
    assert len(posterior.marginals()["x_0"].samples) == 3


class TorchOperations(TorchDispatchMode):
    """Notes how many elements results have."""

    def __init__(self, elements: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements.append(result.numel())
        return result


def test_only_levels_that_are_written() -> None:
    """A tensor of the program that nothing is written into stays as it is."""
    found: dict[str, Tensor] = {}

    def program(values: dict[str, Tensor]) -> None:
        first, second, third = torch.zeros(2), torch.zeros(2), torch.zeros(2)
        first[0] = values["a"]
        second[0] = values["b"]
        second[1] = values["a"]
        third[0] = 1.0
        found.update(first=first, second=second, third=third)

    a, b = torch.arange(2.0), torch.arange(3.0)
    levels = [{"a": a}, {"b": b}]
    run_mapped(program, levels, patched=True)
    assert {name: unwrapped(part).levels for name, part in found.items()} == {
        "first": (0,),
        "second": (0, 1),
        "third": (),
    }
    expected = torch.stack([b.expand(2, 3), a.unsqueeze(-1).expand(2, 3)], -1)
    assert torch.equal(unwrapped(found["second"]).tensor, expected)


def test_many_levels_are_found_together() -> None:
    """More than the program is run anew for."""
    found: list[Tensor] = []

    def program(values: dict[str, Tensor]) -> None:
        loc = torch.zeros(12)
        for n in range(12):
            loc[n] = values[str(n)]
        found[:] = [loc.sum()]

    levels = [{str(n): torch.arange(2.0) * 2**n} for n in range(12)]
    run_mapped(program, levels, patched=True)
    (total,) = found
    sums = unwrapped(total).tensor.flatten().sort().values
    assert torch.equal(sums, torch.arange(2.0**12))


def test_what_runs_the_model_again() -> None:
    """It finds the tensors anew."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(one_by_one, num_samples=20, num_replicates=2).run()
    assert len(posterior.sample(5)["x_0"]) == 5
    posterior.plan()
    posterior.num_replicates = 1
    posterior.run()
    (factor,) = (f for f in posterior._sums[0].whole.factors if f.name == "y")
    assert len(factor.dims) == 3


def test_adapt_finds_the_posterior_of_what_is_written() -> None:
    """The log joint has derivatives, though it takes more than one run."""

    pyro.set_rng_seed(0)
    adapted = MPImportance(one_by_one, num_samples=20).adapt()
    assert isinstance(adapted.guide, AutoPlateNormal)
    found = adapted.guide.median()
    sums = torch.ones(3, 3).tril()
    exact = torch.linalg.solve(torch.eye(3) + sums.T @ sums, sums.T @ Y)
    for n in range(3):  # by moments of particles alone, some are 0.02 away
        assert abs(found[f"x_{n}"] - exact[n]) < 1e-3


def test_adapt_of_a_program_that_runs_one_by_one() -> None:
    """Each trial run draws particles of its own."""

    def model() -> None:
        x, z = scalars(2)
        observe((x if x > 0 else z).expand(3))

    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning):
        posterior = MPImportance(model, num_samples=20).adapt().run()
    assert torch.isfinite(posterior.evidence())
