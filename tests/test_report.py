# SPDX-License-Identifier: Apache-2.0
"""docs/results.md and the README match the committed results and show their numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
from benchmarks import report, report_measured, report_sections, report_tables  # noqa: E402
from vtprune.study import charts  # noqa: E402

ABOUT = {"versions": {"torch": "2.13.0"}, "machine": "2 cores"}


def cells(text: str, first: str) -> list[str]:
    """The row of a Markdown table that starts with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_pages_and_charts_are_what_the_results_give() -> None:
    assert report.stale(ROOT) == [], "run python -m benchmarks.report"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of results and pages in a temporary folder."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name in ("accuracy.json", "iwp_sweep.json"):
        shutil.copy(ROOT / "benchmarks" / "results" / name, tmp_path / "benchmarks" / "results")
    (tmp_path / "README.md").write_text("<!-- begin:accuracy -->\n<!-- end:accuracy -->\n")
    return tmp_path


def test_what_is_stale_is_named_and_mended(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    drawn: list[Path] = []

    def draw(shown: list[charts.Chart], path: Path) -> None:  # only the digest in the metadata is compared
        drawn.append(path)
        path.write_text(f"<svg>sha256 {charts.digest(shown)}</svg>")

    monkeypatch.setattr(charts, "save", draw)
    monkeypatch.setattr(report, "ROOT", copy)
    everything = ["README.md", "docs/results-accuracy.svg", "docs/results.md"]
    assert report.main(["--check"]) == 1
    output = capsys.readouterr().out
    assert all(f"{name} is out of date" in output for name in everything)
    assert report.write(copy) == everything and report.stale(copy) == [] and report.main(["--check"]) == 0
    assert len(drawn) == 1 and report.write(copy) == []
    result = copy / "benchmarks" / "results" / "accuracy.json"
    data = json.loads(result.read_text())
    shown = {"method": "resprune", "ratio": 0.1}  # in the table of README.md, too
    next(row for row in data["rows"] if shown.items() <= row.items())["right"] -= 1
    result.write_text(json.dumps(data))
    assert report.stale(copy) == everything
    report.write(copy)
    (copy / "docs" / "results-gone.svg").write_text("<svg/>")
    assert report.write(copy) == ["docs/results-gone.svg"] and not (copy / "docs" / "results-gone.svg").exists()


def test_the_page_names_the_model_whose_weights_are_newer_than_a_result(copy: Path) -> None:
    assert "earlier weights" not in report.page(report.load(copy / "benchmarks" / "results"))
    result = copy / "benchmarks" / "results" / "accuracy.json"
    data = json.loads(result.read_text())
    both = {"llava": data["weights_sha256"], "qwen2_5_vl": "other"}
    for weights, name in (("other", "llava"), (both, "qwen2_5_vl")):
        result.write_text(json.dumps(data | {"weights_sha256": weights}))
        text = report.page(report.load(copy / "benchmarks" / "results"))
        assert text.count(f"**earlier weights of the built-in {name}**") == 1


def test_files_that_cannot_be_rendered_are_named(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    results = copy / "benchmarks" / "results"
    monkeypatch.setattr(report, "ROOT", copy)
    for name, text, message in (
        ("speed.json", "{}", "speed.json has no renderer"),
        ("kinds.json", "{", "kinds.json is not JSON"),
        ("kinds.json", "{}", "kinds.json does not hold"),
        ("soak.json", '{"left": ["memory"]}', "soak.json is of an interrupted run; left to do: memory"),
    ):
        (results / name).write_text(text)
        assert report.main(["--check"]) == 2 and message in capsys.readouterr().err
        (results / name).unlink()


def test_charts_are_the_same_each_time_and_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, chart in report.drawings(report.load(ROOT / "benchmarks" / "results")).items():
        for number in range(2):
            charts.save([chart], tmp_path / f"{number}.svg")
        first, second = ((tmp_path / f"{number}.svg").read_bytes() for number in range(2))
        assert first == second and len(first) < 150_000, name
        assert charts.digest([chart]).encode() in first and b"<dc:date>" not in first
        assert all(series.label.encode() in first for series in chart.series)


def test_the_load_of_the_machine_is_shown() -> None:
    assert report_tables.versions(ABOUT) == "(torch 2.13.0; 2 cores)"
    stale = {"qwen2_5_vl": "of other weights", "llava": report_tables._weights()["llava"]}
    assert report_tables.versions(ABOUT | {"weights_sha256": stale}).endswith(
        "earlier weights of the built-in qwen2_5_vl**)"
    )
    assert report_tables.earlier_weights({"weights_sha256": "x", "model": "embedded-qwen2_5_vl"}) == ["qwen2_5_vl"]
    assert report_tables.versions(ABOUT | {"load": 2.33}) == "(torch 2.13.0; 2 cores; load up to 2.3)"


def test_fidelity_shows_its_numbers() -> None:
    def number(value: float) -> dict[str, Any]:
        return {"value": value, "interval": [value / 2, value * 2]}

    row = {"method": "iwp", "ratio": 0.1, "kept": 14.0, "visual": 144.0, "frontier": True, "relative_time": number(0.4)}
    row |= {"kl": number(0.02), "top1": number(0.5), "answers": number(0.5), "cosine": number(0.25), "mean_ratio": 0.55}
    data = ABOUT | {"model": "embedded", "pictures": 3, "prompts": 3, "of": "drawn scenes", "questions": ["x?", "y?"]}
    data |= {"clock": "cpu", "ratios": [0.1], "rows": [row, {"method": "late", "ratio": 0.1, "refused": "too late"}]}
    text = report_sections.fidelity(data)
    assert cells(text, "`iwp`") == [
        "`iwp`", "0.55", "14 of 144", "0.02 (0.01–0.04)", "50 (25–100) %", "50 (25–100) %", "0.250 (0.125–0.500)", "",
        "**0.40 (0.20–0.80)**",
    ]  # fmt: skip
    assert "`late` at 0.1: too late" in text and "CPU time" in text and "2 questions each" in text


def test_latency_shows_its_numbers_and_what_does_not_pay() -> None:
    def spread(median: float) -> dict[str, float]:
        return {"median": median, "low": median, "high": median}

    times = {"vision": spread(0.1), "decision": spread(0.002), "token": None, "end_to_end": spread(1.5)}
    row = {"batch": 1, "tokens": 576, "visual": 576, "text": 64, "kept": 58, "peak_bytes": None, **times}
    good = row | {"variant": "iwp 0.1", "prefill": spread(0.25), "speedup": 4.0, "gain": 0.85, "flops_bound": 0.2}
    random = good | {"variant": "random 0.1", "over_limit": 0.04, "kv_bytes": 3, "kv_bytes_formula": 3}
    good |= {"kv_bytes": 2**20, "kv_bytes_formula": 2**20, "speedup_end_to_end": 1.5, "verdict": "does not pay: x"}
    refused = {"batch": 1, "tokens": 576, "variant": "late 0.1", "refused": "too late"}
    data = ABOUT | {"model": "small", "dtype": "float32", "attention": "sdpa", "device": "cpu"}
    data |= {"settings": {"a": {"batch": 1, "tokens": 576}}, "rows": [good, random, refused]}
    text = report_measured.latency(data)
    assert cells(text, "`iwp 0.1`") == [
        "`iwp 0.1`", "58", "100 ms", "2 ms", "250 ms", "4.00", "85 %", "200 ms", "", "1.5 s", "1.50", "", "1.0 MiB",
    ]  # fmt: skip
    assert "`late 0.1`: too late" in text and "does not pay: x" in text and "by the clock" in text
    assert cells(text, "random 0.1, batch 1: prefill over the limit")[1:] == ["0.05", "0.040", "yes"]
    assert cells(text, "random 0.1, batch 1: prefill against unpruned")[1:] == ["5", "4.000", "NO"]
    slower = good | {"prefill": spread(2.0)}
    text = report_measured.latency(data | {"rows_in_cpu_time": [slower]})
    assert cells(text, "`iwp 0.1`")[4] == "2 s" and "CPU time" in text


def test_lmms_eval_shows_its_numbers_and_whether_processes_agree() -> None:
    def task(right: int, **kept: int) -> dict[str, Any]:
        return {"right": right, "total": 10, "interval": [0.1, 0.9], **kept}

    rows = [
        {"method": "none", "processes": 1, "tasks": {"scenes": task(9)}},
        {"method": "iwp", "processes": 1, "tasks": {"scenes": task(8, visual_tokens=144, kept_visual_tokens=14)}},
        {"method": "iwp", "processes": 2, "tasks": {"scenes": task(8, visual_tokens=144, kept_visual_tokens=14)}},
    ]
    data = ABOUT | {"questions": "the first 10", "ratio": 0.1, "batch": 4, "rows": rows}
    text = report_measured.lmms_eval(data)
    assert cells(text, "unpruned") == ["unpruned", "1", "90.0 % (10.0–90.0)"] and "give the same" in text
    assert cells(text, "`iwp`")[2] == "80.0 % (10.0–90.0), 14 of 144"
    rows[2]["tasks"]["scenes"] = task(7)
    assert "give OTHER" in report_measured.lmms_eval(data)


def test_kinds_and_soak_show_their_numbers() -> None:
    kinds = {"all": {"right": 1, "total": 4, "interval": [0.0, 0.5]}}
    rows = [{"kinds": kinds}, {"method": "iwp", "ratio": 0.1, "kinds": kinds}]
    text = report_measured.kinds(ABOUT | {"questions": "4 questions", "rows": rows})
    assert cells(text, "unpruned") == ["unpruned", "", "25.0 % (0–50)"] and cells(text, "`iwp`")[1] == "0.1"
    part = {
        "passed": True,
        "seconds": 9.0,
        "cpu_seconds": 7.6,
        "threads": 8,
        "sizes": [1, 2],
        "each": {"a": 1, "b": [5]},
    }
    failed = {"passed": False, "cpu_seconds": 1.0, "error": "ValueError: x"}
    text = report_measured.soak(ABOUT | {"seed": 0, "parts": {"long_prompts": part, "memory": failed}})
    assert cells(text, "long prompts") == ["long prompts", "yes", "8 s", "threads 8, sizes 1/2, each 1 to 5 (2)"]
    assert cells(text, "memory") == ["memory", "NO", "1 s", "error ValueError: x"]


def test_kernels_on_a_gpu_show_their_dtypes_and_what_was_aimed_at() -> None:
    """GPU results of `benchmarks.kernels` (made up here) are shown with dtypes and targets."""
    row = {"operation": "dpp_map", "size": "N=9", "data": "noise", "dtype": "bfloat16", "seconds": 0.002}
    missed = {"what": "DPP, 160 of 2880", "aim_seconds": 1.5e-3, "seconds": 0.002, "met": False, "shortfall": 0.0}
    missed |= {"replayed_seconds": 0.0016, "times_plain": 12.25, "aim_times_plain": 10.0, "extra_bytes": 2**20}
    wrong = {"what": "iwp", "aim_seconds": 5e-4, "met": False, "shortfall": 1.0, "error": "a pick was not the best row"}
    data = {**ABOUT, "device": "a GPU", "threads": 1, "ceilings": {"float32": {}, "bfloat16": {}}, "rows": [row]}
    assert cells(report_sections.kernels(data | {"rows": [{**row, "share_of_limit": 0.5}]}), "`dpp_map`")[1:4] == [
        "N=9, bfloat16", "noise", "2 ms",
    ]  # fmt: skip
    text = report_sections.kernels({**data, "rows": [{**row, "share_of_limit": 0.5}], "targets": [missed, wrong]})
    assert cells(text, "DPP, 160 of 2880")[1:] == [
        "1.5 ms", "1.6 ms", "2 ms", "12.2 (aim 10)", "1 MiB", "no",
    ]  # fmt: skip
    assert cells(text, "iwp")[1:] == ["500 µs", "", "", "", "", "a pick was not the best row"]
