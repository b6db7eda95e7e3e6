# SPDX-License-Identifier: Apache-2.0
"""Indices with different numbers of particles."""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compared import compare
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from singles import Exact, Singles, exact
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.options import Options
from pyro_mpis.particles import memory
from pyro_mpis.planning import plan_of, programs_of
from pyro_mpis.programs.numbers import index_named

Numbers = Mapping[str, int] | Mapping[str | None, int]

pytestmark = pytest.mark.usefixtures("float64")


def hierarchy() -> None:
    mu = pyro.sample("mu", dist.Normal(0.3, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("school", 2):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor([0.4, -1.2]))


def wide() -> None:
    """Reads nothing."""
    pyro.sample("mu", dist.Normal(0.0, 1.2))
    pyro.sample("tau", dist.LogNormal(0.1, 0.6))
    with pyro.plate("school", 2):
        pyro.sample("theta", dist.Normal(torch.tensor([0.2, -0.5]), 1.4))


def reading() -> None:
    """Proposes a site given others."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.2))
    pyro.sample("tau", dist.LogNormal(0.1 * mu, 0.6))
    with pyro.plate("school", 2):
        pyro.sample("theta", dist.Normal(0.5 * mu, 1.4))


def coupled() -> None:
    """Carries theta on noise of its own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.2))
    tau = pyro.sample("tau", dist.LogNormal(0.1, 0.6))
    with pyro.plate("school", 2):
        auxiliary: Any = {"is_auxiliary": True}
        eps = pyro.sample("eps", dist.Normal(0.0, 1.1), infer=auxiliary)
        density = dist.Normal(0.0, 1.1).log_prob(eps) - tau.log()
        pyro.sample("theta", dist.Delta(mu + tau * eps, log_density=density))


def nested() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("a", 2, dim=-1):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        with pyro.plate("b", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(x, 0.7))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([[0.5, -0.3], [1.2, 0.1]]))


def chain() -> None:
    x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    for step in range(1, 4):
        x = pyro.sample(f"x_{step}", dist.Normal(0.8 * x, 1.0))
        pyro.sample(f"y_{step}", dist.Normal(x, 1.0), obs=torch.tensor(0.4 * step))


def summed() -> None:
    """A discrete site that is summed over, below a sampled one and above another."""
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    z = pyro.sample("z", dist.Bernoulli(p), infer={"enumerate": "parallel"})
    b = pyro.sample("b", dist.Normal(z, 1.0))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(0.7))


def of_counties() -> None:
    """Elements that another plate reads by an index array."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 2):
        alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
    county = torch.tensor([0, 1, 1])
    with pyro.plate("house", 3):
        slope = pyro.sample("slope", dist.Normal(0.0, 0.3))
        mean = alpha[county] + slope
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor([0.1, 0.5, -0.4]))


def together() -> None:
    """Elements of a plate that are read together."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("time", 2):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x.cumsum(0), 1.0), obs=torch.tensor([0.1, 0.5]))


def lost() -> None:
    """What a site is proposed from cannot be seen in the plain run."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    loc = torch.zeros(1)
    loc[0] = mu
    x = pyro.sample("x", dist.Normal(loc[0], 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))


def branching() -> None:
    """Can only run once for each particle."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(1.0 if mu > 0 else mu, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))


Case = tuple[Callable[[], None], Any, Numbers, dict[str, int], dict[str, Any]]

