# SPDX-License-Identifier: Apache-2.0
"""The learned proposal: its parts against brute force, then as a whole against known answers."""

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.adaptation import adapting
from pyro_mpis.adaptation.adapting import started
from pyro_mpis.adaptation.gaussian import Gaussian, eliminated
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.layout import Block, by_site, trees
from pyro_mpis.adaptation.log_joint import LogJoint, Pair
from pyro_mpis.adaptation.matching import Noise, matched, pooled
from pyro_mpis.adaptation.moments import flattened, matched_by_moments
from pyro_mpis.adaptation.natural import Fitted, Settings, fit
from pyro_mpis.adaptation.skewness import SplitNormal
from pyro_mpis.adaptation.start import Start
from pyro_mpis.adaptation.tails import StretchedNormal, TailedNormal
from pyro_mpis.adaptation.trials import Runs, Trial, shared_out, tried
from pyro_mpis.options import Options
from pyro_mpis.programs.messages import statements
from pyro_mpis.programs.numbers import index_named

DATA = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9])
FALSE_ALARM = 1e-5


def normals() -> None:
    """Normal means of a plate: the evidence has a closed form."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 5):
        x = pyro.sample("x", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=DATA)


COVARIANCE = 1.25 * torch.eye(5) + torch.ones(5, 5)
LOG_EVIDENCE = float(dist.MultivariateNormal(torch.zeros(5), COVARIANCE).log_prob(DATA))
MEAN = float(torch.ones(5) @ torch.linalg.solve(COVARIANCE, DATA))


def nested() -> None:
    """Plates in plates, with vectors, positive sites and a mask."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("i", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, tau).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        with pyro.plate("j", 2, dim=-1):
            b = pyro.sample("b", dist.Normal(a[..., 0] - a[..., 1], s))
            data = torch.tensor([[0.5, 1.0], [-1.0, 0.3], [2.0, 0.0]])
            seen = torch.tensor([[True, False], [True, True], [True, True]])
        with poutine.mask(mask=seen):  # type: ignore[call-overload]
            pyro.sample("y", dist.Normal(b, 0.7), obs=data)


def start(model: Callable[..., object]) -> Start:
    pyro.set_rng_seed(0)
    return started(model, (), {}, Options(num_samples=2))


def log_joint(begin: Start, non_centred: frozenset[str] = frozenset()) -> LogJoint:
    return LogJoint(
        begin.programs,
        begin.structure,
        begin.blocks,
        non_centred,
        begin.supports,
        begin.others,
    )


