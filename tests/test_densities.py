# SPDX-License-Identifier: Apache-2.0
"""Densities at single values: zero outside of supports, refused where an argument is invalid."""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_mean
from failing import fails
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.transforms import CorrCholeskyTransform, ExpTransform, SigmoidTransform

from pyro_mpis import MPImportance
from pyro_mpis.particles.drawing import Draw, Drawn
from pyro_mpis.particles.proposals import weigh
from pyro_mpis.programs.densities import density_of, plain_density
from pyro_mpis.programs.mapped import run_mapped
from pyro_mpis.programs.rewritten import CholeskyOrNan
from pyro_mpis.programs.tensors import unwrapped


def test_nan_log_prob() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", a.sign().clamp(max=0.0).sqrt())

    pyro.set_rng_seed(0)
    fails(ValueError, r"site 'f': log_prob is nan at \d+ of 20 combinations", model, K=20)


def test_infinite_density() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", 1.0 / (a * 0.0).abs())

    fails(ValueError, r"site 'f': log_prob is \+inf", model)


OUTSIDE: dict[str, tuple[Callable[[], Distribution], Tensor]] = {
    "LogNormal": (lambda: dist.LogNormal(0.0, 1.0), torch.tensor(-1.0)),
    "Exponential": (lambda: dist.Exponential(2.0), torch.tensor(-1.0)),
    "Uniform": (lambda: dist.Uniform(0.0, 1.0), torch.tensor(1.5)),
    "Poisson": (lambda: dist.Poisson(3.0), torch.tensor(0.5)),
    "Dirichlet": (lambda: dist.Dirichlet(torch.ones(3)), torch.tensor([0.5, 0.6, 0.2])),
    "expanded": (lambda: dist.Exponential(2.0).expand([2]), torch.tensor([-1.0, -2.0])),
    "masked": (lambda: dist.Exponential(2.0).mask(torch.tensor(True)), torch.tensor(-1.0)),
    "independent": (
        lambda: dist.Exponential(2.0).expand([2]).to_event(1),
        torch.tensor([1.0, -2.0]),
    ),
    "affine of a positive number": (
        lambda: dist.TransformedDistribution(
            dist.Exponential(1.0), [dist.transforms.AffineTransform(2.0, 3.0)]
        ),
        torch.tensor(1.0),
    ),
    "independent and transformed": (
        lambda: dist.TransformedDistribution(
            dist.Exponential(torch.ones(2)), [dist.transforms.AffineTransform(2.0, 3.0)]
        ).to_event(1),
        torch.tensor([5.0, 1.0]),
    ),
}


def densities(
    make: Callable[[Tensor], Distribution],
    value: Callable[[Tensor], Tensor],
    numbers: Tensor,
    *,
    validate: bool = True,
) -> Tensor:
    """Return the densities of a mapped run: ``(number, *batch shape)``."""
    results: list[Tensor] = []

    def run(values: Mapping[str, Tensor]) -> None:
        x = values["x"]
        mapped = unwrapped(density_of(make(x), value(x), validate=validate))
        assert mapped.levels == (0,)
        results.append(mapped.tensor)

    with pyro.validation_enabled(False):
        run_mapped(run, [{"x": numbers}], patched=False)
    return results[0]


@pytest.mark.parametrize("name", OUTSIDE)
def test_density_outside_of_a_support_is_zero(name: str) -> None:
    """With validation on, torch refuses such values; without, its formulas may give numbers."""
    make, outside = OUTSIDE[name]
    with pyro.validation_enabled(False):
        fn = make()
        inside = fn.sample()
        formula = fn.log_prob(outside)
    values = torch.stack([outside, inside])
    density = densities(lambda _: make(), lambda x: x, values)
    assert density.shape == (2, *fn.batch_shape)
    assert bool((density[0] == -torch.inf).all())
    torch.testing.assert_close(density[1], make().log_prob(inside))
    unchecked = densities(lambda _: make(), lambda x: x, values, validate=False)
    torch.testing.assert_close(unchecked[0], formula, equal_nan=True)


def test_each_element_lies_inside_or_outside_by_itself() -> None:
    values = torch.tensor([[0.5, -0.5, 0.0], [-1.0, 0.0, 1.0]])
    rates = torch.tensor([1.0, 2.0, 3.0])
    density = densities(lambda _: dist.Exponential(rates), lambda x: x, values)
    inf = math.inf
    expected = torch.tensor([[-0.5, -inf, math.log(3.0)], [-inf, math.log(2.0), math.log(3.0) - 3]])
    torch.testing.assert_close(density, expected)


