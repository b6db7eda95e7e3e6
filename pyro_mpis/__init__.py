# SPDX-License-Identifier: Apache-2.0
"""Massively parallel importance sampling for Pyro."""

from pyro_mpis._warnings import MPISWarning
from pyro_mpis.diagnostics import Diagnosis
from pyro_mpis.importance import MPImportance
from pyro_mpis.marginals import Marginal
from pyro_mpis.summary import Summary

__version__ = "0.1.0"

__all__ = ["Diagnosis", "MPISWarning", "MPImportance", "Marginal", "Summary"]