def points(blocks: tuple[Block, ...], number: int) -> list[Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    shapes = [(number, *block.shape, block.size) for block in blocks]
    return [0.5 * torch.randn(s, generator=generator, dtype=torch.double) for s in shapes]


# --- the log joint and its derivatives


@pytest.mark.parametrize("non_centred", [frozenset(), frozenset({"a", "b"})])
def test_log_joint_is_that_of_a_trace(non_centred: frozenset[str]) -> None:
    """Densities of an ordinary run at the same values, and Jacobians by autograd."""
    begin = start(nested)
    at = points(begin.blocks, 3)
    found = log_joint(begin, non_centred)(at)
    for point in range(3):
        numbers: dict[str, Tensor] = {}
        for block, z in zip(begin.blocks, at, strict=True):
            numbers |= block.split(z[point])
        mu, tau = numbers["mu"], numbers["tau"].exp()
        a, s, b = numbers["a"], numbers["s"].exp(), numbers["b"]
        log_jacobian = numbers["tau"].sum() + numbers["s"].sum()
        if non_centred:
            a = mu + tau * a
            b = (a[..., 0] - a[..., 1]) + s * b
            log_jacobian = log_jacobian + 6 * tau.log() + 2 * s.log().sum()
        values = {"mu": mu, "tau": tau, "a": a, "s": s, "b": b}
        trace = poutine.trace(poutine.condition(nested, data=values)).get_trace()
        expected = trace.log_prob_sum() + log_jacobian
        assert float(found[point]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("non_centred", [frozenset(), frozenset({"a", "b"})])
def test_gradient_and_hessian_are_those_of_the_dense_matrix(non_centred: frozenset[str]) -> None:
    begin = start(nested)
    at = points(begin.blocks, 2)
    found = log_joint(begin, non_centred).derivatives(at)
    shapes = [z.shape[1:] for z in at]
    sizes = [shape.numel() for shape in shapes]

    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        zs = [p.reshape((1, *shape)) for p, shape in zip(parts, shapes, strict=True)]
        return log_joint(begin, non_centred)(zs).sum()

    flats = [torch.cat([z[n].flatten() for z in at]) for n in range(2)]
    gradients = [torch.autograd.functional.jacobian(of_flat, flat) for flat in flats]
    hessians = [torch.autograd.functional.hessian(of_flat, flat) for flat in flats]
    gradient = (gradients[0] + gradients[1]) / 2
    hessian = (hessians[0] + hessians[1]) / 2
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    for block in begin.blocks:
        part = gradient[starts[block.number] :][: sizes[block.number]]
        assert torch.allclose(found.gradient[block.number].flatten(), part, atol=1e-4)
        for around in (*block.parents, block.number):
            other = begin.blocks[around]
            rows = hessian[starts[block.number] :][: sizes[block.number]]
            dense = rows[:, starts[around] :][:, : sizes[around]]
            dense = dense.reshape((block.elements, block.size, other.elements, other.size))
            # the element of the other block that each element of this one is in
            numbers = torch.arange(other.elements).reshape(other.shape).expand(block.shape)
            mine = torch.arange(block.elements)
            expected = dense[mine, :, numbers.flatten(), :]
            rows_found = found.hessian[block.number, around]
            assert torch.allclose(rows_found.reshape(expected.shape), expected, atol=1e-3)


def hidden_states() -> None:
    mu = pyro.sample("mu", dist.Normal(torch.tensor([0.0, 2.0]), 1.0).to_event(1))
    stay = pyro.sample("stay", dist.Beta(4.0, 2.0))
    z = torch.tensor(0.0)
    for step, y in enumerate([0.1, 1.8, 2.2, -0.2]):
        z = pyro.sample(f"z{step}", dist.Bernoulli(torch.where(z == 1, stay, 1 - stay)))
        pyro.sample(
            f"y{step}", dist.Normal(torch.where(z == 1, mu[1], mu[0]), 0.5), obs=y * torch.ones(())
        )


def by_hand(mu: Tensor, stay: Tensor) -> Tensor:
    """The likelihood of ``hidden_states``, summed over all sequences of states."""
    total = []
    for number in range(16):
        states = [0, *(number >> step & 1 for step in range(4))]
        log_p = torch.zeros(())
        for step, y in enumerate([0.1, 1.8, 2.2, -0.2]):
            one = stay if states[step] else 1 - stay
            log_p = log_p + (one if states[step + 1] else 1 - one).log()
            log_p = log_p + dist.Normal(mu[states[step + 1]], 0.5).log_prob(torch.tensor(y))
        total.append(log_p)
    return torch.stack(total).logsumexp(0)


def test_states_are_marked_and_summed() -> None:
    begin = start(hidden_states)
    assert set(begin.supports) == {"z0", "z1", "z2", "z3"}
    at = points(begin.blocks, 3)
    joint = log_joint(begin)
    found = joint(at)
    (block,) = begin.blocks

    def expected_at(z: Tensor) -> Tensor:
        numbers = block.split(z)
        stay = numbers["stay"].sigmoid()
        prior = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(numbers["mu"]).sum()
        prior = prior + dist.Beta(4.0, 2.0).log_prob(stay) + (stay * (1 - stay)).log()
        total: Tensor = by_hand(numbers["mu"], stay) + prior
        return total

    expected = torch.stack([expected_at(z) for z in at[0]])
    assert torch.allclose(found, expected.double(), atol=1e-4)
    hessians = [torch.autograd.functional.hessian(expected_at, z.reshape(3)) for z in at[0]]
    expected_hessian = torch.stack(hessians).mean(0)
    assert torch.allclose(joint.derivatives(at).hessian[0, 0], expected_hessian, atol=1e-3)


# --- the Gaussian


def test_eliminated_precision_is_the_inverse_of_the_dense_one() -> None:
    begin = start(nested)
    blocks = begin.blocks
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    pairs = [(b.number, a) for b in blocks for a in (*b.parents, b.number)]
    precision: dict[Pair, Tensor] = {}
    for b, a in pairs:
        shape = (*blocks[b].shape, blocks[b].size, blocks[a].size)
        part = 0.3 * torch.randn(shape, generator=generator, dtype=torch.double)
        if a == b:
            part = part @ part.mT + 4 * torch.eye(blocks[b].size)
        precision[b, a] = part
    sizes = [block.elements * block.size for block in blocks]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    dense = torch.zeros(sum(sizes), sum(sizes), dtype=torch.double)
    for (b, a), part in precision.items():
        mine, other = blocks[b], blocks[a]
        part = part.reshape((mine.elements, mine.size, other.size))
        numbers = torch.arange(other.elements).reshape(other.shape).expand(mine.shape).flatten()
        for element in range(mine.elements):
            row = starts[b] + element * mine.size
            column = starts[a] + int(numbers[element]) * other.size
            dense[row : row + mine.size, column : column + other.size] = part[element]
            dense[column : column + other.size, row : row + mine.size] = part[element].mT
    covariance = torch.linalg.inv(dense)
    sds = [torch.ones((*block.shape, block.size), dtype=torch.double) for block in blocks]
    made = eliminated(blocks, precision, sds)
    gradient = [torch.randn(sd.shape, generator=generator, dtype=torch.double) for sd in sds]
    step, _ = made.solve(gradient)
    flat = torch.cat([g.flatten() for g in gradient])
    assert torch.allclose(torch.cat([s.flatten() for s in step]), covariance @ flat)
    gaussian = Gaussian(sds, made.scales(), made.couplings)
    noise = torch.randn((200_000, sum(sizes)), generator=generator, dtype=torch.double)
    parts = noise.split(sizes, -1)
    draws = gaussian.at([p.reshape((-1, *sd.shape)) for p, sd in zip(parts, sds, strict=True)])
    together = torch.cat([d.reshape((len(noise), -1)) for d in draws], -1)
    assert torch.allclose(together.T.cov(), covariance, atol=6 * float(covariance.max()) / 447)
    log_det = torch.linalg.slogdet(covariance).logabsdet
    expected = 0.5 * float(log_det) + 0.5 * sum(sizes) * (1 + math.log(2 * math.pi))
    assert gaussian.entropy() == pytest.approx(expected)


def long_grid() -> tuple[Tensor, Tensor]:
    """Points of a plane, fewer far from zero, and how much of it each stands for."""
    at = torch.linspace(-5.0, 5.0, 1201, dtype=torch.double)
    weight = at.cosh() * (at[1] - at[0])
    return torch.cartesian_prod(at.sinh(), at.sinh()), torch.cartesian_prod(weight, weight).prod(-1)


def test_a_tailed_normal_integrates_to_one_and_draws_from_its_density() -> None:
    fn = TailedNormal(torch.zeros(2, dtype=torch.double))
    points, weight = long_grid()
    assert float(fn.log_prob(points).exp() @ weight) == pytest.approx(1.0, abs=1e-4)
    pyro.set_rng_seed(0)
    draws = fn.sample((100_000,))
    # Of the draws 15 % have a tail in one of the two coordinates, and 10 % in both.
    for bound in (0.5, 2.0, 4.0, 8.0):
        student = max(0.0, 1 - bound / math.sqrt(8 + bound**2) / (12 / math.sqrt(152)))
        expected = 0.825 * 2 * NormalDist().cdf(-bound) + 0.175 * student
        sd = math.sqrt(expected * (1 - expected) / 100_000)
        limit = -NormalDist().inv_cdf(FALSE_ALARM / 20) * sd
        assert abs(float((draws[:, 0].abs() > bound).double().mean()) - expected) < limit
        both = float((draws.abs() > bound).all(-1).double().mean())
        normal = 2 * NormalDist().cdf(-bound)
        expected = 0.75 * normal**2 + 0.15 * normal * student + 0.1 * student**2
        sd = math.sqrt(expected * (1 - expected) / 100_000)
        assert abs(both - expected) < -NormalDist().inv_cdf(FALSE_ALARM / 20) * sd


def test_a_tenth_of_a_tailed_normal_is_wide() -> None:
    loc = torch.tensor([3.0, -2.0], dtype=torch.double)
    scale = torch.tensor([[2.0, 0.0], [1.0, 4.0]], dtype=torch.double)
    fn = TailedNormal(torch.zeros(2, dtype=torch.double), (loc, scale))
    points, weight = long_grid()
    assert float(fn.log_prob(points).exp() @ weight) == pytest.approx(1.0, abs=1e-4)
    pyro.set_rng_seed(0)
    draws = fn.sample((100_000,))
    # Between 6 and 7 the first coordinate is mostly wide; the second is then around its line.
    strip = (draws[:, 0] > 6) & (draws[:, 0] < 7)
    plain = TailedNormal(torch.zeros(2, dtype=torch.double)).sample((100_000,))
    more = strip.double().mean() - ((plain[:, 0] > 6) & (plain[:, 0] < 7)).double().mean()
    normal = NormalDist(3.0, 2.0)
    expected = 0.1 * (normal.cdf(7) - normal.cdf(6))
    assert abs(float(more) - expected) < 4.5 * math.sqrt(2 * 0.01 / 100_000)
    expanded = fn.expand((5, 3))
    assert torch.allclose(
        expanded.log_prob(draws[:15].reshape(5, 3, 2)).flatten(), fn.log_prob(draws[:15])
    )


@pytest.mark.parametrize("stretch", [0.03, 0.15])
def test_a_stretched_normal_integrates_to_one_and_is_the_cubic(stretch: float) -> None:
    fn = StretchedNormal(torch.zeros(1, dtype=torch.double), stretch)
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.double)
    assert float(fn.log_prob(grid.unsqueeze(-1)).exp().sum()) * 0.001 == pytest.approx(1, abs=1e-6)
    z = torch.linspace(-6, 6, 101, dtype=torch.double)
    probability = 0.5 * torch.erfc(-z / math.sqrt(2))
    value = fn.value_at(probability.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(value, z + stretch * z**3, rtol=1e-6, atol=1e-6)
    expected = (
        -0.5 * z.square() - 0.5 * math.log(2 * math.pi) - (1 + 3 * stretch * z.square()).log()
    )
    torch.testing.assert_close(fn.log_prob(value.unsqueeze(-1)), expected, rtol=1e-6, atol=1e-6)
    pyro.set_rng_seed(0)
    draws = fn.sample((100_000,))
    for bound in (0.5, 1.0, 2.0):
        expected_share = NormalDist().cdf(-bound)
        share = float((draws > bound + stretch * bound**3).double().mean())
        sd = math.sqrt(expected_share * (1 - expected_share) / 100_000)
        assert abs(share - expected_share) < -NormalDist().inv_cdf(FALSE_ALARM / 12) * sd


def overflowing() -> None:
    """A rate of exp(exp(.)) that heavy tails of the scale's proposal take to infinity."""
    scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("rows", 3):
        x = pyro.sample("x", dist.Normal(0.0, 40 * scale))
        rate = torch.nn.functional.softplus(x) + x.clamp(min=60.0).sub(60.0).exp() - 1.0
        pyro.sample("y", dist.Poisson(rate + 0.01), obs=torch.tensor([2.0, 5.0, 30.0]))


def test_densities_that_overflow_count_as_zero() -> None:
    posterior = adapted(overflowing).run()
    assert math.isfinite(float(posterior.evidence()))
    guide = posterior.guide
    assert isinstance(guide, AutoPlateNormal)
    assert guide.is_learned


def test_scales_that_underflow_count_as_zero() -> None:
    """A latent whose scale is zero at some particles, and a Gamma that rounds to it."""

    def model() -> None:
        log_scale = pyro.sample("log_scale", dist.Normal(-10.0, 10.0))
        b = pyro.sample("b", dist.Gamma(0.02, 1.0))
        with pyro.plate("row", 3):
            x = pyro.sample("x", dist.Normal(0.0, log_scale.exp()))
            pyro.sample("y", dist.Normal(x + b, 1.0), obs=torch.tensor([0.1, -0.2, 0.3]))

    assert math.isfinite(float(adapted(model).run().evidence()))


def test_flattened_weights_have_the_ess_asked_for() -> None:
    weight = torch.tensor([[0.97, 0.25], [0.01, 0.25], [0.01, 0.25], [0.01, 0.25]]).double()
    flat = flattened(weight)
    ess = 1 / flat.square().sum(0)
    assert float(ess[0]) == pytest.approx(1.2, abs=1e-3)
    assert torch.allclose(flat[:, 1], weight[:, 1])


# --- the guide


def adapted(model: Callable[..., object]) -> MPImportance:
    pyro.set_rng_seed(0)
    return MPImportance(model, num_samples=10).adapt()


learned_once = lru_cache(adapted)


def learned(model: Callable[..., object]) -> MPImportance:
    """Return what was learned before, for tests that do not change it."""
    result = learned_once(model)
    pyro.set_rng_seed(1)
    return result


def test_the_guides_density_is_that_of_its_transform() -> None:
    """The log density of values by the change of variables, with a dense Jacobian by autograd."""
    guide = learned(nested).guide
    assert isinstance(guide, AutoPlateNormal)
    trace = poutine.trace(guide).get_trace()
    sites = statements(trace)
    noise = {name: sites[name]["value"] for name in guide.noise_sites}
    sizes = [value.numel() for value in noise.values()]

    def values_of(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        data = {
            name: part.reshape(value.shape)
            for part, (name, value) in zip(parts, noise.items(), strict=True)
        }
        found = poutine.condition(guide, data=data)()
        assert isinstance(found, dict)
        return torch.cat([found[name].flatten() for name in guide.latents])

    flat = torch.cat([value.flatten() for value in noise.values()])
    jacobian = torch.autograd.functional.jacobian(values_of, flat)
    of_noise = sum(float(sites[n]["fn"].log_prob(v).sum()) for n, v in noise.items())
    expected = of_noise - float(torch.linalg.slogdet(jacobian.double()).logabsdet)
    log_density = torch.as_tensor(trace.log_prob_sum()).detach()
    assert float(log_density) == pytest.approx(expected, abs=1e-3)


def test_the_guide_is_an_autoguide_by_behaviour() -> None:
    guide = learned(normals).guide
    assert isinstance(guide, AutoPlateNormal)
    median, quantiles = guide.median(), guide.quantiles([0.1, 0.5, 0.9])
    assert median["x"].shape == (5,)
    assert quantiles["x"].shape == (3, 5)
    assert bool((quantiles["x"].diff(dim=0) > 0).all())
    assert torch.allclose(quantiles["m"][1], median["m"], atol=0.05)
    assert float(median["m"]) == pytest.approx(MEAN, abs=0.1)
    posterior = Importance(normals, guide, num_samples=500).run()
    assert float(posterior.get_log_normalizer()) == pytest.approx(LOG_EVIDENCE, abs=0.2)
    draws = Predictive(normals, guide=guide, num_samples=7)()
    assert draws["y"].shape == (7, 5)
    draws = Predictive(normals, guide=guide, num_samples=7, parallel=True)()
    assert draws["x"].shape[0] == 7
    assert draws["x"].numel() == 35


def test_the_guide_trains_on_and_its_state_can_be_kept() -> None:
    guide = adapted(normals).guide
    assert isinstance(guide, AutoPlateNormal)
    kept = copy.deepcopy(guide.state_dict())
    pyro.clear_param_store()
    svi = SVI(normals, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=2))
    for _ in range(3):
        svi.step()
    assert any(not torch.equal(kept[name], value) for name, value in guide.state_dict().items())
    pyro.clear_param_store()
    guide.load_state_dict(kept)
    assert all(torch.equal(kept[name], value) for name, value in guide.state_dict().items())


def test_the_result_and_the_guide_go_into_files(tmp_path: Path) -> None:
    posterior = learned(normals).run()
    posterior.save(tmp_path / "result.mpis")
    loaded = MPImportance.load(tmp_path / "result.mpis", posterior.model, posterior.guide)
    assert float(loaded.evidence()) == float(posterior.evidence())
    guide = posterior.guide
    assert isinstance(guide, AutoPlateNormal)
    again = pickle.loads(pickle.dumps(guide))
    for name, value in guide.median().items():
        assert torch.equal(again.median()[name], value)
    with pytest.raises(ValueError, match=r"had a learned proposal.*posterior\.guide"):
        MPImportance.load(tmp_path / "result.mpis", normals)


# --- as a whole


def test_the_table_counts_the_weights_of_each_marginal() -> None:
    """A particle inside of a plate has as many values as there are particles around it."""
    posterior = copy.copy(learned(normals))
    posterior.num_replicates = 2
    posterior.run()
    numbers = {posterior.marginals(site).log_weights.shape[-1] for site in ("m", "x")}
    assert len(numbers) == 2
    summary = posterior.summary()
    assert f"{min(numbers)} to {max(numbers)} particles a site" in str(summary)
    assert all(row.ess <= max(numbers) for row in summary.rows)


def test_a_conjugate_model_is_found() -> None:
    posterior = learned(normals).run()
    assert isinstance(posterior.num_samples, dict)
    assert float(posterior.evidence()) == pytest.approx(LOG_EVIDENCE, abs=0.02)
    assert float(posterior.moments()["m"]) == pytest.approx(MEAN, abs=0.03)


def test_numbers_of_particles_are_those_of_the_latents() -> None:
    """Not of the guide's own sites; as they are, changed, in another object, and in a file."""
    posterior = copy.copy(learned(normals))
    numbers = posterior.num_samples
    assert isinstance(numbers, dict)
    assert list(numbers) == [None, "m", "x"]
    posterior.run()
    pyro.set_rng_seed(1)
    other = MPImportance(posterior.model, posterior.guide, num_samples=numbers, num_replicates=8)
    other.run()
    for site in ("m", "x"):
        assert particles_of(posterior, site) == particles_of(other, site) == numbers[site]
    posterior.num_samples = {**numbers, "m": 70}
    assert particles_of(posterior.run(), "m") == 70
    assert particles_of(posterior, "x") == numbers["x"]
    posterior.num_samples = 20
    assert particles_of(posterior.run(), "m") == particles_of(posterior, "x") == 20


def particles_of(posterior: MPImportance, site: str) -> int:
    """Return the number of particles of the index that a site's values are computed from."""
    structure = posterior._sums[0].replicate.structure
    return structure.by_symbol[index_named(structure, site)].num_samples


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
        sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def log_evidence_of_schools() -> float:
    """By quadrature over tau, given which all is Gaussian."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]).double()
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]).double()
    log_tau = torch.linspace(-12, 9, 8000, dtype=torch.double)
    tau = log_tau.exp()
    covariance = torch.diag_embed(sigma.square() + tau.square().unsqueeze(-1)) + 25.0
    log_p = dist.MultivariateNormal(torch.zeros(8).double(), covariance).log_prob(y)
    log_p = log_p + dist.HalfCauchy(torch.tensor(5.0).double()).log_prob(tau) + log_tau
    return float(log_p.logsumexp(0)) + math.log(21 / 7999)


@pytest.mark.parametrize(
    ("model", "log_evidence"),
    [
        pytest.param(normals, lambda: LOG_EVIDENCE, marks=pytest.mark.slow),
        pytest.param(schools, log_evidence_of_schools, marks=pytest.mark.slow),
    ],
)
def test_the_evidence_of_the_frozen_proposal_is_unbiased(
    model: Callable[[], None], log_evidence: Callable[[], float]
) -> None:
    """A z-test of the mean of P / p over 400 runs; rejects a right program once in 100,000."""
    found = learned(model)
    K = 8 if model is normals else 50
    posterior = MPImportance(found.model, found.guide, num_samples=K, num_replicates=400).run()
    for log_bias in (0.0, math.log(1.05)):
        ratios = (posterior._replicates() + log_bias - log_evidence()).exp()
        z = float((ratios.mean() - 1) / (ratios.std() / math.sqrt(400)))
        limit = NormalDist().inv_cdf(1 - FALSE_ALARM / 2)
        assert (abs(z) < limit) == (log_bias == 0.0), f"z = {z:.1f}, limit {limit:.1f}"


COUNTS = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0, 2.0, 1.0, 0.0])


def few_counts() -> None:
    """The posterior of a Gamma of few counts, as a log, has a long left tail."""
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    with pyro.plate("row", 8):
        x = pyro.sample("x", dist.Gamma(0.7, rate))
        pyro.sample("y", dist.Poisson(x), obs=COUNTS)


def test_long_tails_in_plates_do_not_lower_the_evidence() -> None:
    """By quadrature; with Gaussian noise in the plate half of the runs are 0.2 too low."""
    log_rate = torch.linspace(-5, 5, 4001, dtype=torch.double).unsqueeze(-1)
    rate, y = log_rate.exp(), COUNTS.double()
    log_p = 0.7 * log_rate - math.lgamma(0.7) + torch.lgamma(0.7 + y) - torch.lgamma(y + 1)
    log_p = log_p - (0.7 + y) * (1 + rate).log()
    log_prior = dist.Normal(0.0, 0.5).log_prob(log_rate.squeeze(-1))
    expected = float((log_p.sum(-1) + log_prior).logsumexp(0)) + math.log(10 / 4000)
    posterior = adapted(few_counts).run()
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.03)
    assert float((posterior._replicates() - expected).std()) < 0.1


STEPS = torch.tensor([0.4, 0.9, 0.7, 1.6, 1.2, 1.9, 2.6, 2.3, 1.8, 2.2])


def walk() -> None:
    """A random walk, written as a loop."""
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
    x = torch.tensor(0.0)
    for step, y in enumerate(STEPS):
        x = pyro.sample(f"x{step}", dist.Normal(x, scale))
        pyro.sample(f"y{step}", dist.Normal(x, 0.4), obs=y)


def test_a_chain_has_an_index_for_each_latent() -> None:
    """The evidence by quadrature over the scale, given which all is Gaussian."""
    number = len(STEPS)
    shared = torch.arange(1.0, number + 1).double()
    shared = torch.minimum(shared, shared.unsqueeze(-1))
    log_scale = torch.linspace(-5, 3, 2001, dtype=torch.double)
    covariance = (2 * log_scale).exp()[:, None, None] * shared + 0.16 * torch.eye(number)
    log_p = dist.MultivariateNormal(torch.zeros(number).double(), covariance).log_prob(STEPS)
    log_p = log_p + dist.Normal(-1.0, 0.5).log_prob(log_scale)
    expected = float(log_p.logsumexp(0)) + math.log(8 / 2000)
    posterior = adapted(walk).run()
    guide = posterior.guide
    assert isinstance(guide, AutoPlateNormal)
    names = [[part.name for part in block.parts] for block in guide.blocks]
    assert names == [["scale"], *([f"x{step}"] for step in range(number))]
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.05)
    mean = float((log_p.softmax(0) * log_scale.exp()).sum())
    assert float(posterior.moments()["scale"]) == pytest.approx(mean, abs=0.02)


def linked(pairs: list[tuple[int, int]], event: tuple[int, ...] = ()) -> Callable[[], None]:
    """Ten latents, and densities that read some pairs of them."""

    def model() -> None:
        fn = dist.Normal(torch.zeros(event), 1.0).to_event(len(event))
        x = [pyro.sample(f"x{number}", fn) for number in range(10)]
        for one, other in pairs:
            loc = (x[one] - x[other]).sum()
            pyro.sample(f"y{one}{other}", dist.Normal(loc, 1.0), obs=torch.tensor(0.1))

    return model


@pytest.mark.parametrize(
    ("pairs", "event", "expected"),
    [
        ([(n, n + 1) for n in range(9)], (), range(10)),
        ([(n, n + 1) for n in range(8)], (2,), range(9)),
        ([(n // 2, n) for n in range(1, 10)], (), range(10)),
        ([(n, n + 1) for n in range(6)], (), ()),  # too few
        ([(n, n + 1) for n in range(9)], (3,), ()),  # too many numbers each
        ([(n, (n + 1) % 10) for n in range(10)], (), ()),  # a circle
        ([(0, n) for n in range(1, 10)], (), ()),  # all read one, which is then no part of it
    ],
)
def test_chains_and_trees_are_found(
    pairs: list[tuple[int, int]], event: tuple[int, ...], expected: Sequence[int]
) -> None:
    begin = start(linked(pairs, event))
    assert trees(begin.structure, begin.priors) == {f"x{number}" for number in expected}


def every_support() -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    q = pyro.sample("q", dist.Beta(2.0, 2.0))
    r = pyro.sample("r", dist.Gamma(2.0, 1.0))
    u = pyro.sample("u", dist.Uniform(-1.0, 3.0))
    pyro.sample("v", dist.Uniform(0.0, r))  # a support that depends on another latent
    pyro.sample("L", dist.LKJCholesky(3, torch.tensor(2.0)))
    pyro.sample("c", dist.Multinomial(20, p), obs=torch.tensor([3.0, 10.0, 7.0]))
    pyro.sample("d", dist.Binomial(10, q), obs=torch.tensor(3.0))
    pyro.sample("e", dist.Poisson(r), obs=torch.tensor(4.0))
    pyro.sample("f", dist.Normal(u, 0.5), obs=torch.tensor(2.8))


def test_supports_of_every_kind() -> None:
    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    expected = math.lgamma(3) - math.lgamma(23) + math.lgamma(21)
    expected += math.log(math.comb(10, 3)) + log_beta(5, 9) - log_beta(2, 2)
    expected += math.lgamma(6) - math.lgamma(2) - 6 * math.log(2) - math.lgamma(5)
    normal = NormalDist()
    expected += math.log((normal.cdf(0.4) - normal.cdf(-7.6)) / 4)
    posterior = adapted(every_support).run()
    moments = posterior.moments()
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.1)
    assert torch.allclose(moments["p"], torch.tensor([4.0, 11.0, 8.0]) / 23, atol=0.02)
    assert float(moments["q"]) == pytest.approx(5 / 14, abs=0.02)
    assert float(moments["r"]) == pytest.approx(3.0, abs=0.1)
    assert float(moments["v"]) == pytest.approx(1.5, abs=0.1)


def test_summed_states_as_a_whole() -> None:
    """Against a quadrature over the two means and the probability to stay."""
    posterior = adapted(hidden_states).run()
    grid = torch.linspace(-4, 6, 101, dtype=torch.double)
    stay = torch.linspace(0.0, 1.0, 102, dtype=torch.double)[1:-1]
    a, b, s = torch.meshgrid(grid, grid, stay, indexing="ij")
    with pyro.validation_enabled(False):
        likelihood = torch.vmap(lambda a, b, s: by_hand(torch.stack([a, b]), s))(
            a.flatten(), b.flatten(), s.flatten()
        )
    prior = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(2.0, 1.0).log_prob(b)
    prior = prior + dist.Beta(4.0, 2.0).log_prob(s)
    expected = float((likelihood + prior.flatten()).logsumexp(0)) + 2 * math.log(0.1)
    expected -= math.log(101)
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.05)


def test_nothing_is_left_behind() -> None:
    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(1.0))
    before = dict(pyro.get_param_store().items())
    dtype = torch.get_default_dtype()
    pyro.set_rng_seed(3)
    adapted(normals)
    assert dict(pyro.get_param_store().items()) == before
    assert torch.get_default_dtype() == dtype
    assert not poutine.runtime._PYRO_STACK


def test_a_seed_fixes_the_result() -> None:
    one, other = learned(normals).guide, adapted(normals).guide
    assert isinstance(one, AutoPlateNormal)
    assert isinstance(other, AutoPlateNormal)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_without_a_continuous_latent_there_is_nothing_to_learn() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.2))

    with pytest.raises(ValueError, match="no continuous latent"):
        MPImportance(model, num_samples=10).adapt()


def test_failure_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where trial runs of neither learner are good enough; the better of the two is kept."""
    monkeypatch.setattr(adapting, "LOW_ESS", 1e6)
    with pytest.warns(MPISWarning, match=r"adapt found no good proposal: .* ESS of \d+"):
        posterior = adapted(normals)
    assert float(posterior.run().evidence()) == pytest.approx(LOG_EVIDENCE, abs=0.1)


def many() -> None:
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    mu = pyro.sample("mu", dist.Normal(zero, one))
    with pyro.plate("element", 200):
        pyro.sample("x", dist.Normal(mu, one))


def of_many() -> AutoPlateNormal:
    begin = start(many)
    medians, sds = begin.moments(frozenset())
    gaussian = Gaussian(medians, [torch.diag_embed(sd) for sd in sds], {})
    return begin.guide(gaussian, frozenset(), tails=False)


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_a_guide_moves_by_what_is_no_noise(signal: float) -> None:
    # Means of 200 elements, from an ESS of 10, are noise of sd 0.32 around the signal. A move by a
    # share of each, however small, would fail the first; no move at all the second.
    torch.manual_seed(0)
    guide = of_many()
    noise = 0.1**0.5 * torch.randn(200, 1, dtype=torch.double)
    mean = signal + (noise - noise.mean()) / noise.std() * 0.1**0.5 * 0.99
    moments = Noise(
        torch.ones(1).double(),
        mean.unsqueeze(0),
        torch.ones(1, 200, 1, 1).double(),
        torch.zeros(1, 200, 1).double(),
        torch.full((200,), 10.0).double(),
    )
    before, after = guide.gaussian(), matched(guide, {1: moments}).gaussian()
    shift = (after.means[1] - before.means[1]) / before.scales[1].squeeze(-1)
    if signal:
        torch.testing.assert_close(shift.double(), mean * 1 / 1.1, rtol=0.02, atol=0.02)
    else:
        torch.testing.assert_close(shift, torch.zeros(200, 1))
    torch.testing.assert_close(after.scales[1], before.scales[1])


def of_vector() -> AutoPlateNormal:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(20), 1.0).to_event(1))

    begin = start(model)
    medians, sds = begin.moments(frozenset())
    gaussian = Gaussian(medians, [torch.diag_embed(sd) for sd in sds], {})
    return begin.guide(gaussian, frozenset(), tails=True)