@pytest.mark.parametrize("validate", [True, False])
def test_values_of_a_categorical_are_places_in_a_table(validate: bool) -> None:
    """Torch would look for one where there is none: so they are looked at in any case."""
    fn = dist.Categorical(torch.tensor([0.2, 0.8]))
    found = density_of(fn, torch.tensor([-1, 1, 2]), validate=validate)
    torch.testing.assert_close(found, torch.tensor([-math.inf, math.log(0.8), -math.inf]))


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        (dist.Normal(0.0, 1.0), [ExpTransform(), SigmoidTransform()]),
        (dist.Exponential(1.0), [SigmoidTransform()]),
    ],
)
def test_a_value_has_to_be_in_the_range_of_each_transform(base: Any, parts: list[Any]) -> None:
    """Of positive numbers, a sigmoid is above a half; its inverse takes all numbers in torch."""
    fn = dist.TransformedDistribution(base, parts)
    with pyro.validation_enabled(False):
        found = density_of(fn, torch.tensor([0.3, 0.7, 1.5]), validate=True)
    assert (found > -math.inf).tolist() == [False, True, False]
    torch.testing.assert_close(found[1], fn.log_prob(torch.tensor(0.7)))


def test_a_base_of_fewer_event_dims_than_its_transform() -> None:
    """Each matrix is inside or outside by itself."""
    with pyro.validation_enabled(False):
        base = dist.Uniform(-1.0, 1.0).expand([2, 3]).to_event(1)
        fn = dist.TransformedDistribution(base, [CorrCholeskyTransform()])
        value = CorrCholeskyTransform()(torch.tensor([[0.5, 0.5, 0.5], [0.5, 1.5, 0.5]]))
        found = density_of(fn, value, validate=True)
    assert (found > -math.inf).tolist() == [True, False]


def test_a_distribution_that_its_user_made_unchecked() -> None:
    for validate_args, expected in ((False, 1.0), (True, -math.inf)):
        fn = dist.Exponential(1.0, validate_args=validate_args)
        assert float(plain_density(fn, torch.tensor(-1.0))) == expected


def test_an_invalid_component_concerns_its_own_element() -> None:
    with pyro.validation_enabled(False):
        components = dist.Normal(0.0, torch.tensor([[1.0, 2.0], [1.0, -2.0]]))
        fn = dist.MixtureSameFamily(dist.Categorical(torch.ones(2, 2)), components)
        found = density_of(fn, torch.tensor([0.5, 0.5]), validate=True)
    assert found.isnan().tolist() == [False, True]


INVALID: dict[str, Callable[[Tensor], Distribution]] = {
    "scale": lambda x: dist.Normal(0.0, x),
    "concentration": lambda x: dist.Gamma(x, 1.0),
    "probability": lambda x: dist.Bernoulli(probs=x),
    "independent": lambda x: dist.Normal(0.0, torch.stack([x, torch.ones(())])).to_event(1),
    "transformed": lambda x: dist.LogNormal(0.0, x),
    "masked and expanded": lambda x: dist.Normal(0.0, x).expand([2]).mask(torch.tensor(True)),
    "of a mixture": lambda x: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(0.0, torch.stack([x, torch.ones(())]))
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_density_at_an_invalid_argument_is_nan(name: str) -> None:
    """Also where torch's formula has a number."""
    value = INVALID[name](torch.tensor(0.5)).sample()
    density = densities(INVALID[name], lambda x: value, torch.tensor([0.5, -0.5]))
    assert bool(density[0].isfinite().all())
    assert bool(density[1].isnan().all())
    torch.testing.assert_close(density[0], INVALID[name](torch.tensor(0.5)).log_prob(value))


class ByRates(dist.TorchDistribution):
    """One whose argument has a dim of the event, and whose constraint does not say so."""

    arg_constraints = {"rates": constraints.positive}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, rates: Tensor) -> None:
        self.rates = rates
        super().__init__(rates.shape[:-1], rates.shape[-1:])

    def log_prob(self, value: Tensor) -> Tensor:
        return -(self.rates * value).sum(-1)


def test_an_argument_of_which_a_part_is_invalid() -> None:
    value = torch.ones(2)
    for rates, expected in (([1.0, 2.0], -3.0), ([1.0, -2.0], math.nan), ([-1.0, -2.0], math.nan)):
        with pyro.validation_enabled(False):
            found = density_of(ByRates(torch.tensor(rates)), value, validate=True)
        assert float(found) == pytest.approx(expected, nan_ok=True)


