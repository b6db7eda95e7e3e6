# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Big: blocks, processes, and results that are kept
#
# What if a sum does not fit into memory, takes long, or is needed again tomorrow? The data of this
# tutorial are simulated: pupils of many schools, with a mean and a trend of each school.

# %%
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyro_mpis import MPImportance
from pyro_mpis.plots import plot_evidence, plot_marginals

pyro.set_rng_seed(0)
num_schools = 10 if "CI" in os.environ else 40
school = torch.arange(num_schools).repeat_interleave(20)
x = torch.randn(len(school))
true_mean = 1.0 + 0.5 * torch.randn(num_schools)
score = true_mean[school] + 0.3 * x + 0.7 * torch.randn(len(school))


def model(school, x, score=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    trend = pyro.sample("trend", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("school", num_schools):
        own = pyro.sample("own", dist.Normal(mean, spread))
    with pyro.plate("pupil", len(school)):
        pyro.sample("score", dist.Normal(own[school] + trend * x, noise), obs=score)


# %% [markdown]
# ## What would it take?
#
# `plan` says it before the run: *entries* are densities that are evaluated, *in parts* is how many
# pieces the work is cut into to stay within the memory limit.

# %%
data = (school, x, score)
limit = 16 * 2**20  # 16 MiB, to see blocks at work
plan = MPImportance(model, num_samples=16, memory_limit=limit).plan(*data)
print(plan)
numbers = [cost.num_samples for cost in plan.costs]
plt.figure(figsize=(6.4, 3), layout="constrained")
plt.loglog(numbers, [cost.memory for cost in plan.costs], "o-", label="needed if nothing is cut")
plt.axhline(limit, color="k", ls=":", label="the limit")
plt.gca().set(xlabel="K, particles of each latent", ylabel="bytes")
plt.legend()
plt.show()

# %% [markdown]
# ## Blocks
#
# A sum that does not fit is taken in *blocks* of particles, one after the other. Nothing is left
# out, so the result is that of a run in one piece, to rounding.


# %%
def run(**options):
    pyro.set_rng_seed(1)
    return MPImportance(model, num_samples=16, disable_progbar=True, **options).run(*data)


whole = run()
blocks = run(memory_limit=limit)
print(f"log evidence in one piece {whole.evidence():.3f}, in blocks {blocks.evidence():.3f}")

# %% [markdown]
# ## A proposal that is learned, and replicates in processes
#
# From the prior this model needs many particles. With `adapt` it needs few, and is no longer big:
# look for a better proposal before a bigger machine. What is left to compute at the same time are
# *replicates*, independent sets of particles. An `executor` takes them: here threads, which a
# notebook can start anywhere, but which take turns. In a script, use processes, each with one core:
#
#     from concurrent.futures import ProcessPoolExecutor
#
#     if __name__ == "__main__":  # each process imports the script
#         with ProcessPoolExecutor(4) as pool:
#             posterior = MPImportance(model, guide, num_replicates=8, executor=pool).run(*data)

# %%
pyro.set_rng_seed(0)
learned = MPImportance(model, disable_progbar=True).adapt(*data)
learned.num_replicates = 8
with ThreadPoolExecutor(2) as pool:
    learned.executor = pool
    pyro.set_rng_seed(2)
    log_evidence = learned.run(*data).evidence()
learned.executor = None  # later queries run here
pyro.set_rng_seed(2)
assert torch.isclose(learned.run(*data).evidence(), log_evidence)  # the same without an executor
plot_evidence(learned)
plt.show()

# %% [markdown]
# Each dot is a replicate; the band is the log evidence of all with its standard error, in nats. An
# error of 0.1 is 10 % of the evidence. The posterior means of the schools lie near the true ones:

# %%
own = learned["own"]
low, high = own.quantile([0.05, 0.95])
plt.figure(figsize=(4.6, 4), layout="constrained")
plt.errorbar(true_mean, own.mean, torch.stack([own.mean - low, high - own.mean]), fmt="o", ms=4)
plt.axline((1, 1), slope=1, color="0.6", ls=":")
plt.gca().set(xlabel="true mean of a school", ylabel="posterior mean, 90 % interval")
plt.show()
plot_marginals(learned, "mean", "trend", "spread")
plt.show()

# %% [markdown]
# ## Keep it
#
# A saved result answers every question as it did, to the last bit. The file holds numbers only and
# cannot run code: model and guide are given again.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "schools.mpis"
    learned.save(path, factors=False)  # smaller: the model is evaluated again when asked
    print(f"{path.stat().st_size / 2**20:.1f} MiB, in memory {learned.nbytes / 2**20:.1f} MiB")
    kept = MPImportance.load(path, learned.model, learned.guide)
print("the same log evidence:", float(kept.evidence()) == float(learned.evidence()))

# %% [markdown]
# ## Many machines
#
# A Dask cluster is an executor too; [Many processes](../many_processes.md) has the details:
#
#     from dask.distributed import Client
#
#     with Client("tcp://scheduler:8786") as client:
#         MPImportance(model, guide, num_replicates=32, executor=client.get_executor()).run(*data)

# %%
assert torch.isclose(whole.evidence(), blocks.evidence(), atol=1e-2)
assert kept.evidence() == learned.evidence()
assert bool((kept["own"].mean == own.mean).all())
inside = float(((true_mean > low) & (true_mean < high)).float().mean())
assert inside > 0.7
