# SPDX-License-Identifier: Apache-2.0
"""Objectives for :class:`pyro.infer.SVI`: to learn a guide, and a model's parameters."""

from pyro_mpis.objectives.elbo import TraceMP_ELBO
from pyro_mpis.objectives.wake_sleep import MPReweightedWakeSleep

__all__ = ["MPReweightedWakeSleep", "TraceMP_ELBO"]