def test_a_guide_moves_by_what_all_runs_have_in_common() -> None:
    # The posterior is 1.5 times as wide in ten of twenty numbers, without any correlation. Far
    # particles have the large weights, so that covariances have more noise than the ESS lets
    # expect. By James and Stein's share alone guides would move to correlations that are noise.
    torch.manual_seed(0)
    wide = torch.tensor([1.5] * 10 + [1.0] * 10).double()
    unit = torch.eye(20).double()
    guide = of_vector()
    left, of_rule, excess = [], [], []
    for _ in range(10):
        runs = []
        for _ in range(6):
            noise = torch.randn(400, 20, dtype=torch.double)
            log_weight = (-0.5 * (noise / wide).square() + 0.5 * noise.square()).sum(-1)
            runs.append((log_weight.softmax(0), noise))
        moments = pooled(torch.full((6,), 1 / 6).double(), runs)
        before, after = (g.gaussian().scales[0] for g in (guide, matched(guide, {0: moments})))
        scale = torch.linalg.solve_triangular(before.detach(), after.detach(), upper=False)
        covariance = (scale @ scale.mT).double()
        left.append(((1 - unit) * covariance).square().sum())
        total = ((1 - unit) * moments.covariance).square().sum()
        of_rule.append(total * max(0.0, 1 - 20 * 19 / float(moments.ess) / float(total)) ** 2)
        excess.append(covariance.diagonal() - 1)
    assert sum(left) < 0.1 * sum(of_rule)
    of_wide, of_others = torch.stack(excess).mean(0).split(10)
    assert of_wide.mean() > 0.5 * (1.5**2 - 1)  # more than half of the way
    assert of_others.abs().max() < 0.1


