# SPDX-License-Identifier: Apache-2.0
"""The paper's experiments: ``python -m benchmarks.paper --help``."""
