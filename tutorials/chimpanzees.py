# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Chimpanzees: structured guides, and what a group of latents is good for
#
# Seven chimpanzees pulled one of two levers, 72 times each, in six blocks of trials. One lever
# feeds only the actor, the other ("prosocial") also the far side of the table, where in half of
# the trials a partner sat. Do chimpanzees pull for a partner? (Silk et al., Nature 437, 2005;
# McElreath, *Statistical Rethinking*.) The model is that of Bowyer, Heap and Aitchison (2024),
# appendix C.2:
#
#     pulled_left ~ Bernoulli(logit = alpha + alpha_actor + alpha_block
#                                     + (beta_P + beta_PC * condition) * prosocial_left)
#
# with a normal effect for each actor and for each block of an actor, whose two standard deviations
# are unknown. The likelihood reads five latents, so its log factor has `K^5` entries for each
# trial.
#
# `python tutorials/chimpanzees.py` runs on the 504 trials of the public table, in their true
# blocks; `--published` on the 420 of the paper's experiment, against a long NUTS run on them. In
# those arrays the blocks are cut differently (two true blocks of one condition in each cell), so
# the block effects, and the evidence, of the two runs are not comparable.

# %%
import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from _data import load_chimpanzees, load_published
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis import MPImportance

smoke_test = "CI" in os.environ
parser = argparse.ArgumentParser(description="Chimpanzees, with and without a group of latents.")
parser.add_argument("--num-samples", type=int, default=5 if smoke_test else 10, metavar="K")
parser.add_argument("--published", action="store_true", help="the paper's training arrays")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

# Posterior mean and sd on the published arrays, by NUTS: 4 chains of 8000 draws after 2000 of
# warm-up (NumPyro 0.22.0, float64, smallest bulk ESS 12578, largest R-hat 1.0004, no divergence).
NUTS = {
    "alpha": (0.401872, 0.929621),
    "beta_P": (0.759033, 0.286270),
    "beta_PC": (-0.259893, 0.339992),
    "sigma_actor": (2.187100, 0.907712),
    "sigma_block": (0.237877, 0.168528),
    "alpha_actor[0]": (-1.05469, 0.958776),
    "alpha_actor[1]": (4.01322, 1.61902),
    "alpha_actor[2]": (-1.50461, 0.962038),
    "alpha_actor[3]": (-1.41562, 0.959969),
    "alpha_actor[4]": (-1.06683, 0.958599),
    "alpha_actor[5]": (-0.209274, 0.956511),
    "alpha_actor[6]": (1.23385, 0.975023),
}
# Log evidence of the published arrays, by importance sampling from a fit to long runs; s.e. 0.008.
LOG_EVIDENCE = -245.117


# %%
def model(prosocial_left: Tensor, condition: Tensor, pulled_left: Tensor) -> None:
    actors, blocks, trials = pulled_left.shape
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta_P = pyro.sample("beta_P", dist.Normal(0.0, 10.0))
    beta_PC = pyro.sample("beta_PC", dist.Normal(0.0, 10.0))
    sigma_actor = pyro.sample("sigma_actor", dist.HalfCauchy(1.0))
    sigma_block = pyro.sample("sigma_block", dist.HalfCauchy(1.0))
    with pyro.plate("actor", actors, dim=-3):
        alpha_actor = pyro.sample("alpha_actor", dist.Normal(0.0, sigma_actor))
        with pyro.plate("block", blocks, dim=-2):
            alpha_block = pyro.sample("alpha_block", dist.Normal(0.0, sigma_block))
            with pyro.plate("trial", trials, dim=-1):
                prosocial = (beta_P + beta_PC * condition) * prosocial_left
                logits = alpha + alpha_actor + alpha_block + prosocial
                pyro.sample("pulled_left", dist.Bernoulli(logits=logits), obs=pulled_left)


def paper_guide(prosocial_left: Tensor, condition: Tensor, pulled_left: Tensor) -> None:
    """Propose the effects from standard normals, as the paper does; the rest from the prior."""
    actors, blocks, _ = pulled_left.shape
    with pyro.plate("actor", actors, dim=-3):
        pyro.sample("alpha_actor", dist.Normal(0.0, 1.0))
        with pyro.plate("block", blocks, dim=-2):
            pyro.sample("alpha_block", dist.Normal(0.0, 1.0))


# %%
if arguments.published:
    data = load_published("chimpanzees", ("prosocial_left", "condition", "pulled_left"))
    assert data["pulled_left"].shape == (7, 6, 10)
    assert data["pulled_left"].sum() == 238
else:
    data = load_chimpanzees()
    assert data["pulled_left"].shape == (7, 6, 12)
    assert data["pulled_left"].sum() == 292
    # every true block has six trials of each condition
    assert (data["condition"].sum(-1) == 6).all()