@pytest.mark.parametrize("is_scale_mapped", [False, True])
def test_mapped_numbers_are_those_of_single_noise(is_scale_mapped: bool) -> None:
    # two levels, as particles of two indices have; a chosen mode maps the scales
    torch.manual_seed(0)
    outer, inner = torch.randn(4, 3, dtype=torch.double), torch.randn(5, 6, 2, dtype=torch.double)
    scales = torch.randn(4, 6, 2, 2, dtype=torch.double)
    coupling = torch.randn(6, 2, 3, dtype=torch.double)

    def numbers(first: Tensor, second: Tensor, scale: Tensor) -> list[Tensor]:
        means = [torch.zeros(3).double(), torch.zeros(6, 2).double()]
        gaussian = Gaussian(means, [torch.eye(3).double(), scale], {(1, 0): coupling})
        return gaussian.at([first, second])

    of_scale = 0 if is_scale_mapped else None
    inside = torch.func.vmap(numbers, (None, 0, None))
    with torch.no_grad():
        found = torch.func.vmap(inside, (0, None, of_scale))(
            outer, inner, scales if is_scale_mapped else scales[0]
        )
        for a, b in itertools.product(range(4), range(5)):
            expected = numbers(outer[a], inner[b], scales[a if is_scale_mapped else 0])
            torch.testing.assert_close([part[a, b] for part in found], expected)


