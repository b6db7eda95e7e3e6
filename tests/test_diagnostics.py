# SPDX-License-Identifier: Apache-2.0
"""What is poor is said, at the right site; what is said to help, helps."""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mpis import Diagnosis, Marginal, MPImportance, MPISWarning
from pyro_mpis.memory import largest_factor
from pyro_mpis.results.diagnostics import LOW_ESS
from pyro_mpis.results.remedies import _better_guide, _size, _support_size
from pyro_mpis.results.site_diagnosis import UNEVEN_ESS

pytestmark = pytest.mark.usefixtures("float64")

Program = Callable[..., object]


def diagnosed(
    model: Program, guide: Program | None = None, K: int = 20, **options: int
) -> Diagnosis:
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=K, num_replicates=options.get("R", 1))
    return posterior.run().diagnose(show=False)


def helps(diagnosis: Diagnosis) -> str:
    """What is said to raise the effective sample size."""
    (problem,) = (p for p in diagnosis.problems if "effective sample size" in p.found)
    return " ".join(problem.helps)


def plated() -> None:
    """A global, a vector in an outer plate of two, a scalar in an inner one of three."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("outer", 2, dim=-2):
        v = pyro.sample("v", dist.Normal(mu.unsqueeze(-1), torch.ones(3)).to_event(1))
        with pyro.plate("inner", 3, dim=-1):
            x = pyro.sample("x", dist.Normal(v.sum(-1), 1.0))
            y = torch.tensor([[0.3, -0.5, 1.2], [0.8, 0.1, 9.0]])
            pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def wide(scale: float = 10.0) -> None:
    """A prior twenty times as wide as the posterior."""
    a = pyro.sample("a", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(a, scale / 20), obs=torch.tensor(0.3))


def test_numbers_of_every_site_and_element() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(plated, num_samples=60, num_replicates=2).run()
    diagnosis = posterior.diagnose(show=False)
    assert [site.name for site in diagnosis.sites] == ["mu", "v", "x"]
    for site in diagnosis.sites:
        marginal = posterior.marginals(site.name)
        weights = marginal.weights
        assert site.num_particles == 120
        torch.testing.assert_close(site.ess, 1 / weights.square().sum(-1))
        torch.testing.assert_close(site.heaviest, weights.max(-1).values)
        torch.testing.assert_close(site.pareto_k, marginal.pareto_k, equal_nan=True)
        assert site.lowest_ess == pytest.approx(float(site.ess.min()))
    x = diagnosis.sites[2]
    assert x.plates == ("outer", "inner")
    assert [x.element(i) for i in (0, 5)] == ["x[outer=0, inner=0]", "x[outer=1, inner=2]"]
    assert x.worst == "x[outer=1, inner=2]"  # the observation of 9
    assert diagnosis.sites[1].element(1) == "v[outer=1]"
    assert diagnosis.sites[0].worst == "mu"
    assert diagnosis.bottleneck is min(diagnosis.sites, key=lambda site: site.lowest_ess)
    assert diagnosis.log_evidence == pytest.approx(float(posterior.evidence()))
    assert diagnosis.evidence_error == pytest.approx(posterior.evidence_error())
    assert f"(standard error {diagnosis.evidence_error:.2g} over 2 replicates)" in str(diagnosis)


def test_it_prints_and_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(plated, num_samples=6).run()
    state = torch.get_rng_state()
    posterior.diagnose(show=False)
    assert not capsys.readouterr().out
    diagnosis = posterior.diagnose()
    printed = capsys.readouterr().out
    assert printed == f"{diagnosis}\n"
    assert torch.equal(torch.get_rng_state(), state)
    assert max(map(len, printed.splitlines())) <= 100
    assert repr(diagnosis) == "<Diagnosis: problems 1, sites 3>"
    assert "Poor: " in printed
    for site in ("mu", "v", "x"):
        assert re.search(rf"^{site} +prior +6 ", printed, re.MULTILINE)


def test_nothing_is_poor() -> None:
    text = str(
        diagnosed(lambda: wide(1.0), lambda: pyro.sample("a", dist.Normal(0.3, 0.08)), K=100)
    )
    assert "Nothing is poor" in text
    assert "Poor" not in text
    assert "num_replicates=8 would tell" in text


def test_no_site_has_particles() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    diagnosis = diagnosed(model)
    assert diagnosis.bottleneck is None
    assert "summed over its whole support" in str(diagnosis)


def test_no_site_is_observed() -> None:
    def model(y: torch.Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    (problem,) = diagnosed(model).problems
    assert "observes nothing" in problem.found
    posterior = MPImportance(model, num_samples=20).run(torch.tensor(0.1))
    assert not posterior.diagnose(show=False).problems


def test_a_long_table_shows_the_lowest() -> None:
    def model() -> None:
        for i in range(40):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(z, 0.1 + i), obs=torch.tensor(0.0))

    text = str(diagnosed(model))
    shown = [i for i in range(40) if re.search(rf"^z_{i} ", text, re.MULTILINE)]
    assert len(shown) == 30
    assert shown[:10] == list(range(10))  # the most informed
    assert "and 10 sites of higher ESS" in text


def test_a_single_site_is_combined_with_none() -> None:
    samples = torch.linspace(-1.0, 1.0, 20)
    marginal = Marginal(samples, torch.zeros(20).log_softmax(-1), {"a": torch.Size()})
    site = replace(diagnosed(wide).sites[0], ess=torch.tensor(4.0), num_particles=20)
    assert _better_guide(site, marginal, 1, 1).endswith("more particles are all it takes.")


def test_before_run() -> None:
    with pytest.raises(RuntimeError, match=r"call \.run"):
        MPImportance(plated, num_samples=3).diagnose()


# --- what helps


def test_a_wide_prior_asks_for_a_guide() -> None:
    """The width it names is the particles' over the posterior's; the guide it asks for helps."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(wide, num_samples=30).run()
    diagnosis = posterior.diagnose(show=False)
    found = re.search(
        r"a is drawn from the prior, (\d+) times as wide as its posterior", helps(diagnosis)
    )
    assert found is not None
    a = posterior.marginals("a")
    assert int(found[1]) == round(float(a.samples.std(correction=0) / a.variance.sqrt()))
    assert 10 < int(found[1]) < 40  # twenty, but for the noise of 30 particles
    assert "AutoNormal" in helps(diagnosis)
    assert not diagnosed(wide, lambda: pyro.sample("a", dist.Normal(0.0, 1.0)), K=30).problems


