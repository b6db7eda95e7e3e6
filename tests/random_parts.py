# SPDX-License-Identifier: Apache-2.0
"""What random programs are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine


@dataclass(frozen=True)
class Latent:
    """A latent that later statements may read."""

    name: str
    plates: tuple[str, ...]
    event: int | None = None  # length of its event, a vector
    values: int = 0  # of a categorical one
    positive: bool = False
    simplex: bool = False  # its event is one of probabilities


@dataclass
class Generated:
    """A program's text, and what is to be expected of it."""

    seed: int
    num_particles: int
    model: str
    guide: str
    groups: list[tuple[str, ...]]
    may_share: bool  # whether elements of a plate may have to share an index
    branches: bool  # whether it runs once for each particle

    @property
    def source(self) -> str:
        return f"{self.model}\n{self.guide}\n# K={self.num_particles}, groups={self.groups}"

    def programs(self) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        names: dict[str, Any] = {"pyro": pyro, "torch": torch, "dist": dist, "poutine": poutine}
        exec(self.model + "\n" + self.guide, names)
        return names["model"], names.get("guide")
