# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts behind the README's tables, on small data."""

from __future__ import annotations

import json

import pytest

import vtprune
from benchmarks import accuracy, families, iwp_sweep, report_sections, versions
from vtprune import refvlm
from vtprune.refvlm import evaluate


def test_accuracy_counts_right_answers_and_kept_tokens():
    jobs = [(name, {"ratio": ratio}) for name in ("uniform", "fastv", "oracle") for ratio in (0.5, 0.1)]
    data = accuracy.measure([(None, {}), *jobs, ("fastv", {"mean_ratio": 0.2})], 10, batch=4)
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

    assert data["unpruned"].pop("answers").count("1") == right()
    assert data["unpruned"] | {"interval": None} == {
        "visual_tokens": 144,
        "right": right(),
        "total": 10,
        "interval": None,
    }
    with vtprune.patch(model, ratio=0.1, method="uniform"):
        assert by["uniform", 0.1]["right"] == right()


def test_accuracy_of_smaller_pictures_and_of_methods_at_their_tokens():
    jobs = [(None, {}), ("resize", {"ratio": 0.5}), ("resize", {"ratio": 0.1}), ("uniform", {"ratio": 0.1})]
    data = accuracy.measure(jobs, 4, batch=2, embedded="qwen2_5_vl")
    tenth, half, uniform = data["rows"]
    assert (half["kept"], tenth["kept"], uniform["kept"]) == (64, 9, 9), "144 tokens; squares of at most 72 and 14"
    assert 0.05 < tenth["cost"] < half["cost"] < 0.5 < uniform["cost"] < 1, "only resizing makes the tower cheaper"
    model, processor = refvlm.load(name="qwen2_5_vl")
    samples = list(evaluate.held_out_scenes(4))
    small = [sample._replace(image=sample.image.resize((36, 36))) for sample in samples]
    processor.image_processor.size["shortest_edge"] = 144
    given = evaluate.answer(model, processor, small, batch_size=1)
    assert tenth["answers"] == "".join(str(int(s.answer == a)) for s, a in zip(samples, given, strict=True))
    text = report_sections.accuracy(data)
    assert "Beside smaller pictures" in text and "| `uniform` | 9 |" in text
    assert "| 9 |" in next(line for line in reversed(text.splitlines()) if line.startswith("| `uniform` |"))


def test_accuracy_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "accuracy.json"
    jobs = [(None, {}), ("uniform", {"ratio": 0.1})]
    first = accuracy.measure(jobs, 4, batch=4, out=out)
    seen = []
    again = accuracy.measure([*jobs, ("random", {"ratio": 0.1})], 4, batch=4, out=out, log=seen.append)
    assert len(seen) == 1 and again["unpruned"] == first["unpruned"] and len(again["rows"]) == 2
    stale = json.loads(out.read_text()) | {"weights_sha256": "of other weights"}
    out.write_text(json.dumps(stale))
    with pytest.raises(vtprune.VTPruneError, match='weights_sha256 is "of other weights" there.*--force'):
        accuracy.measure(jobs, 4, batch=4, out=out)
    assert json.loads(out.read_text()) == stale
    assert len(accuracy.measure(jobs, 4, batch=4, out=out, force=True)["rows"]) == 1


def test_a_sweep_is_sorted_and_one_of_other_questions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(iwp_sweep, "right", lambda options, ratio, questions: 3)
    settings = [{"layer": 1, "duplication": d} for d in (0.5, 0.0)]
    data = iwp_sweep.sweep(settings, 4, 1, tmp_path / "sweep.json", force=False)
    assert [(row["duplication"], row["right"]) for row in data["rows"]] == [(0.0, [3, 3]), (0.5, [3, 3])]
    with pytest.raises(vtprune.VTPruneError, match="questions is"):
        iwp_sweep.sweep([], 5, 1, tmp_path / "sweep.json", force=False)


def test_a_law_holds_where_tests_ran_and_none_failed():
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
    assert families.collect(cases, ["llava", "llava_next"]) == [
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
    read = families.read_junit(tmp_path / "a.xml")
    assert read == [("m", "a", "passed"), ("m", "b", "failed"), ("m", "c", "failed"), ("m", "d", "skipped")]


def test_runs_of_the_suite_are_summed_up_by_version(tmp_path):
    (tmp_path / "a.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><error/></testcase>'
        '<testcase name="c"><skipped type="pytest.skip" message="no GPU"/></testcase>'
        '<testcase name="d"><skipped type="pytest.xfail" message="transformers 5.17.0 mixes pictures"/></testcase>'
        '<testcase name="e"><skipped type="pytest.skip" message="transformers 5.17.0 fails, too: why"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = versions.summary(tmp_path / "a.xml")
    assert found == {
        "passed": 1,
        "skipped": 2,
        "expected_failures": 1,
        "failed": 1,
        "run_again": 0,
        "old_versions": {"transformers 5.17.0 fails, too": 1, "transformers 5.17.0 mixes pictures": 1},
    }
    (tmp_path / "b.xml").write_text('<testsuite><testcase name="b"/><testcase name="c"/></testsuite>')
    again = versions.summary(tmp_path / "a.xml", tmp_path / "b.xml")
    assert again == found | {"passed": 2, "failed": 0, "run_again": 1}
    data: dict = {}
    for transformers, torch, passed in (
        ("5.23.0", "2.9", 1),
        ("5.3.0", "2.11", 2),
        ("5.23.0", "2.13", 3),
        ("5.3.0", "2.11", 4),
    ):
        run = {"versions": {"transformers": transformers, "torch": torch}, "passed": passed}
        data = versions.recorded(data, run)
    assert [run["passed"] for run in data["runs"]] == [4, 1, 3]
