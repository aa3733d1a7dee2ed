# SPDX-License-Identifier: Apache-2.0
"""The scripts behind the README's tables, on little data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import vtprune
from vtprune import refvlm
from vtprune.refvlm import evaluate

ROOT = Path(__file__).resolve().parent.parent


def _script(path: str):
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accuracy_counts_right_answers_and_kept_tokens():
    data = _script("benchmarks/accuracy.py").measure(["uniform", "fastv"], [0.5, 0.1], questions=10, batch=4)
    assert [(row["method"], row["ratio"]) for row in data["rows"]] == [
        ("uniform", 0.5),
        ("uniform", 0.1),
        ("fastv", 0.5),
        ("fastv", 0.1),
    ]
    assert [row["kept"] for row in data["rows"]] == [72, 14, 72, 14]
    before_layer_2_of_6 = (2 * 144 + 4 * 14) / 6
    assert [round(row["mean_tokens"], 3) for row in data["rows"]][1::2] == [14, round(before_layer_2_of_6, 3)]

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
        assert data["rows"][1]["right"] == right()


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
