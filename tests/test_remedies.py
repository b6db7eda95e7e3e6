# SPDX-License-Identifier: Apache-2.0
"""What is said to help, helps."""

import re
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import Program, diagnosed, weighted, wide
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_mpis import Diagnosis, Marginal, MPImportance, MPISWarning
from pyro_mpis.particles.memory import largest_factor
from pyro_mpis.results.diagnostics import LOW_ESS, diagnose
from pyro_mpis.results.remedies import _better_guide, _size, _support_size

pytestmark = pytest.mark.usefixtures("float64")


def helps(diagnosis: Diagnosis) -> str:
    """What is said to raise the effective sample size."""
    (problem,) = (p for p in diagnosis.problems if "effective sample size" in p.found)
    return " ".join(problem.helps)


def test_a_single_site_is_combined_with_none() -> None:
    samples = torch.linspace(-1.0, 1.0, 20)
    marginal = Marginal(samples, torch.zeros(20).log_softmax(-1), {"a": torch.Size()})
    site = replace(diagnosed(wide).sites[0], ess=torch.tensor(4.0), num_particles=20)
    assert _better_guide(site, marginal, 1, 1).endswith("more particles are all it takes.")


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
    assert "adapt(...) learns one" in helps(diagnosis)
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


def test_a_guide_that_adapt_has_made() -> None:
    """It is not the user's to train or to widen."""

    class Learned:
        is_learned = True

        def __call__(self) -> None:
            pyro.sample("a", dist.Normal(1.5, 0.5))

    pyro.set_rng_seed(0)
    for guide, advice in ((Learned(), "Call adapt again"), (Learned().__call__, "Train the guide")):
        diagnosis = MPImportance(wide, guide, num_samples=25).run().diagnose(show=False)
        text = helps(diagnosis)
        assert advice in text
        assert ("Call adapt again" in text) != ("Train the guide" in text or "iden" in text)
    assert diagnosis.sites[0].proposal == "guide"


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
    assert "Make the guide wider" in text


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
        # independent particles: those that are spread evenly are seldom as poor
        posterior = MPImportance(model, guide, num_samples=10, stratified=False)
        diagnosis = posterior.run().diagnose(show=False)
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


def test_an_event_shape_that_is_a_plain_tuple() -> None:
    def model() -> None:
        tree = pyro.sample("tree", dist.SpanningTree(torch.zeros(6)))
        pyro.sample("y", dist.Normal(tree[0, 1].float(), 0.1), obs=torch.tensor(3.0))

    assert type(dist.SpanningTree(torch.zeros(6)).event_shape) is tuple
    assert "'tree'" in str(diagnosed(model, K=60)) or "tree" in helps(diagnosed(model, K=60))


def test_sites_of_even_weights_to_group() -> None:
    """The power of num_samples that the group would leave is what grouping leaves."""

    def model() -> None:
        a, b, c = (pyro.sample(name, dist.Normal(0.0, 0.1)) for name in "abc")
        d = pyro.sample("d", dist.Normal(0.0, 50.0))
        pyro.sample("y", dist.Normal(a + b + c + d, 1.0), obs=torch.tensor(0.0))

    # Independent particles, one of which lies where d has to be. Of eight that are spread evenly
    # none does, and a, b and c, which are to make up for it, have uneven weights too.
    text = helps(diagnosed(model, K=8, stratified=False))
    assert "factor of 'y' reads 4 particle indices" in text
    assert "With groups=[('a', 'b', 'c')]" in text
    assert "as num_samples to the power of 2" in text
    sizes = []
    for K in (8, 16):
        posterior = MPImportance(model, num_samples=K, groups=[("a", "b", "c")]).run()
        sizes.append(largest_factor(posterior._sums[0].replicate.structure)[1])
    assert sizes[1] == 2**2 * sizes[0]

    def uneven() -> None:
        total = sum(pyro.sample(name, dist.Normal(0.0, 50.0)) for name in "abcd")
        pyro.sample("y", dist.Normal(total, 0.01), obs=torch.tensor(0.0))

    assert "Sites that share an index (groups=) lower that power" in helps(diagnosed(uneven, K=4))


# --- where a remedy begins


