# SPDX-License-Identifier: Apache-2.0
"""Models whose posterior is normal and known, and proposals as wide as it or not."""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

ELEMENTS = 6  # of the hierarchy's plate
PRIOR = 4.0  # variance of its mean; those of an element and of an observation are one


def correlated(rho: float, size: int) -> Tensor:
    """Return a covariance with ones on its diagonal, and ``rho`` elsewhere."""
    return (1 - rho) * torch.eye(size) + rho


def mean_field(covariance: Tensor) -> Tensor:
    """Return the covariance of the independent normals q that minimise KL(q, p)."""
    return torch.linalg.inv(covariance).diagonal().reciprocal().diag()


def vector(covariance: Tensor) -> Callable[[], None]:
    """
    Return a program that draws one vector.

    As a model without data it has an evidence of one, and its prior for a posterior.
    """

    def program() -> None:
        mean = torch.zeros(len(covariance))
        pyro.sample("w", dist.MultivariateNormal(mean, covariance))

    return program


@dataclass(frozen=True)
class Hierarchy:
    """
    Vectors around a common mean, observed with noise; all covariances are multiples of one.

    So each multiple is that of a hierarchy of numbers, and is found by conditioning of normals.
    """

    covariance: Tensor  # (size, size)

    @property
    def data(self) -> Tensor:
        """Observations: ``(elements, size)``."""
        drawn = torch.randn(ELEMENTS, len(self.covariance), generator=_generator())
        scale = torch.linalg.cholesky(self.covariance)
        return 2**0.5 * drawn @ scale.mT

    def model(self) -> None:
        """Draw the mean and the elements' vectors; observe them."""
        covariance = self.covariance
        zeros = torch.zeros(len(covariance))
        mu = pyro.sample("mu", dist.MultivariateNormal(zeros, PRIOR * covariance))
        with pyro.plate("element", ELEMENTS):
            z = pyro.sample("z", dist.MultivariateNormal(mu, covariance))
            pyro.sample("y", dist.MultivariateNormal(z, covariance), obs=self.data)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Return means of the mean and the elements, and the multiples of the covariance."""
        prior = torch.full((ELEMENTS + 1, ELEMENTS + 1), PRIOR)
        prior[1:, 1:] += torch.eye(ELEMENTS)
        gain = torch.linalg.solve(prior[1:, 1:] + torch.eye(ELEMENTS), prior[1:]).mT
        return gain @ self.data, prior - gain @ prior[1:]

    def log_evidence(self) -> float:
        """Return the log density of the data."""
        among = PRIOR + 2 * torch.eye(ELEMENTS)
        joint = torch.kron(among, self.covariance).double()
        zeros = torch.zeros(len(joint)).double()
        return float(dist.MultivariateNormal(zeros, joint).log_prob(self.data.double().flatten()))

    def exact(self) -> None:
        """Draw from the posterior: the elements given the mean."""
        means, multiples = self.posterior()
        fn = dist.MultivariateNormal(means[0], multiples[0, 0] * self.covariance)
        mu = pyro.sample("mu", fn)
        with pyro.plate("element", ELEMENTS):
            fn = dist.MultivariateNormal((mu + self.data) / 2, self.covariance / 2)
            pyro.sample("z", fn)

    def marginals(
        self, factor: float = 1.0, of: Callable[[Tensor], Tensor] = torch.clone
    ) -> Callable[[], None]:
        """
        Return a guide in which nothing depends on another vector.

        :param factor: of the posterior's standard deviations.
        :param of: the covariance of the guide, given that of the posterior.
        """

        def guide() -> None:
            means, multiples = self.posterior()
            variances = factor**2 * multiples.diagonal()
            covariance = of(self.covariance)
            pyro.sample("mu", dist.MultivariateNormal(means[0], variances[0] * covariance))
            with pyro.plate("element", ELEMENTS):
                each = variances[1:, None, None] * covariance
                pyro.sample("z", dist.MultivariateNormal(means[1:], each))

        return guide


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