# Program, guide, numbers; the number of draws that a site's particles are chosen from, where that
# is more: as many as the largest of what it is proposed from.
CASES: dict[str, Case] = {
    "prior, many globals": (hierarchy, None, {"mu": 4, None: 2}, {"theta": 4}, {}),
    "prior, many locals": (hierarchy, None, {"theta": 4, "mu": 3, "tau": 2}, {}, {}),
    "prior, one particle": (hierarchy, None, {"theta": 1, None: 3}, {"theta": 3}, {}),
    "prior, group": (
        hierarchy,
        None,
        {"tau": 4, None: 3},
        {"theta": 4},
        {"groups": [("mu", "tau")]},
    ),
    "prior, shared": (hierarchy, None, {"theta": 2, None: 4}, {"theta": 4}, {"shared": ["school"]}),
    "guide": (hierarchy, wide, {"mu": 4, "tau": 2, None: 3}, {}, {}),
    "guide, group": (hierarchy, wide, {"mu": 5, None: 3}, {}, {"groups": [("mu", "tau")]}),
    "guide that reads": (hierarchy, reading, {"mu": 4, None: 2}, {"theta": 4, "tau": 4}, {}),
    "group that reads": (
        nested,
        None,
        {"mu": 4, None: 2},
        {"x": 4, "z": 4},
        {"groups": [("x", "z")]},
    ),
    "carried": (hierarchy, coupled, {"theta": 4, "mu": 3, None: 2}, {}, {}),
    "nested": (nested, None, {"mu": 3, "x": 2, "z": 1}, {"x": 3, "z": 3}, {}),
    "nested, many below": (nested, None, {"mu": 1, "x": 2, "z": 3}, {}, {}),
    "chain": (chain, None, {"x_1": 5, None: 3}, {"x_2": 5, "x_3": 5}, {}),
    "summed": (summed, None, {"p": 4, None: 2}, {"b": 4}, {}),
    "summed, with a number": (summed, None, {"p": 3, "z": 4, "b": 2}, {"b": 4}, {}),
    "index array": (of_counties, None, {"mu": 3, None: 2}, {"alpha": 3}, {}),
    "read together": (together, None, {"mu": 4, "x": 3}, {"x": 4}, {}),
    "lost": (lost, None, {"mu": 4, "x": 2}, {"x": 4}, {}),
    "lost, many below": (lost, None, {"mu": 2, "x": 4}, {}, {}),
    "branching": (branching, None, {"mu": 4, "x": 2}, {}, {}),
}


def compared(name: str, wrong: Callable[[Singles], Exact] = exact) -> MPImportance:
    model, guide, numbers, num_draws, options = CASES[name]
    options = dict(options)
    shared = options.pop("shared", None)
    if shared is not None:
        options["shared_plates"] = shared
    return compare(model, guide, numbers, num_draws=num_draws, wrong=wrong, **options)


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_that_of_all_combinations(name: str) -> None:
    compared(name)


def test_the_largest_number_counts_where_programs_run_once_for_each_particle() -> None:
    with pytest.warns(MPISWarning, match="as many particles as the site with most: 4"):
        posterior = MPImportance(branching, num_samples={"mu": 4, "x": 2}).run()
    assert count(posterior, "x") == 4


def over_particles_only(problem: Singles) -> Exact:
    """Mixes over as many draws as there are particles."""
    problem.num_draws = {}
    return exact(problem)


def with_one_k(problem: Singles) -> Exact:
    """Divides by the largest number of particles for each index."""
    truth = exact(problem)
    short = sum(
        len(index.elements) * math.log(problem.num_particles / index.size)
        for index in problem.indices
        if not index.enumerated
    )
    return replace(truth, log_evidence=truth.log_evidence - short)


@pytest.mark.parametrize("wrong", [over_particles_only, with_one_k])
def test_wrong_sums_are_rejected(wrong: Callable[[Singles], Exact]) -> None:
    with pytest.raises(AssertionError):
        compared("prior, many globals", wrong)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_autoguides(guide: Callable[..., Any]) -> None:
    """A carried site names what it is computed from."""
    pyro.clear_param_store()
    numbers = {"mu": 4, None: 3}
    posterior = compare(hierarchy, guide(hierarchy), numbers)
    number = count(posterior, "theta")
    assert count(posterior, "mu") == 4
    assert number == (3 if guide is AutoNormal else 4)  # the other has one index


def count(posterior: MPImportance, site: str) -> int:
    """The number of particles."""
    return posterior.marginals(site).log_weights.shape[-1]


# Blocks, replicates, files.


def answers(posterior: MPImportance) -> list[Tensor]:
    moments = posterior.moments()
    weights = [marginal.weights for marginal in posterior.marginals().values()]
    return [posterior.evidence(), *moments.values(), *weights]