trials = data["pulled_left"].numel()
print(f"{trials} trials, {'published arrays' if arguments.published else 'true blocks'}")

# %% [markdown]
# ## Three proposals
#
# The paper proposes the five globals from their wide priors and the effects from standard normals.
# Of ten particles of a Normal(0, 10) hardly one is near the posterior: the evidence comes out tens
# of nats too low, and an ESS near 1 for `alpha` and the slopes says why.
#
# `AutoNormal`, trained by SVI for some seconds, puts the same ten where they count. But only the
# sums `alpha + alpha_actor[i]` are well known, not their two parts, and independent normals can
# cover the sums only by being too narrow about both. So this proposal misses most of the posterior
# of `alpha`, and the ESS need not show it: all particles lie where the guide put them, and there
# most weights are even. What shows it is the evidence, too low by some nats on most runs.
#
# A guide that lets sites read others covers the posterior: the effects of the actors read `alpha`,
# those of the blocks their spread. Each is weighted by its mixture over the particles of the site
# that it reads, without a word from the user. And training by the ELBO leaves a guide narrower
# than the posterior, the worst that can happen to a proposal: rare particles in its tails get
# enormous weights. So the guide is made half as wide again once it is trained. Massively parallel
# sampling can afford that, since each latent pays for its own width only.


# %%
def structured_guide(
    prosocial_left: Tensor, condition: Tensor, pulled_left: Tensor, width: float = 1.5
) -> None:
    actors, blocks, _ = pulled_left.shape

    def loc_scale(name: str, *shape: int) -> tuple[Tensor, Tensor]:
        loc = pyro.param(f"structured.{name}.loc", torch.zeros(shape))
        scale = pyro.param(
            f"structured.{name}.scale", torch.full(shape, 0.3), constraint=constraints.positive
        )
        return loc, width * scale

    alpha = pyro.sample("alpha", dist.Normal(*loc_scale("alpha")))
    pyro.sample("beta_P", dist.Normal(*loc_scale("beta_P")))
    pyro.sample("beta_PC", dist.Normal(*loc_scale("beta_PC")))
    pyro.sample("sigma_actor", dist.LogNormal(*loc_scale("sigma_actor")))
    sigma_block = pyro.sample("sigma_block", dist.LogNormal(*loc_scale("sigma_block")))
    with pyro.plate("actor", actors, dim=-3):
        loc, scale = loc_scale("alpha_actor", actors, 1, 1)
        pyro.sample("alpha_actor", dist.Normal(loc - alpha, scale))
        with pyro.plate("block", blocks, dim=-2):
            loc, scale = loc_scale("alpha_block", actors, blocks, 1)
            pyro.sample("alpha_block", dist.Normal(loc * sigma_block, scale * sigma_block))


