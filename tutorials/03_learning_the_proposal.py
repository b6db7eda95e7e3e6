# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Learning the proposal, and knowing that it failed
#
# Particles are drawn from a *proposal*: the prior, or a guide. A proposal near to the posterior
# makes every answer more exact. This tutorial learns one in two ways, lets one of them fail, and
# shows how you would notice. The data: how often each of ten pumps failed, and in how many thousand
# hours of operation (Gaver and O'Muircheartaigh 1987).

# %%
import copy
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

from pyro_mpis import MPImportance, MPISWarning, TraceMP_ELBO
from pyro_mpis.plots import plot_ess

failures = torch.tensor([5.0, 1.0, 5.0, 14.0, 3.0, 19.0, 1.0, 1.0, 4.0, 22.0])
hours = torch.tensor([94.3, 15.7, 62.9, 126.0, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5])
EXACT = -34.408  # log evidence, by numerical integration over shape and rate


def model(hours, failures=None):
    shape = pyro.sample("shape", dist.Exponential(1.0))
    rate = pyro.sample("rate", dist.Exponential(1.0))
    with pyro.plate("pump", len(hours)):
        failing = pyro.sample("failing", dist.Gamma(shape, rate))  # failures in a thousand hours
        pyro.sample("failures", dist.Poisson(failing * hours), obs=failures)


# %% [markdown]
# ## A guide of Pyro's, trained
#
# `TraceMP_ELBO` stands where `Trace_ELBO` stood. Its loss is minus the log evidence that
# `MPImportance` would estimate with these particles. `AutoNormal` gives each latent a Gaussian of
# its own (for positive latents: of the logarithm). We keep a copy of it as it is after 60 steps.

# %%
pyro.settings.set(module_local_params=True)  # else the copy shares the original's parameters
pyro.set_rng_seed(0)
guide = AutoNormal(model, init_scale=0.02)
svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03}), TraceMP_ELBO(num_samples=5))
losses = [svi.step(hours, failures) for _ in range(60)]
early = copy.deepcopy(guide)
losses += [svi.step(hours, failures) for _ in range(30 if "CI" in os.environ else 340)]

plt.figure(figsize=(7, 3), layout="constrained")
plt.plot(losses, lw=0.8, label="loss")
plt.axhline(-EXACT, color="k", ls=":", label="minus the exact log evidence")
plt.axvline(60, color="C1", label="stopped too early")
plt.gca().set(xlabel="step", ylabel="loss (nats)", ylim=(20, 240))
plt.legend()
plt.show()

# %% [markdown]
# Eight *replicates*, independent sets of particles, give the log evidence a standard error. It is
# in nats, the unit of natural logarithms: an error of 0.1 is 10 % of the evidence, and good.

# %%
replicates = 4 if "CI" in os.environ else 8
results = {}  # name -> (log evidence, standard error)


def run(name, guide=None):
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=50, num_replicates=replicates)
    posterior.run(hours, failures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)  # what it says is shown below
        results[name] = (posterior.evidence().item(), posterior.evidence_error())
    print(f"{name}: log evidence {results[name][0]:.2f}, standard error {results[name][1]:.2f}")
    return posterior


run("prior")
trained = run("trained", guide)
stopped = run("stopped early", early)

# %% [markdown]
# ## How to see that it failed
#
# The guide that was stopped early is ten nats off, and its standard error says one. Its particles
# lie close together, so that all replicates miss the same parts of the posterior. Where no exact
# value is known, there are two other ways to find out. The first is to ask what is poor:

# %%
problems = stopped.diagnose(show=False).problems
print(*(f"* {problem.found}" for problem in problems), sep="\n")
print("of the trained guide:", len(trained.diagnose(show=False).problems), "problems")

# %% [markdown]
# The second costs one more run: make the guide wider. A guide that is too wide loses little. If the
# log evidence rises by more than its error, the guide was too narrow.


# %%
def widened(guide, times):
    wider = copy.deepcopy(guide)
    for site in ("shape", "rate", "failing"):
        setattr(wider.scales, site, times * getattr(wider.scales, site).detach())
    return wider


for times in (2, 4, 8):
    run(f"stopped early, {times} times as wide", widened(early, times))
wider = run("trained, 2 times as wide", widened(guide, 2))

# %% [markdown]
# ## Or let `adapt` do it
#
# `adapt` learns a guide in which latents depend on each other. It chooses tens of replicates; eight
# are enough to compare. ESS, the *effective sample size*, is how many equally good particles would
# carry as much: the nearer to the line at the right, the better.

# %%
pyro.set_rng_seed(0)
adapted = MPImportance(model).adapt(hours, failures)
adapted.num_replicates = 8
results["adapt"] = (adapted.run(hours, failures).evidence().item(), adapted.evidence_error())
print(adapted.summary())
plot_ess(adapted)
plt.show()

# %% [markdown]
# All runs beside each other. A bar is two standard errors to either side. The narrow guide moves
# with each doubling, until it covers the posterior; the trained one stays within its error bar.

# %%
values, errors = zip(*results.values(), strict=True)
plt.figure(figsize=(7, 3.4), layout="constrained")
plt.errorbar(values, list(results), xerr=[2 * e for e in errors], fmt="o", ms=4, capsize=3)
plt.axvline(EXACT, color="k", ls=":", label="exact")
plt.gca().invert_yaxis()
plt.xlabel("log evidence (nats)")
plt.legend(loc="lower left")
plt.show()

# %%
assert results["stopped early"][0] < EXACT - 5 < results["stopped early, 8 times as wide"][0]
assert any("narrower than the posterior" in problem.found for problem in problems)
assert results["stopped early, 2 times as wide"][0] > results["stopped early"][0] + 3
assert abs(results["adapt"][0] - EXACT) < 4 * results["adapt"][1] < 1.0
if "CI" not in os.environ:  # there the training is cut short
    assert abs(results["trained"][0] - EXACT) < 4 * results["trained"][1] < 2.0
    assert abs(results["trained, 2 times as wide"][0] - EXACT) < 0.15
