# SPDX-License-Identifier: Apache-2.0
"""Bad input: errors name the site or argument, say why and what to do; nothing stays behind."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from pyro.poutine.runtime import _PYRO_STACK, InferDict
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.particles import proposals

Program = Callable[..., object]


def chain(y: float = 0.5) -> None:
    """Two latents and an observation."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(y))


def fails(
    error: type[Exception], match: str, model: Program, guide: Program | None = None, K: int = 3
) -> None:
    """Check the error, and that it leaves the handlers' stack and the param store as they were."""
    pyro.get_param_store().clear()
    pyro.param("kept", torch.tensor(1.0))
    with pytest.raises(error, match=match):
        MPImportance(model, guide, num_samples=K).run()
    assert _PYRO_STACK == []
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert torch.is_grad_enabled()
    assert torch.distributions.Distribution._validate_args
    # and the next run works
    assert bool(MPImportance(chain, num_samples=2).run().evidence().isfinite())


@pytest.mark.parametrize("num_samples", [0, -1, 2.0, "3", True])
def test_number_of_samples(num_samples: int) -> None:
    with pytest.raises(ValueError, match="num_samples: expected a positive integer"):
        MPImportance(chain, num_samples=num_samples)


def test_number_of_samples_missing() -> None:
    with pytest.warns(MPISWarning, match="10 particles"):
        posterior = MPImportance(chain)
    assert posterior.num_samples == 10


def test_programs_that_are_none() -> None:
    with pytest.raises(ValueError, match="model: expected a callable, but found int"):
        MPImportance(3, num_samples=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guide: expected a callable or None, but found dict"):
        MPImportance(chain, {}, num_samples=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "query",
    [
        lambda posterior: posterior.evidence(),
        lambda posterior: posterior.moments(),
        lambda posterior: posterior.marginals(),
        lambda posterior: posterior.sample(3),
        lambda posterior: posterior.summary(),
    ],
)
def test_query_before_run(query: Callable[[MPImportance], object]) -> None:
    with pytest.raises(RuntimeError, match=r"call \.run"):
        query(MPImportance(chain, num_samples=2))


def test_failed_run_keeps_the_last_posterior() -> None:
    """A run that fails changes nothing."""
    posterior = MPImportance(chain, num_samples=2).run()
    before = posterior.evidence()
    with pytest.raises(TypeError):
        posterior.run(1, 2, 3)
    assert torch.equal(posterior.evidence(), before)


def test_unknown_sites() -> None:
    posterior = MPImportance(chain, num_samples=2).run()
    for query in (
        lambda: posterior.marginals("c"),
        lambda: posterior.moments(torch.log, "c"),
        lambda: posterior.moments({"m": (torch.mul, "a", "c")}),
        lambda: posterior.marginals("y"),
    ):
        with pytest.raises(ValueError, match=r"no such latent site, only 'a', 'b'"):
            query()
    with pytest.raises(
        ValueError, match=r"expected the name of a site, but found list.*one by one"
    ):
        posterior.marginals(["a", "b"])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"groups: the model has no latent site 'c'.*'a', 'b'"):
        MPImportance(chain, num_samples=2, groups=[("a", "c")]).run()
    with pytest.raises(ValueError, match=r"groups: expected a sequence of site names"):
        MPImportance(chain, num_samples=2, groups=["ab"]).run()
    with pytest.raises(ValueError, match=r"groups: site 'a' is in .* merge the two groups"):
        MPImportance(chain, num_samples=2, groups=[("a", "b"), ("a",)]).run()


def test_moments_that_make_no_sense() -> None:
    posterior = MPImportance(chain, num_samples=2).run()
    with pytest.raises(ValueError, match=r"moments: give the names of the function's sites"):
        posterior.moments(torch.log)
    with pytest.raises(ValueError, match=r"moment 'm': expected a function and the names"):
        posterior.moments({"m": "a"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"moment function of 'a' failed: it returned int, not"):
        posterior.moments(lambda a: 3, "a")  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"moment function of 'a' failed"):
        posterior.moments(lambda a: a.item(), "a")
    with pytest.raises(ValueError, match=r"moment function of 'a', 'b' failed"):
        posterior.moments(lambda a: a, "a", "b")
    with pytest.raises(ValueError, match="num_samples: expected a positive integer"):
        posterior.sample(0)
    with pytest.raises(ValueError, match="q: expected probabilities"):
        posterior.marginals("a").quantile(1.5)


