# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Five minutes: eight schools
#
# Eight schools coached their pupils for a test. Of each school we know how much better its pupils
# did, `y`, and the standard error of that number, `sigma` (Rubin 1981). How much does coaching
# help, and does it help in some schools more than in others?

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive

from pyro_mpis import MPImportance
from pyro_mpis.plots import plot_ess, plot_evidence, plot_marginals

schools = list("ABCDEFGH")
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

# %% [markdown]
# ## The model
#
# An ordinary Pyro model. Each school has an effect `theta`. The effects lie around a mean `mu`,
# with a spread `tau`.


# %%
def model(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# %% [markdown]
# ## The posterior
#
# `MPImportance` draws 100 values of each of the ten latents (its *particles*) and weighs all
# 100<sup>10</sup> combinations of them. There is no guide here, so particles are drawn from the
# prior.

# %%
pyro.set_rng_seed(1)
posterior = MPImportance(model, num_samples=100).run(sigma, y)
print(posterior.summary())

# %% [markdown]
# The last two columns say how far to trust a row. The effective sample size (ESS) is the number of
# particles that carry the answer: a mean is off by about one posterior sd over its square root.
# `diagnose` says the same in words, and what would help.

# %%
posterior.diagnose()

# %% [markdown]
# ## Pictures
#
# Each line of `theta` is a school, with the histogram of its posterior. The bar goes from the 5 %
# to the 95 % quantile. Particles that have at least 1 % of the weight are drawn in red: a dot's
# area, or a line's height, is the weight.

# %%
axes = plot_marginals(posterior, coords={"school": schools})
axes[0].figure.suptitle("Eight schools: 100 particles of each latent, from the prior")
Path("output").mkdir(exist_ok=True)
axes[0].figure.savefig("output/eight_schools.png", dpi=130)
print("picture: output/eight_schools.png")

# %%
plot_ess(posterior)
plt.show()

# %% [markdown]
# ## Any question about the posterior
#
# `moments` gives the posterior mean of any function of the latents. It is called with one value of
# each site, so write it for single numbers.

# %%
p_helps = posterior.moments(lambda theta: (theta > 0).float(), "theta")
for school, p in zip(schools, p_helps.tolist(), strict=True):
    print(f"school {school}: coaching helps with probability {p:.2f}")

# %% [markdown]
# `sample` draws from the joint posterior, in the form that Pyro's `Predictive` takes. Would this
# model produce a best school as good as the best one seen?

# %%
draws = posterior.sample(1000)
predicted = Predictive(model, posterior_samples=draws, parallel=True)(sigma)["y"]  # (1000, 8)
low, high = predicted.max(-1).values.quantile(torch.tensor([0.05, 0.95])).tolist()
print(f"best of eight schools: {y.max():.0f} seen, {low:.0f} to {high:.0f} predicted (90 %)")

# %% [markdown]
# ## The evidence, and its error
#
# The evidence is the probability of the data under the model; to compare two models, subtract
# their log evidences. Several independent sets of particles, *replicates*, show how exact it is.
# For this model the true value is known, by numerical integration: -31.3113.

# %%
pyro.set_rng_seed(1)
replicated = MPImportance(model, num_samples=100, num_replicates=10).run(sigma, y)
log_evidence, error = replicated.evidence().item(), replicated.evidence_error()
print(f"log evidence {log_evidence:.3f}, standard error {error:.3f}; exact -31.311")
plot_evidence(replicated)
plt.show()

# %% [markdown]
# ## Where to go from here
#
# * A better proposal than the prior makes all errors smaller: see the tutorial on learning it.
# * `posterior.to_arviz()` hands the posterior to ArviZ, for its plots and for LOO.
# * [Reading the diagnostics](../diagnostics.md) says when to trust an answer.

# %%
assert abs(log_evidence + 31.3113) < 4 * error
assert low < y.max() < high
assert posterior.summary().rows[0].ess > 20
