# SPDX-License-Identifier: Apache-2.0
"""Particles that are spread evenly have their distributions, and leave the evidence unbiased."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import FALSE_ALARM, check_exact_mean, check_frequencies, check_mean
from compared import run_recorded
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.options import Options
from pyro_mpis.particles.drawing import draw_particles
from pyro_mpis.planning import plan_of, programs_of
from pyro_mpis.programs import stratified
from pyro_mpis.programs.stratified import LARGEST, SMALLEST, Strata, uniform_shape, value_at

K = 4  # particles
RUNS = 4000  # independent sets of them

FAMILIES: dict[str, Callable[[], Any]] = {
    "Normal": lambda: dist.Normal(0.3, 1.7),
    "LogNormal": lambda: dist.LogNormal(0.3, 0.8),
    "Uniform": lambda: dist.Uniform(-0.7, 3.1),
    "Exponential": lambda: dist.Exponential(0.4),
    "HalfNormal": lambda: dist.HalfNormal(1.7),
    "HalfCauchy": lambda: dist.HalfCauchy(0.6),
    "Cauchy": lambda: dist.Cauchy(0.3, 0.6),
    "Laplace": lambda: dist.Laplace(0.3, 0.6),
    "Logistic": lambda: dist.Logistic(0.3, 0.6),
    "Weibull": lambda: dist.Weibull(1.3, 0.7),
    "Gumbel": lambda: dist.Gumbel(0.3, 0.7),
    "Pareto": lambda: dist.Pareto(1.2, 2.5),
    "transformed": lambda: dist.TransformedDistribution(
        dist.Normal(0.3, 1.7),
        [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.SigmoidTransform()],
    ),
    "decreasing": lambda: dist.TransformedDistribution(
        dist.Logistic(0.3, 0.6), [dist.transforms.AffineTransform(1.0, -2.0)]
    ),
}
VECTORS: dict[str, Callable[[], Any]] = {
    "independent": lambda: dist.Normal(torch.tensor([0.3, -1.0]), 1.7).to_event(1),
    "masked": lambda: dist.Normal(torch.tensor([0.3, -1.0]), 1.7).mask(False).to_event(1),
    "dense": lambda: dist.MultivariateNormal(
        torch.tensor([0.3, -1.0]), torch.tensor([[1.0, 0.8], [0.8, 1.5]])
    ),
    "low rank": lambda: dist.LowRankMultivariateNormal(
        torch.tensor([0.3, -1.0]), torch.tensor([[1.0], [0.8]]), torch.tensor([0.5, 0.1])
    ),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "Gamma": lambda: dist.Gamma(2.0, 3.0),
    "InverseGamma": lambda: dist.InverseGamma(2.0, 3.0),
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "Bernoulli": lambda: dist.Bernoulli(0.3),
    "Delta": lambda: dist.Delta(torch.tensor(0.3)),
    "subclass": lambda: Skewed(0.3, 1.7),
}


class Skewed(dist.Normal):
    """Draws in a way of its own."""

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.base_draw(sample_shape).exp()

    def base_draw(self, sample_shape: torch.Size) -> Tensor:
        return self.loc + self.scale * torch.randn(sample_shape + self.batch_shape)


def spread(fn: Any, strata: Strata = Strata(K, K), runs: int = RUNS) -> Tensor:  # noqa: B008
    """Draw sets of particles: ``(K, runs, *event shape)``."""
    fn = fn.expand([runs])
    shape = uniform_shape(fn)
    assert shape is not None
    uniforms = strata.uniforms(shape, torch.get_default_device())
    return value_at(fn.expand([strata.number, runs]), uniforms)


def check_uniform(numbers: Tensor, false_alarm: float) -> None:
    """A Kolmogorov-Smirnov test of numbers between 0 and 1; asymptotic, which is conservative."""
    ordered = numbers.double().sort().values
    steps = torch.arange(len(ordered) + 1) / len(ordered)
    distance = float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())
    limit = math.sqrt(math.log(2 / false_alarm) / (2 * len(ordered)))
    assert distance < limit, f"distance {distance:.3g}, limit {limit:.3g}"


def check_each_particle(numbers: Tensor) -> None:
    """Each particle by itself is uniform over the sets: ``(K, runs)``."""
    for row in numbers:
        check_uniform(row, FALSE_ALARM / len(numbers))


def check_strata(numbers: Tensor) -> None:
    """Of the particles of each set one lies in each stratum: ``(K, runs)``."""
    strata = (numbers.double() * len(numbers)).floor().sort(0).values
    assert bool((strata == torch.arange(len(numbers)).unsqueeze(-1)).all())


def independent_of_permutation(number: int, shape: torch.Size, device: Any) -> Tensor:
    """A wrong program: particle k lies in stratum k."""
    places = torch.rand((number, *shape), dtype=torch.double)
    return (torch.arange(number).reshape(-1, *(1,) * len(shape)) + places) / number


# Each family.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", FAMILIES)
def test_distribution_and_strata(name: str) -> None:
    pyro.set_rng_seed(0)
    fn = FAMILIES[name]()
    numbers = fn.cdf(spread(fn))
    check_each_particle(numbers)
    check_strata(numbers)


@pytest.mark.usefixtures("float64")
def test_wrong_programs_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    pyro.set_rng_seed(0)
    fn = dist.Normal(0.3, 1.7)
    with pytest.raises(AssertionError):
        check_strata(fn.cdf(fn.sample((K, RUNS))))
    with pytest.raises(AssertionError):
        check_each_particle(dist.Normal(0.4, 1.9).cdf(spread(fn)))
    monkeypatch.setattr(stratified, "latin_hypercube", independent_of_permutation)
    with pytest.raises(AssertionError):
        check_each_particle(fn.cdf(spread(fn)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name: str) -> None:
    """The scalars of each particle have the joint distribution, each projection of them."""
    pyro.set_rng_seed(0)
    fn = VECTORS[name]()
    values = spread(fn)
    plain = fn.base_dist if isinstance(fn, dist.Independent) else fn
    if isinstance(plain, dist.MaskedDistribution):
        plain = plain.base_dist
    cov = getattr(fn, "covariance_matrix", None)
    cov = torch.diag(plain.variance) if cov is None else cov
    for direction in torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.6, -0.8]]):
        scale = (direction @ cov @ direction).sqrt()
        check_each_particle(dist.Normal(direction @ fn.mean, scale).cdf(values @ direction))
    if name == "dense":
        noise = torch.linalg.solve_triangular(
            fn.scale_tril, (values - fn.mean).unsqueeze(-1), upper=False
        )
        for row in dist.Normal(0.0, 1.0).cdf(noise.squeeze(-1)).unbind(-1):
            check_strata(row)


@pytest.mark.usefixtures("float64")
def test_some_of_more_draws() -> None:
    """Those that are particles, the first or others in each element; every draw is uniform."""
    pyro.set_rng_seed(0)
    first = Strata(6, K).uniforms(torch.Size([RUNS]), torch.get_default_device())
    check_each_particle(first)
    check_strata(first[:K])
    kept = torch.rand((6, RUNS)).argsort(0)[:K]
    chosen = Strata(6, K, kept).uniforms(torch.Size([RUNS, 2]), torch.get_default_device())
    for numbers in chosen.unbind(-1):
        check_each_particle(numbers)
        check_strata(numbers.gather(0, kept))
        with pytest.raises(AssertionError):
            check_strata(numbers[:K])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_edges(name: str, dtype: torch.dtype) -> None:
    """At the smallest and the largest number values are finite and have a density."""
    torch.set_default_dtype(dtype)
    try:
        fn = FAMILIES[name]().expand([5])
        edges = torch.tensor([SMALLEST, 1e-12, 0.5, 1 - 1e-12, LARGEST], dtype=torch.double)
        values = value_at(fn, edges)
        assert values.dtype == dtype
        assert bool(values.isfinite().all())
        if name != "transformed" or dtype == torch.float64:  # a sigmoid is 1 there, as when drawn
            assert bool(fn.log_prob(values).isfinite().all())
    finally:
        torch.set_default_dtype(torch.float32)


def test_tails_of_float32() -> None:
    """As far out as they are: float32 has no number between 1 - 6e-8 and 1."""
    numbers = torch.tensor([1e-12, 1 - 1e-12], dtype=torch.double)
    values = value_at(dist.Normal(torch.zeros(2), 1.0), numbers)
    torch.testing.assert_close(values, torch.tensor([-7.034484, 7.034487]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bound", [1.0, 1e6, 3.3e38, -1.0, 1e-30])
def test_a_uniform_stays_below_its_bound(bound: float) -> None:
    low = torch.tensor(-2.0)
    fn = dist.Uniform(low, torch.tensor(bound))
    value = value_at(fn, torch.tensor(LARGEST, dtype=torch.double))
    assert low < value < bound
    assert bool(fn.log_prob(value).isfinite())


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_drawn_independently(name: str) -> None:
    assert uniform_shape(OTHERS[name]()) is None


# In a run.


def draws_of(model: Callable[[], None], number: int = K, **options: Any) -> dict[str, Tensor]:
    plan, _, _ = plan_of(programs_of(model, None, (), {}), Options(number, **options))
    drawn = draw_particles(plan.structure, plan.programs, stratified=True)
    return {name: draw.value for name, draw in drawn.draws.items()}


def sites_of_all_kinds() -> None:
    """Two that read nothing, one drawn for all particles at once, one particle by particle."""
    with pyro.plate("run", RUNS):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("at once", dist.Normal(a, 1.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    loc = torch.zeros(RUNS)
    with pyro.plate("rows", RUNS):
        transform = dist.transforms.AffineTransform(shift, 1.0)
        base = dist.Normal(loc, 1.0)
        pyro.sample("one by one", dist.TransformedDistribution(base, [transform]))


def strata_of(numbers: Tensor) -> Tensor:
    return (numbers * K).long()


@pytest.mark.usefixtures("float64")
def test_sites_and_elements_are_independent() -> None:
    """The strata of particle k at two of them: chi-square, alarm 1e-6 each."""
    pyro.set_rng_seed(0)
    draws = draws_of(sites_of_all_kinds)
    cdf: Callable[[Tensor], Tensor] = dist.Normal(0.0, 1.0).cdf
    numbers = {
        "a": cdf(draws["a"]),
        "other": cdf(draws["other"]),
        "at once": cdf(draws["at once"] - draws["a"]),
        "one by one": cdf(draws["one by one"] - draws["shift"].unsqueeze(-1)),
    }
    for number in numbers.values():
        check_strata(number)
        check_each_particle(number)
    pairs = list(itertools.combinations(numbers.values(), 2))
    pairs += [(number[:, ::2], number[:, 1::2]) for number in numbers.values()]  # of elements
    for one, other in pairs:
        check_independent(one[1], other[1])
    with pytest.raises(AssertionError):
        check_independent(numbers["a"][1], numbers["a"][1])


def check_independent(one: Tensor, other: Tensor) -> None:
    counts = (strata_of(one) * K + strata_of(other)).bincount(minlength=K * K)
    check_frequencies(counts, torch.full((K * K,), 1 / K**2))


def conjugate() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(mu, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.3))


LOG_TRUTH = float(dist.Normal(0.0, math.sqrt(3.0)).log_prob(torch.tensor(1.3)))


def wide_guide() -> None:
    """A mixture proposal for x."""
    mu = pyro.sample("mu", dist.Normal(0.2, 1.3))
    pyro.sample("x", dist.Normal(0.5 * mu, 1.6))


def apart() -> None:
    """A proposal for each site that reads no other."""
    pyro.sample("mu", dist.Normal(0.2, 1.3))
    pyro.sample("x", dist.Normal(0.5, 1.6))


def ratios(runs: int, guide: Any = None, **options: Any) -> Tensor:
    """P / p(y) of independent runs."""
    pyro.set_rng_seed(0)
    return torch.stack(
        [
            (MPImportance(conjugate, guide, **options).run().evidence() - LOG_TRUTH).exp()
            for _ in range(runs)
        ]
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("guide", "options"),
    [
        pytest.param(None, {"num_samples": 3}, marks=pytest.mark.slow),
        (wide_guide, {"num_samples": 3}),
        (None, {"num_samples": {"mu": 4, "x": 2}}),
        (wide_guide, {"num_samples": 3, "groups": [("mu", "x")]}),
    ],
)
def test_evidence_is_unbiased(guide: Any, options: dict[str, Any]) -> None:
    """The mean of P / p is 1: z-test, alarm 1e-6; a bias of a third is seen."""
    found = ratios(200, guide, **options)
    check_mean(found, 1.0)
    with pytest.raises(AssertionError):
        check_mean(found * 4 / 3, 1.0)


@pytest.mark.usefixtures("float64")
def test_evidence_spreads_less() -> None:
    """Half as much or less: independent particles as narrow by chance are below 1e-6 likely."""
    spreads = [
        float(ratios(100, apart, num_samples=20, stratified=choice).log().std())
        for choice in (True, False)
    ]
    assert spreads[0] < spreads[1] / 2


# Exactly: all permutations.

HALVES = 2  # particles, one in each half


def steps() -> None:
    """All densities are constant on the strata, so that only permutations matter."""
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    high = a > 0.5
    with pyro.plate("p", 2):
        b = pyro.sample("b", dist.Uniform(0.0, torch.where(high, 2.0, 1.0)))
        probs = torch.where(b > 1.0, 0.7, 0.2) * torch.where(high, 1.0, 0.5)
        pyro.sample("x", dist.Bernoulli(probs), obs=torch.tensor([1.0, 0.0]))


def expected_evidence(
    permutations: Sequence[dict[str, list[list[int]]]], monkeypatch: pytest.MonkeyPatch
) -> float:
    """Return the mean evidence of equally likely permutations: site -> ``(elements, K)``."""
    total = 0.0
    for orders in permutations:
        waiting = [orders["a"], orders["b"]]

        def hypercube(number: int, shape: torch.Size, device: Any, left: Any = waiting) -> Tensor:
            rows = torch.tensor(left.pop(0))
            return ((rows.T + 0.5) / number).reshape((number, *shape)).double()

        monkeypatch.setattr(stratified, "latin_hypercube", hypercube)
        posterior, _ = run_recorded(steps, None, num_samples=HALVES)
        assert not waiting
        total += float(posterior.evidence(log_scale=False))
    return total / len(permutations)


@pytest.mark.usefixtures("float64")
def test_expected_evidence_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a permutation for each site and element, and not if they have one in common."""
    both = [[0, 1], [1, 0]]
    low, high = 0.2 * 0.5, 0.5 * (0.2 + 0.7)
    truth = 0.5 * (low * (1 - low)) + 0.5 * (high * (1 - high))
    own = [{"a": [a], "b": [b, c]} for a, b, c in itertools.product(both, repeat=3)]
    check_exact_mean(expected_evidence(own, monkeypatch), truth)
    for alike in (
        [{"a": [a], "b": [a, a]} for a in both],
        [{"a": [a], "b": [b, b]} for a, b in itertools.product(both, repeat=2)],
    ):
        with pytest.raises(AssertionError):
            check_exact_mean(expected_evidence(alike, monkeypatch), truth)