def test_a_guide_off_the_posterior() -> None:
    """The distance it names, in the guide's sds, is about that of the two means, 1.8."""

    def guide() -> None:
        pyro.sample("a", dist.Normal(1.2, 0.5))

    distances = []
    for seed in range(20):
        pyro.set_rng_seed(seed)
        diagnosis = MPImportance(wide, guide, num_samples=25).run().diagnose(show=False)
        text = " ".join(str(diagnosis).split())
        found = re.search(r"the guide, whose centre is (\d\.\d) of its sds off the posterior", text)
        if found is not None:
            assert "Train the guide further" in text
            distances.append(float(found[1]))
    assert len(distances) >= 5
    assert 1.5 <= sum(distances) / len(distances) <= 2.5


def test_a_guide_narrower_than_the_posterior() -> None:
    """The weight is on its outermost particles, of the second of two elements."""
    samples = torch.stack([torch.linspace(-1.0, 1.0, 20), torch.linspace(-2.0, 2.0, 20)])
    weights = torch.stack([torch.ones(20), samples[1].abs() ** 8])
    log_weights = weights.log().log_softmax(-1)
    marginal = Marginal(samples, log_weights, {"a": torch.Size()})
    site = replace(
        diagnosed(wide).sites[0],
        ess=marginal.ess,
        proposal="guide",
        plates=("n",),
        num_particles=20,
    )
    ratio = float(samples[1].std(correction=0) / marginal.variance[1].sqrt())
    text = _better_guide(site, marginal, 2, 2)
    assert f"a[n=1] is drawn from the guide, only {ratio:.1f} times as wide as its post" in text
    assert ratio < 0.9
    assert "make the guide wider" in text


