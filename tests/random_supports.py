# SPDX-License-Identifier: Apache-2.0
"""
Random programs whose supports depend on latents, under masks and scales, as source text.

Two parents stand in no plate or in that of the data: a positive number and a count. What reads them
has a support, or arguments, that not all of their values allow. Guides reach beyond supports.
"""

import random
from dataclasses import dataclass

from random_parts import Generated

PARALLEL = ", infer={'enumerate': 'parallel'}"
# name -> prior, guide
PARENTS = {
    "high": (
        ["Uniform(0.3, 2.5)", "LogNormal(0.2, 0.5)", "Gamma(3.0, 2.0)", "HalfNormal(1.5)"],
        ["Normal(1.2, 1.0)", "Uniform(-0.4, 3.0)", "LogNormal(0.1, 0.7)"],
    ),
    "count": (
        ["Binomial(3, 0.6)", "Poisson(2.0)", "Categorical(torch.tensor([0.2, 0.5, 0.3]))"],
        ["Poisson(2.5)", "Binomial(5, 0.5)"],
    ),
}
# name -> the parent that it reads, prior, guide
CHILDREN = {
    "inside": ("high", "Uniform(0.0, high)", "Normal(0.7, 1.0)"),
    "above": ("high", "Pareto(high, 3.0)", "LogNormal(0.4, 0.8)"),
    "moved": (
        "high",
        "TransformedDistribution(dist.Exponential(1.0), "
        "[dist.transforms.AffineTransform(high, 0.8)])",
        "Normal(1.8, 1.5)",
    ),
    "rest": ("count", "Binomial(count, 0.5)", "Poisson(1.0)"),
    "root": ("high", "Normal((high - 0.5).sqrt(), 1.0)", "Normal(0.5, 1.5)"),
    "share": ("count", "Beta(count, 2.0)", "Normal(0.5, 0.4)"),
}
# site read -> distribution of the data, values that they may have
DATA = {
    "high": [
        ("Uniform(0.0, high)", (0.2, 0.6, 1.1)),
        ("Exponential(high)", (0.3, 1.4)),
        ("Uniform(-0.5, high).mask(torch.tensor(True))", (0.1, 0.9)),
        ("Normal(high, 0.8)", (0.5, 1.5)),
    ],
    "count": [("Binomial(count, 0.4)", (0.0, 1.0, 2.0)), ("Poisson(count + 0.3)", (0.0, 2.0))],
    "inside": [("Uniform(inside, inside + 1.0)", (0.8, 1.1)), ("Normal(inside, 0.6)", (0.4, 1.0))],
    "above": [("Exponential(above)", (0.4, 0.8)), ("Uniform(0.0, above)", (0.5, 1.1))],
    "moved": [("Normal(moved, 1.0)", (1.0, 2.5)), ("Pareto(moved, 2.0)", (2.4, 3.0))],
    "rest": [("Binomial(3 - rest, 0.5)", (0.0, 1.0, 2.0)), ("Binomial(rest + 1, 0.4)", (0.0, 1.0))],
    "root": [("Normal(root, 1.0)", (0.0, 1.0))],
    "share": [("Bernoulli(share)", (0.0, 1.0)), ("Beta(2.0, 3.0 * share)", (0.2, 0.6))],
}
NEED_A_GUIDE = ("root", "share")  # priors that cannot be drawn from at some values of the parent


@dataclass
class Supports:
    """Writes one program."""

    seed: int

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.branches = False

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def statement(self, name: str, text: str, plated: bool, options: str = "") -> list[str]:
        """Sample a site, perhaps under a mask or a scale."""
        mask = "torch.tensor([True, False])" if plated and self.chance(0.6) else "False"
        how = self.rng.choice(["plain"] * 8 + ["own", "handler", "scale"])
        if how == "own":
            text += f".mask({mask})"
        if "obs=" in options and plated and how == "handler" and self.chance(0.7):
            how, options = "plain", f"{options}, obs_mask=torch.tensor([True, False])"
        lines = [f"{name} = pyro.sample('{name}', dist.{text}{options})"]
        if plated:
            lines = ["with data:", f"    {lines[0]}"]
        if how in ("handler", "scale"):
            scale = self.rng.choice(["0.5", "1.7", "high.abs()" if name != "high" else "1.3"])
            handler = f"mask(mask={mask})" if how == "handler" else f"scale(scale={scale})"
            lines = [f"with poutine.{handler}:", *(f"    {line}" for line in lines)]
        return [f"    {line}" for line in lines]

    def program(self) -> Generated:
        plates = {name: self.chance(0.3) for name in PARENTS}
        children = self.rng.sample(list(CHILDREN), self.rng.choice([1, 1, 2]))
        guided = self.chance(0.6) or any(name in NEED_A_GUIDE for name in children)
        model, guide = (
            [f"def {name}():", "    data = pyro.plate('data', 2)"] for name in ("model", "guide")
        )
        for name, (priors, guides) in PARENTS.items():
            prior = self.rng.choice(priors)
            mark = PARALLEL if "Categorical" in prior and self.chance(0.7) else ""
            model += self.statement(name, prior, plates[name], mark)
            if name == "count":  # integers of a Categorical
                model.append("    count = count * 1.0")
            if guided and not mark:
                line = f"pyro.sample('{name}', dist.{self.rng.choice(guides)})"
                guide += self.in_plate(line, plates[name])
        if self.chance(0.15):  # a branch that changes nothing: once for each particle
            model += ["    if (high > 100.0).any():", "        raise AssertionError"]
            self.branches = True
        for name in children:
            parent, prior, proposal = CHILDREN[name]
            plated = plates[parent] or self.chance(0.4)
            model += self.statement(name, prior, plated)
            if guided:
                guide += self.in_plate(f"pyro.sample('{name}', dist.{proposal})", plated)
            plates[name] = plated
        if "root" in children or self.chance(0.2):
            model.append(
                "    pyro.factor('positive', torch.where(high > 0.5, 0.0, -torch.inf).sum())"
            )
        for number, name in enumerate([*children, self.rng.choice(list(PARENTS))]):
            text, values = self.rng.choice(DATA[name])
            plated = plates[name] or self.chance(0.5)
            data = [self.rng.choice(values) for _ in range(2 if plated else 1)]
            observed = f"torch.tensor({data if plated else data[0]})"
            model += self.statement(f"y{number}", text, plated, f", obs={observed}")
        text = "\n".join(guide) if guided else ""
        return Generated(self.seed, 2, "\n".join(model), text, [], True, self.branches)

    def in_plate(self, line: str, plated: bool) -> list[str]:
        return ["    with data:", f"        {line}"] if plated else [f"    {line}"]
