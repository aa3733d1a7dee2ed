# SPDX-License-Identifier: Apache-2.0
"""Renderers of docs/results.md, one per kind of result file.

A renderer takes the content of a file and returns Markdown without a heading.
"""

from __future__ import annotations

from typing import Any

from benchmarks.report_readme import cost_grid, grid
from benchmarks.report_tables import ANSWER_PATCHES, estimate, percent, right_share, seconds, span, table, versions
from vtprune.study.fidelity_view import BESIDE, beside_resizing, refusals
from vtprune.study.resize import NAME, regained, rival

Data = dict[str, Any]


def refvlm(data: Data) -> str:
    """Accuracy of a built-in model, unpruned."""
    kinds = {name: value for name, value in data.items() if isinstance(value, dict) and "all" in value}
    kinds |= data.get("beds", {})
    rows = [
        (
            name.replace("_", " ") if kind == "all" else "",
            kind,
            right_share(row),
            f"{row['total']:,}",
            f"{100 * row['majority']:.1f} %",
        )
        for name, result in kinds.items()
        for kind, row in result.items()
    ]
    text = (
        f"{data['parameters']:,} parameters, unpruned; an answer is right only word for word. `majority` is what the "
        f"most frequent answer of each kind would reach. {versions(data)}"
    )
    return f"{text}\n\n" + table(("questions", "kind", "right", "of", "majority"), rows)


def drawn(data: Data) -> str:
    """Right answers on drawn pages and crowds, compared with smaller pictures."""
    parts = [
        f"Built-in model {data['model']}, {data['questions']}. Methods keep as many tokens as the smaller picture of "
        "the row `resize`. `cost`: operations to the first token, tower included, unpruned = 1. `rescued`: of the "
        "questions that the unpruned model answers rightly, and wrongly from the smaller picture, those that the row "
        f"answers rightly. {versions(data)}"
    ]
    for bed, rows in data["beds"].items():
        cells = [
            (
                f"`{row['row']}`",
                f"{row['tokens']:.0f}",
                f"{row['cost']:.2f}",
                right_share(row),
                f"{row['rescued']} of {row['lost']}" if "lost" in row else "",
            )
            for row in rows
        ]
        parts.append(f"### {bed} visual tokens\n\n" + table(("row", "tokens", "cost", "right", "rescued"), cells))
    return "\n\n".join(parts)


def accuracy(data: Data) -> str:
    """Accuracy of every method, with intervals."""
    base = data["unpruned"]
    text = (
        f"{data['questions']}; unpruned: {right_share(base)} with all {base['visual_tokens']} tokens. "
        f"{ANSWER_PATCHES!r} is no method: the patches that hold the answer are kept first. {versions(data)}"
    )
    costs = (
        "At equal mean cost, the share of visual tokens averaged over the inputs of the decoder layers; cells are "
        "empty where a method cannot cost so little, or was not measured:"
    )
    ratios = "At one ratio, where methods that cut inside the decoder cost more than those that cut before it:"
    tables = "\n\n".join((text, costs, cost_grid(data, right_share), ratios, grid(data["rows"], right_share)))
    return tables + _accuracy_beside_resizing(data)


def _accuracy_beside_resizing(data: Data) -> str:
    """Right answers compared with smaller pictures at equal tokens and at no more operations."""
    ran = [row for row in data["rows"] if "ratio" in row and "answers" in row]
    resized = {row["ratio"]: row for row in ran if row["method"] == NAME}
    if not resized:
        return ""

    def flags(row: Data) -> list[bool]:
        return [letter == "1" for letter in row["answers"]]

    def beside(row: Data, other: Data | None) -> tuple[str, str, str]:
        if other is None:
            return "", "", ""
        lost, again = regained(flags(data["unpruned"]), flags(other), flags(row))
        return f"{other['kept']:.0f}", percent(other), f"{again} of {lost}"

    rows = []
    for row in sorted(ran, key=lambda row: (-row["ratio"], -row["right"])):
        if row["method"] != NAME:
            dearest = rival(row["cost"], {ratio: other["cost"] for ratio, other in resized.items()})
            cells = (*beside(row, resized.get(row["ratio"])), *beside(row, resized.get(dearest)))
            rows.append((f"`{row['method']}`", f"{row['kept']:.0f}", f"{row['cost']:.2f}", percent(row), *cells))
    heading = ("method", "tokens", "cost", "right", "resize, equal tokens", "right", "regained",
               "resize, no more operations", "right", "regained")  # fmt: skip
    return (
        "\n\nBeside smaller pictures: methods keep as many tokens as these have. Cost: operations to the first token, "
        "vision tower included, as a share of the unpruned ones. Regained: of the questions answered rightly at "
        "full size and wrongly on the smaller picture, those answered rightly again.\n\n" + table(heading, rows)
    )


