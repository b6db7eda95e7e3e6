# SPDX-License-Identifier: Apache-2.0
"""Every outcome of the draws of programs that draw one number after the other."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from torch import Tensor


class Coins:
    """What the coins of a run show, and how likely that is."""

    def __init__(self) -> None:
        self.shown: list[bool] = []
        self.thrown = 0
        self.probability = 1.0

    def start(self, shown: list[bool]) -> None:
        self.shown, self.thrown, self.probability = shown, 0, 1.0


class NotDecided(BaseException):  # which is not taken for an error of a program's
    """A coin is thrown beyond those that are decided."""


class Coin:
    """A distribution with draws and a density alone, which shows what is decided."""

    def __init__(self, probability: float | Tensor, coins: Coins) -> None:
        self.probs = torch.as_tensor(probability)
        self.coins = coins

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value > 0, self.probs, 1.0 - self.probs).log()

    def __call__(self) -> Tensor:
        coins = self.coins
        if coins.thrown >= len(coins.shown):
            raise NotDecided
        head = coins.shown[coins.thrown]
        coins.thrown += 1
        coins.probability *= float(self.probs) if head else 1.0 - float(self.probs)
        return torch.tensor(float(head))


def throw(name: str, probability: float | Tensor, coins: Coins) -> Tensor:
    """Sample a coin at a site."""
    fn: Any = Coin(probability, coins)
    result: Tensor = pyro.sample(name, fn)
    return result


def outcomes(coins: Coins, run: Callable[[], float]) -> Iterator[tuple[float, float]]:
    """Yield the probability of every outcome of all throws, and what a run returns there."""
    pending: list[list[bool]] = [[]]
    while pending:
        shown = pending.pop()
        coins.start(shown)
        try:
            result = run()
        except NotDecided:
            pending += [[*shown, False], [*shown, True]]
        else:
            yield coins.probability, result
