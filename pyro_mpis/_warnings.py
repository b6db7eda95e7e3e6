# SPDX-License-Identifier: Apache-2.0
"""The class of this package's warnings, so that users can filter them."""

import os
import sys
import warnings

PACKAGE = os.path.dirname(__file__) + os.sep


class MPISWarning(UserWarning):
    """
    A warning of this package.

    The answer is poor, or not quite what was asked for. The text says what would help.
    """


def warn(message: str) -> None:
    """Emit an :class:`MPISWarning` that points at the line that called the package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, MPISWarning, stacklevel=level)
