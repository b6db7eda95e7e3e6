# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # From Importance, SVI and NUTS, and when not to use this
#
# One model, the eight schools of the first tutorial, by four methods of inference. What does each
# give, and how exact is it?

# %%
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, EmpiricalMarginal, Importance, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.plots import plot_ess

quick = "CI" in os.environ
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


EXACT = -31.3113  # log evidence, by numerical integration
MEANS = {}  # method -> posterior means of the eight schools

# %% [markdown]
# ## From `Importance`
#
# The name of the class changes; so does what is combined. `Importance` weighs joint samples of all
# latents. `MPImportance` weighs all combinations of the values of each. Members of `Importance`
# work: `EmpiricalMarginal(posterior, "mu")`, `exec_traces`, `get_ESS()`.

# %%
for method in (Importance, MPImportance):
    pyro.set_rng_seed(0)
    renamed = method(model, num_samples=100).run(sigma, y)
    value, ess = float(renamed.get_log_normalizer()), float(renamed.get_ESS())
    print(f"{method.__name__}: log evidence {value:.2f}, ESS {ess:.1f} of 100")
print(f"posterior mean of mu: {EmpiricalMarginal(renamed, 'mu').mean:.2f}")

pyro.set_rng_seed(0)
posterior = MPImportance(model).adapt(sigma, y)
if quick:
    posterior.num_replicates = 8
posterior.run(sigma, y)
print(f"after adapt: log evidence {posterior.evidence():.3f} ({posterior.evidence_error():.3f})")
print(f"exact:       log evidence {EXACT:.3f}")
MEANS["MPImportance"] = posterior.moments()["theta"]

# %% [markdown]
# The log evidence is in nats; the number in brackets is its standard error. ESS, the effective
# sample size, is how many equally good particles would carry as much: each site has its own.

# %%
plot_ess(posterior)
plt.show()

# %% [markdown]
# ## From `SVI`
#
# A guide that `SVI` trained is a proposal. Its loss is minus a lower bound on the log evidence, and
# does not say how far off it is. `evidence()` is nearer, and a warning says what is still missing:
# the guide, whose latents do not depend on each other, is narrower than the posterior. The tutorial
# on learning the proposal shows what to do.

# %%
pyro.clear_param_store()
pyro.set_rng_seed(0)
guide = AutoNormal(model)
svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.02}), Trace_ELBO())
losses = [svi.step(sigma, y) for _ in range(300 if quick else 800)]
corrected = MPImportance(model, guide, num_samples=100, num_replicates=8).run(sigma, y)
MEANS["SVI"] = guide.median()["theta"].detach()
MEANS["SVI, corrected"] = corrected.moments()["theta"]
with warnings.catch_warnings(record=True) as notices:
    warnings.simplefilter("always", MPISWarning)
    error = corrected.evidence_error()
bound = -sum(losses[-100:]) / 100
print(f"bound {bound:.2f}, log evidence {corrected.evidence():.2f} ({error:.2f})")
print(*(". ".join(str(notice.message).split(". ")[:3]) for notice in notices))

# %%
plt.figure(figsize=(7, 3), layout="constrained")
plt.plot(losses, lw=0.5, label="loss of SVI")
plt.axhline(-EXACT, color="k", ls=":", label="minus the exact log evidence")
plt.gca().set(xlabel="step", ylabel="nats", ylim=(30, 45))
plt.legend()
plt.show()

# %% [markdown]
# ## From `NUTS`
#
# NUTS needs gradients and time, and gives draws, but no evidence. With enough time it is the
# standard to compare with. Code that takes its draws, such as `Predictive` or ArviZ, takes these:
#
#     draws = mcmc.get_samples()       # before
#     draws = posterior.sample(1000)   # now
#
# What a very long run of NUTS would give is known here, by integration over `mu` and `tau`. The
# means of SVI are near 0, where its training began: while `tau` is small, `mu` and the effects hold
# each other there.

# %%
mu = torch.linspace(-25, 30, 300).double()[:, None, None]
tau = torch.linspace(-7, 6, 400).double().exp()[None, :, None]
log_joint = dist.Normal(mu, (sigma**2 + tau**2).sqrt()).log_prob(y).sum(-1, keepdim=True)
log_joint = log_joint + dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau)
weights = (log_joint + tau.log()).flatten().softmax(0).reshape(log_joint.shape)
theta = (y / sigma**2 + mu / tau**2) / (1 / sigma**2 + 1 / tau**2)
MEANS["exact"] = (weights * theta).sum((0, 1))

# %%
plt.figure(figsize=(7, 3.2), layout="constrained")
for shift, (name, means) in enumerate(MEANS.items()):
    plt.plot(torch.arange(8) + 0.15 * (shift - 1.5), means, "o", label=name)
plt.xticks(range(8), list("ABCDEFGH"))
plt.gca().set(xlabel="school", ylabel="posterior mean of the effect")
plt.figlegend(fontsize="small", ncols=4, loc="outside upper center")
plt.show()

# %% [markdown]
# ## When not to use this
#
# * **A latent that is one long vector**, such as the weights of a network: it has particles as a
#   whole, and is as hard as for ordinary importance sampling. NUTS and SVI use gradients.
# * **An observation that reads all elements of a plate**: its elements share their particles, and a
#   warning says so. **A long chain of states** is better served by a particle filter.
# * **A program that branches on a latent** (`if z > 0:`) runs once for each particle of the
#   latent. That takes longer; with `torch.where` in place of the branch it does not.
# * **Several modes of one posterior**: a learned proposal finds one of them, and no number printed
#   above shows that others are missing. Compare with the prior as the proposal.
#
# It pays where latents are many and each depends on few others, where some are discrete, and where
# the evidence is asked for, with its error.

# %%
assert abs(float(posterior.evidence()) - EXACT) < max(0.05, 4 * posterior.evidence_error())
assert bound < float(corrected.evidence()) < EXACT + 0.1
assert any("narrower than the posterior" in str(notice.message) for notice in notices)
difference = (MEANS["MPImportance"] - MEANS["exact"]).abs().max()
assert difference < 0.5  # posterior sds are 5 to 7