@pytest.mark.parametrize(
    ("log_evidences", "ess", "better"),
    [
        ([-1.0, -1.2, -0.9], [25.0, 25.0, 25.0], True),
        ([-1.0, -1.2, -0.9], [15.0, 15.0, 15.0], False),
        ([-1.0, -1.2, -0.8], [60.0, 60.0, 11.0], True),  # one particle of large weight, by chance
        ([-1.0, -1.2, 0.8], [40.0, 40.0, 1.1], False),  # one of very large weight
        ([-1.3, -1.4, -1.2], [25.0, 25.0, 25.0], True),  # the first three agreed by chance
        ([-2.0, -2.2, -1.9], [25.0, 25.0, 25.0], False),
        ([0.0, -0.2, 0.1], [15.0, 15.0, 15.0], True),  # clearly higher
        ([-math.inf, -1.0, -0.9], [25.0, 25.0, 25.0], False),
    ],
)
def test_a_move_is_better_with_a_higher_ess_and_no_lower_evidence(
    log_evidences: Sequence[float], ess: Sequence[float], better: bool
) -> None:
    def trial(log_evidences: Sequence[float], ess: Sequence[float]) -> Trial:
        noise = {0: pooled(torch.ones(1).double(), [(torch.ones(1), torch.ones(1, 1))])}
        return Trial(torch.tensor(log_evidences).double(), noise, torch.tensor(ess))

    before = trial([-1.0, -1.01, -0.99], [20.0, 20.0, 20.0])
    assert trial(log_evidences, ess).is_better(before) == better