def test_a_guide_with_a_single_index() -> None:
    """All sites drawn as one vector: its parts may be as wide as the posterior, and ESS low."""

    def model() -> None:
        for name in "abcd":
            x = pyro.sample(name, dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{name}", dist.Normal(x, 0.5), obs=torch.tensor(0.0))

    def guide() -> None:
        z = pyro.sample(
            "z", dist.Normal(torch.zeros(4), 0.8).to_event(1), infer={"is_auxiliary": True}
        )
        for number, name in enumerate("abcd"):
            value = z[..., number]
            pyro.sample(name, dist.Delta(value, log_density=torch.zeros_like(value)))

    texts = []
    for seed in range(20):
        pyro.set_rng_seed(seed)
        with pytest.warns(MPISWarning, match="a single particle index"):
            posterior = MPImportance(model, guide, num_samples=10).run()
        texts.append(str(posterior.diagnose(show=False)))
    assert sum("they share one particle index" in " ".join(text.split()) for text in texts) >= 5


def test_all_weight_on_one_particle() -> None:
    text = helps(diagnosed(lambda: wide(1000.0), K=10))
    assert "a is drawn from the prior, with most of the weight on one value" in text
    assert "may not be enough" in text


def test_few_particles_of_other_sites() -> None:
    """Particles that cover the posterior, with weights uneven by what they are combined with."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a + b, 0.1), obs=torch.tensor(0.0))

    def structured() -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(-b, 0.1))

    def lowest(guide: Program | None, seed: int) -> tuple[float, str]:
        pyro.set_rng_seed(seed)
        diagnosis = MPImportance(model, guide, num_samples=10).run().diagnose(show=False)
        assert diagnosis.bottleneck is not None
        return diagnosis.bottleneck.lowest_ess, " ".join(str(diagnosis).split())

    before = [lowest(None, seed) for seed in range(20)]
    assert sum("which covers its posterior" in text for _, text in before) >= 5
    after = [lowest(structured, seed)[0] for seed in range(20)]
    assert sum(after) > 1.2 * sum(ess for ess, _ in before)


def test_more_particles_give_what_is_promised() -> None:
    """To a factor of two: the ESS at the number that it names, in the mean over seeds."""
    ratios = []
    for seed in range(20):
        pyro.set_rng_seed(seed)
        text = str(MPImportance(wide, num_samples=30).run().diagnose(show=False))
        found = re.search(r"Raise num_samples: (\d+) would make the lowest about (\d+)", text)
        if found is not None:
            posterior = MPImportance(wide, num_samples=int(found[1])).run()
            ratios.append(float(posterior.marginals("a").ess) / int(found[2]))
    assert len(ratios) > 5
    assert 0.5 < sum(ratios) / len(ratios) < 2.0


def test_what_more_particles_cost() -> None:
    """The largest factor's bytes, as memory counts them: a factor of two indices."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 50.0))
        with pyro.plate("n", 5):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(b, 0.1), obs=torch.zeros(5))

    text = helps(diagnosed(model, K=8))
    now = 8 * 8 * 5 * 8 * 3 / 1024  # K^2, plate, bytes of a double, tensors at once
    assert f"that of 'b', then takes {4 * now:.3g} KiB in place of {now:.3g} KiB" in text
    assert _size(999) == "999 B"
    assert _size(5 * 2**30) == "5 GiB"
    assert _size(3.5 * 2**40) == "3.5 TiB"


def rare(enumerate_it: bool = False) -> None:
    infer = {"enumerate": "parallel"} if enumerate_it else {}
    kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.9, 0.05, 0.05])), infer=infer)  # type: ignore[arg-type]
    pyro.sample("y", dist.Normal(kind * 8.0, 1.0), obs=torch.tensor(8.0))


def test_a_rare_value_is_to_be_enumerated() -> None:
    diagnosis = diagnosed(rare, K=30)
    assert "'kind' has only 3 values: marked infer={'enumerate': 'parallel'}" in helps(diagnosis)
    assert "drawn from" not in helps(diagnosis)
    assert not diagnosed(lambda: rare(True), K=30).problems


@pytest.mark.parametrize(
    ("fn", "size"),
    [
        (dist.Bernoulli(0.2), 2),
        (dist.Categorical(torch.ones(2, 5)), 5),
        (dist.OneHotCategorical(torch.ones(4)), 4),
        (dist.Binomial(torch.tensor([3, 6]), torch.tensor(0.5)), 7),
        (dist.Poisson(2.0), None),
        (dist.Normal(0.0, 1.0), None),
        (dist.Bernoulli(torch.ones(3) / 2).to_event(1), None),
    ],
)
def test_sizes_of_supports(fn: dist.TorchDistribution, size: int | None) -> None:
    assert _support_size(fn) == size
    if size is not None and not isinstance(fn, dist.Binomial):
        assert len(fn.enumerate_support(expand=False)) == size


def test_a_long_vector_is_to_be_put_in_a_plate() -> None:
    def model(plate: bool) -> None:
        if plate:
            with pyro.plate("n", 6):
                w = pyro.sample("w", dist.Normal(0.0, 3.0))
                pyro.sample("y", dist.Normal(w, 0.5), obs=torch.ones(6))
        else:
            w = pyro.sample("w", dist.Normal(torch.zeros(6), 3.0).to_event(1))
            pyro.sample("y", dist.Normal(w, 0.5).to_event(1), obs=torch.ones(6))

    before, after = (diagnosed(lambda p=plate: model(p), K=60) for plate in (False, True))
    assert "'w' is a vector of 6 elements with one particle index" in helps(before)
    assert before.bottleneck is not None
    assert after.bottleneck is not None
    assert before.bottleneck.lowest_ess < LOW_ESS < after.bottleneck.lowest_ess
    assert not any("effective sample size" in problem.found for problem in after.problems)


