# SPDX-License-Identifier: Apache-2.0
"""Settings of the property tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
