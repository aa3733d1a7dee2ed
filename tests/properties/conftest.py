# SPDX-License-Identifier: Apache-2.0
"""Paths and settings of the property tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "laws"), str(HERE.parent)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
