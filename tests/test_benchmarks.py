# SPDX-License-Identifier: Apache-2.0
"""The scripts behind the README's tables, on little data."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import vtprune
from vtprune import refvlm
from vtprune.refvlm import evaluate

ROOT = Path(__file__).resolve().parent.parent


def _script(path: str):
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accuracy_counts_right_answers_and_kept_tokens():
    jobs = [(name, {"ratio": ratio}) for name in ("uniform", "fastv", "oracle") for ratio in (0.5, 0.1)]
    data = _script("benchmarks/accuracy.py").measure([(None, {}), *jobs, ("fastv", {"mean_ratio": 0.2})], 10, batch=4)
    by = {(row["method"], row.get("ratio")): row for row in data["rows"]}
    assert [by[name, ratio]["kept"] for name in ("uniform", "fastv") for ratio in (0.5, 0.1)] == [72, 14, 72, 14]
    assert by["uniform", 0.1]["mean_tokens"] == 14
    assert by["fastv", 0.1]["mean_tokens"] == pytest.approx((2 * 144 + 4 * 14) / 6)  # before layer 2 of 6
    assert by["oracle", 0.5]["answer_patches"] == 1 > by["uniform", 0.5]["answer_patches"]
    assert "before layer 2 of 6" in by["fastv", None]["refused"]

    samples = list(evaluate.held_out_scenes(10))
    model, processor = refvlm.load()

    def right() -> int:
        given = evaluate.answer(model, processor, samples, batch_size=1)
        return sum(sample.answer == text for sample, text in zip(samples, given, strict=True))

    assert data["unpruned"] | {"interval": None} == {
        "visual_tokens": 144,
        "right": right(),
        "total": 10,
        "interval": None,
    }
    with vtprune.patch(model, ratio=0.1, method="uniform"):
        assert by["uniform", 0.1]["right"] == right()


def test_accuracy_goes_on_where_it_stopped(tmp_path):
    accuracy, out = _script("benchmarks/accuracy.py"), tmp_path / "accuracy.json"
    jobs = [(None, {}), ("uniform", {"ratio": 0.1})]
    first = accuracy.measure(jobs, 4, batch=4, out=out)
    seen = []
    again = accuracy.measure([*jobs, ("random", {"ratio": 0.1})], 4, batch=4, out=out, log=seen.append)
    assert len(seen) == 1 and again["unpruned"] == first["unpruned"] and len(again["rows"]) == 2
    stale = json.loads(out.read_text()) | {"weights_sha256": "of other weights"}
    out.write_text(json.dumps(stale))
    assert len(accuracy.measure(jobs, 4, batch=4, out=out)["rows"]) == 1


@pytest.fixture
def collect():
    return _script("benchmarks/families.py").collect


def test_a_law_holds_where_tests_ran_and_none_failed(collect):
    cases = [
        ("tests.laws.test_1_identity", "test_identity[llava-iwp]", "passed"),
        ("tests.laws.test_1_identity", "test_identity[llava-dart]", "skipped"),
        ("tests.laws.test_1_identity", "test_identity[llava_next-iwp]", "failed"),
        ("tests.laws.test_1_identity", "test_identity[llava_next-dart]", "passed"),
        ("tests.laws.test_2_drop_is_mask", "test_video[llava-iwp]", "skipped"),
        ("tests.laws.test_2_drop_is_mask", "test_keep[llava_next]", "passed"),
        ("tests.laws.test_9_never_silent", "test_names", "failed"),
        ("tests.test_cli", "test_run[llava]", "failed"),
    ]
    assert collect(cases, ["llava", "llava_next"]) == [
        {"model_type": "llava", "laws": {"identity": True}, "tests": {"passed": 1, "skipped": 2}},
        {
            "model_type": "llava_next",
            "laws": {"identity": False, "drop is mask": True},
            "tests": {"failed": 1, "passed": 2},
        },
    ]


def test_outcomes_are_read_from_a_junit_file(tmp_path):
    (tmp_path / "a.xml").write_text(
        '<testsuites><testsuite><testcase classname="m" name="a"/>'
        '<testcase classname="m" name="b"><failure/></testcase><testcase classname="m" name="c"><error/></testcase>'
        '<testcase classname="m" name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    read = _script("benchmarks/families.py").read_junit(tmp_path / "a.xml")
    assert read == [("m", "a", "passed"), ("m", "b", "failed"), ("m", "c", "failed"), ("m", "d", "skipped")]
