# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md, between `<!-- begin:NAME -->` and `<!-- end:NAME -->`.

`methods` comes from the registry, the others from results; blocks without results state that. Content of the result
files:

* `accuracy.json`: `questions` (text), `unpruned` and `rows`, each with `right` and `total`; rows also with `method`,
  `ratio` or `mean_ratio` (asked for), `refused` where the method cannot meet it, else `kept` (visual tokens after the
  last cut, mean over questions) and `mean_tokens` (mean over decoder layer inputs and questions); `unpruned` with
  `visual_tokens`;
* `families.json`: `rows` with `model_type`, `laws` (name to whether it held, without inapplicable ones) and `tests`
  (`passed`, `failed`, `skipped` to counts).

Both carry `versions`, a mapping from package to version, and `machine`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report_tables import ANSWER_PATCHES, method_label, percent, table, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = 5  # methods in the table of accuracy
MISSING = "*Not yet measured.*"


def render(text: str, results: Path = RESULTS) -> str:
    """The README with every marked block filled.

    Raises:
        ValueError: A block has no renderer, or is not closed.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise ValueError(f"README.md has a block {name!r}; there are: {', '.join(BLOCKS)}")
        return f"<!-- begin:{name} -->\n{BLOCKS[name](results)}\n<!-- end:{name} -->"

    if sorted(re.findall(r"<!-- begin:(\w+) -->", text)) != sorted(re.findall(r"<!-- end:(\w+) -->", text)):
        raise ValueError("README.md has a block that is not closed")
    return re.sub(r"<!-- begin:(\w+) -->.*?<!-- end:\1 -->", fill, text, flags=re.S)


def methods(results: Path) -> str:
    """The registered methods by type and location of their cuts, with links to papers."""
    from scripts.docs import methods as pages
    from vtprune import methods as registry

    rows: dict[tuple[str, str, str], list[str]] = {}
    for kind, names in pages.groups().items():
        for name in names:
            paper, cuts = pages.paper(name), pages.cuts(name)
            text = f"[`{name}`](https://arxiv.org/abs/{paper})" if paper else f"`{name}`"
            place, aware = "before the decoder", "yes" if registry.get(name)().question_aware else "no"
            if kind == "Wrappers":
                place = aware = "as the host"
            elif cuts != "input":
                place, text = "inside it", f"{text} ({cuts})"
            rows.setdefault((kind, place, aware), []).append(text)
    head = ("", "cuts", "reads the question", "methods, with their papers (in brackets: before which of 32 layers)")
    return table(head, [(*key, ", ".join(texts)) for key, texts in rows.items()])


def accuracy(results: Path) -> str:
    """Methods in rows, mean costs in columns, with the tokens left after the last cut."""
    data = read(results / "accuracy.json")
    if data is None:
        return MISSING
    base = data["unpruned"]
    whole = f"{percent(base)} with all {base['visual_tokens']} tokens"
    text = (
        f"{data['questions']}; unpruned: {whole}. Right answers at equal mean cost: the share of visual tokens, "
        f"averaged over the inputs of the decoder layers; in brackets: tokens left at the end. {ANSWER_PATCHES!r} is "
        f"no method: the patches that hold the answer are kept first. The {SHOWN} best at the smallest cost; methods "
        f"that cut inside the decoder cannot cost so little; docs/results.md has all. {versions(data)}"
    )
    return f"{text}\n\n{cost_grid(data, _cell, SHOWN)}"


def grid(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    """Methods in rows, requested ratios in columns, sorted by the smallest ratio."""
    ratios = sorted({row["ratio"] for row in rows if "ratio" in row}, reverse=True)
    by = {(row["method"], row["ratio"]): row for row in rows if "ratio" in row}
    return _table(by, [f"ratio {ratio:g}" for ratio in ratios], ratios, cell)


def cost_grid(data: dict[str, Any], cell: Callable[[dict[str, Any]], str], most: int | None = None) -> str:
    """Methods in rows, mean costs in columns, sorted by the smallest cost; the `most` best, or all.

    A result is in the column of its requested `mean_ratio`, or of a cost within 3 % of its own. Cells without a
    measurement are empty.
    """
    rows = data["rows"]
    costs = sorted({row[name] for row in rows for name in ("ratio", "mean_ratio") if name in row}, reverse=True)
    by: dict[tuple[str, float], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: "mean_ratio" in row):  # requested costs come last and win
        if "mean_ratio" in row:
            by[row["method"], row["mean_ratio"]] = row
        elif "refused" not in row:
            share = row["mean_tokens"] / data["unpruned"]["visual_tokens"]
            by |= {(row["method"], cost): row for cost in costs if abs(share - cost) <= 0.03 * cost}
    return _table(by, [f"mean cost {cost:g}" for cost in costs], costs, cell, most)


def _table(
    by: dict[tuple[str, float], dict[str, Any]], heading: list[str], columns: list[float],
    cell: Callable[[dict[str, Any]], str], most: int | None = None,
) -> str:  # fmt: skip
    """A table by method and column, sorted by the last column, then by the one before it."""

    def order(name: str) -> tuple[Any, ...]:
        mine = [by.get((name, column), {}) for column in reversed(columns)]
        return (*(-row.get("right", 0) / row.get("total", 1) for row in mine), name)

    def shown(row: dict[str, Any] | None) -> str:
        return "" if row is None else "not possible" if "refused" in row else cell(row)

    names = sorted({name for name, _ in by}, key=order)[:most]
    lines = [(method_label(name), *(shown(by.get((name, column))) for column in columns)) for name in names]
    return table(("method", *heading), lines)


def families(results: Path) -> str:
    """Which laws hold on which families."""
    data = read(results / "families.json")
    return MISSING if data is None else families_table(data)


def families_table(data: dict[str, Any]) -> str:
    """Families grouped by the laws that held on them, as a table of few rows."""
    laws = list(dict.fromkeys(law for row in data["rows"] for law in row["laws"]))
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in sorted(data["rows"], key=lambda row: row["model_type"]):
        broken = tuple(law for law in laws if row["laws"].get(law) is False)
        groups.setdefault(broken, []).append(f"`{row['model_type']}`")
    rows = [
        (f"all but {', '.join(broken)}" if broken else "all", str(len(names)), ", ".join(names))
        for broken, names in sorted(groups.items(), key=lambda item: len(item[0]))
    ]
    tests = {kind: sum(row["tests"].get(kind, 0) for row in data["rows"]) for kind in ("passed", "failed", "skipped")}
    counts = f"{tests['passed']:,} tests passed, {tests['failed']:,} failed, {tests['skipped']:,} skipped"
    text = f"Laws tried: {', '.join(laws)}; {counts}. {versions(data)}"
    return f"{text}\n\n" + table(("laws that hold", "", "families"), rows)


def gains(results: Path) -> str:
    """Gains with a tenth of the tokens: processor time of a real decoder, time and answers of the built-in model."""
    speed, fidelity = read(results / "real-speed.json"), read(results / "fidelity.json")
    whole = read(results / "towers-cpu.json")
    if speed is None or fidelity is None or whole is None:
        return MISSING
    measured = speed["rows_in_cpu_time"]
    tokens = max(row["tokens"] for row in measured)
    by = {row["variant"]: row for row in measured if row["tokens"] == tokens}
    base, rows = by["unpruned"], _whole_requests(whole)
    row = by["divprune ratio=0.1"]
    time = _first_token(row) / _first_token(base)
    kept = f"{row['visual']:,} -> {row['kept']:,}"
    memory = f"{row['kv_bytes'] / base['kv_bytes'] - 1:+.0%}"
    rows.append((f"real decoder ({speed['model']})", kept, f"{time - 1:+.0%}", memory, "not measured"))
    row = next(row for row in fidelity["rows"] if row["method"] == "divprune" and row["ratio"] == 0.1)
    kept, time = f"{row['visual']:.0f} -> {row['kept']:.0f}", f"{row['relative_time']['value'] - 1:+.0%}"
    rows.append(
        ("built-in model, 3.6 million parameters", kept, time, "not measured", f"{row['answers']['value']:.0%}")
    )
    text = (
        "A tenth of the tokens, kept by `divprune`, on one CPU. Time to the first token includes the vision tower: in "
        "full width, with random weights, in the first two rows; a small stand-in beside the real decoder. **Not yet "
        f"measured on a GPU.** {versions(speed)}"
    )
    heads = ("", "visual tokens", "time to first token", "KV cache", "same answers")
    return f"{table(heads, rows)}\n\n{text}"


def _whole_requests(whole: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of whole requests, vision tower included, for a method that cuts before the decoder."""
    names = {"decoder 0.1": "decoder cut", "tower 0.35, decoder 0.1": "decoder and tower cut"}
    text, rows = whole["text_tokens"], []
    for variant, name in names.items():
        row = whole["first_token"][variant]
        before, after = row["visual_tokens"]
        memory = (after + text) / (before + text) - 1
        kept = f"{before:,} -> {after:,}"
        rows.append(
            (
                f"Qwen2.5-VL-7B with a quarter of its layers, {name}",
                kept,
                f"{1 / row['gain'] - 1:+.0%}",
                f"{memory:+.0%}",
                "not measured",
            )
        )
    return rows


def _first_token(row: dict[str, Any]) -> float:
    return row["vision"]["median"] + row["prefill"]["median"]


BLOCKS: dict[str, Callable[[Path], str]] = {
    "gains": gains,
    "methods": methods,
    "accuracy": accuracy,
    "families": families,
}


def read(path: Path) -> Any:
    """Content of a result file; None without one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _cell(row: dict[str, Any]) -> str:
    return f"{percent(row)} ({row['kept']:.0f})"
