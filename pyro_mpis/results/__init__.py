# SPDX-License-Identifier: Apache-2.0
"""
What is made of a posterior.

A summary and a diagnosis, the model run at posterior draws, an export to ArviZ, the traces that
:class:`pyro.infer.Importance` has, and files.
"""