@pytest.mark.parametrize(("ess", "uneven"), [(3.9, True), (4.1, False)])
def test_a_guide_is_advised_where_weights_are_uneven(ess: float, uneven: bool) -> None:
    """Where the effective sample size is below half of the particles; more are, in any case."""
    total = MPImportance(wide, num_samples=8).run()._sums[0]
    diagnosis = diagnose(total, {"a": weighted(ess, 8)}, {"a"}, torch.zeros(1))
    assert ("drawn from the prior" in helps(diagnosis)) == uneven
    assert "Raise num_samples" in helps(diagnosis)


@pytest.mark.parametrize(("ess", "telling"), [(1.9, False), (2.1, True)])
def test_fewer_than_two_particles_tell_neither_width_nor_number(ess: float, telling: bool) -> None:
    total = MPImportance(wide, num_samples=20).run()._sums[0]
    diagnosis = diagnose(total, {"a": weighted(ess, 20)}, {"a"}, torch.zeros(1))
    assert ("with most of the weight on one value" in helps(diagnosis)) != telling
    assert ("may not be enough" in helps(diagnosis)) != telling
    assert ("would make the lowest about 5" in helps(diagnosis)) == telling


def outer(ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Particles this many times as wide as the posterior: thirds at -1, 0 and 1."""
    share = 2 / 3 / ratio**2  # of the weight, at -1 and 1
    return torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([share / 2, 1 - share, share / 2])


def beside(distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Particles whose centre is this many of their sds off: nine at 0, one at 1."""
    share = 0.1 + 0.3 * distance  # of the weight, at 1
    weights = torch.full((10,), (1 - share) / 9)
    weights[9] = share
    return torch.tensor(9 * [0.0] + [1.0]), weights


@pytest.mark.parametrize(
    ("particles", "text"),
    [
        (outer(3.1), "3 times as wide as its posterior"),
        (outer(2.9), "which covers its posterior (2.9 times as wide)"),
        (outer(0.91), "which covers its posterior (0.9 times as wide)"),
        (outer(0.89), "only 0.9 times as wide as its posterior"),
        (beside(1.6), "whose centre is 1.6 of its sds off"),
        (beside(1.4), "only 0.6 times as wide as its posterior"),
    ],
)
def test_what_is_said_of_particles(particles: tuple[torch.Tensor, torch.Tensor], text: str) -> None:
    samples, weights = (tensor.double() for tensor in particles)
    marginal = Marginal(samples, weights.log(), {"a": torch.Size()})
    site = replace(diagnosed(wide).sites[0], ess=torch.tensor(4.0), num_particles=20)
    assert text in _better_guide(site, marginal, 2, 2)


@pytest.mark.parametrize("number", [100, 101])
def test_up_to_a_hundred_values_are_to_be_enumerated(number: int) -> None:
    def model() -> None:
        kind = pyro.sample("kind", dist.Categorical(torch.ones(number)))
        pyro.sample("y", dist.Normal(kind * 8.0, 1.0), obs=torch.tensor(80.0))

    assert (f"'kind' has only {number} values" in helps(diagnosed(model))) == (number == 100)


@pytest.mark.parametrize("number", [3, 4])
def test_sharing_pays_from_four_indices_on(number: int) -> None:
    def model() -> None:
        total = sum(pyro.sample(f"z_{i}", dist.Normal(0.0, 50.0)) for i in range(number))
        pyro.sample("y", dist.Normal(total, 0.01), obs=torch.tensor(0.0))

    assert ("particle indices" in helps(diagnosed(model, K=4))) == (number == 4)


def test_particles_of_a_guides_own_site_are_asked_for_by_a_name_of_the_model() -> None:
    """The number may be given to any latent that is computed from the guide's site."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        pyro.sample("free", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(mu, tau), obs=torch.linspace(1.0, 3.0, 20))

    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(poutine.block(model, hide=["free", "y"]), init_scale=2.0)
    guide()
    posterior = MPImportance(model, guide, num_samples={"mu": 4, None: 50}).run()
    said = str(posterior.diagnose(show=False))
    assert re.search(r"Raise num_samples of\s+'(mu|tau)'", said), said
    MPImportance(model, guide, num_samples={"tau": 8, None: 50}).run()