def test_the_pooled_ess_of_a_trial_is_that_of_all_its_weights() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(30).double().exp() for _ in range(3)]
    log_p = torch.stack([weight.mean().log() for weight in weights])
    ess = torch.stack([weight.sum() ** 2 / weight.square().sum() for weight in weights])
    noise = {0: pooled(torch.ones(1).double(), [(torch.ones(1), torch.ones(1, 1))])}
    every = torch.cat(weights)
    expected = float(every.sum() ** 2 / every.square().sum())
    assert Trial(log_p, noise, ess).pooled_ess == pytest.approx(expected)


def test_moments_of_runs_are_those_of_weights_that_are_cut_off() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 50, 2, dtype=torch.double)
    weights = (3 * torch.randn(3, 50, dtype=torch.double)).exp()
    log_p = weights.sum(-1).log()
    runs = [(w / w.sum(), v) for w, v in zip(weights, values, strict=True)]
    noise = pooled(log_p.softmax(0), runs)
    every = (weights / weights.sum()).clamp(max=150**-0.5).flatten()
    every = every / every.sum()
    flat = values.reshape(150, 2)
    mean = every @ flat
    assert (weights / weights.sum()).max() > 2 * 150**-0.5
    torch.testing.assert_close(noise.mean, mean)
    torch.testing.assert_close(noise.covariance, (every * (flat - mean).T) @ (flat - mean))
    torch.testing.assert_close(noise.together(noise.cubes), every @ (flat - mean) ** 3)
    torch.testing.assert_close(noise.ess, 1 / every.square().sum())


