# SPDX-License-Identifier: Apache-2.0
"""Sections of docs/results.md that rest on real parts: answers, needles, position bias, speed of a decoder."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.report_tables import right_share, span, table, versions

Data = dict[str, Any]


def quality(data: Data) -> str:
    """A table of the unpruned model by kind of question, and one of all methods for each bed where they were asked."""
    beds = data["beds"]
    head = (
        "A DINOv2-small tower, SmolLM2-135M, and our projector and LoRA between them, asked about drawn objects on "
        f"parts of photographs that training never saw ({', '.join(data['held_out_photographs'])}) and about pages of "
        f"large text. Right answers, equal word for word (95 % interval). {versions(data)}"
    )
    whole = {bed: rows["unpruned"]["kinds"] for bed, rows in beds.items()}
    lines = [
        (
            bed.split()[0],
            f"{int(bed.split()[1]) ** 2:,}",
            kind,
            right_share(row, ".0f"),
            str(row["total"]),
            f"{100 * row['majority']:.0f} %",
        )
        for bed, kinds in whole.items()
        for kind, row in kinds.items()
    ]
    right, total = (sum(kinds["all"][name] for kinds in whole.values()) for name in ("right", "total"))
    overall = f"Unpruned {right} of {total} are right."
    parts = [f"{head}\n\n{overall}"]
    parts.append(table(("picture", "visual tokens", "questions", "right", "of", "most frequent answer"), lines))
    for bed, rows in beds.items():
        cut = [row for name, row in rows.items() if name != "unpruned"]
        if not cut:
            continue
        costs = sorted({row["mean_ratio"] for row in cut}, reverse=True)
        found = {(row["method"], row["mean_ratio"]): row for row in cut}
        methods = sorted({row["method"] for row in cut if "refused" not in row})
        asked = min(row["kinds"]["all"]["total"] for row in cut if "refused" not in row)
        first = rows["unpruned"]["outcomes"][:asked]
        kind, grid = bed.split()
        parts.append(
            f"### {kind.capitalize()}s, {int(grid) ** 2:,} visual tokens, pruned\n\nThe first {asked} questions, of "
            f"which the unpruned model answers {first.count('1')} rightly, at equal mean cost, the share of visual "
            "tokens averaged over the inputs of the decoder layers."
        )
        cells = [[found.get((method, cost), {}) for cost in costs] for method in methods]
        kinds = [[row.get("kinds") for row in line] for line in cells]
        shown = [[right_share(one["all"], ".0f") if one else "refused" for one in line] for line in kinds]
        pairs = zip(methods, shown, strict=True)
        parts.append(
            table(("method", *(f"mean cost {cost:g}" for cost in costs)), [(f"`{m}`", *line) for m, line in pairs])
        )
        never = {row["method"]: row["refused"] for row in cut if "refused" in row and row["method"] not in methods}
        parts.append("\n".join(f"* `{name}` cannot be tried: {why}" for name, why in sorted(never.items())))
    return "\n\n".join(part for part in parts if part)


def training(data: Data) -> str:
    """One row a checkpoint: loss, and right answers on held-out photographs by kind of picture."""
    curve = data["curve"]
    kinds = [name for name in curve[-1] if ":" not in name and name not in ("step", "loss", "processor_seconds")]
    head = (
        "Loss of the answers' tokens, and the share of questions about held-out photographs whose tokens are all the "
        "most likely ones, by kind of picture and patches in each direction, in the course of training."
    )
    lines = [
        (f"{point['step']:,}", f"{point['loss']:.3f}", *(f"{100 * point[kind]:.0f} %" for kind in kinds))
        for point in curve
    ]
    return f"{head}\n\n{table(('step', 'loss', *kinds), lines)}"


def needle(data: Data) -> str:
    """A table for each number of visual places: a row a method, a column a mean cost."""
    parts = [
        f"{data['decoder']}. A text in visual places with one fact in it and a question about the fact; right "
        "answers (95 % interval) at equal mean cost, the share of visual tokens averaged over the "
        "inputs of the decoder layers, "
        "and in brackets the share of the fact's tokens that is left after the last cut. It is text, not patches: no "
        "word can be guessed from its neighbors, and cuts before anything was read are judged harshly. In "
        "1,024 places the filler sentences repeat, which favors methods that drop duplicates. "
        f"{versions(data)}"
    ]
    for places in sorted((name for name in data if name.isdigit()), key=int):
        rows = data[places]
        costs = sorted({row["mean_ratio"] for row in map(_asked, rows.items()) if "mean_ratio" in row}, reverse=True)
        methods = sorted({row["method"] for row in map(_asked, rows.items()) if "mean_ratio" in row})
        lines, refused = [], {}
        for method in methods:
            cells = []
            for cost in costs:
                row = rows.get(f"{method} {cost}", {})
                if "refused" in row:
                    refused.setdefault(method, row["refused"])
                cells.append(_needle_cell(row))
            if any(cell not in ("", "refused") for cell in cells):
                lines.append((f"`{method}`", *cells))
        controls = [
            (rows[name]["method"] + (f" (ratio {rows[name]['ratio']})" if "ratio" in rows[name] else ""), rows[name])
            for name in rows
            if "mean_ratio" not in _asked((name, rows[name]))
        ]
        shown = "; ".join(f"{name} {row['right']} of {row['total']}" for name, row in controls if "right" in row)
        totals = {row["total"] for row in rows.values() if "total" in row}
        trials = " to ".join(map(str, sorted({min(totals), max(totals)})))
        title = f"### {int(places):,} visual places, {trials} of {data['trials']} trials for each number"
        parts.append(f"{title}\n\n{shown[:1].upper()}{shown[1:]}.")
        parts.append(table(("method", *(f"mean cost {cost:g}" for cost in costs)), lines))
        never = {name: why for name, why in refused.items() if f"`{name}`" not in {line[0] for line in lines}}
        parts.append("\n".join(f"* `{name}` cannot be tried: {why}" for name, why in sorted(never.items())))
    return "\n\n".join(part for part in parts if part)


def _asked(item: tuple[str, Data]) -> Data:
    """A row with the cost that was asked for, which its name ends with."""
    name, row = item
    tail = name.removeprefix(row["method"]).strip()
    return {**row, "mean_ratio": float(tail)} if tail and "ratio" not in row else {"method": row["method"]}


def _needle_cell(row: Data) -> str:
    if "refused" in row:
        return "refused"
    if not row.get("total"):
        return ""
    kept = "" if row.get("fact_kept") is None else f" [{100 * row['fact_kept']:.0f} %]"
    return f"{right_share(row, '.0f')}{kept}"


def position_bias(data: Data) -> str:
    """One row a method."""
    terms = sorted({terms for terms in data["photographs"].values()})
    chance = f"{100 * data['ratio']:.0f} %"
    head = (
        f"{len(data['photographs'])} photographs of scikit-image ({', '.join(terms)}), {data['grid'] ** 2} visual "
        f"tokens, of which {chance} stay: a DINOv2-small tower, SmolLM2 and a projector fitted by ridge regression, "
        "never trained to answer. Each picture upright and upside down. `follows the content`: share of the patches "
        "kept of the turned picture that were kept of the upright one; `stays in place`: share of "
        "the places; by chance both are "
        f"{chance}. `bias`: mean row of what is kept over both, 0 for none, 0.5 for the bottom row only. Means over "
        f"photographs (95 % interval). {versions(data)}"
    )
    lines, notes = [], []
    for name, row in sorted(data["methods"].items()):
        if "refused" in row:
            notes.append(f"* `{name}` cannot be tried: {row['refused']}")
            continue
        shares = (
            f"{100 * row[key]['mean']:.0f} %{span(row[key]['interval'], '.0f', 100)}" for key in ("content", "place")
        )
        bias = f"{row['bias']['mean']:+.2f}{span(row['bias']['interval'], '+.2f')}"
        lines.append((f"`{name}`", *shares, bias))
    parts = [head, table(("method", "follows the content", "stays in place", "bias"), lines), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def tower_photographs(data: Data) -> str:
    """How far cuts in a real tower change the features of photographs."""
    head = (
        f"{len(data['photographs'])} photographs of scikit-image, a DINOv2-small tower of {data['grid'] ** 2} patches, "
        "cut before its fourth block (`Pixels`: the first). Cosine similarity of the final features to the uncut "
        "tower's, mean over all patches and over the tenth that changed most. Means over photographs (95 % interval). "
        f"{versions(data)}"
    )
    lines = [
        (f"`{name}`", *(f"{row[key]['mean']:.2f}{span(row[key]['interval'], '.2f')}" for key in ("cosine", "worst")))
        for name, row in data["rows"].items()
    ]
    return f"{head}\n\n" + table(("tower method and share", "all patches", "a tenth"), lines)


def speed(data: Data) -> str:
    """A table for each number of visual places: ratios inside a round, whose runs stood next to each other in time."""
    loads = [entry["load"] for setting in data["settings"].values() for entry in setting["rounds"] if entry["load"]]
    load = f" Processes that wanted one of the machine's cores meanwhile: up to {max(loads):.0f}." if loads else ""
    parts = [
        f"{data['model']}, {data['dtype']}, {data['attention']} attention, one thread of "
        f"{data['machine']}. CPU time of the "
        "process as a multiple of the unpruned decoder's in the same round: median (lowest to highest "
        "round). `limit`: a "
        f"prompt that had only the kept tokens from the start. There is no vision tower.{load} {versions(data)}"
    ]
    refused: dict[str, str] = {}
    for setting in data["settings"].values():
        every = [entry["runs"] for entry in setting["rounds"]]
        lines = []
        for variant in data["variants"]:
            name = variant if variant.startswith(("unpruned", "limit")) else f"`{variant.split()[0]}`"
            rounds = [runs for runs in every if variant in runs]
            if "refused" in rounds[0][variant]:
                refused[name] = rounds[0][variant]["refused"]
                continue
            sooner = _ratios([(runs["unpruned"]["cpu"]["prefill"], runs[variant]["cpu"]["prefill"]) for runs in rounds])
            over = _ratios(
                [(runs[variant]["cpu"]["prefill"], runs[data["variants"][1]]["cpu"]["prefill"]) for runs in rounds]
            )
            token = _ratios([(runs[variant]["cpu"]["token"], runs["unpruned"]["cpu"]["token"]) for runs in rounds])
            smaller = rounds[0]["unpruned"]["kv_bytes"] / rounds[0][variant]["kv_bytes"]
            size = f"{rounds[0][variant]['kv_bytes'] / 2**20:.1f} MiB, {smaller:.1f} times smaller"
            lines.append((name, sooner, over, token, size))
        heading = ("variant", "first token: times as fast", "times the limit's", "a token: times unpruned", "KV cache")
        parts.append(f"### {setting['tokens']:,} visual places, {len(every)} rounds\n\n{table(heading, lines)}")
    parts.append("\n".join(f"* {name} cannot be tried: {why}" for name, why in sorted(refused.items())))
    return "\n\n".join(part for part in parts if part)


def needle_layers(data: Data) -> str:
    """One row a layer: what rules would keep of the fact, and where attention goes."""
    rules = ("last_row", "instruction_rows", "rows_times_values", "residual")
    places = ("sink", "text", "last_quarter")
    lines = [
        (
            layer,
            *(f"{100 * row[name]['mean']:.0f} %{span(row[name]['interval'], '.0f', 100)}" for name in rules),
            *(f"{100 * row[name]['mean']:.0f} %" for name in places),
            *(f"{row[name]['mean']:.3f}" for name in ("relevance", "closest_similarity")),
        )
        for layer, row in sorted(data["layers"].items(), key=lambda item: int(item[0]))
    ]
    chance = f"{100 * data['ratio']:.0f} %"
    head = (
        f"{data['texts']} of the same texts, {data['places']} visual places. Share of the fact's tokens among the "
        f"{chance} of the tokens that a rule ranks first in a layer ({chance} by chance, 95 % interval): attention of "
        "the last prompt token (`fastv` reads it in the layer before its cut), of all instruction rows, the latter "
        "times the length of the values (`iwp` without its term for duplicates), and residual energy of the states "
        "before the layer (`resprune`). Then where the attention of the last token goes: to the prompt's first token, "
        "to the other text, and of what the visual places get, to their last quarter. Last the medians that `iwp` "
        f"logs: relevance, and similarity of each token to its closest. {versions(data)}"
    )
    heading = (
        "layer", "last row", "instruction rows", "rows times values", "residual energy", "first token", "other text",
        "last quarter", "relevance", "similarity",
    )  # fmt: skip
    return f"{head}\n\n{table(heading, lines)}"


def debiased_curve(data: Data) -> str:
    """One row a way of correcting FastV's scores."""
    lines = []
    for name, row in data["rows"].items():
        if "refused" in row:
            lines.append((name, row["refused"], ""))
            continue
        ends = " and ".join(f"{end:.1f}" for end in row["curve"])
        lines.append((name, f"{100 * row['last_quarter']:.0f} %{span(row['interval'], '.0f', 100)}", ends))
    profile = data["by_row"]
    quarter = sum(profile[-len(profile) // 4 :])
    head = (
        f"{data['photographs']} photographs, upright and turned, {data['grid'] ** 2} visual tokens, of which "
        f"{100 * data['ratio']:.0f} % stay. FastV's scores as they are, with the released curve, and with curves "
        "fitted to the other half of the photographs; dividing by the mean of each place is the most that a curve over "
        f"places can do. The last quarter of the picture's rows gets {100 * quarter:.0f} % of the scores, its last row "
        f"{profile[-1] / profile[0]:.0f} times as much as its first. Of the variance of the scores' logarithm "
        f"{100 * data['between']:.0f} % is between rows; the tenth of the tokens with the largest scores has "
        f"{100 * data['heaviest']:.0f} % of them. {versions(data)}"
    )
    heading = ("scores", "kept in the last quarter of the rows", "last place over first in the curves")
    return f"{head}\n\n{table(heading, lines)}"


def _ratios(pairs: list[tuple[float, float]]) -> str:
    """Median, lowest and highest of quotients."""
    found = sorted(above / below for above, below in pairs)
    return f"{statistics.median(found):.2f}{span((found[0], found[-1]), '.2f')}"