def test_arguments_invalid_at_some_particles() -> None:
    """At combinations that the plain run did not meet, and where nothing else rules them out."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.5, 0.5))
        pyro.sample("y", dist.Bernoulli(a.clamp(max=0.9)), obs=torch.tensor(1.0))

    pyro.set_rng_seed(0)
    fails(ValueError, r"site 'y': log_prob is nan at \d+ of 50 combinations", model, K=50)


def test_guide_outside_of_the_support() -> None:
    """Particles that the prior does not allow count as impossible, not as an error."""

    def model() -> None:
        s = pyro.sample("s", dist.Exponential(1.0))
        pyro.sample("y", dist.Normal(s, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        affine = dist.transforms.AffineTransform(0.5, 1.0)
        pyro.sample("s", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [affine]))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=50).run()
    s = posterior.marginals("s").samples
    assert 5 < int((s < 0).sum()) < 45
    log_ratio = dist.Normal(s, 1.0).log_prob(torch.tensor(1.0)) - s
    log_ratio = log_ratio - dist.Normal(0.5, 1.0).log_prob(s)
    expected = torch.where(s < 0, 0.0, log_ratio.exp()).mean().log()
    torch.testing.assert_close(posterior.evidence(), expected)
    assert bool((posterior.marginals("s").weights[s < 0] == 0).all())


@pytest.mark.usefixtures("float64")
def test_nan_counts_only_where_no_other_factor_rules_it_out() -> None:
    """More deaths than there were animals: the second count has no density then."""

    def model() -> None:
        first = pyro.sample("first", dist.Binomial(4, torch.tensor(0.6)))
        second = pyro.sample("second", dist.Binomial(4 - first, torch.tensor(0.5)))
        rest = 4 - first - second
        pyro.sample("y", dist.Binomial(rest, torch.tensor(0.5)), obs=torch.tensor(0.0))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=8).run()
    first = posterior.marginals("first").samples
    second = posterior.marginals("second").samples
    assert bool((first.max() + second.max()) > 4)

    def given(number: Tensor, parent: Tensor) -> Tensor:
        """Probability of the second count given the first."""
        if number + parent > 4:
            return torch.zeros(())
        log_prob: Tensor = dist.Binomial(4 - parent, torch.tensor(0.5)).log_prob(number)
        return log_prob.exp()

    total = torch.zeros(())
    for b in second:
        proposal = torch.stack([given(b, a) for a in first]).mean()
        for a in first:
            total = total + given(b, a) / proposal * 0.5 ** (4 - a - b) / 64
    torch.testing.assert_close(posterior.evidence(), total.log())


# A prior that has invalid arguments at some values of its parent.

LOC, LIMIT = 0.5, 0.3


def limited(ruled_out: bool, limit: float, size: int, looked_at: bool) -> Callable[[], None]:
    """A prior of 'b' with a scale that may be negative."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(LOC, 1.0))
        if ruled_out:
            pyro.factor("positive", torch.where(a > limit, 0.0, -torch.inf))
        with pyro.plate("p", size):
            b = pyro.sample("b", dist.Normal(0.0, a - limit))
            if looked_at:
                b = torch.tensor(b.tolist())
            pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor([0.5, -1.5])[:size])

    return model


def evidence_of_limited(size: int) -> float:
    a = torch.linspace(LIMIT, LOC + 8, 20_001)
    y = torch.tensor([0.5, -1.5])[:size, None]
    log_p = dist.Normal(0.0, (1 + (a - LIMIT) ** 2).sqrt()).log_prob(y).sum(0)
    log_p = log_p + dist.Normal(LOC, 1.0).log_prob(a)
    return float(torch.trapezoid(log_p.exp(), a))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("options", "size"), [({"num_samples": 3}, 2), ({"num_samples": {"a": 4, None: 2}}, 1)]
)
def test_a_prior_that_another_factor_keeps_from_invalid_arguments(
    options: dict[str, Any], size: int
) -> None:
    """
    The evidence is unbiased, with a false alarm of 1e-6.

    It is twice as high, 10 standard errors, if particles that were drawn there count.
    """
    pyro.set_rng_seed(0)
    model = limited(True, LIMIT, size, False)
    posterior = MPImportance(model, **options, num_replicates=150, stratified=False)
    evidences = posterior.run()._replicates().exp()
    assert 0 < int((evidences == 0).sum()) < 50  # no valid particle
    check_mean(evidences, evidence_of_limited(size))


