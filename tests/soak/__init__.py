# SPDX-License-Identifier: Apache-2.0
"""Long runs of the property tests: `python -m tests.soak`."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "properties"), str(TESTS / "laws"), str(TESTS), str(TESTS.parent / "kernels/torch-ext")]