@pytest.mark.parametrize("skewness", [-0.9, -0.4, 0.0, 0.7])
def test_a_split_normal_has_mean_zero_variance_one_and_its_skewness(skewness: float) -> None:
    fn = SplitNormal.of(torch.tensor([skewness]).double())
    x = torch.linspace(-12, 12, 200_001).double().unsqueeze(-1)
    density = fn.log_prob(x).exp() * 24 / 200_000
    moments = [float((density * x**power).sum()) for power in range(4)]
    assert moments == pytest.approx([1.0, 0.0, 1.0, skewness], abs=1e-4)
    # quantiles are those of the density
    uniform = torch.tensor([[0.001], [0.2], [0.5], [0.9], [0.9999]]).double()
    below = [float(density[(x <= at).squeeze(-1)].sum()) for at in fn.at(uniform)]
    assert below == pytest.approx(uniform.flatten().tolist(), abs=2e-4)


def test_skewed_noise_with_tails_has_its_density() -> None:
    skewness = torch.tensor([-0.8, 0.5]).double()
    wide = torch.tensor([1.0, -1.0]).double(), torch.tensor([[3.0, 0.0], [1.0, 2.0]]).double()
    fn = TailedNormal(torch.zeros(2).double(), wide, skewness)
    axis = torch.linspace(-30, 30, 1201).double()
    grid = torch.cartesian_prod(axis, axis)
    density = fn.log_prob(grid).exp() * 0.05**2
    assert float(density.sum()) == pytest.approx(1.0, abs=0.01)
    torch.manual_seed(0)
    draws = fn.sample((200_000,))
    for below in ([-1.0, 0.5], [0.3, -0.7], [-2.5, 3.0]):
        corner = torch.tensor(below).double()
        expected = float(density[(grid <= corner).all(-1)].sum())
        assert float((draws <= corner).all(-1).double().mean()) == pytest.approx(expected, abs=0.01)


def test_a_guide_learns_the_skewness_of_its_noise() -> None:
    # log of a Gamma of shape 1, whose skewness is -1.14, in half of the numbers
    torch.manual_seed(0)
    guide = of_vector()
    exponential = -torch.rand(6, 400, 20, dtype=torch.double).log()
    skewed = (exponential.log() + 0.5772) / (math.pi / 6**0.5)
    values = torch.where(torch.arange(20) < 10, skewed, torch.randn(6, 400, 20).double())
    runs = [(torch.full((400,), 1 / 400).double(), value) for value in values]
    moved = matched(guide, {0: pooled(torch.full((6,), 1 / 6).double(), runs)})
    assert moved.is_skewed
    assert not guide.is_skewed
    assert (moved.skewness[:10] < -0.7).all()  # cut off at -0.9
    assert (moved.skewness[10:].abs() < 0.3).all()
    torch.testing.assert_close(moved.with_gaussian(moved.gaussian()).skewness, moved.skewness)


def test_far_draws_of_a_skewed_guide_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = of_vector()
    skewed = guide.with_gaussian(guide.gaussian(), torch.full((20,), -0.5))
    far = torch.linspace(-7.0, 7.0, 4)
    monkeypatch.setattr("pyro_mpis.adaptation.guide.antithetic", lambda n, s: far.expand(20, 4).T)
    numbers = skewed.draws(4, (), {})["x"]
    assert numbers.dtype == torch.float32
    expected = SplitNormal.of(torch.full((1,), -0.5).double()).at(torch.special.ndtr(far.double()))
    gaussian = guide.gaussian()
    scale = gaussian.scales[0].detach().reshape(20, 20).diagonal()
    expected = gaussian.means[0].detach().reshape(20) + expected.unsqueeze(-1) * scale
    torch.testing.assert_close(numbers, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [1, 3])
def test_one_particle_of_all_weight_says_nothing_of_the_skewness(number: int) -> None:
    torch.manual_seed(0)
    skewness = torch.linspace(-0.5, 0.5, 20).double()
    guide = of_vector()
    guide = guide.with_gaussian(guide.gaussian(), skewness)
    weight = torch.zeros(400).double()
    weight[7] = 1.0
    runs = [(weight, torch.randn(400, 20).double()) for _ in range(number)]
    shares = torch.zeros(number).double()
    shares[0] = 1.0  # of the evidence: other runs have none
    moved = matched(guide, {0: pooled(shares, runs)})
    torch.testing.assert_close(moved.skewness, skewness)
    assert moved.gaussian().is_finite()


def test_narrow_data_far_from_the_prior_are_found() -> None:
    """The first trial runs have one particle of all weight each."""

    def narrow() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m, 1e-4), obs=torch.tensor(0.7))

    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match="no good proposal"):
        posterior = MPImportance(narrow).adapt()
    exact = float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.7)))
    assert float(posterior.run().evidence()) == pytest.approx(exact, abs=0.02)


def test_a_trial_run_may_have_zero_evidence() -> None:
    """A later run, that is: the first goes another way."""

    def window() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        is_inside = (m > 2.0) & (m < 2.3)
        pyro.factor("f", torch.where(is_inside, torch.tensor(0.0), torch.tensor(-math.inf)))

    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match="-inf"):
        posterior = MPImportance(window).adapt()
    normal = dist.Normal(torch.tensor(0.0).double(), 1.0)
    exact = float(normal.cdf(torch.tensor(2.3)) - normal.cdf(torch.tensor(2.0)))
    log_p, error = float(posterior.run().evidence()), float(posterior.evidence_error())
    assert abs(log_p - math.log(exact)) < 4 * error < 0.4