@pytest.mark.usefixtures("float64")
def test_particles_drawn_at_invalid_arguments_do_not_count() -> None:
    """Which they are is known of particles that are chosen among more draws, element by element."""
    a = torch.tensor([1.3, 0.2, 0.1, 2.3, 0.0])  # of the draws
    b = torch.arange(10.0).reshape(5, 2) / 10
    kept = torch.tensor([[4, 3], [0, 2], [3, 1]])

    def log_q(value: Tensor, parent: Tensor) -> Tensor:
        valid = parent > LIMIT
        scale = torch.where(valid, parent - LIMIT, 1.0)
        return torch.where(valid, dist.Normal(0.0, scale).log_prob(value), torch.nan)

    pyro.set_rng_seed(0)
    posterior = MPImportance(limited(True, LIMIT, 2, False), num_samples={"a": 5, "b": 3}).run()
    replicate = posterior._sums[0].replicate
    structure, programs = replicate.structure, replicate.programs
    draws = {
        "a": Draw(a, torch.zeros(5), reads_particles=False),
        "b": Draw(b, torch.zeros(5, 2), reads_particles=True),
    }
    drawn = Drawn(draws, {structure.index_of["b"].symbol: kept})
    found = weigh(structure, programs, drawn, validate=True, from_factors=False)
    for k, element in itertools.product(range(3), range(2)):
        own = int(kept[k, element])
        density = log_q(b[own, element], a).exp().nan_to_num(0.0).mean().log()
        expected = density if a[own] > LIMIT else torch.tensor(math.inf)
        log_q_found = found.log_proposals[structure.index_of["b"].symbol][k, element]
        torch.testing.assert_close(log_q_found, expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:the programs run once")
@pytest.mark.parametrize("looked_at", [False, True])
def test_mapped_and_ordinary_runs_agree_on_invalid_arguments(looked_at: bool) -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(limited(True, LIMIT, 2, looked_at), num_samples=300).run()
    assert float(posterior.evidence()) == pytest.approx(math.log(evidence_of_limited(2)), abs=0.4)
    for limit in (LIMIT, 1e6):  # at some particles, and at all
        model = limited(False, limit, 2, looked_at)
        fails(ValueError, r"site 'b': log_prob is nan at \d+ of \d+ combinations", model, K=30)


# Plain runs at values that are impossible.


def test_structure_is_found_where_the_first_draw_makes_an_argument_invalid() -> None:
    """A probability of 1.3 in the plain run: the prior has no such values."""

    def model() -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor([1.0, 0.0]))

    def guide() -> None:
        pyro.sample("p", dist.Normal(1.3, 0.4))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=200).run()
    p = posterior.marginals("p").samples
    inside = p <= 1.0
    assert 10 < int(inside.sum()) < 100
    weights = torch.where(inside, p * (1 - p), 0.0) / dist.Normal(1.3, 0.4).log_prob(p).exp()
    torch.testing.assert_close(posterior.evidence(), weights.mean().log())
    traces = MPImportance(model, guide, num_samples=20).run().exec_traces
    sums = torch.tensor([float(trace.log_prob_sum()) for trace in traces])
    drawn = torch.tensor([float(torch.as_tensor(trace.nodes["p"]["value"])) for trace in traces])
    assert torch.equal(sums == -torch.inf, drawn > 1)


@pytest.mark.parametrize("fixed", ["model", "guide"])
def test_arguments_that_are_invalid_whatever_the_latents_are(fixed: str) -> None:
    def guide() -> None:
        pyro.sample("x", dist.Normal(0.0, math.nan if fixed == "guide" else 1.0))

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        p = torch.tensor([0.5, 1.5 if fixed == "model" else 0.5])
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Binomial(3, p), obs=torch.tensor([2.0, 1.0]))
            pyro.sample("z", dist.Normal(x, 1.0), obs=torch.zeros(2))

    found = {
        "model": "'y' of the model: 'probs' of its Binomial",
        "guide": "'x' of the guide: 'scale'",
    }
    fails(
        ValueError, f"site {found[fixed]}.* must be .*Check the data and parameters", model, guide
    )


def test_fixed_arguments_beside_latents_are_looked_at() -> None:
    """Torch makes one shape of all arguments, so that a mark of a latent is on each."""

    def model() -> None:
        n = pyro.sample("n", dist.Poisson(3.0))
        pyro.sample("y", dist.Binomial(n + 5.0, torch.tensor(1.5)), obs=torch.tensor(1.0))

    fails(ValueError, r"site 'y': log_prob is nan at 5 of 5 combinations", model, K=5)


