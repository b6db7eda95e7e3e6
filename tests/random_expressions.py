# SPDX-License-Identifier: Apache-2.0
"""
Random Pyro programs, written for single values, as source text.

A seed gives a program of few cells: latents in plates that nest, follow each other or cross, read
in every way that a user may write, and a guide for some of them. Its text is what a failing test
shows, to be shortened by hand.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from random_parts import Latent

AUXILIARY = "infer={'is_auxiliary': True}"
PARALLEL = ", infer={'enumerate': 'parallel'}"
REAL = ("Normal({loc}, {scale})", "StudentT(5.0, {loc}, {scale})", "Laplace({loc}, {scale})")
POSITIVE = (
    "LogNormal(0.4 * torch.tanh({loc} + torch.zeros(())), 0.5)",
    "Gamma(3.0, {scale} + 1.0)",
)


LAYOUTS: list[dict[str, tuple[int, int, tuple[str, ...]]]] = [  # plate -> size, dim, plates around
    {},
    {"p": (2, -1, ())},
    {"p": (3, -1, ())},
    {"p": (2, -1, ()), "q": (2, -2, ("p",))},
    {"p": (2, -2, ()), "q": (2, -1, ("p",))},
    {"p": (2, -1, ()), "q": (3, -1, ())},
    {"p": (2, -1, ()), "q": (2, -1, ())},
    {"p": (2, -2, ()), "q": (2, -1, ())},  # they cross
    {"p": (2, -2, ()), "q": (3, -1, ())},
    {"p": (2, -1, ()), "q": (2, -1, ()), "r": (2, -1, ())},  # chains of index arrays
    {"p": (2, -1, ()), "q": (2, -1, ()), "r": (2, -2, ("q",))},
]


@dataclass
class Expressions:
    """Plates and latents of one program, and ways to read them."""

    seed: int
    max_combinations: int = 260
    latents: list[Latent] = field(default_factory=list)
    may_share: bool = False
    branches: bool = False
    masked: set[str] = field(default_factory=set)  # latents under a mask
    reads_by_index: bool = False  # once: a second time plates may cross

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.layout = dict(self.rng.choice(LAYOUTS))
        self.num_particles = self.rng.choice([2, 2, 2, 3])
        self.combinations = 1
        self.crossing = any(d[1] == -2 and not d[2] for d in self.layout.values()) and (
            "q" in self.layout and not self.layout["q"][2]
        )

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def number(self) -> str:
        return f"{self.rng.uniform(-1.5, 1.5):.2f}"

    def tensor(self, *shape: int) -> str:
        def nested(sizes: tuple[int, ...]) -> Any:
            if not sizes:
                return round(self.rng.uniform(-1.5, 1.5), 2)
            return [nested(sizes[1:]) for _ in range(sizes[0])]

        return f"torch.tensor({nested(shape)})"

    def integers(self, below: int, *shape: int) -> str:
        def nested(sizes: tuple[int, ...]) -> Any:
            if not sizes:
                return self.rng.randrange(below)
            return [nested(sizes[1:]) for _ in range(sizes[0])]

        return f"torch.tensor({nested(shape)})"

    # Plates and shapes.

    def dim(self, plate: str) -> int:
        return {"o": (3, -1, ()), **self.layout}[plate][1]

    def size(self, plate: str) -> int:
        return {"o": (3, -1, ()), **self.layout}[plate][0]

    def shape(self, plates: tuple[str, ...]) -> tuple[int, ...]:
        depth = max([-self.dim(plate) for plate in plates], default=0)
        by_dim = {self.dim(plate): self.size(plate) for plate in plates}
        return tuple(by_dim.get(dim, 1) for dim in range(-depth, 0))

    def places(self) -> list[tuple[str, ...]]:
        """Return the sets of plates that a site may be in."""
        result: list[tuple[str, ...]] = [()]
        for plate, (_, _, around) in self.layout.items():
            result.append((*around, plate))
        if self.crossing:
            result.append(("p", "q"))
        return result

    def elements(self, plates: tuple[str, ...]) -> int:
        return torch.Size(self.shape(plates)).numel()

    # Expressions.

    def scalar_of(self, latent: Latent) -> str:
        """Reduce a latent to one real number for each plate element."""
        name, batch = latent.name, len(self.shape(latent.plates))
        if latent.values:
            table = self.tensor(latent.values)
            return self.rng.choice([f"{table}[{name}]", f"{table}[{name}]", f"(0.7 * {name})"])
        if latent.event is None:
            options = ["{}", "{}", "{}", "torch.sin({})", "(0.5 * {})", "{}.tanh()", "{}.abs()"]
            if not latent.plates:
                options += ["torch.stack([{0}, torch.tensor({1})]).prod()", "{}.reshape(-1)[0]"]
                options += ["torch.where({0} > 0, {0}, {1})"]
            return self.rng.choice(options).format(name, self.number())
        weights = self.tensor(latent.event)
        options = [f"{name}[{':, ' * batch}0]", f"{name}[..., 1]", f"{name}.sum(-1)"]
        options += [
            f"({name} @ {weights})",
            f"({name} / {name}.norm(dim=-1, keepdim=True))[..., 1]",
        ]
        options += [f"{name}.logsumexp(-1)", f"{name}.max(-1).values", f"{name}.cumsum(-1)[..., 1]"]
        if not latent.plates:
            matrix = self.tensor(2, latent.event)
            options += [f"{name}[0]", f"{name}[-1]", f"({matrix} @ {name}).prod()"]
            options += [f"torch.stack([{name}[1], {name}[0]])[0]", f"({name} @ {name}).sqrt()"]
            options += [f"({name} / {name}.norm())[0]", f"{name}.reshape(-1).softmax(0)[1]"]
            options += [f"torch.outer({name}, {name})[0, 1]", f"{name}.flip(0)[0]"]
        return self.rng.choice(options)

    def mixed(self, text: str, latent: Latent, plate: str) -> str:
        """Mix the elements of a plate, in its own shape."""
        self.may_share = True
        dim = self.dim(plate)
        return self.rng.choice(
            [
                "{0}.cumsum({1})",
                "{0}.softmax({1})",
                "({0} - {0}.mean({1}, keepdim=True))",
                "{0}.flip({1})",
                "{0}.roll(1, {1})",
                "({0} / ({0}.norm() + 0.1))",
            ]
        ).format(text, dim)

    def read(self, latent: Latent, plates: tuple[str, ...]) -> str | None:
        """Read a latent at a site of some plates; None if there is no way."""
        text = self.scalar_of(latent)
        foreign = [plate for plate in latent.plates if plate not in plates]
        shape = self.shape(latent.plates)
        if not foreign:
            if latent.plates and self.chance(0.12):
                text = self.mixed(text, latent, self.rng.choice(latent.plates))
            return text
        if len(shape) == 1:
            (plate,) = foreign
            same_dim = [p for p in plates if self.dim(p) == -1]
            if same_dim and self.chance(0.7):
                self.may_share |= self.reads_by_index
                self.reads_by_index = True
                return f"({text})[{self.integers(self.size(plate), self.size(same_dim[0]))}]"
            self.may_share = True
            selectors = [
                z
                for z in self.latents
                if 0 < z.values <= self.size(plate) and set(z.plates) <= set(plates)
            ]
            if selectors and self.chance(0.6):
                return f"({text})[{self.rng.choice(selectors).name}]"
            options = ["({}).sum()", "({}).mean()", "({})[0]", "({}).softmax(0)[0]"]
            options += ["({}).logsumexp(0)", "({}).prod()", "({}).norm()", "({}).cumsum(0)[-1]"]
            options += ["({0} @ {1})"]
            return self.rng.choice(options).format(text, self.tensor(self.size(plate)))
        self.may_share = True
        if set(foreign) == set(latent.plates):
            return self.rng.choice(["({}).sum()", "({}).mean()", "({}).reshape(-1)[0]"]).format(
                text
            )
        (plate,) = foreign
        operation = self.rng.choice(["sum", "mean", "logsumexp"])
        keep = "" if self.dim(plate) == -2 else ", keepdim=True"
        return f"({text}).{operation}({self.dim(plate)}{keep})"

    def real(self, plates: tuple[str, ...], most: int = 3) -> str:
        """Return a real number for each plate element, of up to ``most`` latents."""
        terms = []
        if self.latents:
            number = self.rng.randint(1 if self.chance(0.9) else 0, most)
            for latent in self.rng.sample(self.latents, min(number, len(self.latents))):
                term = self.read(latent, plates)
                if term is not None:
                    terms.append(term)
        if not terms or self.chance(0.3):
            terms.append(self.number())
        result = terms[0]
        for term in terms[1:]:
            result = f"({result} {self.rng.choice(['+', '+', '-', '*'])} {term})"
        return result

    def scale(self, plates: tuple[str, ...]) -> str:
        positive = [v for v in self.latents if v.positive and set(v.plates) <= set(plates)]
        if positive and self.chance(0.4):
            return f"({self.rng.choice(positive).name} + 0.3)"
        return f"{self.rng.uniform(0.5, 1.5):.2f}"

    def row(self, latent: Latent, plates: tuple[str, ...]) -> str:
        """Return a vector for each plate element: its own one, or one that others choose."""
        if set(latent.plates) <= set(plates):
            return latent.name
        self.may_share = True
        selectors = [z for z in self.latents if 0 < z.values <= self.size(latent.plates[0])]
        selectors = [z for z in selectors if set(z.plates) <= set(plates)]
        if selectors and self.dim(latent.plates[0]) == -1:
            return f"{latent.name}[{self.rng.choice(selectors).name}]"
        return f"{latent.name}.reshape(-1, {latent.event}).mean(0)"

    def vector(self, size: int) -> str:
        """Return a vector computed from latents, in no plate."""
        options = [""]
        for latent in self.latents:
            name, event = latent.name, latent.event
            if event and not latent.plates:
                options.append(f"({self.tensor(size, event)} @ {name})")
                options.append(f"{name}[{self.integers(event, size)}]")
                plain = [z for z in self.latents if 0 < z.values <= event and not z.plates]
                options += [f"({name}[{z.name}] * {self.tensor(size)})" for z in plain]
            if len(self.shape(latent.plates)) == 1 and not event and not latent.values:
                plated = self.size(latent.plates[0])
                options += [f"{name}[{self.integers(plated, size)}] + 0.0"] * 2
                options.append(f"({self.tensor(size, plated)} @ {name}.double())")
                options += [f"{name}.double()", f"{name}.cumsum(0)"] if plated == size else []
        chosen = self.rng.choice(options)
        if not chosen:
            return f"({self.real(())} * {self.tensor(size)})"
        plated_names = [latent.name for latent in self.latents if latent.plates]
        if any(name in chosen for name in plated_names):
            self.may_share |= self.reads_by_index or "@" in chosen or "cumsum" in chosen
            self.reads_by_index = True
        return chosen
