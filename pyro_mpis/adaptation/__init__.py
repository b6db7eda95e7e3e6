# SPDX-License-Identifier: Apache-2.0
"""Learn a proposal: a plate-structured Gaussian guide, fitted to the posterior."""
