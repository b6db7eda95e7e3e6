# SPDX-License-Identifier: Apache-2.0
"""From programs to a graph of log factors: particles, densities, which element is read."""