def fidelity(data: Data) -> str:
    """Fidelity to the unpruned model, without labels: one table per ratio."""
    clock = "CPU time of the process" if data["clock"] == "cpu" else "time"
    asked = data["questions"] if isinstance(data["questions"], str) else f"{len(data['questions'])} questions each"
    parts = [
        f"{data['model']} model, {data['pictures']} pictures ({data['of']}), questions: {asked}; against the unpruned "
        "model. KL, top-1 and cosine (last hidden state) are of the token after the prompt, answers are greedy and "
        "equal word for word; mean cost: share of visual tokens over the inputs of the decoder layers, and rows of "
        "equal cost stand together; attention error: relative change of the attention output of the text at the last "
        f"cut. Time: {clock} to the first token, vision tower and selection included, over the unpruned one; **bold** "
        "where nothing, the unpruned model included, is both faster and nearer (KL). In brackets: 95 % intervals. "
        f"{versions(data)}"
    ]
    ran = [row for row in data["rows"] if "refused" not in row]
    slower = sum(row["relative_time"]["value"] > 1 for row in ran)
    if slower:
        parts.append(
            f"{slower} of {len(ran)} rows are slower than the unpruned model: there selection costs more than it saves."
        )
    heading = (
        "method",
        "mean cost",
        "kept",
        "KL, nats",
        "same top-1",
        "same answer",
        "cosine",
        "attention error",
        "time",
    )
    for ratio in sorted({row["ratio"] for row in ran}, reverse=True):
        mine = sorted(
            (row for row in ran if row["ratio"] == ratio),
            key=lambda row: (round(row["mean_ratio"], 2), row["kl"]["value"]),
        )
        parts.append(f"### Ratio {ratio:g}\n\n" + table(heading, map(_fidelity_row, mine)))
    refused = refusals(data["rows"])
    beside = [row for row in ran if row.get("equal_tokens") or row.get("equal_time")]
    if beside:
        parts.append(
            "### Beside smaller pictures\n\nKL minus that of the unpruned model on a smaller picture (95 % interval; "
            "below 0 pruning is nearer), of as many tokens, and of the largest size that takes no more time; and of "
            "the answers that this picture changes, how many stay.\n\n"
            + table(BESIDE, [(f"`{cells[0]}`", *cells[1:]) for cells in map(beside_resizing, beside)])
        )
    if refused:
        parts.append(
            "Not possible:\n\n" + _bullets(f"`{r['method']}` at {r['ratio']:g}: {r['refused']}" for r in refused)
        )
    return "\n\n".join(parts)


def _fidelity_row(row: Data) -> tuple[str, ...]:
    time = estimate(row["relative_time"], ".2f")
    return (
        f"`{row['method']}`",
        f"{row['mean_ratio']:.2f}",
        f"{row['kept']:.0f} of {row['visual']:.0f}",
        estimate(row["kl"], ".2g"),
        estimate(row["top1"], ".0f", 100) + " %",
        estimate(row["answers"], ".0f", 100) + " %",
        estimate(row["cosine"], ".3f"),
        estimate(row.get("attention_error"), ".2f"),
        f"**{time}**" if row["frontier"] else time,
    )