def test_sites_of_different_plates_have_no_joint() -> None:
    def model() -> None:
        with pyro.plate("p", 2):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("q", 3):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    posterior = MPImportance(model, num_samples=2).run()
    with pytest.raises(ValueError, match=r"sites 'a' and 'b'.*different plates.*\.sample"):
        posterior.marginals("a", "b")


def test_guide_site_that_the_model_lacks() -> None:
    def guide() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    fails(
        ValueError, r"site 'extra': in the guide, but not in the model.*is_auxiliary", chain, guide
    )


def test_guide_site_that_the_model_observes() -> None:
    def guide() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0))

    fails(ValueError, r"site 'y': observed in the model, but sampled in the guide", chain, guide)


def test_guide_of_another_support() -> None:
    def model() -> None:
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, s), obs=torch.tensor(1.0))

    def real() -> None:
        pyro.sample("s", dist.Normal(0.0, 1.0))

    def narrow() -> None:
        pyro.sample("s", dist.Uniform(0.0, 2.0))

    def positive() -> None:
        pyro.sample("s", dist.LogNormal(0.0, 1.0))

    fails(ValueError, r"site 's': the guide's Normal has support.*Gamma.*biject_to", model, real)
    fails(ValueError, r"site 's': the guide's Uniform has support \[0, 2\]", model, narrow)
    assert bool(MPImportance(model, positive, num_samples=3).run().evidence().isfinite())


def test_guide_of_another_shape() -> None:
    def model() -> None:
        with pyro.plate("p", 3):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    fails(
        ValueError,
        r"site 'a': the guide's value has shape \(2,\), the model's \(3,\)",
        model,
        guide,
    )


def test_structure_that_depends_on_a_latent() -> None:
    def branch() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        if a > 0:
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.5))

    # whether or not the site of the branch is met at first
    message = (
        r"model runs on single values, but not on 30.*after site 'a'.*torch\.where"
        r"|site 'y': met in the model only with particles"
    )
    for seed in range(6):
        pyro.set_rng_seed(seed)
        fails(ValueError, message, branch, K=30)

    draws = iter(range(100))

    def other_sites() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample(f"y_{min(next(draws), 1)}", dist.Normal(a, 1.0), obs=torch.tensor(0.5))

    with pytest.raises(ValueError, match=r"site 'y_0': met in the model only without particles"):
        MPImportance(other_sites, num_samples=3).run()


def item(a: Tensor) -> Tensor:
    return torch.tensor(a.sum().item() if a.dim() == 0 else a.item())


def first(a: Tensor) -> Tensor:
    return a[0]


def eats_batch(a: Tensor) -> Tensor:
    return a.reshape(2)[..., 0]


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (item, r"not on 3 particles at once.*after site 'a'.*\.item\(\)"),
        (first, r"site 'y'"),
        (eats_batch, r"not on 3 particles at once.*reshap"),
    ],
)
def test_code_that_is_not_vectorised(function: Callable[[Tensor], Tensor], match: str) -> None:
    def model() -> None:
        if function is item:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        else:
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(function(a), 1.0), obs=torch.tensor(0.5))

    fails(ValueError, match, model)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(),
        lambda x: x / x.norm(),
        lambda x: torch.softmax(x, 0),
        lambda x: torch.cumsum(x, 0),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_code_that_mixes_particles(function: Callable[[Tensor], Tensor], declared: bool) -> None:
    """
    Shapes are right, whatever the numbers: a run at single values shows it.

    A wrong number may be near the right one by chance; then more combinations are looked at.
    """

    def model() -> None:
        event_dim = 1 if declared else 0
        x = pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(event_dim))
        pyro.sample("y", dist.Normal(function(x), 1.0).to_event(event_dim), obs=torch.ones(5))

    fails(ValueError, r"site 'y': its log_prob with all particles at once differs", model, K=4)
    for seed in range(30):
        pyro.set_rng_seed(seed)
        with pytest.raises(ValueError, match="with all particles at once differs"):
            MPImportance(model, num_samples=4).run()


def branches(w: Tensor) -> Tensor:
    return torch.tensor(2.0 if w.sum() > 0 else 0.0)


def item_of_sum(w: Tensor) -> Tensor:
    return torch.tensor(1.0 if w.sum().item() > 0 else -1.0)


def of_numpy(w: Tensor) -> Tensor:
    return torch.tensor(float(np.sign(np.asarray(w).sum())))


