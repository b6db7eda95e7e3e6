# SPDX-License-Identifier: Apache-2.0
"""The class of this package's warnings, so that users can filter them."""

import warnings


class MPISWarning(UserWarning):
    """The answer is poor, or not quite what was asked for; the text says what would help."""


def warn(message: str) -> None:
    """Emit an :class:`MPISWarning` that points at the line that called the package."""
    warnings.warn(message, MPISWarning, stacklevel=3)
