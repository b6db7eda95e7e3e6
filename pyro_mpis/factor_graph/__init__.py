# SPDX-License-Identifier: Apache-2.0
"""
The paper's sums over a graph of log factors: evidence, weights, moments, marginals and samples.

Nothing here knows of programs. A
:class:`~pyro_mpis.factor_graph.graph.FactorGraph` has all that the sums need, whether its numbers
come from programs or are written by hand.
"""
