# SPDX-License-Identifier: Apache-2.0
"""How many threads torch computes with, in runs and queries."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mpis import MPImportance, _threads, planning

seen: list[int] = []


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """Let the user have set three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen.clear()
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def model() -> None:
    seen.append(torch.get_num_threads())
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def failing() -> None:
    model()
    raise ValueError("the model's own")


def test_small_runs_take_one() -> None:
    posterior = MPImportance(model, num_samples=10).run()
    posterior.sample(5)
    assert set(seen) == {1}


def test_the_users_number_comes_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="the model's own"):
        MPImportance(failing, num_samples=10).run()
    assert set(seen) == {1}


@pytest.mark.parametrize(("pays", "number"), [(True, 3), (False, 1)])
def test_large_runs_take_the_users_number_if_it_pays(
    pays: bool, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LARGE", 5)
    monkeypatch.setattr(_threads, "_pay", lambda number: pays)
    MPImportance(model, num_samples=10).run()
    assert seen[0] == 1  # the plain run
    assert seen[-1] == number


def test_programs_that_take_long_at_single_values_count_as_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "SLOW", 0.0)
    monkeypatch.setattr(_threads, "_pay", lambda number: True)
    MPImportance(model, num_samples=2).run()
    assert seen[-1] == 3


def test_jobs_in_other_threads_take_one() -> None:
    with ThreadPoolExecutor(2) as executor:
        MPImportance(model, num_samples=10, num_replicates=4, executor=executor).run()
    assert set(seen) == {1}


def test_whether_they_pay_is_found_by_trying_and_holds_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []
    seconds = {1: 1.0, 3: 0.7}

    def fake(x: torch.Tensor, number: int) -> float:
        tried.append(number)
        return seconds[number]

    monkeypatch.setattr(_threads, "_STATE", _threads._State())
    monkeypatch.setattr(_threads, "_seconds", fake)
    assert _threads._pay(3)
    seconds[3] = 0.9
    assert _threads._pay(3)
    assert tried == [3, 3, 1]
    _threads._STATE.checked -= 2 * _threads.VALID
    assert not _threads._pay(3)


def test_trying_leaves_the_number_as_it_was() -> None:
    assert _threads._seconds(torch.ones(10), 2) >= 0.0
    assert torch.get_num_threads() == 3
