# SPDX-License-Identifier: Apache-2.0
"""The package's log."""

from __future__ import annotations

import functools
import logging

_log = logging.getLogger("vtprune")


@functools.lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    """Logs a warning the first time it is called with a message."""
    _log.warning(message)
