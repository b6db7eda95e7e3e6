# SPDX-License-Identifier: Apache-2.0
"""Random programs with their guides; :mod:`random_models` writes the models."""

from random_expressions import AUXILIARY, PARALLEL
from random_models import Writer
from random_parts import Generated, Latent


class GuideWriter:
    """Writes a guide for some of a model's latents."""

    def __init__(self, writer: Writer, model: str) -> None:
        self.writer, self.rng = writer, writer.rng
        self.statements = {
            latent.name: next(
                line for line in model.splitlines() if f"pyro.sample('{latent.name}'" in line
            )
            for latent in writer.latents
        }

    def guide(self) -> str:
        writer = self.writer
        everything = list(writer.latents)
        chosen = [latent for latent in everything if self.rng.random() < 0.6]
        if not chosen or self.rng.random() < 0.25:
            return ""
        self.rng.shuffle(chosen)
        lines = ["def guide():"]
        for plate in writer.layout:
            dim, size = writer.dim(plate), writer.size(plate)
            lines.append(f"    {plate} = pyro.plate('{plate}', {size}, dim={dim})")
        kept, writer.latents = (writer.may_share, writer.branches), []
        for latent in chosen:
            lines += self.site(latent)
            writer.latents.append(latent)
        writer.may_share, writer.branches = kept
        writer.latents = everything
        return "\n".join(lines)

    def site(self, latent: Latent) -> list[str]:
        writer, name, plates = self.writer, latent.name, latent.plates
        statement = self.statements[name]
        auxiliary = self.rng.random()
        loc = writer.real(plates, 2) if self.rng.random() < 0.6 else writer.number()
        zeros = f"torch.zeros({writer.shape(plates)})" if plates else "torch.zeros(())"
        long = []
        if name in writer.masked:
            auxiliary = 1.0  # left out where nothing reads it: the sums know of drawn sites alone
        if "Bernoulli" in statement:
            text = f"Bernoulli(logits={loc})"
            if latent.values:
                long = [f"    {name} = {name}.long()"]
        elif latent.values:
            text = f"Categorical(logits={writer.tensor(latent.values)})"
        elif latent.positive:
            if auxiliary < 0.5:
                return self.carried(latent, f"Normal({loc}, 0.8)", "{0}.exp()", "-{0}")
            text = f"LogNormal(0.5 * torch.tanh({loc} + torch.zeros(())), 0.8)"
        elif latent.simplex:
            text = f"Dirichlet(torch.ones({latent.event}) + {self.rng.choice([0.2, 1.0])})"
        elif latent.event:
            event = latent.event
            text = f"Normal({writer.tensor(event)}, 1.2)"
            if "to_event" in statement or "Multivariate" in statement:
                text += ".to_event(1)"
                if self.rng.random() < 0.3:
                    text = f"MultivariateNormal({writer.tensor(event)}, torch.eye({event}) + 0.2)"
                elif not plates and self.rng.random() < 0.4:
                    text = f"Normal({loc} * {writer.tensor(event)}, 1.2).to_event(1)"
        else:
            real = [latent for latent in writer.latents if latent.plates == plates]
            real = [v for v in real if not v.values and not v.event and not v.positive]
            if auxiliary < 0.2:
                return self.carried(latent, f"Normal({loc}, 1.2)", "(2.0 * {0} - 0.3)", f"{zeros}")
            if auxiliary < 0.4 and real:
                source = self.rng.choice(real).name
                value = f"(1.3 * {source} + 0.2)"
                delta = f"dist.Delta({value}, log_density=0.1 * {source})"
                return writer.inside(plates, f"{name} = pyro.sample('{name}', {delta})")
            text = f"Normal({loc}, 1.2)"
            if len(writer.shape(plates)) == 1 and self.rng.random() < 0.1:  # one vector for a plate
                text, plates = (
                    f"Normal({writer.tensor(writer.size(plates[0]))}, 1.2).to_event(1)",
                    (),
                )
        mark = PARALLEL if PARALLEL in statement and self.rng.random() < 0.5 else ""
        return writer.inside(plates, f"{name} = pyro.sample('{name}', dist.{text}{mark})") + long

    def carried(self, latent: Latent, draw: str, value: str, density: str) -> list[str]:
        name, plates = latent.name, latent.plates
        lines = []
        value, density = value.format(f"{name}_aux"), density.format(f"{name}_aux")
        for statement in (
            f"{name}_aux = pyro.sample('{name}_aux', dist.{draw}, {AUXILIARY})",
            f"{name} = pyro.sample('{name}', dist.Delta({value}, log_density={density}))",
        ):
            lines += self.writer.inside(plates, statement)
        return lines


def generate(seed: int, max_combinations: int = 260) -> Generated:
    """Write the program of a seed."""
    writer = Writer(seed, max_combinations)
    model = writer.model()
    guide = GuideWriter(writer, model).guide()
    groups: list[tuple[str, ...]] = []
    free = [v for v in writer.latents if PARALLEL not in model_line(model, v.name)]
    free = [v for v in free if PARALLEL not in model_line(guide, v.name)]
    free = [v for v in free if v.name not in writer.masked]
    if len(free) > 1 and writer.chance(0.2):
        one, other = writer.rng.sample(free, 2)
        groups = [(one.name, other.name)]
    return Generated(
        seed,
        writer.num_particles,
        model,
        guide,
        groups,
        writer.may_share,
        writer.branches,
    )


def model_line(program: str, name: str) -> str:
    return next((s for s in program.splitlines() if f"pyro.sample('{name}'" in s), "")
