# SPDX-License-Identifier: Apache-2.0
"""Patch, pause, remove and patch again in any order; `make soak` runs more and longer sequences."""

from __future__ import annotations

from drawn import profile
from hypothesis.stateful import run_state_machine_as_test
from lifecycle import Lifecycle


def test_any_order() -> None:
    run_state_machine_as_test(Lifecycle, settings=profile(12, stateful_step_count=14))