# Options.


def test_reproducible() -> None:
    def found(**options: Any) -> Tensor:
        pyro.set_rng_seed(3)
        return MPImportance(conjugate, num_samples=5, **options).run().marginals("x").samples

    torch.testing.assert_close(found(), found(), rtol=0, atol=0)
    assert not torch.equal(found(), found(stratified=False))


@pytest.mark.usefixtures("float64")
def test_switched_off() -> None:
    """Particles are independent: of two, both are in one half half of the time."""
    pyro.set_rng_seed(0)

    def model() -> None:
        with pyro.plate("run", RUNS):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    for choice, share in ((False, 0.5), (True, 1.0)):
        posterior = MPImportance(model, num_samples=2, stratified=choice).run()
        a = posterior.marginals("a").samples
        apart = ((a[..., 0] > 0) != (a[..., 1] > 0)).sum()
        check_frequencies(torch.stack([apart, RUNS - apart]), torch.tensor([share, 1 - share]))


@pytest.mark.filterwarnings("ignore:the guide draws 2 sites as one vector")
@pytest.mark.parametrize("guide", [AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_guides_of_one_vector(guide: Callable[..., Any]) -> None:
    """The noise of the joint latent is spread, each of its scalars."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    auto = guide(conjugate)
    auto()
    posterior = MPImportance(conjugate, auto, num_samples=8).run()
    values = posterior._sums[0].replicate.particles.values[f"_{guide.__name__}_latent"].detach()
    if guide is AutoMultivariateNormal:
        fn = auto.get_posterior()
        noise = torch.linalg.solve_triangular(
            fn.scale_tril, (values - fn.loc).unsqueeze(-1), upper=False
        ).detach()
        check_strata(dist.Normal(0.0, 1.0).cdf(noise[:, 0]))
        check_strata(dist.Normal(0.0, 1.0).cdf(noise[:, 1]))
    assert bool(values.isfinite().all())
