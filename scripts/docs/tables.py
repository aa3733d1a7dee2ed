# SPDX-License-Identifier: Apache-2.0
"""Tables of the documentation, from the registry, from `benchmarks/results/*.json` and from the tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import equal_cost as comparisons
from benchmarks.report_readme import MISSING, RESULTS, ROOT, read
from benchmarks.report_tables import table


def front(results: Path = RESULTS) -> str:
    """The Pareto front of budgets and methods in cost and accuracy."""
    data = read(results / "accuracy.json")
    if data is None:
        return MISSING
    best, rows = -1, []
    # By cost, then accuracy. Costs are rounded, because a mean over layers is inexact in the last bits.
    measured = (row for row in data["rows"] if "refused" not in row and row["method"] != "oracle")
    for row in sorted(measured, key=lambda row: (round(row["mean_tokens"], 3), -row["right"], row["method"])):
        if row["right"] > best:
            best = row["right"]
            share = row["mean_tokens"] / data["unpruned"]["visual_tokens"]
            kept = f"{row['kept']:.0f}"
            rows.append(
                (f"{row['mean_tokens']:.0f} ({share:.0%})", kept, _share(row), f"`{row['method']}`", _asked(row))
            )
    rows.append((f"{data['unpruned']['visual_tokens']} (100%)", "all", _share(data["unpruned"]), "unpruned", ""))
    head = ("mean tokens over layers", "left at the end", "right answers (95 % interval)", "method", "asked for")
    return f"{_about(data)}\n\n{table(head, rows)}"


def floor(results: Path = RESULTS) -> str:
    """The smallest `ratio` of each method at which, and above which, the loss stays within a bound."""
    data = read(results / "accuracy.json")
    if data is None:
        return MISSING
    whole = data["unpruned"]["right"] / data["unpruned"]["total"]
    bounds = (0.01, 0.02, 0.05, 0.10)
    lines = []
    for name in sorted({row["method"] for row in data["rows"]} - {"oracle"}):
        mine = sorted((r for r in data["rows"] if r["method"] == name and "ratio" in r), key=lambda r: -r["ratio"])
        cells, mean = [], []
        for bound in bounds:
            held: dict[str, Any] | None = None
            for row in mine:
                if "refused" in row or whole - row["right"] / row["total"] > bound + 1e-9:
                    break
                held = row
            cells.append("none tried" if held is None else f"{held['ratio']:g}")
            mean.append(1.0 if held is None else held["ratio"])
        lines.append((mean[::-1], (f"`{name}`", *cells)))
    head = ("method", *(f"at most {100 * bound:g} points lost" for bound in bounds))
    tried = sorted({row["ratio"] for row in data["rows"] if "ratio" in row}, reverse=True)
    text = f"Ratios tried: {', '.join(f'{ratio:g}' for ratio in tried)}. {_about(data)}"
    return f"{text}\n\n{table(head, [cells for _, cells in sorted(lines)])}"


def kinds(results: Path = RESULTS) -> str:
    """Right answers by kind of question, with and without pruning."""
    data = read(results / "kinds.json")
    if data is None:
        return MISSING
    whole = next(row for row in data["rows"] if "method" not in row)["kinds"]
    names = sorted((kind for kind in whole if kind != "all"), key=lambda kind: (_worst(data, kind), kind))

    def line(label: str, kinds: dict[str, Any]) -> tuple[str, ...]:
        return (label, *(f"{kinds[name]['accuracy']:.1%}" for name in [*names, "all"]))

    rows = [line("unpruned", whole)]
    pruned = sorted((row for row in data["rows"] if "method" in row), key=lambda r: (r["method"], -r["ratio"]))
    rows += [line(f"`{row['method']}`, ratio {row['ratio']:g}", row["kinds"]) for row in pruned]
    rows.append(("always the most frequent answer", *(f"{whole[name]['majority']:.1%}" for name in [*names, "all"])))
    head = ("", *(f"{name} ({whole[name]['total']})" for name in names), f"all ({whole['all']['total']})")
    return f"In brackets: questions of each kind. {_about(data)}\n\n{table(head, rows)}"


def laws(results: Path = RESULTS) -> str:
    """The test file of every law, and the number of families on which it held in the last full run."""
    data = read(results / "families.json") or {"rows": []}
    lines = []
    for path in sorted((ROOT / "tests" / "laws").glob("test_*.py"), key=lambda path: int(path.stem.split("_")[1])):
        number, name = path.stem.split("_", 2)[1:]
        summary = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
        held = [row["laws"][_law(name)] for row in data["rows"] if _law(name) in row["laws"]]
        verdict = f"{sum(held)} of {len(held)}" if held else "not in the last run"
        lines.append((number, re.sub(r"^Law \d+: ", "", summary), f"`{path.relative_to(ROOT)}`", verdict))
    about = f" {_versions(data)}" if data["rows"] else ""
    return table(("law", "what is tested", "file", "families on which it held"), lines) + f"\n\n{about.strip()}"


def methods(names: list[str] | None = None) -> str:
    """A row per method (default: all), with links to its page and its paper."""
    from scripts.docs import methods as pages

    rows = []
    for name in pages.names() if names is None else names:
        paper = pages.paper(name)
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""
        rows.append((f"[`{name}`](/methods/{name}.md)", pages.cuts(name), pages.summary(name), link))
    return table(("method", "cuts before layer (of 32)", "what it does", "paper"), rows)


def of_method(name: str, results: Path = RESULTS) -> str:
    """Accuracy of one method at every budget, with the unpruned model and random selection for comparison."""
    data = read(results / "accuracy.json")
    rows = [row for row in data["rows"] if row["method"] == name] if data else []
    if data is None or not rows:
        return MISSING
    control = {_asked(row): row for row in data["rows"] if row["method"] == "random"}
    lines = []
    for row in sorted(rows, key=lambda row: ("ratio" not in row, -row.get("ratio", 0), -row.get("mean_ratio", 0))):
        other = control.get(_asked(row))
        beside = _share(other) if other and "refused" not in other else ""
        if "refused" in row:
            lines.append((_asked(row), "not possible", "", "", beside))
        else:
            lines.append((_asked(row), f"{row['kept']:.0f}", f"{row['mean_tokens']:.0f}", _share(row), beside))
    head = ("asked for", "left at the end", "mean over layers", "right answers (95 % interval)", "`random`")
    return f"Unpruned: {_share(data['unpruned'])}. {_about(data)}\n\n{table(head, lines)}"


def needles(results: Path = RESULTS) -> str:
    """Right answers in the needle test of a real decoder, at equal mean costs."""
    data = read(results / "needle.json")
    if data is None:
        return MISSING
    places = min((name for name in data if name.isdigit()), key=int)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in data[places].items():
        cost = name.removeprefix(row["method"]).strip()
        if cost and "ratio" not in row:
            rows.setdefault(row["method"], {})[cost] = row
    rows = {method: mine for method, mine in rows.items() if any("outcomes" in row for row in mine.values())}
    costs = sorted({cost for mine in rows.values() for cost in mine}, key=float, reverse=True)

    def right(method: str) -> float:
        return sum(row["right"] / row["total"] for row in rows[method].values() if "outcomes" in row)

    def cell(row: dict[str, Any] | None) -> str:
        return "not tried" if row is None else _share(row) if "outcomes" in row else "not possible"

    lines = [
        (f"`{method}`", *(cell(rows[method].get(cost)) for cost in costs))
        for method in sorted(rows, key=lambda method: (-right(method), method))
    ]
    whole = data[places]["unpruned"]
    texts = {row["total"] for mine in rows.values() for row in mine.values() if "outcomes" in row}
    asked = " to ".join(map(str, sorted({min(texts), max(texts)})))
    about = (
        f"SmolLM2-135M-Instruct, {int(places):,} visual places, {asked} texts for each number; "
        f"unpruned {_share(whole)}. "
        f"({', '.join(f'{name} {version}' for name, version in data['versions'].items())})"
    )
    head = ("method", *(f"right answers at mean cost {cost}" for cost in costs))
    return f"{about}\n\n{table(head, lines)}"


def equal_cost(results: Path = RESULTS) -> str:
    """The default and the best other method on every test bed and at every cost, and clear wins over the default."""
    found = comparisons.comparisons(results)
    if not found:
        return MISSING
    lines = []
    for bed, cost in dict.fromkeys((one.bed, one.cost) for one in found):
        mine = [one for one in found if (one.bed, one.cost) == (bed, cost)]
        best = max(mine, key=lambda one: (one.high + one.low, one.method))
        lines.append(
            (
                bed,
                f"{cost:.2f}",
                f"{best.default:.1%}",
                f"`{best.method}` {best.share:.1%}",
                f"{best.total}",
                f"{100 * best.low:+.1f} to {100 * best.high:+.1f}",
                str(sum(one.high < 0 for one in mine)),
                ", ".join(f"`{one.method}`" for one in comparisons.better(mine)) or "none",
            )
        )
    head = (
        "test bed", "mean cost", f"`{comparisons.NAME}`", "best other", "questions", "its lead, points (95 %)",
        "clearly worse", "clearly better",
    )  # fmt: skip
    wins = comparisons.better(found)
    text = f"{len(found)} comparisons at equal mean cost, {len(wins)} in which a method is clearly better."
    return f"{text}\n\n{table(head, lines)}"


def clips(results: Path = RESULTS) -> str:
    """Effect of pruning clips, compared with fewer and smaller frames: one table per budget."""
    data = read(results / "video.json")
    if data is None or not data["rows"]:
        return MISSING
    rows, out = data["rows"], [f"{data['questions']}; {data['tokens']:,} visual tokens unpruned. {_versions(data)}"]
    sizes = {row["kept"] for row in rows if row["rule"] == "uniform"}  # fewer and smaller frames have further sizes
    head = (
        "rule",
        "tokens",
        "time to first token",
        "KV",
        "KL to unpruned, real clips",
        "same first word",
        "still scenes",
        "moving camera",
        "moving objects",
    )
    for kept in sorted(sizes, reverse=True):
        lines = []
        for rule in dict.fromkeys(row["rule"] for row in rows):
            mine = {row["part"]: row for row in rows if (row["rule"], row["kept"]) == (rule, kept)}
            if any("refused" in row for row in mine.values()):
                lines.append((f"`{rule}`", "refused", *[""] * (len(head) - 2)))
                continue
            real = [row for part, row in mine.items() if "right" not in row]
            count = sum(row["prompts"] for row in real)
            some = next(iter(mine.values()))
            kl = sum(row["kl"] * row["prompts"] for row in real) / max(count, 1)
            same = sum(row["same"] for row in real)
            seconds = sum(row["seconds"] for row in mine.values()) / len(mine)
            right = [
                "" if row is None else f"{row['right']} of {row['prompts']} ({row['right_unpruned']})"
                for row in map(mine.get, ("still", "moving", "objects"))
            ]
            name = f"`{rule}`" if " " not in rule else rule
            cells = (
                f"{some['tokens']:.0f}",
                f"{seconds:.2f}",
                f"{some['bytes']:.2f}",
                f"{kl:.2f}",
                f"{same:.0f} of {count}",
            )
            lines.append((name, *cells, *right))
        out.append(table(head, lines))
    return "\n\n".join(out)


def clips_time(results: Path = RESULTS) -> str:
    """Methods compared with fewer or smaller frames that took no more time; one table per kind of clip."""
    data = read(results / "video.json")
    if data is None or not data.get("equal_time"):
        return MISSING
    out = []
    for kind, lines in data["equal_time"].items():
        rows: dict[tuple[str, int], list[str]] = {}
        for line in lines:
            cells = rows.setdefault((line["rule"], line["kept"]), [f"{line['time']:.2f}", f"{line['kl']:.2f}"])
            if "instead_kept" not in line:
                cells += ["none", "", ""]
                continue
            low, high = line["difference"]
            cells += [f"{line['instead_kept']}", f"{line['instead_kl']:.2f}", f"{low:+.2f} to {high:+.2f}"]
        ran = [line["difference"] for line in lines if "difference" in line]
        intro = (
            f"{kind.capitalize()}, {len(ran)} comparisons: the method is clearly nearer in "
            f"{sum(high < 0 for _, high in ran)}, what is shown instead in {sum(low > 0 for low, _ in ran)}."
        )
        ways = [
            f"{clip}: {name}" for clip in ("fewer frames", "smaller") for name in ("tokens a step", "KL", "difference")
        ]
        head = ("rule", "tokens a step", "time", "KL", *ways)
        out.append(
            f"{intro}\n\n{table(head, [(f'`{rule}`', str(kept), *cells) for (rule, kept), cells in rows.items()])}"
        )
    return "\n\n".join(out)


def curvature(results: Path = RESULTS) -> str:
    """V-CAST's frame weights at a scene cut, at a turn of the camera and in still scenes."""
    data = read(results / "video.json")
    if data is None or not data.get("curvature"):
        return MISSING
    rows = []
    for case in data["curvature"]:
        at, shares = (" / ".join(f"{value:.2f}" for value in case[name]) for name in ("curvature", "share"))
        rows.append((case["case"], at, shares, f"{case['curvature_elsewhere']:.2f}", f"{case['share_elsewhere']:.2f}"))
    head = ("clip", "curvature there", "budget there", "curvature elsewhere", "budget elsewhere")
    return table(head, rows)


FILLS: dict[str, Callable[[], str]] = {
    "front": front,
    "floor": floor,
    "kinds": kinds,
    "laws": laws,
    "methods": methods,
    "needles": needles,
    "equal_cost": equal_cost,
    "clips": clips,
    "clips_time": clips_time,
    "curvature": curvature,
}


def _share(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['right'] / row['total']:.1%} ({low:.1%} to {high:.1%})"


def _asked(row: dict[str, Any]) -> str:
    return next(f"`{name}={row[name]:g}`" for name in ("ratio", "mean_ratio") if name in row)


def _worst(data: dict[str, Any], kind: str) -> float:
    return min(row["kinds"][kind]["accuracy"] for row in data["rows"])


def _law(name: str) -> str:
    """The key of a law in the results."""
    return name.replace("_", " ")


def _about(data: dict[str, Any]) -> str:
    return f"Built-in model, {data['questions']}. {_versions(data)}"


def _versions(data: dict[str, Any]) -> str:
    return f"({', '.join(f'{name} {version}' for name, version in data['versions'].items())}; {data['machine']})"
