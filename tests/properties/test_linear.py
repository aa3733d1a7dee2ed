# SPDX-License-Identifier: Apache-2.0
"""Memory is linear in the number of visual tokens; `make soak` tests up to 32,768 with every method."""

from __future__ import annotations

import pytest
import torch
from linear import Peak, growth


@pytest.mark.parametrize("method", ["iwp", "sparsevlm"])
def test_memory_is_linear(method: str) -> None:
    peaks = growth((6144, 12288), [method])[method]
    assert peaks[1] < 2.5 * peaks[0], peaks


def test_peak_counts_what_is_alive_at_once() -> None:
    with Peak() as seen:
        for _ in range(3):
            torch.ones(1000) * 2
        square = torch.ones(100, 1) @ torch.ones(1, 100)
        del square
    assert 40_800 <= seen.most <= 40_900  # the product and its operands