@pytest.mark.parametrize(("ess", "number"), [(21, 3), (13, 5), (2, 9)])
def test_a_trial_has_more_runs_where_its_ess_is_low(ess: int, number: int) -> None:
    guide, begun = of_vector(), []  # twenty numbers want an ESS of 60 of all runs

    def runs(guide: AutoPlateNormal) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        begun.append(guide)
        weight = torch.where(torch.arange(30) < ess, 1 / ess, 0.0).double()
        return torch.zeros(()), [(weight, torch.randn(30, 20).double())]

    trial = tried(cast(Runs, runs), guide, 3, most=9)
    assert len(begun) == len(trial.log_evidences) == number
    begun.clear()
    assert len(tried(cast(Runs, runs), guide, 3).log_evidences) == 3


def of_few() -> AutoPlateNormal:
    begin = start(normals)
    medians, sds = begin.moments(frozenset())
    gaussian = Gaussian(medians, [torch.diag_embed(sd) for sd in sds], {})
    return begin.guide(gaussian, frozenset(), tails=False)


@pytest.mark.parametrize(
    ("outer", "inside", "expected"),
    [
        (0.02, 0.03, (None, 5)),  # even, and not the most: as in the trial
        (0.002, 0.05, (150, 10)),  # even, but nearly all of the variance
        (0.01, 0.5, (150, 20)),
        (0.3, 0.5, (None, None)),
        (0.0, 0.5, (None, None)),  # not known
    ],
)
def test_the_index_that_adds_most_of_the_variance_gets_more_particles(
    outer: float, inside: float, expected: tuple[int | None, ...]
) -> None:
    guide = of_few()
    numbers = dict(zip(guide.noise_sites, (150, 5), strict=True))
    trial = Trial(torch.zeros(3), {}, torch.zeros(3), {0: outer, 1: inside})
    found = shared_out(guide, numbers, trial)
    assert tuple(map(found.get, guide.noise_sites)) == expected


def test_a_plate_of_many_elements_has_more_particles_already() -> None:
    guide = of_many()
    numbers = dict(zip(guide.noise_sites, (75, 10), strict=True))
    trial = Trial(torch.zeros(3), {}, torch.zeros(3), {0: 0.01, 1: 0.5})
    assert shared_out(guide, numbers, trial) == {}


def test_a_settled_fit_goes_on_with_its_tail() -> None:
    begin = start(normals)
    medians, sds = begin.moments(frozenset())

    def fitted(resumed: Fitted | None) -> Fitted:
        evaluate = log_joint(begin).derivatives
        widths = begin.widths(frozenset())
        settings = Settings(points=4, tail=5)
        pairs = [(b.number, around) for b in begin.blocks for around in b.parents]
        return fit(begin.blocks, evaluate, medians, sds, widths, pairs, settings, resumed=resumed)

    torch.manual_seed(0)
    first = fitted(None)
    again = fitted(first)
    assert first.settled
    assert again.settled
    assert len(again.elbos) == 1 + 5
    assert abs(again.elbo - first.elbo) < 1.0


def test_moments_alone_find_a_proposal() -> None:
    """The second learner comes to the evidence that the first does."""
    begin = start(nested)
    alone = replace(begin, blocks=begin.blocks_by(by_site))
    assert [len(block.parts) for block in alone.blocks] == [1] * len(begin.priors)
    guide, plan = matched_by_moments(alone, Options(num_samples=2), lambda trial: None)
    trial = tried(Runs(plan), guide, 40)
    expected = float(learned(nested).run().evidence())
    assert trial.log_evidence == pytest.approx(expected, abs=0.6)
    assert guide.noise_sites == tuple(f"_mpis_noise_{n}" for n in range(len(begin.priors)))


def test_an_improper_prior_is_started_from_somewhere() -> None:
    """Against a grid: a flat prior of a location, and of a scale in the half-line."""
    y = torch.tensor([5.0, 11.0, 12.0, 13.0, 14.0, 15.0, 18.0, 19.0, 22.0, 26.0, 30.0, 40.0])

    def model() -> None:
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("rows", 12):
            pyro.sample("y", dist.Normal(m, s), obs=y)

    grid = torch.linspace(-200, 240, 2201, dtype=torch.double).unsqueeze(-1)
    scale = torch.linspace(-1, 8, 901, dtype=torch.double).exp()
    log_p = sum(dist.Normal(grid, scale).log_prob(datum) for datum in y) + scale.log()
    assert isinstance(log_p, Tensor)
    expected = float(log_p.flatten().logsumexp(0)) + math.log(0.2 * 0.01)
    posterior = adapted(model).run()
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.1)
    weight = log_p.flatten().softmax(0).reshape(log_p.shape)
    mean = float((weight * grid).sum())
    sd = math.sqrt(float((weight * (grid - mean) ** 2).sum()))
    assert float(posterior.moments()["m"]) == pytest.approx(mean, abs=0.1 * sd)


def test_groups_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="groups: the guide that adapt learns"):
        MPImportance(normals, groups=[("m", "x")]).adapt()


def many_values(mark: dict[str, object] | None = None) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    logits = -torch.arange(80.0).sub(40.0).square() / 50
    z = pyro.sample("z", dist.Categorical(logits=logits), infer=cast(Any, mark or {}))
    n = pyro.sample("n", dist.Poisson(3.0))
    y = torch.tensor(0.5)
    pyro.sample("y", dist.Normal(x + 0.1 * (z - 40) + 0.0 * n, 1.0), obs=y)


def said_by_adapt(mark: dict[str, object] | None) -> list[str]:
    pyro.set_rng_seed(0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", MPISWarning)
        MPImportance(many_values).adapt(mark)
    return [str(w.message) for w in told if issubclass(w.category, MPISWarning)]


def test_discrete_latents_that_are_left_to_their_prior_are_told() -> None:
    of_z, of_n = said_by_adapt(None)
    assert of_z.startswith("'z' (80 values): adapt sums discrete latents of up to 64 values")
    assert of_n.startswith("'n': discrete latents that cannot be summed")


@pytest.mark.parametrize("mark", [{"enumerate": "parallel"}, {"num_samples": 9}])
def test_nothing_is_told_of_marked_sites(mark: dict[str, object]) -> None:
    assert not [text for text in said_by_adapt(mark) if "'z'" in text]


def test_of_learners_with_the_same_evidence_the_one_of_less_spread_is_taken() -> None:
    def candidate(log_evidences: list[float]) -> adapting._Candidate:
        trial = Trial(torch.tensor(log_evidences, dtype=torch.double), {}, torch.ones(3))
        return adapting._Candidate(cast(AutoPlateNormal, None), trial, True, {}, 1)

    even = candidate([-7.05, -7.04, -7.05])
    noisy = candidate([-6.9, -7.2, -7.0])
    better = candidate([-6.0, -6.1, -5.9])
    impossible = candidate([-math.inf] * 3)
    assert adapting._best([even, noisy]) is even
    assert adapting._best([noisy, even, better]) is better
    assert adapting._best([impossible, noisy]) is noisy
    assert adapting._best([impossible]) is impossible