def fit(name: str, guide: Callable[..., None]) -> None:
    """Train the parameters of a guide, which Pyro keeps in its parameter store."""
    pyro.set_rng_seed(arguments.seed)
    steps = 500 if smoke_test else 1500
    optimizer = ClippedAdam({"lr": 0.05, "lrd": 0.05 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=3)
    svi = SVI(model, guide, optimizer, elbo)
    losses = [svi.step(**data) for _ in range(steps)]
    print(f"{name} guide trained: ELBO {-sum(losses[-200:]) / 200:.1f}")


pyro.clear_param_store()
guides = {
    "paper": paper_guide,
    "AutoNormal": AutoNormal(model, init_scale=0.1),
    "structured": structured_guide,
}
fit("AutoNormal", guides["AutoNormal"])
fit("structured", partial(structured_guide, width=1.0))

# %% [markdown]
# ## Groups
#
# Sites in a group share one particle index: `K` triples (alpha, beta_P, beta_PC) rather than their
# `K^3` combinations. The likelihood's factor shrinks from `K^5` to `K^3` entries a trial. The
# price is that a triple must be good as a whole. From the wide priors it never is, and the
# evidence is hundreds of nats too low. From a fitted guide it often is: the group costs little in
# accuracy, and three times as many particles are still cheaper.

# %%
K = arguments.num_samples
GROUP = [("alpha", "beta_P", "beta_PC")]
# name: guide, groups, number of particles
CONFIGURATIONS: dict[str, tuple[str, Sequence[Sequence[str]], int]] = {
    "paper": ("paper", (), K),
    "paper, group": ("paper", GROUP, K),
    "AutoNormal": ("AutoNormal", (), K),
    "AutoNormal, group": ("AutoNormal", GROUP, K),
    "structured": ("structured", (), K),
    "structured, group": ("structured", GROUP, K),
    "structured, group, 3K": ("structured", GROUP, 3 * K),
}
seeds = range(arguments.seed, arguments.seed + (1 if smoke_test else 3))


@dataclass(frozen=True)
class Effect:
    """Posterior mean and 90 % interval of a scalar, and the ESS of its particles."""

    mean: float
    low: float
    high: float
    ess: float


def effects(posterior: MPImportance) -> dict[str, Effect]:
    """Describe every scalar latent, plated ones by plate element."""
    rows = {}
    for site, marginal in posterior.marginals().items():
        low, high = marginal.quantile([0.05, 0.95])
        columns = [value.flatten().tolist() for value in (marginal.mean, low, high, marginal.ess)]
        for index, row in enumerate(zip(*columns, strict=True)):
            rows[site if len(columns[0]) == 1 else f"{site}[{index}]"] = Effect(*row)
    return rows


log_evidence: dict[str, Tensor] = {}
found: dict[str, dict[str, Effect]] = {}
print(f"\n{'proposal':<22}{'K':>4}{'seconds':>9}   log evidence, run by run")
for name, (guide, groups, num_samples) in CONFIGURATIONS.items():
    values = []
    begun = time.perf_counter()
    for seed in seeds:
        pyro.set_rng_seed(seed)
        posterior = MPImportance(model, guides[guide], num_samples=num_samples, groups=groups)
        values.append(posterior.run(**data).evidence())
    seconds = (time.perf_counter() - begun) / len(seeds)
    log_evidence[name] = torch.stack(values)
    found[name] = effects(posterior)  # of the last run
    row = "  ".join(f"{value:.1f}" for value in values)
    print(f"{name:<22}{num_samples:>4}{seconds:>9.2f}   {row}")
if arguments.published:
    print(f"{'long-run reference':<38}{LOG_EVIDENCE:.1f}")

# %% [markdown]
# ## Effects
#
# On the logit scale, from the last run of each. An interval ends at particles, and there are few
# of them: read it as a rough one.

# %%
for guide in guides:
    names = [name for name, configuration in CONFIGURATIONS.items() if configuration[0] == guide]
    print("\n" + " " * 14 + "".join(f"{name:>32}" for name in names))
    print(" " * 14 + f"{'mean  [   5 %,  95 %]   ESS':>32}" * len(names))
    for label in NUTS:
        row = [found[name][label] for name in names]
        print(
            f"{label:<14}"
            + "".join(f"{e.mean:>10.2f}  [{e.low:>6.2f},{e.high:>6.2f}]{e.ess:>5.1f}" for e in row)
        )
    least = [
        min(e.ess for label, e in found[name].items() if label.startswith("alpha_block"))
        for name in names
    ]
    print(f"{'alpha_block':<14}" + "".join(f"{'lowest ESS of 42':>27}{ess:>5.1f}" for ess in least))

# %% [markdown]
# ## Against NUTS
#
# On the published arrays the posterior is known from a long NUTS run. Differences of the posterior
# means are in its posterior sds: the mean of ten independent posterior draws would be 0.3 off.

# %%
if arguments.published:
    off = {
        name: {label: (rows[label].mean - mean) / sd for label, (mean, sd) in NUTS.items()}
        for name, rows in found.items()
    }
    print("\n(posterior mean - NUTS mean) / NUTS sd, by proposal")
    for number, name in enumerate(off, 1):
        print(f"  ({number}) {name}")
    print(f"{'':<14}{'NUTS mean (sd)':>16}" + "".join(f"{f'({i})':>9}" for i in range(1, 8)))
    for label, (mean, sd) in NUTS.items():
        row = "".join(f"{differences[label]:>9.2f}" for differences in off.values())
        print(f"{label:<14}{mean:>9.2f} ({sd:.2f}){row}")
    largest = {name: max(map(abs, differences.values())) for name, differences in off.items()}
    print(f"{'largest':<30}" + "".join(f"{value:>9.2f}" for value in largest.values()))

# %% [markdown]
# What the text above says, for the default run of the tutorial.

# %%
assert all(bool(values.isfinite().all()) for values in log_evidence.values())
if arguments.seed == 0 and K == 10 and not smoke_test:
    best = log_evidence["structured, group, 3K"]
    assert best.max() - best.min() < 3
    assert (log_evidence["paper"] < best.mean() - 10).all()
    assert (log_evidence["paper, group"] < best.mean() - 100).all()
    assert (log_evidence["structured"] - log_evidence["structured, group"]).abs().max() < 2
    assert max(found["paper"][label].ess for label in ("alpha", "beta_P", "beta_PC")) < 1.5
    width = {name: rows["alpha"].high - rows["alpha"].low for name, rows in found.items()}
    assert width["AutoNormal"] < 0.5 * width["structured, group, 3K"]
    if arguments.published:
        assert (best - LOG_EVIDENCE).abs().max() < 2
        assert largest["structured, group, 3K"] < 0.6
