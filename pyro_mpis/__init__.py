# SPDX-License-Identifier: Apache-2.0
"""Massively parallel importance sampling for Pyro."""

from pyro_mpis._version import __version__
from pyro_mpis._warnings import MPISWarning
from pyro_mpis.diagnostics import Diagnosis
from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.importance import MPImportance
from pyro_mpis.predictive import log_predictive
from pyro_mpis.summary import Summary

__all__ = [
    "Diagnosis",
    "MPISWarning",
    "MPImportance",
    "Marginal",
    "Summary",
    "__version__",
    "log_predictive",
]
