# SPDX-License-Identifier: Apache-2.0
"""All rows, in the order of the table."""

from __future__ import annotations

from tests.supported import compiling, generating, weights
from tests.supported.table import ROWS

__all__ = ["ROWS", "compiling", "generating", "weights"]
