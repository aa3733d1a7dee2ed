# SPDX-License-Identifier: Apache-2.0
"""Sections of docs/results.md for speed, lmms-eval, kinds of questions and soak runs; see `report_sections`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.latency import targets
from benchmarks.report_tables import right_share, seconds, span, table, versions

Data = dict[str, Any]


def kinds(data: Data) -> str:
    """Accuracy by kind of question, unpruned first."""
    names = list(data["rows"][0]["kinds"])
    rows = [
        (
            f"`{row['method']}`" if row.get("method") else "unpruned",
            f"{row['ratio']:g}" if row.get("ratio") else "",
            *(right_share(row["kinds"][name], ".0f") for name in names),
        )
        for row in data["rows"]
    ]
    return f"{data['questions']}. {versions(data)}\n\n" + table(("method", "ratio", *names), rows)


def latency(data: Data) -> str:
    """A table per setting, followed by slowdowns and refusals."""
    rows, cpu = (data["rows_in_cpu_time"], True) if "rows_in_cpu_time" in data else (data["rows"], False)
    clock = "CPU time of the process, which other programs do not lengthen" if cpu else "by the clock"
    parts = [
        f"{data['model']}, {data['dtype']}, {data['attention']} attention, {data['device']}; medians of runs in turn, "
        f"{clock}. `limit`: the same model given a prompt that has only the kept tokens; `of the gain`: "
        "share of the prefill time between unpruned and the limit that was saved; FLOPs bound: the prefill if time "
        f"fell as operations do. {versions(data)}"
    ]
    for setting in data["settings"].values():
        mine = [row for row in rows if (row["batch"], row["tokens"]) == (setting["batch"], setting["tokens"])]
        ran = [row for row in mine if "refused" not in row]
        if ran:
            size = f"{ran[0]['visual']:,} visual and {ran[0]['text']:,} text tokens"
            parts.append(f"### Batch {setting['batch']}, {size} each\n\n" + table(_LATENCY, map(_latency_row, ran)))
        notes = [*_notes(mine), *([setting["refused"]] if setting.get("refused") else [])]
        if notes:
            parts.append("\n".join(f"* {note}" for note in notes))
    aims = [
        (aim["what"], f"{aim['aim']:g}", f"{aim['measured']:.3f}", "yes" if aim["met"] else "NO")
        for aim in targets(data, "cpu" if data["device"] == "cpu" else "cuda")
    ]
    parts.append("### Targets\n\n" + table(("what", "aim", "measured", "met"), aims))
    return "\n\n".join(parts)


_LATENCY = (
    "variant", "kept", "vision", "selection", "prefill", "speedup", "of the gain", "FLOPs bound", "per token",
    "end to end", "speedup", "peak", "KV cache",
)  # fmt: skip


def _latency_row(row: Data) -> tuple[str, ...]:
    def median(name: str) -> str:
        return seconds(row[name]["median"]) if row.get(name) else ""

    return (
        f"`{row['variant']}`",
        f"{row['kept']:,}",
        median("vision"),
        median("decision"),
        median("prefill"),
        f"{row['speedup']:.2f}" if row.get("speedup") else "",
        f"{100 * row['gain']:.0f} %" if row.get("gain") is not None else "",
        seconds(row.get("flops_bound")),
        median("token"),
        median("end_to_end"),
        f"{row['speedup_end_to_end']:.2f}" if row.get("speedup_end_to_end") else "",
        _mebibytes(row.get("peak_bytes")),
        _mebibytes(row.get("kv_bytes")),
    )


def _notes(rows: list[Data]) -> Iterator[str]:
    for row in rows:
        if row.get("refused") or row.get("verdict"):
            yield f"`{row['variant']}`: {row.get('refused') or row['verdict']}"
        if row.get("kv_bytes") != row.get("kv_bytes_formula"):
            held, formula = row["kv_bytes"], row["kv_bytes_formula"]
            yield f"`{row['variant']}`: the KV cache holds {held:,} B, its formula says {formula:,} B"


def _mebibytes(number: float | None) -> str:
    return "" if number is None else f"{number / 2**20:,.1f} MiB"


def lmms_eval(data: Data) -> str:
    """Right answers by task, for runs in one and in several processes."""
    tasks = list(data["rows"][0]["tasks"])

    def shown(cell: Data) -> str:
        text = right_share(cell)
        if not cell.get("visual_tokens"):  # unpruned runs and questions without a picture log none
            return text
        return f"{text}, {cell['kept_visual_tokens']:.0f} of {cell['visual_tokens']:.0f}"

    rows = [
        (
            "unpruned" if row["method"] == "none" else f"`{row['method']}`",
            str(row["processes"]),
            *(shown(row["tasks"][task]) for task in tasks),
        )
        for row in data["rows"]
    ]
    alone = {row["method"]: row["tasks"] for row in data["rows"] if row["processes"] == 1}
    several = [row for row in data["rows"] if row["processes"] > 1]
    same = all(row["tasks"] == alone.get(row["method"]) for row in several)
    text = (
        f"The real lmms-eval with `--model vtprune` on the built-in model, {data['questions']}, ratio "
        f"{data['ratio']:g}, batches of {data['batch']}. After the share of right answers: visual tokens kept. "
        f"{versions(data)}"
    )
    if several:
        text += (
            f"\n\nRuns in several processes give {'the same' if same else 'OTHER'} answers and kept counts as in one."
        )
    return f"{text}\n\n" + table(("method", "processes", *(f"`{task}`" for task in tasks)), rows)


def soak(data: Data) -> str:
    """A row per part: whether it passed, and its counts."""
    rows = []
    for name, part in data["parts"].items():
        rest = {key: value for key, value in part.items() if key not in ("passed", "seconds", "cpu_seconds")}
        details = ", ".join(f"{key.replace('_', ' ')} {_brief(value)}" for key, value in rest.items())
        rows.append(
            (name.replace("_", " "), "yes" if part["passed"] else "NO", f"{part['cpu_seconds']:,.0f} s", details)
        )
    return f"{versions(data)}\n\n" + table(("part", "passed", "CPU time", "what it went through"), rows)


def _brief(value: Any) -> str:
    """A short text for a value; nested values as size and range of numbers."""
    if isinstance(value, (dict, list)):
        inner = list(_numbers(value))
        few = isinstance(value, list) and len(value) <= 8 and len(inner) == len(value)
        if few or not inner:
            return "/".join(map(_brief, inner)) or "none"
        return f"{_brief(min(inner))} to {_brief(max(inner))} ({len(value)})"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def towers(data: Data) -> str:
    """Time to the first token with cuts in tower, decoder and both, and tower times relative to their limits."""
    shares = [
        (
            name,
            f"{row['gain']:.2f}",
            f"{100 * row['tower_seconds'] / row['seconds']:.0f} %",
            f"{100 * row['embedding_seconds'] / row['seconds']:.0f} %",
            f"{row['first_token'] / row['first_token_after']:.2f}" if "first_token" in row else "",
            f"{row['bound']:.1f}" if "bound" in row else "",
        )
        for name, row in data["first_token"].items()
    ]
    limits = [
        (f"`{name}`", str(row["block"]), f"{100 * row['over_limit']:+.0f} %") for name, row in data["towers"].items()
    ]
    text = (
        f"{data['shape']}: {data['about']}, {data['patches']:,} patches, {data['visual_tokens']:,} visual and "
        f"{data['text_tokens']} text tokens, decoder method `{data['method']}`; {data['clock']}, {data['dtype']}, "
        f"{data['device']}, rounds: {data['rounds']}. `bound`: the most that pruning the decoder alone can still give. "
        f"{versions(data)}"
    )
    heading = (
        "tokens kept",
        "gain in time to first token",
        "tower's share",
        "patch embedding's",
        "gain by operations",
        "bound",
    )
    after = (
        "Above its limit, in a tower of full depth: the cut tower's time over that of the same tower whose later "
        "blocks are handed only the kept patches, with arguments made before (`Similar` and `Pixels`, which copy: the "
        f"merger gets only those, too; `Pixels`: and the patch embedding); rounds: {data['tower_rounds']}."
    )
    tables = table(heading, shares), table(("tower method", "cut before block", "above its limit"), limits)
    return "\n\n".join((text, tables[0], after, tables[1]))


def tower_quality(data: Data) -> str:
    """Tower methods compared with resizing at no more operations."""
    parts = [
        f"Built-in model {data['model']}. `cost`: operations to the first token, tower included, as a share of the "
        "unpruned ones. `resize`: the largest smaller picture that costs no more. KL in nats of the next token; "
        "`difference`: KL minus that of resize on the same prompts (95 % interval); below 0 pruning is nearer to the "
        "unpruned model; `over Change`: minus that of `Change` at the same share. `time`: processor time, "
        "median over prompts, unpruned = 1. `same`: prompts with the unpruned model's next token. `rescued`: of the "
        "questions that the unpruned model answers rightly and resize loses, those that the row answers rightly. "
        f"{versions(data)}"
    ]
    heading = (
        "row",
        "cost",
        "time",
        "KL",
        "same",
        "right",
        "resize",
        "its cost",
        "its KL",
        "difference",
        "its right",
        "rescued",
        "over Change",
    )
    for name, part in data["parts"].items():
        rows = []
        for row in part["rows"]:
            spent = f"{row['time']:.2f}" if "time" in row else ""
            cells = [row["row"], f"{row['cost']:.2f}", spent, f"{row['kl']:.3f}", str(row["same"]), str(row["right"])]
            if "resize" in row:
                low, high = row["kl_above_resize"]
                cells += [row["resize"].split()[1], f"{row['resize_cost']:.2f}", f"{row['resize_kl']:.3f}"]
                cells += [f"{low:+.3f} to {high:+.3f}", str(row["resize_right"]), f"{row['rescued']} of {row['lost']}"]
            cells += [""] * (len(heading) - 1 - len(cells))
            low, high = row.get("kl_above_change") or (None, None)
            rows.append((*cells, "" if low is None else f"{low:+.3f} to {high:+.3f}"))
        parts.append(f"### {name} pixels, {part['prompts']} prompts\n\n" + table(heading, rows))
    return "\n\n".join(parts)


def vllm_videos(data: Data) -> str:
    """Clips in vLLM, pruned by the plug-in and by vLLM itself."""
    parts = [
        f"Clips of {data['visual_tokens']} visual tokens, of which {data['share']:.0%} stay; {data['clips']} clips a "
        "model, each answered by all engines in turn. `KL`: of the next token to the unpruned engine's (95 % "
        "interval). `same`, `right`: answers equal to the unpruned engine's, and right ones; random weights have none. "
        "`time`: CPU time of a request, from frames to the last token, over the unpruned engine's for the same clip, "
        f"median and quartiles. {versions(data)}"
    ]
    for part in data["models"]:
        rows = [
            (
                row["engine"],
                f"{row['tokens']:.0f}",
                f"{row['kl']:.3f}{span(row['kl_interval'], '.3f')}",
                str(row["same"]),
                str(row["right"]) if part["trained"] else "",
                f"{row['time']:.2f}{span(row['time_quartiles'], '.2f')}",
            )
            for row in part["rows"]
        ]
        heading = ("engine", "tokens of the prompt", "KL", "same", "right", "time")
        parts.append(f"### {part['model']}\n\n" + table(heading, rows))
    return "\n\n".join(parts)
