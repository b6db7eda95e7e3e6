# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Eight schools: evidence, posterior and diagnostics from a handful of samples
#
# Eight schools coached their pupils for a test. For each we have an estimated effect `y` and its
# standard error `sigma` (Rubin 1981). The model shares strength between the schools:
#
#     mu ~ Normal(0, 5),   theta[j] ~ Normal(mu, tau),
#     tau ~ HalfCauchy(5),     y[j] ~ Normal(theta[j], sigma[j])
#
# Massively parallel importance sampling draws `K` values ("particles") of each of the ten latents
# and weighs all `K^10` ways of combining them, at a cost that grows like `K^3`. The model is small
# enough for an exact answer by quadrature, so every number below stands beside the truth.

# %%
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_mpis import MPImportance

matplotlib.use("Agg")
import matplotlib.pyplot as plt

started = time.perf_counter()
smoke_test = "CI" in os.environ  # fewer replicates; the same model, guides and checks
replicates = 10 if smoke_test else 20
picture = Path("output/eight_schools.png")

y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(sigma: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# %% [markdown]
# ## The exact answer
#
# Given `tau`, everything is Gaussian: `y[j] ~ Normal(mu, sqrt(tau^2 + sigma[j]^2))`, and `mu`
# integrates out in closed form. One integral is left. With `tau = 5 tan(pi u / 2)` the HalfCauchy
# prior is uniform in `u` on (0, 1), and the integrand is even about both ends, so the midpoint
# rule converges faster than any power of the step: 50 points already agree with 2000 to 12 digits.


# %%
class Quadrature:
    """The posterior as a mixture over a grid of ``tau``, each component Gaussian; float64."""

    def __init__(self, num_points: int) -> None:
        u = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
        self.tau = 5 * torch.tan(math.pi * u / 2)  # (points,)
        effect, error = y.double(), sigma.double()
        precision = 1 / (self.tau[:, None] ** 2 + error**2)  # (points, schools): of y[j] given mu
        self.mu_precision = precision.sum(-1) + 1 / 25
        self.mu_mean = (precision * effect).sum(-1) / self.mu_precision
        log_likelihood = 0.5 * (
            (precision / (2 * math.pi)).log().sum(-1)
            - (25 * self.mu_precision).log()
            - (precision * effect**2).sum(-1)
            + self.mu_precision * self.mu_mean**2
        )
        self.log_evidence = (log_likelihood.logsumexp(0) - math.log(num_points)).item()
        self.weight = log_likelihood.softmax(0)
        # theta[j] given tau: between mu and y[j], by the share of the variance that is tau's
        share = self.tau[:, None] ** 2 * precision
        self.theta_mean = self.mu_mean[:, None] + share * (effect - self.mu_mean[:, None])
        self.theta_variance = share * error**2 + (1 - share) ** 2 / self.mu_precision[:, None]
        # the density of u at a grid point is weight * num_points; du / dtau makes it one of tau
        self.tau_density = self.weight * num_points * 10 / (math.pi * (25 + self.tau**2))

    def mean(self) -> dict[str, Tensor]:
        return {
            "mu": self.weight @ self.mu_mean,
            "tau": self.weight @ self.tau,
            "theta": self.weight @ self.theta_mean,
        }

    def sd(self) -> dict[str, Tensor]:
        mean = self.mean()
        square = {
            "mu": self.weight @ (self.mu_mean**2 + 1 / self.mu_precision),
            "tau": self.weight @ self.tau**2,
            "theta": self.weight @ (self.theta_mean**2 + self.theta_variance),
        }
        return {site: (square[site] - mean[site] ** 2).sqrt() for site in mean}

    def mu_density(self, x: Tensor) -> Tensor:
        return dist.Normal(self.mu_mean, self.mu_precision**-0.5).log_prob(x[:, None]).exp() @ (
            self.weight
        )

    def theta_density(self, x: Tensor) -> Tensor:  # (x, schools)
        component = dist.Normal(self.theta_mean, self.theta_variance.sqrt())
        return torch.einsum("xts,t->xs", component.log_prob(x[:, None, None]).exp(), self.weight)


exact = Quadrature(2000)
refined = [Quadrature(num_points).log_evidence for num_points in (50, 4000)]
assert all(abs(value - exact.log_evidence) < 1e-10 for value in refined)
assert abs(exact.log_evidence + 31.311347) < 1e-6
print(f"log evidence by quadrature: {exact.log_evidence:.6f}\n")

# %% [markdown]
# ## The prior as the proposal
#
# Without a guide every latent is proposed from its prior. That is all there is to do: no tuning,
# no gradient. `diagnose` says in words how far to trust the table, and what would help.

# %%
pyro.set_rng_seed(1)
posterior = MPImportance(model, num_samples=100).run(sigma, y)
print("Proposal: the prior, K = 100")
print(posterior.summary())
print()
posterior.diagnose()
error = {
    site: (mean.double() - exact.mean()[site]) / exact.sd()[site]
    for site, mean in posterior.moments().items()
}
worst = max(value.abs().max().item() for value in error.values())
print(f"\nposterior means against quadrature: at most {worst:.2f} posterior sds off\n")
assert worst < 0.6  # see the ESS of mu, about 50: one standard error is 0.15 sds, for ten means

# %% [markdown]
# ## A guide trained by SVI as the proposal
#
# `AutoNormal` gives each latent a Gaussian of its own (a log-normal for `tau`). Trained on the
# ELBO it settles where the eight effects can be independent of each other: at `tau` near 6, with
# the small `tau` that the posterior favours, the neck of the funnel, left out. The ELBO does not
# tell. The importance weights do: with this guide the evidence is too low on most runs, and rarely
# far too high.
#
# The remedy is the usual one, a model whose latents are less dependent: write `theta = mu + tau *
# z`. `LocScaleReparam` does it from outside. The same guide then fits well.


# %%
def fit(program: Callable[..., None]) -> tuple[AutoNormal, float]:
    """Train an AutoNormal; also return its ELBO, averaged over the last steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    steps, last = 1000, 200
    guide = AutoNormal(program, init_scale=0.5)
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(program, guide, optimizer, elbo)
    losses = [svi.step(sigma, y) for _ in range(steps)]
    return guide, -sum(losses[-last:]) / last


@poutine.reparam(config={"theta": LocScaleReparam(centered=0.0)})
def noncentred(sigma: Tensor, y: Tensor | None = None) -> None:
    model(sigma, y)


# %% [markdown]
# Each proposal is run many times, to see the spread that a single run does not show. `P / p(y)` is
# the estimated evidence over the true one, on the linear scale, where the estimate is unbiased:
# its mean is 1 for every proposal. But where the proposal misses a part of the posterior the mean
# hangs on rare runs that hit it, and a table of few runs shows less than 1.


# %%
def replicate(
    program: Callable[..., None], guide: Callable[..., None] | None, num_samples: int
) -> Tensor:
    """Log evidence of independent runs."""
    values = []
    for seed in range(replicates):
        pyro.set_rng_seed(seed)
        run = MPImportance(program, guide, num_samples=num_samples).run(sigma, y)
        values.append(run.evidence())
    return torch.stack(values).double()


def standard_error(ratio: Tensor) -> float:
    return (ratio.std() / len(ratio) ** 0.5).item()


def compare(
    name: str,
    program: Callable[..., None],
    guide: Callable[..., None] | None = None,
    elbo: str = "",
) -> Tensor:
    """Print a row of the table for each K; return the log evidences of the first."""
    rows = {num_samples: replicate(program, guide, num_samples) for num_samples in (30, 100)}
    for num_samples, values in rows.items():
        ratio = (values - exact.log_evidence).exp()
        print(
            f"{name:<25}{num_samples:>4}{elbo:>9}{values[0]:>11.2f}{values.mean():>9.2f}"
            f"{values.std():>7.2f}   {ratio.mean():.2f} ({standard_error(ratio):.2f})"
        )
    return rows[30]


print(f"log evidence, one run and over {replicates} runs; last column: P / p(y)")
print(f"{'proposal':<25}{'K':>4}{'ELBO':>9}{'first run':>11}{'mean':>9}{'sd':>7}   mean (s.e.)")
prior = compare("prior", model)
# One guide at a time: both keep their parameters in Pyro's store, under the same names.
centred_guide, centred_elbo = fit(model)
centred_tau = centred_guide.median()["tau"].item()
centred = compare("AutoNormal", model, centred_guide, f"{centred_elbo:.2f}")
noncentred_guide, noncentred_elbo = fit(noncentred)
better = compare("AutoNormal, non-centred", noncentred, noncentred_guide, f"{noncentred_elbo:.2f}")
print(f"{'quadrature':<38}{exact.log_evidence:>11.2f}\n")

# %% [markdown]
# The non-centred guide is worth its training: both ELBOs bound the same number from below, and at
# the same `K` its evidence has the smaller spread.
#
# Read k-hat together with the ESS. It is fitted to the 20 largest of 100 weights, so it is noisy;
# and where the ESS is above half of `K` it would tell of noise alone, and is left out.
#
# `theta` is no latent of the non-centred model, but a function of three that are: any function of
# several sites has its posterior mean from `moments`.

# %%
ratio = (prior - exact.log_evidence).exp()
assert abs(ratio.mean() - 1) < 4 * standard_error(ratio)  # unbiased
assert abs(prior[0] - exact.log_evidence) < 4 * prior.std()  # one run, by the spread of the runs
assert centred.mean() < exact.log_evidence - 0.3  # the neck of the funnel is missing
assert (centred < exact.log_evidence).double().mean() > 0.5
assert 5 < centred_tau < 7
assert better.std() < prior.std()
assert centred_elbo < noncentred_elbo < exact.log_evidence

pyro.set_rng_seed(0)
guided = MPImportance(noncentred, noncentred_guide, num_samples=100).run(sigma, y)
print("Proposal: AutoNormal of the non-centred model, K = 100")
print(guided.summary())
theta = guided.moments(lambda mu, tau, z: mu + tau * z, "mu", "tau", "theta_decentered")
print("\nposterior mean of theta, by school")
print("  guide      " + " ".join(f"{value:6.2f}" for value in theta.tolist()))
print(
    "  prior      " + " ".join(f"{value:6.2f}" for value in posterior.moments()["theta"].tolist())
)
print("  quadrature " + " ".join(f"{value:6.2f}" for value in exact.mean()["theta"].tolist()))
assert ((theta - exact.mean()["theta"]) / exact.sd()["theta"]).abs().max() < 0.6

# %% [markdown]
# ## Posterior predictive
#
# `sample` draws from the joint posterior of all latents, in the layout that `Predictive` takes.
# Would the model, fitted to these schools, produce a best school as good as the best one seen?

# %%
draws = posterior.sample(1000)
predicted = Predictive(model, posterior_samples=draws, parallel=True)(sigma)["y"]  # (1000, 8)
low, high = predicted.max(-1).values.quantile(torch.tensor([0.05, 0.95])).tolist()
print(f"\nbest of eight schools: observed {y.max():.0f}, predicted {low:.0f} to {high:.0f} (90 %)")
assert predicted.shape == (1000, 8)
assert low < y.max() < high

# %% [markdown]
# ## The picture
#
# Left: prior, exact posterior, and the particles, each with its marginal weight, with their
# weighted histogram. Right: the schools. The estimates are drawn towards their common mean, the
# more so the less exact they are.


# %%
def draw_global(
    axis: plt.Axes, site: str, symbol: str, x: Tensor, prior: Tensor, density: Tensor
) -> None:
    """Prior and posterior density of a global, above its weighted particles."""
    marginal = posterior.marginals(site)
    weight = marginal.log_weights.softmax(-1)
    inside = (marginal.samples >= x.min()) & (marginal.samples <= x.max())
    axis.fill_between(x, prior, color="0.85", label="prior")
    axis.plot(x, density, color="C0", label="posterior, quadrature")
    histogram, *_ = axis.hist(
        marginal.samples,
        bins=16,
        range=(x[0].item(), x[-1].item()),
        weights=weight,
        density=True,
        histtype="step",
        color="C3",
        lw=0.9,
        label="particles, weighted histogram",
    )
    top = 1.35 * max(density.max().item(), histogram.max())
    axis.set(xlim=(x[0], x[-1]), ylim=(0, top), yticks=[], xlabel=symbol)
    stems = axis.twinx()
    stems.vlines(marginal.samples[inside], 0, weight[inside], color="C3", lw=0.9)
    stems.set(ylim=(0, 6 * weight.max()), yticks=[])
    axis.legend(frameon=False, fontsize=8, loc="upper right")


figure, axes = plt.subplot_mosaic(
    [["mu", "theta"], ["tau", "theta"]],
    figsize=(10, 6.2),
    width_ratios=[1, 1.35],
    layout="constrained",
)
x = torch.linspace(-12, 20, 400, dtype=torch.float64)
prior_mu = dist.Normal(0.0, 5.0).log_prob(x).exp()
draw_global(axes["mu"], "mu", r"$\mu$, mean of all schools", x, prior_mu, exact.mu_density(x))
x = torch.linspace(0, 25, 400, dtype=torch.float64)
at = torch.searchsorted(exact.tau, x).clamp(max=len(exact.tau) - 1)
prior_tau = dist.HalfCauchy(5.0).log_prob(x).exp()
draw_global(
    axes["tau"], "tau", r"$\tau$, spread of the schools", x, prior_tau, exact.tau_density[at]
)

schools = axes["theta"]
x = torch.linspace(-30, 45, 400, dtype=torch.float64)
density = exact.theta_density(x)
marginal = posterior.marginals("theta")
weight = marginal.log_weights.softmax(-1)
for j, name in enumerate("ABCDEFGH"):
    row = 7 - j
    schools.fill_between(
        x, row, row + 0.62 * density[:, j] / density.max(), color="C0", alpha=0.35, lw=0, zorder=1
    )
    height = torch.full_like(weight[j], row - 0.08)
    schools.scatter(
        marginal.samples[j], height, s=600 * weight[j], color="C3", alpha=0.4, lw=0, zorder=2
    )
    schools.errorbar(
        y[j], row - 0.27, xerr=sigma[j], fmt="o", color="0.35", ms=4, lw=1, capsize=2, zorder=3
    )
    schools.text(-29, row + 0.12, name, color="0.25")
schools.fill_between([], [], color="C0", alpha=0.35, lw=0, label="posterior, quadrature")
schools.scatter([], [], s=30, color="C3", alpha=0.4, lw=0, label="particles, area by weight")
schools.errorbar([], [], xerr=[], fmt="o", color="0.35", ms=4, lw=1, label="observed, one s.e.")
schools.set(
    xlim=(-30, 45), ylim=(-0.6, 8.4), yticks=[], xlabel=r"$\theta_j$, effect of each school"
)
schools.legend(frameon=False, fontsize=8, loc="upper right", ncols=3, columnspacing=1.2)
figure.suptitle("Eight schools: prior as the proposal, 100 particles per latent", fontsize=11)

picture.parent.mkdir(exist_ok=True)
figure.savefig(picture, dpi=130)
print(f"picture: {picture.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