def run(model: Callable[[], None], numbers: Numbers, **options: Any) -> MPImportance:
    pyro.set_rng_seed(0)
    return MPImportance(model, num_samples=numbers, **options).run()


def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"mu": 8, "tau": 6, "theta": 3}
    whole = run(hierarchy, numbers)
    monkeypatch.setattr(memory, "default_limit", lambda device: 1500)
    cut = run(hierarchy, numbers)
    assert len(cut._sums[0].blocks) > 1
    torch.testing.assert_close(answers(cut), answers(whole))
    assert cut.sample(5)["theta"].shape == (5, 2)


def test_replicates() -> None:
    numbers = {"mu": 8, None: 3}
    posterior = run(hierarchy, numbers, num_replicates=3)
    assert count(posterior, "mu") == 24
    assert count(posterior, "theta") == 9
    assert (posterior.diagnose(show=False).evidence_error or 0.0) > 0
    posterior.diagnose(show=False)
    assert "9 to 24 particles a site" in str(posterior.summary())
    assert "3 to 8 particles a site, 3 replicates" in repr(posterior)


def test_files(tmp_path: Path) -> None:
    posterior = run(hierarchy, {"mu": 8, None: 3})
    posterior.save(tmp_path / "posterior")
    loaded = MPImportance.load(tmp_path / "posterior", hierarchy)
    assert loaded.num_samples == {"mu": 8, None: 3}
    torch.testing.assert_close(answers(loaded), answers(posterior), rtol=0, atol=0)
    torch.testing.assert_close(answers(loaded.run()), answers(loaded), rtol=0, atol=0)


def test_members_of_importance() -> None:
    posterior = run(hierarchy, {"mu": 8, None: 3})
    assert len(posterior.exec_traces) == len(posterior.log_weights) == 8
    assert posterior.get_ESS() >= 1
    assert len(run(hierarchy, {"mu": 8, None: 3}, groups=[("mu", "tau")]).exec_traces) == 8


def test_the_advice_names_the_site() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 30.0))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + x, 0.5), obs=torch.tensor(1.0))

    text = str(run(model, {"mu": 12, "x": 30}).diagnose(show=False))
    assert re.search(r"Raise num_samples of 'mu': \d+", text)


# Which index is meant.


def test_same_as_one_number() -> None:
    """Numbers that are all equal change nothing, draws included."""
    others: dict[str | None, int] = {None: 5}
    one = run(hierarchy, others)
    torch.testing.assert_close(
        answers(run(hierarchy, {"mu": 5, "tau": 5, "theta": 5})), answers(one)
    )
    pyro.set_rng_seed(0)
    plain = MPImportance(hierarchy, num_samples=5).run()
    torch.testing.assert_close(answers(plain), answers(one), rtol=0, atol=0)