def iwp_sweep(data: Data) -> str:
    """IWP's layer and duplication weight."""
    weights = sorted({row["duplication"] for row in data["rows"]})
    by = {(row["layer"], row["duplication"]): row for row in data["rows"]}

    def cell(row: Data | None) -> str:
        if row is None:
            return ""
        share = sum(row["right"]) / (len(row["right"]) * row["total"])
        return f"{100 * share:.1f} %{span(row['interval'], scale=100)}"

    rows = [
        (str(layer), *(cell(by.get((layer, weight))) for weight in weights))
        for layer in sorted({row["layer"] for row in data["rows"]})
    ]
    ratios = " and ".join(f"{ratio:g}" for ratio in data["ratios"])
    text = (
        f"Right answers with IWP cut before each layer, mean over ratios {ratios}; {data['questions']}, of which the "
        f"unpruned model answers {data['unpruned']} rightly. {versions(data)}"
    )
    return f"{text}\n\n" + table(("layer", *(f"duplication {weight:g}" for weight in weights)), rows)


def kernels(data: Data) -> str:
    """Times of the kernels and of the plain loops."""
    rows = [
        (
            f"`{row['operation']}`",
            row["size"] if len(data["ceilings"]) < 2 else f"{row['size']}, {row['dtype']}",
            row["data"],
            seconds(row["seconds"]),
            seconds(row.get("plain_seconds")),
            f"{row['speed_against_plain']:.1f}" if row.get("speed_against_plain") else "",
            f"{100 * row['share_of_limit']:.0f} %" if row.get("share_of_limit") is not None else "",
            *(f"{row[key] / 2**20:.0f} MiB" if key in row else "" for key in ("extra_bytes", "plain_extra_bytes")),
        )
        for row in data["rows"]
    ]
    text = (
        f"Each agrees with its specification (`naive.py`) in the same run. `plain` is the published loop in vectorized "
        "PyTorch; the limit follows from the bytes and operations of the definition, and the ceilings measured on "
        f"{data['device']}: more than 100 % where lazy evaluation needs fewer, or the data stays in a cache "
        f"({data['threads']} thread{'s' if data['threads'] > 1 else ''}). {versions(data)}"
    )
    heading = ("kernel", "size", "data", "time", "plain", "times as fast", "of the limit", "extra memory", "plain's")
    text += "\n\n" + table(heading, rows)
    return text + "\n\n" + _targets(data["targets"]) if data.get("targets") else text


def _targets(targets: list[Data]) -> str:
    """Selections and their targets."""
    rows = [
        (
            target["what"],
            seconds(target["aim_seconds"]),
            seconds(target.get("replayed_seconds")),
            seconds(target.get("seconds")),
            f"{target['times_plain']:.1f} (aim {target['aim_times_plain']:g})" if "times_plain" in target else "",
            f"{target['extra_bytes'] / 2**20:.0f} MiB" if "extra_bytes" in target else "",
            "yes" if target["met"] else target.get("error", "no"),
        )
        for target in targets
    ]
    text = (
        "Whole decisions, replayed from a CUDA graph and as they are called; every pick was checked to be the best row "
        "at its time, up to rounding."
    )
    return f"{text}\n\n" + table(("decision", "aim", "replayed", "called", "times plain", "memory", "met"), rows)


def zoo_sensitivity(data: Data) -> str:
    """ZOO-Prune's estimators."""
    names = list(data["rows"][0]["time_over_exact"])
    rows = [
        (
            row["projector"],
            name,
            f"{row['rank_correlation_with_reference'][name]:.3f}",
            f"{row['time_over_exact'][name]:.0f}",
        )
        for row in data["rows"]
        for name in names
    ]
    text = (
        f"Sensitivity of a projector by {data['directions']} differences (as released), by as many derivatives, and in "
        "closed form: rank correlation with the derivative over 256 directions in float64, and time over the closed "
        f"form's. {versions(data)}"
    )
    return f"{text}\n\n" + table(("projector", "estimator", "rank correlation", "time"), rows)


