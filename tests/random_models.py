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
class Writer:
    """Writes one program."""

    seed: int
    max_combinations: int = 260
    latents: list[Latent] = field(default_factory=list)
    may_share: bool = False
    branches: bool = False
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

    # Statements.

    def spend(self, cells: int, size: int) -> bool:
        if self.combinations * size**cells > self.max_combinations:
            return False
        self.combinations *= size**cells
        return True

    def inside(self, plates: tuple[str, ...], statement: str) -> list[str]:
        lines = [f"    {statement}"]
        if plates:
            lines = [f"    with {', '.join(plates)}:", f"        {statement}"]
        return lines

    def latent(self, number: int) -> list[str]:
        plates = self.rng.choice(self.places())
        self.may_share |= self.crossing and len(plates) > 1
        name, cells = f"z{number}", self.elements(plates)
        kind = self.rng.choice(["real"] * 4 + ["pos", "vec", "vec", "cat", "cat", "bern", "free"])
        enumerated = kind in ("cat", "bern") and self.chance(0.5)
        values = {"cat": 2 if self.chance(0.5) else 3, "bern": 2}.get(kind, 0)
        if not self.spend(cells, values if enumerated else self.num_particles):
            return []
        mark = PARALLEL if enumerated else ""
        event = self.rng.choice([2, 3]) if kind in ("vec", "free") else None
        if kind == "real":
            text = self.rng.choice(REAL).format(loc=self.real(plates, 2), scale=self.scale(plates))
        elif kind == "pos":
            text = self.rng.choice(POSITIVE).format(
                loc=self.real(plates, 1), scale=self.scale(plates)
            )
        elif kind == "bern":
            text = f"Bernoulli(logits={self.real(plates, 2)})"
        elif kind == "cat":
            text = f"Categorical(logits={self.tensor(values)})"
            parents = [z for z in self.latents if z.values and set(z.plates) <= set(plates)]
            if parents and self.chance(0.7):
                parent = self.rng.choice(parents)
                rows = self.tensor(parent.values, values)
                text = f"Categorical(logits={rows}[{parent.name}])"
        else:
            assert event is not None
            text = self.rng.choice(
                [
                    f"Normal({self.tensor(event)}, 1.0).to_event(1)",
                    f"Normal(0.0, 1.0).expand([{event}]).to_event(1)",
                    f"MultivariateNormal({self.tensor(event)}, torch.eye({event}) + 0.3)",
                ]
            )
            if kind == "free" and not plates:  # a dim that no plate declares
                text = f"Normal({self.tensor(event)}, 1.0)"
            elif not plates and self.chance(0.3):
                loc = f"{self.real((), 2)} * {self.tensor(event)}"
                text = f"MultivariateNormal({loc}, torch.eye({event}) + 0.3)"
        self.latents.append(
            Latent(name, plates, event, values if kind != "bern" else 2, kind == "pos")
        )
        convert = f"{name} = {name}.long()" if kind == "bern" and self.chance(0.5) else ""
        lines = self.inside(plates, f"{name} = pyro.sample('{name}', dist.{text}{mark})")
        if kind == "bern" and not convert:  # a number, not an index
            self.latents[-1] = Latent(name, plates)
        return lines + ([f"    {convert}"] if convert else [])

    def observation(self, number: int) -> list[str]:
        name = f"y{number}"
        places = [*self.places(), ("o",), ("o",)]
        if self.crossing:
            places += [("p", "q")] * 3
        plates = self.rng.choice(places)
        self.may_share |= self.crossing and len(plates) > 1
        shape = self.shape(plates)
        loc = self.real(plates)
        style = self.rng.choice(["plain"] * 5 + ["pois", "bern", "free", "vec", "ord", "mix"])
        scale = self.scale(plates)
        if style == "pois":
            data = self.integers(4, *shape)
            loc = f"torch.tanh({loc} + torch.zeros({shape}))"
            text = f"Poisson(torch.exp(0.5 * {loc}))"
        elif style == "bern":
            data = f"{self.integers(2, *shape)}.double()"
            text = f"Bernoulli(logits={loc} + torch.zeros({shape}))"
        elif style == "free":
            plates, data = (), self.tensor(3)
            text = f"Normal({self.vector(3)}, {self.scale(())})"
        elif style == "vec":
            plates, data = (), self.tensor(3)
            vector = self.vector(3)
            self.may_share |= any(latent.plates for latent in self.latents)
            text = self.rng.choice(
                [
                    f"Normal({vector}, 1.0).to_event(1)",
                    f"MultivariateNormal({vector}, torch.eye(3))",
                ]
            )
        elif style == "ord":
            plates, data = (), "torch.tensor(1)"
            text = f"OrderedLogistic({self.real(())} + torch.zeros(()), torch.tensor([-0.5, 0.8]))"
        elif style == "mix":
            self.may_share |= any(latent.plates for latent in self.latents)
            plates, data = (), self.number() and f"torch.tensor({self.number()})"
            text = (
                f"MixtureSameFamily(dist.Categorical(logits={self.tensor(2)}), "
                f"dist.Normal({self.vector(2)}, 1.0))"
            )
        else:
            data, text = self.tensor(*shape), f"Normal({loc}, {scale})"
        statement = f"pyro.sample('{name}', dist.{text}, obs={data})"
        lines = self.inside(plates, statement)
        wrapper = ""
        if self.chance(0.15) and style in ("plain", "pois", "bern") and plates:
            wrapper = f"poutine.mask(mask={self.integers(2, *shape)}.bool())"
        elif self.chance(0.15):
            wrapper = f"poutine.scale(scale={self.rng.uniform(0.5, 2.0):.1f})"
        if wrapper:
            lines = [f"    with {wrapper}:", *(f"    {line}" for line in lines)]
        return lines

    def vector(self, size: int) -> str:
        """Return a vector computed from latents, in no plate."""
        options = [""]
        for latent in self.latents:
            name, event = latent.name, latent.event
            if event and not latent.plates:
                options.append(f"({self.tensor(size, event)} @ {name})")
                options.append(f"{name}[{self.integers(event, size)}]")
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

    def model(self) -> str:
        lines = ["def model():"]
        for plate in [*self.layout, "o"]:
            lines.append(
                f"    {plate} = pyro.plate('{plate}', {self.size(plate)}, dim={self.dim(plate)})"
            )
        for i in range(self.rng.randint(1, 5 if self.layout else 8)):
            lines += self.latent(i)
        scalars = [v for v in self.latents if not v.plates and v.event is None and not v.values]
        if self.chance(0.15):
            lines.append(f"    pyro.deterministic('d', {self.real(())} + torch.zeros(()))")
        if scalars and self.chance(0.1):
            self.branches = True
            name = self.rng.choice(scalars).name
            lines.append(f"    branch = {name} if {name} > 0.1 else 0.3 * {name}")
            lines.append("    pyro.sample('yb', dist.Normal(branch, 1.0), obs=torch.tensor(0.4))")
        if self.chance(0.1):
            lines.append(f"    pyro.factor('f', -0.1 * ({self.real(())}) ** 2 + torch.zeros(()))")
        for i in range(self.rng.randint(1, 3)):
            lines += self.observation(i)
        return "\n".join(lines)
