# SPDX-License-Identifier: Apache-2.0
"""Tests of the kernel benchmark on small inputs, and of the command that runs all GPU measurements."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

import vtprune_kernels
from benchmarks import gpu_all, kernel_targets, kernels
from benchmarks.kernel_cases import cases
from benchmarks.kernel_certificate import RULES, shortfall

CPU, SMALL = torch.device("cpu"), {"rows": 70, "keep": 9, "scale": 16}
LIMITS = {"bytes_per_second": 1e9, "flops_per_second": 1e9}


def test_plain_formulations_give_the_specified_results():
    seen = set()
    for case in cases(CPU, torch.float32, **SMALL):
        seen.add(case.operation)
        for plain, specified in zip(tree_leaves(case.plain()), tree_leaves(case.naive()), strict=True):
            torch.testing.assert_close(plain, specified, rtol=1e-4, atol=1e-5, msg=case.operation)
    assert seen == set(vtprune_kernels.__all__)


def test_every_case_is_checked_and_timed():
    for case in cases(CPU, torch.float32, **SMALL):
        row = kernels.against_limit(kernels.measure(case, CPU, torch.float32, budget=0.0), LIMITS)
        assert row["agrees"] and row["seconds"] > 0 and row["plain_seconds"] > 0 and row["runs"] >= 3
        assert row["limit_seconds"] == pytest.approx(max(case.bytes / 1e9, case.flops / 1e9))
        assert row["share_of_limit"] == pytest.approx(row["limit_seconds"] / row["seconds"])
        assert f"{row['seconds'] * 1e3:.2f} ms" in kernels.describe(row)
        assert row["extra_bytes"] > 0


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    case = next(iter(cases(CPU, torch.float32, **SMALL)))
    right = vtprune_kernels.progressive_mmr
    monkeypatch.setattr(vtprune_kernels, "progressive_mmr", lambda *a, **k: right(*a, **k).flip(1))
    row = kernels.against_limit(kernels.measure(case, CPU, torch.float32, budget=0.0), LIMITS)
    assert " ms" not in kernels.describe(row)
    assert row["agrees"] is None and "entries differ" in row["error"]
    assert not any("seconds" in name for name in row)


@pytest.mark.parametrize("operation", RULES)
def test_a_certificate_accepts_a_greedy_choice_and_no_other(operation):
    for case in cases(CPU, torch.float32, **SMALL):
        if case.operation == operation:
            order, inputs = case.naive()[0], case.arguments[:-2]
            assert shortfall(operation, order, *inputs) <= 1e-6
            left = next(row for row in range(70) if row not in order.tolist())
            for place in (0, 4, 8):
                wrong = order.clone()
                wrong[place] = left
                assert shortfall(operation, wrong, *inputs) > 1e-4
            assert shortfall(operation, order[[0, 1, 0]], *inputs) == torch.inf


def test_a_choice_that_rounding_led_elsewhere_is_certified(monkeypatch):
    rows = torch.eye(8).repeat(2, 1)  # row 8 is as good as row 0
    arguments = (rows, torch.ones(16), torch.tensor([0, 16]), torch.tensor([2]))
    case = kernels.Case("weighted_farthest_point", "", "", arguments, lambda: None, 1, 1)
    for pick, answer in ((9, "every pick is the best row within 0.0e+00"), (8, None)):
        monkeypatch.setattr(vtprune_kernels, "weighted_farthest_point", lambda *_, pick=pick: torch.tensor([[0, pick]]))
        if answer:
            assert kernels.agrees(case, torch.float32) == answer
        else:
            with pytest.raises(AssertionError, match="1 of 2 entries differ"):
                kernels.agrees(case, torch.float32)


def test_decisions_with_an_aim_are_checked_and_timed():
    aims = {"iwp": 1e9, "farthest": 1e9, "dpp": 0.0}
    every = list(kernel_targets.decisions(CPU, torch.float32, 70, 9, aims, plain=True, scale=16))
    assert len(every) == 4
    for decision in every:
        decision.times = 0.0
        row = kernel_targets.measure(decision, kernels.seconds, kernels.extra_memory, CPU, 0.0)
        assert row["shortfall"] <= 1e-5 and row["extra_bytes"] > 0 and row["times_plain"] > 0
        assert row["met"] == (decision.seconds > 0)
        assert ("MISSED" in kernel_targets.describe(row)) == ("DPP" in row["what"])
    every[0].run = lambda: torch.arange(9)[None]
    row = kernel_targets.measure(every[0], kernels.seconds, kernels.extra_memory, CPU, 0.0)
    assert not row["met"] and "seconds" not in row and " ms" not in kernel_targets.describe(row)


def test_extra_memory_counts_what_is_alive_at_once():
    source = torch.ones(1000)

    def work():
        first = source + 1  # 4000 bytes
        second = first * 2  # 8000 bytes while `first` is alive
        del first
        third = second - 1  # 8000
        return third.view(10, 100)  # no new memory

    assert kernels.extra_memory(work, CPU) == 8000
    assert kernels.extra_memory(lambda: source.view(10, 100), CPU) == 0


def test_gpu_command_runs_kernel_tests_and_times(tmp_path):
    steps = dict(gpu_all.steps(tmp_path, 0.1))
    assert list(steps) == ["kernel_tests", "kernels", "latency", "towers", "waits", "gpu_tests"]
    step = gpu_all.run("hello", [sys.executable, "-c", "print('hello'); raise SystemExit(3)"], tmp_path, 60)
    assert step["exit"] == 3 and step["last"] == "hello"
    step = gpu_all.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, 1)
    assert step["exit"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_operation_waits_for_the_device():
    from kernel_tests.gpu_cases import launches

    calls = list(launches(torch.bfloat16, "cuda"))
    for _, call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _, call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