def _bullets(lines: Any) -> str:
    return "\n".join(f"* {line}" for line in lines)


def small_pools(data: Data) -> str:
    """Median time with a matrix of all pairs relative to lazy evaluation, for small pools."""
    rows = [
        (
            f"`{row['operation']}`",
            f"{row['rows']:,}",
            f"{row['width']:,}",
            f"{row['picks']:,}",
            row["data"],
            f"{row['lazy'] / row['pairs']:.2f}",
            "matrix" if row["small"] else "lazy",
        )
        for row in data["rows"]
    ]
    head = ("choice", "rows", "width", "picks", "data", "matrix: times as fast", "what is taken")
    return f"Medians of {data['rounds']} rounds; both choose the same rows. {versions(data)}\n\n{table(head, rows)}"


def overhead(data: Data) -> str:
    """Operations, calls and allocations of a prefill and a decoding step relative to the unpruned model."""
    plain = {row["setting"]: row for row in data["rows"] if row["variant"] == "unpruned"}

    def share(row: Data, part: str, count: str) -> str:
        return f"{row[part][count] / plain[row['setting']][part][count]:.2f}x"

    def times(row: Data) -> tuple[str, ...]:
        spent = row["seconds"]
        if "own_limit" not in spent:
            return ("", "", "", "")
        unpruned, possible = spent["unpruned"], spent["unpruned"] - spent["own_limit"]
        steps = row["step_seconds"]
        return (
            f"{spent['pruned'] / unpruned:.2f}x",
            f"{(unpruned - spent['pruned']) / possible:.0%} of {possible / unpruned:.0%}",
            f"{row['selection_seconds'] / unpruned:.0%}",
            f"{steps['pruned'] / steps['unpruned']:.2f}x",
        )

    rows = [
        (
            row["setting"],
            f"`{row['variant']}`",
            *(share(row, "prefill", count) for count in ("operations", "calls", "allocations")),
            *(share(row, "step", count) for count in ("operations", "calls", "allocations")),
            *times(row),
        )
        for row in data["rows"]
    ]
    counts = (f"{part}: {n}" for part in ("prefill", "step") for n in ("ops", "calls", "allocs"))
    head = ("setting", "variant", *counts, "prefill: time", "share of the gain", "selection", "step: time")
    text = (
        f"Keep {data['ratio']:.0%}. Counts of one prefill and one decoding step over those of the unpruned model: aten "
        "operations, Python calls, allocations. `limit` is fed the kept tokens only. Times are CPU time of one thread, "
        "over the unpruned model in the same run: of a prefill; the share of the possible gain that is reached, and "
        "that gain (between unpruned and limit; for methods that cut deeper, the limit from that layer on); of the "
        f"selection; and of a decoding step. `plain-divprune` is the plain loop in the same engine. {versions(data)}"
    )
    return f"{text}\n\n{table(head, rows)}"


def certify(data: Data) -> str:
    """Share of broken certificates, made on random subsets of the pictures and evaluated on others."""

    def broken(part: Data) -> str:
        return f"{part['broken']:.1%} (allowed {part['allowed']:.1%})"

    rows = [
        (
            row["model"],
            f"`{row['method']}`",
            f"{found['risk']:g} / {found['confidence']:g}",
            f"{found['ratio_of_all']:g}",
            broken(found["population"]),
            broken(found["halves"]),
        )
        for row in data["rows"]
        for found in row["certificates"]
    ]
    head = ("model", "method", "risk / confidence", "certified ratio", "broken, drawn again", "broken, other half")
    splits = data["rows"][0]["certificates"][0]["splits"]
    text = (
        f"{data['pictures']:,} pictures with one question each, {splits:,} certificates a column: made on as many "
        "pictures drawn with replacement and judged on all, and made on a random half and judged on the other. Allowed "
        f"is 1 - confidence and two standard errors. {versions(data)}"
    )
    return f"{text}\n\n{table(head, rows)}"


