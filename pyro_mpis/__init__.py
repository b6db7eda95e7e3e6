# SPDX-License-Identifier: Apache-2.0
"""
Massively parallel importance sampling for Pyro.

The method is that of Bowyer, Heap and Aitchison (2024), "Using Autodiff to Estimate Posterior
Moments, Marginals and Samples", UAI, PMLR 244:394-417. Where its equations are:

* (12)-(14), particles and their proposal: ``particles.drawing`` and ``particles.proposals``;
* (15)-(17), indices k, and what each site reads: ``programs.structure`` and
  ``programs.analysis``;
* (19)-(22), r_k as a product of small tensors: ``particles.factors`` makes it,
  ``factor_graph.graph`` is what it makes;
* (18) and (23), the evidence: ``factor_graph.evidence``, in an order found by ``order``, with the
  kernels of ``logspace``; as a sum over blocks of particles in ``blocks``;
* (24) and (29), moments: ``factor_graph.moments``;
* (27)-(28) and (30)-(31), source terms, (32)-(35), weights as derivatives, (43)-(44), joint
  weights: ``factor_graph.source_terms``; the marginals with these weights: ``marginals``;
* (25), the distribution over k, and (36)-(42), samples of it: ``factor_graph.sampling``.
"""

from pyro_mpis._version import __version__
from pyro_mpis._warnings import MPISWarning
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.importance import MPImportance
from pyro_mpis.objectives import MPReweightedWakeSleep, TraceMP_ELBO
from pyro_mpis.results.diagnostics import Diagnosis
from pyro_mpis.results.predictive import log_predictive
from pyro_mpis.results.summary import Summary
from pyro_mpis.run_plan import Advice, Cost, RunPlan

__all__ = [
    "Advice",
    "AutoPlateNormal",
    "Cost",
    "Diagnosis",
    "MPISWarning",
    "MPImportance",
    "MPReweightedWakeSleep",
    "Marginal",
    "RunPlan",
    "Summary",
    "TraceMP_ELBO",
    "__version__",
    "log_predictive",
]