@pytest.mark.parametrize("function", [branches, item_of_sum, of_numpy])
def test_values_that_leave_torch(function: Callable[[Tensor], Tensor]) -> None:
    """Right at half of the combinations of particles; so several of them are looked at."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(function(w), 1.0), obs=torch.tensor(2.0))

    for seed in range(6):
        pyro.set_rng_seed(seed)
        fails(ValueError, r"site 'y': its log_prob with all particles at once", model, K=30)


def test_values_that_are_only_looked_at_may_leave_torch() -> None:
    seen = []

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        assert not bool(w.isnan().any())
        seen.append(w.sum().item())
        pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=torch.tensor(2.0))

    posterior = MPImportance(model, num_samples=30).run()
    assert bool(posterior.evidence().isfinite())
    assert posterior._sums[0].replicate.programs.leaves_torch
    assert not MPImportance(chain, num_samples=2).run()._sums[0].replicate.programs.leaves_torch


def test_guide_that_mixes_particles() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(3))

    def guide(log_density: bool) -> None:
        infer: InferDict = {"is_auxiliary": True}
        u = pyro.sample("u", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer=infer)
        if log_density:
            pyro.sample("x", dist.Delta(u, log_density=(u - u.mean()).sum(-1), event_dim=1))
        else:
            pyro.sample("x", dist.Delta(u - u.mean(), event_dim=1))

    for log_density, what in ((False, "value"), (True, "log_prob")):
        message = rf"site 'x': its {what} with all particles at once differs"
        fails(ValueError, message, model, partial(guide, log_density), K=4)


def test_particles_in_place_of_data() -> None:
    """As many particles as rows: what should fail to broadcast gives one for the other."""
    rows = torch.linspace(-1.0, 1.0, 15).reshape(5, 3)

    def model() -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
        with pyro.plate("data", 5):
            scale = s * (1.0 + w.abs().mean(-1, keepdim=True))
            pyro.sample("y", dist.Normal((w * rows).sum(-1), scale), obs=torch.ones(5))

    def guide() -> None:
        pyro.sample("s", dist.LogNormal(0.0, 0.6))
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.2))

    fails(ValueError, r"site 'y': its log_prob with all particles at once differs", model, guide, 5)


def test_guide_that_is_not_vectorised() -> None:
    def guide() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(a[0].sum(), 1.0))

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(a.sum(-1), 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(0.5))

    fails(ValueError, r"site 'b': its proposal was computed from 'a', yet", model, guide)


def test_nan_log_prob() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", a.sign().clamp(max=0.0).sqrt())

    pyro.set_rng_seed(0)
    fails(ValueError, r"site 'f': log_prob is nan at \d of 20 combinations", model, K=20)


def test_infinite_density() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", 1.0 / (a * 0.0).abs())

    fails(ValueError, r"site 'f': log_prob is \+inf", model)


def test_evidence_of_zero() -> None:
    def impossible() -> None:
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        with pyro.plate("p", 2):
            log_prob = torch.where(a > torch.tensor([-1.0, 2.0]), 0.0, -torch.inf)
            pyro.factor("limit", log_prob)

    def together() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.5))
        pyro.factor("one", torch.where(a == 1.0, 0.0, -torch.inf))
        pyro.factor("zero", torch.where(a == 0.0, 0.0, -torch.inf))

    fails(ValueError, r"site 'limit': probability zero.* at 1 of 2 plate elements", impossible)
    fails(ValueError, r"no combination.*'one', 'zero'", together, K=30)


def test_observation_of_the_wrong_shape() -> None:
    def too_many() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(4))

    fails(ValueError, r"site 'y': no log_prob of a value of shape \(4,\)", too_many)


def test_observations_without_a_density_and_what_to_do_with_them() -> None:
    """The advice is followed, too."""

    def hidden(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        mask = torch.tensor([True, False])
        with pyro.plate("data", 2), poutine.mask(mask=mask):  # type: ignore[call-overload]
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    def coins(y: Tensor) -> None:
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Bernoulli(pyro.sample("p", dist.Beta(1.0, 1.0))), obs=y)

    y = torch.tensor([0.3, math.nan])
    fails(ValueError, r"site 'y'.*nan.*torch.nan_to_num", partial(hidden, y))
    MPImportance(hidden, num_samples=3).run(torch.nan_to_num(y))
    heads = torch.tensor([True, False])
    fails(ValueError, r"site 'y'.*bool: give it as numbers, by \.float", partial(coins, heads))
    MPImportance(coins, num_samples=3).run(heads.float())


def test_values_written_among_data() -> None:
    """Writing hides which element is read; ``torch.where`` does not."""
    missing = torch.tensor([False, True, True])
    place = torch.tensor([0, 0, 1])
    covariate = torch.tensor([0.3, 0.0, 0.0])

    def imputed(written: bool) -> None:
        with pyro.plate("missing", 2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if written:
            whole = covariate.expand(*x.shape[:-1], 3).clone()
            whole[..., missing] = x
        else:
            whole = torch.where(missing, x[..., place], covariate)
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(whole, 1.0), obs=torch.zeros(3))

    fails(
        NotImplementedError, r"site .y.*writing into a tensor.*torch.where", partial(imputed, True)
    )
    MPImportance(imputed, num_samples=3).run(False)


def test_observation_that_is_no_tensor() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=0.5)  # type: ignore[arg-type]

    fails(ValueError, r"site 'y': its value is not a tensor, but float\..*as_tensor", model)


def test_what_takes_single_values_only_has_its_remedy() -> None:
    x = torch.randn(5, 3)

    def latent() -> Tensor:
        return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def product() -> None:
        pyro.sample("y", dist.Normal(x @ latent(), 1.0).to_event(1), obs=torch.zeros(5))

    def branch() -> None:
        scale = 1.0 if latent()[..., 0].item() > 0 else 2.0
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(0.0))

    def mixture() -> None:
        with pyro.plate("component", 3):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.sample("y", dist.Normal(Vindex(loc)[..., z], 1.0), obs=torch.zeros(5))

    fails(ValueError, r"plates: write \(X \* w\)\.sum\(-1\) for X @ w", product, K=7)
    fails(ValueError, r"plates: .*torch\.where, and do not call \.item", branch, K=7)
    fails(ValueError, r"another latent's value .* by \.to_event\(1\)", mixture, K=7)


N = 5  # elements of what latents meet outside of plates
DISTANCE = torch.linspace(0.0, 1.0, N).unsqueeze(-1) - torch.linspace(0.0, 1.0, N)


def kernel(advised: bool) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    if advised:
        scale = scale[..., None, None]
    covariance = torch.exp(-((DISTANCE / scale) ** 2)) + torch.eye(N)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(N), covariance), obs=torch.zeros(N))


def expanded(advised: bool) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    fn = dist.Normal(0.0, scale.unsqueeze(-1) * torch.ones(N)) if advised else None
    w = pyro.sample("w", (fn or dist.Normal(0.0, scale).expand([N])).to_event(1))
    pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=torch.tensor(0.5))


def parts_of_one_shape(advised: bool) -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    if advised:
        w, loc = torch.broadcast_tensors(w, loc)
    with pyro.plate("data", N):
        fn = dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(loc, 1.0))
        pyro.sample("y", fn, obs=torch.zeros(N))


def layer(advised: bool) -> None:
    x = DISTANCE[:, :2]
    weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    if advised:
        mean = (x @ weight.transpose(-1, -2) + bias.unsqueeze(-2)).squeeze(-1)
        mean = Vindex(mean)[..., torch.arange(N)]
    else:
        mean = torch.nn.functional.linear(x, weight, bias).squeeze(-1)
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(N))


def vector_along_a_plate(advised: bool) -> None:
    f = pyro.sample("f", dist.Normal(torch.zeros(N), 1.0).to_event(1))
    with pyro.plate("data", N):
        loc = Vindex(f)[..., torch.arange(N)] if advised else f
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.zeros(N))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (kernel, r"x\[\.\.\., None, None\] for a matrix"),
        (expanded, r"scale\.unsqueeze\(-1\) \* torch\.ones\(n\)"),
        (parts_of_one_shape, r"first w, loc = torch\.broadcast_tensors"),
        (layer, r"x @ weight\.transpose\(-1, -2\) \+ bias\.unsqueeze\(-2\)"),
        (vector_along_a_plate, r"along a plate of size n with Vindex\(x\)\[\.\.\., torch\.arange"),
    ],
)
def test_advice_on_dims_works_when_followed(model: Callable[[bool], None], match: str) -> None:
    fails(ValueError, match, partial(model, False), K=7)
    evidence = MPImportance(model, num_samples=7).run(True).evidence()
    assert bool(evidence.isfinite())


def test_names_no_line_of_the_standard_library() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):  # runs the sample statement within contextlib
            pyro.sample("y", dist.Normal(a.reshape(-1), 1.0), obs=torch.zeros(3))

    fails(ValueError, r"after site 'a', in test_errors\.py:\d+, `pyro\.sample\(\"y\"", model, K=7)


def test_an_observation_that_lacks_its_plate_is_named() -> None:
    index = torch.tensor([0, 1, 1, 2])

    def model() -> None:
        with pyro.plate("group", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a[..., index], 1.0), obs=torch.zeros(4))

    fails(NotImplementedError, r"several elements.*dims of 'y' are in no pyro\.plate", model, K=7)


def test_a_factor_of_many_latents_names_some() -> None:
    def model() -> None:
        total = sum(pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)) for i in range(20))
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(0.0))

    fails(MemoryError, r"(z_\d+: 50, ){6}and 14 more: .*split the site", model, K=50)


def test_duplicate_names() -> None:
    def model() -> None:
        for _ in range(2):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    fails(ValueError, r"Multiple sample sites named 'a'.*name of its own", model)


def test_plates_that_cross() -> None:
    def model() -> None:
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows, columns:
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.zeros(2, 3))

    fails(NotImplementedError, r"site 'y'.*'columns'.*'rows'.*cross.*to_event", model)


def test_missing_plate() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("y", dist.Normal(a.sum(), 1.0), obs=torch.tensor(0.0))

    fails(ValueError, r"site 'y': .*Batch dims of 'a' are in no pyro\.plate.*\.to_event", model)


def test_subsampled_plate() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=5):
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(5))

    def sequential() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", 10, subsample_size=5):
            pyro.sample(f"y_{i}", dist.Normal(a, 1.0), obs=torch.tensor(0.0))

    fails(ValueError, r"plate 'data': a subsample of 5 of 10", model)
    fails(ValueError, r"plate 'data': a subsample of 5 of 10", sequential)


def test_plate_of_two_sizes() -> None:
    def model() -> None:
        with pyro.plate("p", 3):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("q", 2):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    def guide() -> None:
        with pyro.plate("p", 2):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    fails(ValueError, r"plate 'p': dim -1 and size 3 at site 'a', but dim -1 and", model, guide)


def test_enumeration_without_support() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0), infer={"enumerate": "parallel"})

    fails(ValueError, r"site 'a': marked infer=.*Normal has no finite support", model)


def test_group_with_a_detour() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        c = pyro.sample("c", dist.Normal(b, 1.0))
        pyro.sample("y", dist.Normal(c, 1.0), obs=torch.tensor(0.5))

    with pytest.raises(ValueError, match=r"groups: \('a', 'c'\).*given 'b'.*Add 'b' to the group"):
        MPImportance(model, num_samples=3, groups=[("a", "c")]).run()


def test_too_many_dims() -> None:
    def model() -> None:
        total = torch.tensor(0.0)
        for i in range(70):
            total = total + pyro.sample(f"a_{i}", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(0.0))

    fails(NotImplementedError, r"site 'y': it reads 70 latent sites.*groups", model)


def test_too_much_memory() -> None:
    """Refused from the sizes alone: nothing large is allocated."""

    def model() -> None:
        total = torch.tensor(0.0)
        for name in "abcdefgh":
            total = total + pyro.sample(name, dist.Normal(0.0, 1.0))
        with pyro.plate("p", 2):
            pyro.sample("y", dist.Normal(total, 1.0), obs=torch.zeros(2))

    fails(
        MemoryError,
        r"site 'y': its log_prob has one element for each.*a: 100.*p: 2.*groups",
        model,
        K=100,
    )


def test_max_plate_nesting_too_small() -> None:
    def model() -> None:
        with pyro.plate("p", 2, dim=-2):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"max_plate_nesting=1, but plates reach dim -2"):
        MPImportance(model, num_samples=2, max_plate_nesting=1).run()
    posterior = MPImportance(model, num_samples=2, max_plate_nesting=3).run()
    assert posterior.moments()["a"].shape == (2, 1)


def test_runs_under_handlers() -> None:
    """Conditioning and scaling from outside act on the run."""
    conditioned = poutine.condition(lambda: chain(), {"a": torch.tensor(0.0)})
    posterior = MPImportance(conditioned, num_samples=2).run()
    assert set(posterior.moments()) == {"b"}


def written_in_place(a: Tensor) -> Tensor:
    """The same value, by a way on which its origin is lost."""
    v = torch.zeros((*a.shape, 1))
    v[..., 0] = a
    return v[..., 0]


def test_origins_lost_by_writing_in_place() -> None:
    """Seen from shapes where every site has a dim, refused where sites share dims."""

    def model(n: int) -> None:
        xs: list[Tensor] = []
        for i in range(n):
            loc = xs[-1] if xs else torch.tensor(0.0)
            xs.append(pyro.sample(f"x{i}", dist.Normal(loc, 1.0)))
        for i in range(n - 2):
            mean = written_in_place(xs[i]) + xs[i + 2]
            pyro.sample(f"y{i}", dist.Normal(mean, 1.0), obs=torch.tensor(0.3))

    assert bool(MPImportance(model, num_samples=3).run(4).evidence().isfinite())
    with pytest.raises(NotImplementedError, match=r"site 'y\d+': it depends on latents besides"):
        MPImportance(model, num_samples=3).run(20)

    def guide() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.5), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(written_in_place(u)))

    fails(ValueError, r"site 'a': its value differs between particles.*in place", chain, guide)


def test_group_whose_parent_is_read_in_place() -> None:
    """The mixture over the parent is found from shapes: right, whatever the origin says."""

    def guide(in_place: bool) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        seen = written_in_place(a) if in_place else a
        b = pyro.sample("b", dist.Normal(0.8 * seen, 0.7))
        pyro.sample("c", dist.Normal(b, 0.7))

    def model(in_place: bool) -> None:
        sites = [pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "abc"]
        pyro.sample("y", dist.Normal(sum(sites), 1.0), obs=torch.tensor(2.0))

    results = []
    for in_place in (False, True):
        pyro.set_rng_seed(0)
        posterior = MPImportance(model, guide, num_samples=4, groups=[("b", "c")]).run(in_place)
        results.append(posterior.evidence())
    torch.testing.assert_close(results[0], results[1])


def test_latent_under_a_mask_that_depends_on_a_latent() -> None:
    """Refused with a guide for it; drawn from the prior it counts as drawn, as in Importance."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with poutine.mask(mask=z.bool()):  # type: ignore[call-overload]
            x = pyro.sample("x", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    fails(NotImplementedError, r"site 'x': a latent site under a mask .*'z'", model, guide)
    posterior = MPImportance(model, num_samples=1000).run()
    means = torch.tensor([0.0, 1.0])
    truth = dist.Normal(means, 2**0.5).log_prob(torch.tensor(0.5)).exp().mean().log()
    assert abs(float(posterior.evidence() - truth)) < 0.1


def test_arguments_invalid_at_some_particles() -> None:
    """Where a distribution would clamp them in silence."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.5, 0.5))
        pyro.sample("y", dist.Bernoulli(a.clamp(max=0.9)), obs=torch.tensor(1.0))

    pyro.set_rng_seed(0)
    with pytest.raises(ValueError, match=r"(model runs on single values, but not on 50|Expected)"):
        MPImportance(model, num_samples=50).run()


def test_guide_outside_of_the_support() -> None:
    """Where torch does not tell the support of a transformed distribution."""

    def model() -> None:
        s = pyro.sample("s", dist.Exponential(1.0))
        pyro.sample("y", dist.Normal(s, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        affine = dist.transforms.AffineTransform(2.0, 1.0)
        pyro.sample("s", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [affine]))

    pyro.set_rng_seed(0)
    fails(ValueError, r"site 's'.*with 50 particles|after site 's'", model, guide, K=50)


def test_sites_that_depend_on_a_reduction_over_latents() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0)) if bool((a > 1.0).any()) else a
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(0.5))

    pyro.set_rng_seed(1)
    with pytest.raises(ValueError, match=r"site 'b': met in the model only with"):
        MPImportance(model, num_samples=100).run()


def test_arguments_of_very_many_particles_are_checked_at_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or that check would take more memory than all the rest, which is done in pieces."""
    monkeypatch.setattr(proposals, "CHECKED_ELEMENTS", 20)
    checked: list[int] = []

    def model() -> None:
        with pyro.plate("p", 2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            if torch.distributions.Distribution._validate_args:
                checked.append(a.numel())
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(2))

    MPImportance(model, num_samples=1000).run()
    assert max(checked) == 20