def test_sites_without_a_number() -> None:
    with pytest.warns(MPISWarning, match=r"no number for 'tau', 'theta': 10 particles of each"):
        posterior = run(hierarchy, {"mu": 3})
    assert count(posterior, "tau") == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(hierarchy, {"mu": 3, "theta": 4}, groups=[("mu", "tau")])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"mu": 0}, "num_samples of 'mu': expected a positive integer, but found 0"),
        ({None: 2.5}, r"num_samples of all others \(None\): expected a positive integer"),
        ({3: 4}, "num_samples: expected names of sites, or None for all others, but found 3"),
    ],
)
def test_numbers_that_are_none(numbers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPImportance(hierarchy, num_samples=numbers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phi", r"'phi': no such latent site\. The sites with particles are 'mu', 'tau', 'theta'"),
        ("y", "'y': no such latent site"),
    ],
)
def test_names_of_no_site(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(hierarchy, {name: 3, None: 2})


def test_two_numbers_for_a_group() -> None:
    message = r"'mu', 'tau' share one particle index.*\('mu': 3, 'tau': 4\)"
    with pytest.raises(ValueError, match=message):
        run(hierarchy, {"mu": 3, "tau": 4, None: 2}, groups=[("mu", "tau")])
    run(hierarchy, {"mu": 3, "tau": 3, None: 2}, groups=[("mu", "tau")])


def test_a_site_fixed_at_a_point() -> None:
    guide = AutoDelta(pyro.poutine.block(hierarchy, expose=["mu"]))
    posterior = MPImportance(hierarchy, guide, num_samples={"mu": 3, None: 2})
    with pytest.raises(ValueError, match=r"'mu' has no particles of its own.*no random site"):
        posterior.run()


def test_a_site_carried_by_several_of_its_plates() -> None:
    def guide() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        b = pyro.sample("b", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Delta(a + b, log_density=torch.tensor(0.0)))

    structure = plan_of(programs_of(hierarchy, guide, (), {}), Options(num_samples=2))[0].structure
    with pytest.raises(ValueError, match=r"'mu' has no particles of its own.*'a', 'b'\. Give"):
        index_named(structure, "mu")
    assert index_named(structure, "a") == structure.index_of["a"].symbol


def test_merged_indices_have_the_larger_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "default_limit", lambda device: 2500)
    monkeypatch.setattr(memory, "MAX_BLOCKS", 1)
    with pytest.warns(MPISWarning, match="'mu', 'tau' share particle indices"):
        posterior = run(hierarchy, {"mu": 9, "tau": 6, "theta": 2})
    counts = [count(posterior, name) for name in ("mu", "tau", "theta")]
    assert counts == [9, 9, 2]


# --- no number given


def schools() -> None:
    """Eight groups with a known scale each."""
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=torch.linspace(-3.0, 28.0, 8))


def one_by_one() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    scale = 1.0 if a > 0 else 2.0
    pyro.sample("y", dist.Normal(a, scale), obs=torch.tensor(1.0))


class TestChosenNumber:
    def test_more_time_gives_more_particles(self) -> None:
        numbers = []
        for seconds in (1e-6, 0.3, 3.0):
            posterior = MPImportance(schools, time_limit=seconds)
            assert posterior.num_samples is None
            numbers.append(posterior.run().num_samples)
        assert numbers == [10, 100, 200]  # whatever the machine

    def test_each_replicate_has_its_share_of_the_time(self) -> None:
        posterior = MPImportance(schools, time_limit=0.3, num_replicates=10).run()
        assert posterior.num_samples == 30  # 100, if each had all of it

    def test_memory_is_kept_to(self) -> None:
        posterior = MPImportance(schools, memory_limit=10 * 2**20).run()
        assert posterior.num_samples == 30
        assert not posterior._sums[0].replicate.plan.cut.blocks

    def test_it_is_that_of_a_given_number(self) -> None:
        pyro.set_rng_seed(0)
        chosen = MPImportance(schools, time_limit=0.3).run().evidence()
        pyro.set_rng_seed(0)
        torch.testing.assert_close(MPImportance(schools, num_samples=100).run().evidence(), chosen)

    def test_it_is_chosen_again_in_the_next_run(self) -> None:
        posterior = MPImportance(schools, time_limit=0.3).run()
        posterior.time_limit = 1e-6
        assert posterior.run().num_samples == 10

    def test_the_summary_and_the_plan_say_it(self) -> None:
        posterior = MPImportance(schools, time_limit=0.3, num_replicates=2).run()
        posterior.diagnose(show=False)  # what is poor
        assert "100 particles a site (chosen to fit into 0.3 s" in str(posterior.summary())
        given = MPImportance(schools, num_samples=10).run()
        given.diagnose(show=False)
        assert "chosen" not in str(given.summary())
        numbers = [cost.num_samples for cost in MPImportance(schools).plan().costs]
        assert 200 in numbers

    def test_programs_that_run_once_for_each_particle(self) -> None:
        with pytest.warns(MPISWarning, match="once for each particle"):
            posterior = MPImportance(one_by_one, time_limit=0.1).run()
        assert posterior.num_samples == 50
        assert posterior.marginals("a").log_weights.shape == (50,)

    @pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
    def test_a_limit_without_meaning_is_refused(self, limit: float) -> None:
        with pytest.raises(ValueError, match="time_limit: expected a positive number"):
            MPImportance(schools, time_limit=limit)
