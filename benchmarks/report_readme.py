# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md, between `<!-- begin:NAME -->` and `<!-- end:NAME -->`.

`methods` comes from the registry, the others from results. Where there is no measurement yet, the block says so. What
the result files hold:

* `accuracy.json`: `questions` (text), `unpruned` and `rows`, each with `right` and `total`; rows also with `method`,
  `ratio` or `mean_ratio` (asked for), `refused` where the method cannot meet it, else `kept` (visual tokens after the
  last cut, mean over questions) and `mean_tokens` (mean over decoder layer inputs and questions); `unpruned` with
  `visual_tokens`;
* `families.json`: `rows` with `model_type`, `laws` (name of a law to whether it held; one that does not apply is left
  out) and `tests` (`passed`, `failed`, `skipped` to counts).

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
    """The registered methods by kind and place of their cuts, each with a link to its paper."""
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
    """Methods down, ratios across; the tokens that were really kept stand beside every share of right answers."""
    data = _read(results / "accuracy.json")
    if data is None:
        return MISSING
    base = data["unpruned"]
    whole = f"{percent(base)} with all {base['visual_tokens']} tokens"
    text = (
        f"{data['questions']}; unpruned: {whole}. In brackets: tokens kept at the end / mean over decoder layers. "
        f"{ANSWER_PATCHES!r} is no method: the patches that hold the answer are kept first. At one `mean_ratio` "
        f"all cost the same. The {SHOWN} best at the smallest ratio; docs/results.md has all. {versions(data)}"
    )
    return f"{text}\n\n{grid(data['rows'], _cell, SHOWN)}"


def grid(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str], most: int | None = None) -> str:
    """Methods down, budgets across, best first by the smallest `ratio`; the `most` best, or all."""
    budgets = sorted({(name, row[name]) for row in rows for name in ("ratio", "mean_ratio") if name in row})
    budgets.sort(key=lambda budget: (budget[0] != "ratio", -budget[1]))
    by = {(row["method"], name, row[name]): row for row in rows for name in ("ratio", "mean_ratio") if name in row}
    smallest = [budget for budget in budgets if budget[0] == budgets[0][0]][-1]

    def order(name: str) -> tuple[float, str]:
        last = by.get((name, *smallest), {})
        return -last.get("right", 0) / max(1, last.get("total", 1)), name

    def shown(row: dict[str, Any] | None) -> str:
        return "" if row is None else "not possible" if "refused" in row else cell(row)

    names = sorted({row["method"] for row in rows}, key=order)[:most]
    lines = [(method_label(name), *(shown(by.get((name, *budget))) for budget in budgets)) for name in names]
    return table(("method", *(f"{name} {value:g}" for name, value in budgets)), lines)


def families(results: Path) -> str:
    """Which laws hold on which families."""
    data = _read(results / "families.json")
    return MISSING if data is None else families_table(data)


def families_table(data: dict[str, Any]) -> str:
    """Families grouped by the laws that held on them, so that dozens of families stay a table of a few rows."""
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
    """What a tenth of the tokens gains: on a real decoder by processor time, on the built-in model with its answers."""
    speed, fidelity = _read(results / "real-speed.json"), _read(results / "fidelity.json")
    if speed is None or fidelity is None:
        return MISSING
    measured = speed["rows_in_cpu_time"]
    tokens = max(row["tokens"] for row in measured)
    by = {row["variant"]: row for row in measured if row["tokens"] == tokens}
    base, rows = by["unpruned"], []
    for name in ("divprune", "iwp"):
        row = by[f"{name} ratio=0.1"]
        time = _first_token(row) / _first_token(base)
        kept = f"{row['visual']:,} -> {row['kept']:,}"
        memory = f"{row['kv_bytes'] / base['kv_bytes'] - 1:+.0%}"
        rows.append((f"real decoder ({speed['model']}), `{name}`", kept, f"{time - 1:+.0%}", memory, "not measured"))
    row = next(row for row in fidelity["rows"] if row["method"] == "iwp" and row["ratio"] == 0.1)
    kept, time = f"{row['visual']:.0f} -> {row['kept']:.0f}", f"{row['relative_time']['value'] - 1:+.0%}"
    rows.append(("built-in model, `iwp`", kept, time, "not measured", f"{row['answers']['value']:.0%}"))
    text = (
        "A tenth of the tokens, on a CPU; time to the first token includes the vision tower, which beside the real "
        "decoder is a small stand-in. The built-in model is so small that selection costs more than it saves. **Not "
        f"yet measured on a GPU.** {versions(speed)}"
    )
    heads = ("", "visual tokens", "time to first token", "KV cache", "same answers")
    return f"{table(heads, rows)}\n\n{text}"


def _first_token(row: dict[str, Any]) -> float:
    return row["vision"]["median"] + row["prefill"]["median"]


BLOCKS: dict[str, Callable[[Path], str]] = {
    "gains": gains,
    "methods": methods,
    "accuracy": accuracy,
    "families": families,
}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _cell(row: dict[str, Any]) -> str:
    return f"{percent(row)} ({row['kept']:.0f} / {row['mean_tokens']:.0f})"