def test_data_outside_of_a_fixed_support_beside_latents() -> None:
    def model() -> None:
        alpha = pyro.sample("alpha", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Pareto(1.0, alpha), obs=torch.tensor(0.5))

    fails(ValueError, r"site 'y': probability zero for all particles", model)


# Mixtures: each component has its own support.


def steps(low: Tensor) -> Distribution:
    """Two uniforms, from ``low`` and from one above."""
    lows = torch.stack([low, low + 1.0])
    return dist.Uniform(lows, lows + torch.tensor([1.0, 2.0]))


def shifted(by: Tensor, fn: Distribution) -> Any:
    return dist.TransformedDistribution(fn, [dist.transforms.AffineTransform(by, 1.0)])


def uneven(components: Distribution) -> Any:
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)


def two_paretos(low: Tensor) -> Any:
    lows = torch.stack([low, 2.0 * low]).unsqueeze(-1).expand(2, 2)
    return dist.Pareto(lows, 2.0).to_event(1)


def two_shifted(low: Tensor) -> Any:
    return shifted(torch.stack([low, low + 1]), dist.Exponential(torch.ones(2)))


def chosen(late: list[bool], zero: Distribution, one: Distribution) -> Distribution:
    return dist.MaskedMixture(torch.tensor(late), zero, one)


MIXTURES: dict[
    str, tuple[Callable[[Tensor], Distribution], list[float], Callable[[float], Any]]
] = {
    # name: distribution given x, a value, and its density given x
    "uniforms": (
        lambda x: uneven(steps(x)),
        [1.5],
        lambda x: 0.3 * (x <= 1.5 < x + 1) + 0.7 / 2 * (x + 1 <= 1.5 < x + 3),
    ),
    "expanded": (
        lambda x: uneven(steps(x)).expand([2]),
        [1.5, 2.2],
        lambda x: [0.3 * (x <= y < x + 1) + 0.7 / 2 * (x + 1 <= y < x + 3) for y in (1.5, 2.2)],
    ),
    "independent": (
        lambda x: uneven(two_shifted(x)).expand([2]).to_event(1),
        [1.5, 1.8],
        lambda x: math.prod(
            sum(share * math.exp(low - y) * (low < y) for share, low in ((0.3, x), (0.7, x + 1)))
            for y in (1.5, 1.8)
        ),
    ),
    "transformed": (
        lambda x: shifted(x, uneven(dist.Exponential(torch.tensor([1.0, 2.0])))),
        [1.5],
        lambda x: 0.3 * math.exp(x - 1.5) + 0.7 * 2 * math.exp(2 * (x - 1.5)) if x < 1.5 else 0.0,
    ),
    "of transformed ones": (
        lambda x: uneven(two_shifted(x)),
        [1.5],
        lambda x: sum(
            share * math.exp(low - 1.5) for share, low in ((0.3, x), (0.7, x + 1)) if low < 1.5
        ),
    ),
    "of vectors": (
        lambda x: uneven(two_paretos(x)),
        [1.8, 2.5],
        lambda x: sum(
            share * 4 * low**4 / (1.8 * 2.5) ** 3 if low <= 1.8 else 0.0
            for share, low in ((0.3, x), (0.7, 2 * x))
        ),
    ),
    "chosen": (
        lambda x: chosen(
            [False, True, True],
            dist.Exponential(x).expand([3]),
            shifted(x, dist.Exponential(torch.ones(3))),
        ),
        [0.4, 0.4, 2.0],
        lambda x: [x * math.exp(-0.4 * x), math.exp(x - 0.4) * (x < 0.4), math.exp(x - 2)],
    ),
    "chosen with an argument that is invalid elsewhere": (
        lambda x: chosen([True, False], dist.Normal(0.0, x.expand(2)), dist.Normal(0.0, x - 1)),
        [0.5, 0.5],
        lambda x: [
            math.exp(-0.125 / s**2) / (s * math.sqrt(2 * math.pi)) if s > 0 else math.nan
            for s in (x - 1, x)
        ],
    ),
}


MIXTURES["chosen with an argument that is invalid here"] = (
    lambda x: chosen([True, False], dist.Bernoulli(x.expand(2)), dist.Bernoulli(x - 0.5)),
    [1.0, 1.0],
    lambda x: [p if 0 <= p <= 1 else math.nan for p in (x - 0.5, x)],
)


