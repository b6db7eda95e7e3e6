# SPDX-License-Identifier: Apache-2.0
"""How a model and a guide are run, and what one plain run tells of them."""
