# SPDX-License-Identifier: Apache-2.0
"""What an experiment consists of, and what the models of both kinds share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

Arrays = dict[str, Tensor]
Program = Callable[..., None]


@dataclass(frozen=True)
class Experiment:
    """A model with its proposal and data: ``model(**train)``, ``guide(**train)``."""

    name: str
    model: Program
    guide: Program
    train: Arrays
    test: Arrays
    max_plate_nesting: int
    # latents of plate elements that the test set has in place of the training set's
    new_latents: tuple[str, ...] = ()
    local_samples: int = 1  # draws of these for each posterior sample; the authors have one

    def to(self, device: str) -> Experiment:
        """Return the experiment with its data on another device."""
        train = {name: value.to(device) for name, value in self.train.items()}
        test = {name: value.to(device) for name, value in self.test.items()}
        return replace(self, train=train, test=test)


def read_by_index(weights: Tensor, index: Tensor) -> Tensor:
    """
    Read a vector latent drawn outside all plates at one position per plate element.

    :param weights: ``(*particles, 1, .., 1, size)``; in an ordinary run ``(size,)``.
    :param index: long, shaped like the plates of the reader.
    :return: ``(*particles, *index.shape)``. Plain ``weights[..., index]`` would keep the ones
        between particles and plates, and so misalign the particles.
    """
    batch_shape = weights.shape[:-1]
    particles = batch_shape[: max(0, len(batch_shape) - index.dim())]
    return weights.reshape(particles + weights.shape[-1:])[..., index]