def test_sites_of_even_weights_to_group() -> None:
    """The power of num_samples that the group would leave is what grouping leaves."""

    def model() -> None:
        a, b, c = (pyro.sample(name, dist.Normal(0.0, 0.1)) for name in "abc")
        d = pyro.sample("d", dist.Normal(0.0, 50.0))
        pyro.sample("y", dist.Normal(a + b + c + d, 1.0), obs=torch.tensor(0.0))

    text = helps(diagnosed(model, K=8))
    assert "factor of 'y' reads 4 particle indices" in text
    assert "With groups=[('a', 'b', 'c')]" in text
    assert "as the power of 2" in text
    sizes = []
    for K in (8, 16):
        posterior = MPImportance(model, num_samples=K, groups=[("a", "b", "c")]).run()
        sizes.append(largest_factor(posterior._sums[0].builder.structure, K)[1])
    assert sizes[1] == 2**2 * sizes[0]

    def uneven() -> None:
        total = sum(pyro.sample(name, dist.Normal(0.0, 50.0)) for name in "abcd")
        pyro.sample("y", dist.Normal(total, 0.01), obs=torch.tensor(0.0))

    assert "Sites that share an index (groups=) lower that power" in helps(diagnosed(uneven, K=4))


def test_heavy_tails() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.StudentT(1.0, 0.0, 1.0))
        pyro.sample("y", dist.StudentT(1.0, mu, 1.0), obs=torch.tensor(8.0))

    def guide() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    diagnosis = diagnosed(model, guide, K=1000)
    (problem,) = (p for p in diagnosis.problems if "k-hat" in p.found)
    worst = diagnosis.bottleneck
    assert worst is not None
    assert f"(highest: mu, {worst.highest_k:.2f})" in problem.found
    assert "Use a wider guide" in problem.helps[0]

    def tight() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 0.2), obs=torch.tensor(5.0))

    problems = diagnosed(tight, K=1000).problems
    assert any("k-hat" in p.found and "The prior has few particles" in p.helps[0] for p in problems)


def test_k_hat_counts_only_where_weights_are_uneven() -> None:
    site = replace(
        diagnosed(wide, K=60).sites[0],
        ess=torch.tensor([55.0, 20.0, 10.0]),
        pareto_k=torch.tensor([0.9, 0.3, math.nan]),
    )
    assert site.ess[0] > UNEVEN_ESS * site.num_particles
    assert site.highest_k == pytest.approx(0.3)
    assert math.isnan(replace(site, pareto_k=torch.full((3,), math.nan)).highest_k)


def test_an_unsure_evidence() -> None:
    def vague() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(a, 0.05), obs=torch.tensor(0.3))

    diagnosis = diagnosed(vague, K=10, R=4)
    (problem,) = (p for p in diagnosis.problems if "log evidence" in p.found)
    assert diagnosis.evidence_error is not None
    assert (
        f"standard error of {diagnosis.evidence_error:.1f} nats over 4 replicates" in problem.found
    )
    assert "num_replicates=16" in problem.helps[0]
    assert not any("log evidence" in p.found for p in diagnosed(wide, K=300, R=4).problems)


def test_replicates_without_evidence() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Delta(z), obs=torch.tensor(1.0))

    diagnosis = diagnosed(model, K=1, R=8)
    lost = int((diagnosis.log_evidences == -math.inf).sum())
    assert 0 < lost < 8
    assert any(p.found.startswith(f"{lost} of 8 replicates have") for p in diagnosis.problems)


# --- warnings


def test_summary_warns_once_of_the_same() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(wide, num_samples=10).run()
    with pytest.warns(MPISWarning) as caught:
        posterior.summary()
    expected = [str(problem) for problem in posterior.diagnose(show=False).problems]
    assert [str(warning.message) for warning in caught] == expected
    assert all(warning.filename == __file__ for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.summary()
    posterior.run()
    with pytest.warns(MPISWarning):
        posterior.summary()
    posterior.run().diagnose()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.summary()


def test_warnings_can_be_filtered() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(wide, num_samples=10).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", MPISWarning)
        posterior.summary()


def test_site_of_replicates_in_plates_of_no_name() -> None:
    """Batch dims of size one outside of all plates are not numbered."""

    def model() -> None:
        with pyro.plate("outer", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(2, 1))

    (site,) = diagnosed(model).sites
    assert site.ess.shape == (2, 1)
    assert site.element(1) == "z[outer=1]"