def test_mixtures_are_as_torch_has_them_without_validation() -> None:
    """Outside of a support too."""

    def make(x: Tensor) -> Any:
        return uneven(two_shifted(x))

    value = torch.tensor(0.5)
    numbers = torch.tensor([0.2, 1.1])
    with pyro.validation_enabled(False):
        formula = torch.stack([make(x).log_prob(value) for x in numbers])
    assert bool(formula.isfinite().all())
    found = densities(make, lambda _: value, numbers, validate=False)
    torch.testing.assert_close(found, formula)


@pytest.mark.parametrize("name", MIXTURES)
def test_each_component_of_a_mixture_has_a_support_of_its_own(name: str) -> None:
    make, value, density = MIXTURES[name]
    numbers = torch.tensor([0.2, 0.7, 1.1, 1.6])
    data = torch.tensor(value) if len(value) > 1 else torch.tensor(value[0])
    found = densities(make, lambda _: data, numbers)
    expected = torch.tensor([density(float(x)) for x in numbers]).log()
    torch.testing.assert_close(found, expected.reshape(found.shape), equal_nan=True)


@pytest.mark.usefixtures("float64")
def test_evidence_of_mixtures_whose_components_rule_data_out() -> None:
    """Where the bounds are fixed, and where a summed latent chooses the component."""
    data = torch.tensor([0.5, 2.9, 2.2])

    def fixed() -> None:
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        lows, highs = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])
        fn = dist.MixtureSameFamily(
            dist.Categorical(torch.stack([share, 1 - share])), dist.Uniform(lows, highs)
        )
        with pyro.plate("data", 3):
            pyro.sample("y", fn, obs=data)

    pyro.set_rng_seed(0)
    posterior = MPImportance(fixed, num_samples=20).run()
    share = posterior.marginals("share").samples
    torch.testing.assert_close(
        posterior.evidence(), (share * (1 - share).square() / 4).mean().log()
    )

    def change(observed: Tensor) -> None:
        start = pyro.sample(
            "start", dist.Categorical(torch.ones(4)), infer={"enumerate": "parallel"}
        )
        late = torch.arange(3) >= start
        with pyro.plate("data", 3):
            early = dist.Exponential(torch.ones(3))
            fn = dist.MaskedMixture(late, early, shifted(torch.tensor(2.0), early))
            pyro.sample("y", fn, obs=observed)

    total = 0.0
    for start in range(4):
        lows = [2.0 * (t >= start) for t in range(3)]
        total += math.prod(
            math.exp(low - float(y)) * (float(y) >= low) for low, y in zip(lows, data, strict=True)
        )
    found = MPImportance(change, num_samples=1).run(data).evidence()
    assert float(found) == pytest.approx(math.log(total / 4))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("seed", range(3))
def test_a_matrix_that_is_not_positive_definite(seed: int) -> None:
    """It counts as zero where another factor rules it out, in the first run too."""
    y = torch.tensor([0.5, -0.3])

    def model(ruled_out: bool) -> None:
        r = pyro.sample("r", dist.Normal(0.0, 0.7))
        if ruled_out:
            pyro.factor("possible", torch.where(r.abs() < 1, 0.0, -torch.inf))
        rows = torch.stack([torch.ones_like(r), r, r, torch.ones_like(r)], -1).reshape(2, 2)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), rows), obs=y)

    pyro.set_rng_seed(seed)
    posterior = MPImportance(model, num_samples=60).run(True)
    r = posterior.marginals("r").samples
    assert 0 < int((r.abs() > 1).sum()) < 30
    left = 1 - r.square()
    log_p = -0.5 * (y.square().sum() - 2 * r * y.prod()) / left - 0.5 * left.log()
    weights = torch.where(r.abs() < 1, log_p, -torch.inf).exp() / (2 * math.pi)
    torch.testing.assert_close(posterior.evidence(), weights.mean().log())
    fails(ValueError, "site 'y': log_prob is nan at", partial(model, False), K=60)


def test_cholesky_factors_are_nan_as_a_whole() -> None:
    matrices = torch.stack([torch.eye(3), torch.ones(3, 3) - 2 * torch.eye(3), 4 * torch.eye(3)])
    with CholeskyOrNan():
        found = torch.linalg.cholesky(matrices)
    torch.testing.assert_close(found[[0, 2]], torch.stack([torch.eye(3), 2 * torch.eye(3)]))
    assert bool(found[1].isnan().all())