def auto_ratio(data: Data) -> str:
    """Automatic ratios by kind of picture, and their effect on right answers."""
    kinds = [
        (model, row["rule"], *(f"{100 * row[name]:.1f} %" for name in ("mean", "pages", "scenes", "flat")))
        for model, found in data["models"].items()
        for row in found["kinds"]
    ]
    gains = [
        (
            model,
            f"`{row['method']}`",
            f"{100 * row['mean']:.1f} %",
            f"{row['kept_least']} to {row['kept_most']}",
            f"{row['right_auto']} of {row['total']}",
            f"{row['right_one']} of {row['total']}",
            f"{100 * row['gain']:+.1f} points{span(row['interval'], '+.1f', 100)}",
        )
        for model, found in data["models"].items()
        for row in found["accuracy"]
    ]
    about = (
        f"{data['pictures']} pictures of each kind; the rule was calibrated on all of them to one mean, by features "
        f"(`vtprune tune --auto`) and by pixels (as for vLLM). {versions(data)}"
    )
    asked = (
        "Questions about held-out scenes: a ratio for each picture, calibrated on other scenes, beside one ratio for "
        "all with the same mean (95 % interval of the difference, over pictures)."
    )
    tables = (
        table(("model", "by", "kept on average", "pages", "scenes", "flat pictures"), kinds),
        table(("model", "method", "mean share", "tokens kept", "right, automatic", "right, one ratio", "gain"), gains),
    )
    return "\n\n".join((about, tables[0], asked, tables[1]))


def cdpruner_relevance(data: Data) -> str:
    """Right answers of the built-in models by sign and weight of CDPruner's text relevance."""
    ratios = sorted({row["ratio"] for row in data["rows"]}, reverse=True)
    found: dict[tuple[str, str], dict[float, Data]] = {}
    for row in data["rows"]:
        found.setdefault((row["model"], row["variant"]), {})[row["ratio"]] = row
    rows = [
        (
            model,
            variant,
            *(f"{mine[ratio]['right']} of {mine[ratio]['total']}" if ratio in mine else "" for ratio in ratios),
        )
        for (model, variant), mine in found.items()
    ]
    head = ("model", "relevance", *(f"ratio {ratio:g}" for ratio in ratios))
    return f"{versions(data)}\n\n{table(head, rows)}"


def received(data: Data) -> str:
    """Right answers and kept sets with received attention over sampled query rows."""
    rows = [
        (row["method"], str(row["queries"]), f"{row['right']} of {row['total']}", f"{row['same']:.0%}")
        for row in data["rows"]
    ]
    text = (
        f"The built-in Qwen2.5-VL, 576 patches, ratio {data['ratio']:g}: `queries=`, right answers, and the share of "
        f"the kept tokens that all rows would keep. {versions(data)}"
    )
    return f"{text}\n\n" + table(("method", "queries", "right", "same tokens"), rows)


def readings(data: Data) -> str:
    """The library's rules and AngelSlim's."""
    rows = [
        (
            row["model"],
            row["method"],
            row["reading"],
            f"{row['ratio']:g}",
            f"{row['right']} of {row['total']}",
            f"{row['same']:.0%}",
        )
        for row in data["rows"]
    ]
    text = f"Share of the tokens that ours keeps, and right answers. {versions(data)}"
    return f"{text}\n\n" + table(("model", "method", "reading", "ratio", "right", "same tokens"), rows)


def video(data: Data) -> str:
    """Divergence of the next token when clips are pruned."""
    sizes = {row["kept"] for row in data["rows"] if row["rule"] == "uniform"}  # those of methods only
    rows = [
        (row["part"], f"`{row['rule']}`", f"{row['kept']:,}", f"{row['kl']:.3f}{span(row['kl_interval'], '.3f')}")
        for row in data["rows"]
        if "kl" in row and row["kept"] in sizes
    ]
    head = ("clips", "rule", "tokens kept", "KL to unpruned")
    about = f"{data['questions']}; {data['tokens']:,} visual tokens unpruned. [Video](video.md) has the summary."
    return f"{about} {versions(data)}\n\n{table(head, rows)}"
