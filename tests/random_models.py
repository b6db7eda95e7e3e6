# SPDX-License-Identifier: Apache-2.0
"""
Random models, written for single values, as source text.

A seed gives a program of few cells: latents in plates that nest, follow each other or cross, read
in every way that a user may write.
"""

from random_expressions import PARALLEL, POSITIVE, REAL, Expressions
from random_parts import Latent

KINDS = ["real"] * 4 + ["pos", "vec", "vec", "cat", "cat", "bern", "free", "dir"]
STYLES = ["plain"] * 5 + ["pois", "bern", "free", "vec", "ord", "mix", "event", "cat"]


class Writer(Expressions):
    """Writes one program."""

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
        kind = self.rng.choice(KINDS)
        enumerated = kind in ("cat", "bern") and self.chance(0.5)
        values = {"cat": 2 if self.chance(0.5) else 3, "bern": 2}.get(kind, 0)
        if not self.spend(cells, values if enumerated else self.num_particles):
            return []
        mark = PARALLEL if enumerated else ""
        event = self.rng.choice([2, 3]) if kind in ("vec", "free", "dir") else None
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
            simplices = [z for z in self.latents if z.simplex and z.event == values]
            simplices = [z for z in simplices if set(z.plates) <= set(plates) or len(z.plates) == 1]
            if simplices and self.chance(0.7):
                text = f"Categorical({self.row(self.rng.choice(simplices), plates)})"
            elif parents and self.chance(0.7):
                parent = self.rng.choice(parents)
                rows = self.tensor(parent.values, values)
                text = f"Categorical(logits={rows}[{parent.name}])"
        elif kind == "dir":
            text = f"Dirichlet(torch.ones({event}) + 0.5)"
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
        self.latents.append(Latent(name, plates, event, values, kind == "pos", kind == "dir"))
        convert = f"{name} = {name}.long()" if kind == "bern" and self.chance(0.5) else ""
        handler = ""
        if self.chance(0.15):
            handler, text = self.hidden(plates, text)
            self.masked |= set() if "scale" in handler else {name}
        lines = self.inside(plates, f"{name} = pyro.sample('{name}', dist.{text}{mark})")
        if handler:
            lines = [f"    with {handler}:", *(f"    {line}" for line in lines)]
        if kind == "bern" and not convert:  # a number, not an index
            self.latents[-1] = Latent(name, plates)
        return lines + ([f"    {convert}"] if convert else [])

    def hidden(self, plates: tuple[str, ...], text: str) -> tuple[str, str]:
        """Put a latent under a mask of either kind, or a scale; return a handler and its text."""
        mask = f"{self.integers(2, *self.shape(plates))}.bool()" if plates else "False"
        kind = self.rng.choice(["mask", "mask", "own", "own", "scale"])
        if kind == "own":
            return "", f"{text}.mask({mask})"
        scales = [v.name for v in self.latents[:-1] if v.positive and not (v.plates or v.event)]
        scale = self.rng.choice([*scales, "0.7", "1.6"])
        return f"poutine.{kind}({kind}={mask if kind == 'mask' else scale})", text

    def observation(self, number: int) -> list[str]:
        name = f"y{number}"
        places = [*self.places(), ("o",), ("o",)]
        if self.crossing:
            places += [("p", "q")] * 3
        plates = self.rng.choice(places)
        self.may_share |= self.crossing and len(plates) > 1
        shape = self.shape(plates)
        loc = self.real(plates)
        style = self.rng.choice(STYLES)
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
        elif style == "event":
            data = self.tensor(*shape, 2)
            loc = f"({loc} + torch.zeros({shape})).unsqueeze(-1)"
            text = f"Normal({loc} * {self.tensor(2)}, {self.rng.choice([0.7, 1.1])}).to_event(1)"
        elif style == "cat":
            data = self.integers(2, *shape)
            loc = f"({loc} + torch.zeros({shape})).unsqueeze(-1)"
            text = f"Categorical(logits={loc} * {self.tensor(2)})"
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
        owners = [v for v in self.latents if not v.event and set(v.plates) <= set(plates)]
        if self.chance(0.1) and style == "plain" and plates and owners:
            wrapper = f"poutine.mask(mask={self.rng.choice(owners).name} > 0.4)"
        elif self.chance(0.15) and style in ("plain", "pois", "bern") and plates:
            wrapper = f"poutine.mask(mask={self.integers(2, *shape)}.bool())"
        elif self.chance(0.15):
            wrapper = f"poutine.scale(scale={self.rng.uniform(0.5, 2.0):.1f})"
        if wrapper:
            lines = [f"    with {wrapper}:", *(f"    {line}" for line in lines)]
        return lines

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
