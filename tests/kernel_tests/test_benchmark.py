# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the kernels, on little data, and the one command for all that needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import vtprune_kernels

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import gpu_all, kernels
from benchmarks.kernel_cases import cases

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


def test_extra_memory_counts_what_is_alive_at_once():
    source = torch.ones(1000)

    def work():
        first = source + 1  # 4000 bytes
        second = first * 2  # 8000 at once
        del first
        third = second - 1  # 8000
        return third.view(10, 100)  # nothing new

    assert kernels.extra_memory(work, CPU) == 8000
    assert kernels.extra_memory(lambda: source.view(10, 100), CPU) == 0


def test_gpu_command_runs_kernel_tests_and_times(tmp_path):
    steps = dict(gpu_all.steps(tmp_path, 0.1))
    assert list(steps) == ["kernel_tests", "kernels", "latency", "gpu_tests"]
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
