# SPDX-License-Identifier: Apache-2.0
"""Writes results to `models.json` and renders them as `models.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vtprune.study import progress

_ORDER = ("passes", "refused", "fails", "not fed", "not built")
_TITLES = {
    "passes": "Passes",
    "refused": "Refused, with this sentence",
    "fails": "Does not pass",
    "not fed": "Built, but no synthetic prompt was accepted",
    "not built": "Cannot be built here without weights",
}


FILE = "models.json"


def load(folder: Path, force: bool = False) -> dict[str, Any]:
    """Versions and earlier results by architecture (under `architectures`; none with `force`).

    Raises:
        StaleResultError: The results are of another version.
    """
    versions = progress.versions()
    header = versions | {"torch": versions["torch"].split("+")[0]}
    found = progress.load(folder / FILE, header, force)
    entries = {entry["architecture"]: entry for entry in found.get("architectures", [])}
    return found | header | {"architectures": entries}


def summary(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Number of entries by status."""
    counts = Counter(entry["status"] for entry in entries)
    return {status: counts[status] for status in _ORDER if counts[status]}


def line(entry: dict[str, Any]) -> str:
    """One line for the terminal."""
    return f"{entry['status']:<9} {entry['architecture']:<24} {entry.get('seconds', 0):>6} s  {entry.get('reason', '')}"


def tower_line(entry: dict[str, Any]) -> str:
    """One line for the terminal about the vision tower."""
    return f"{entry['architecture']:<24} {entry.get('tower', '-')[:150]}"


def save(folder: Path, data: dict[str, Any], order: list[str]) -> None:
    """Writes both files, with the architectures in `order`."""
    entries = [data["architectures"][name] for name in order if name in data["architectures"]]
    whole = data | {"summary": summary(entries), "architectures": entries}
    progress.save(folder / FILE, whole)
    (folder / "models.md").write_text(render(whole))


def render(whole: dict[str, Any]) -> str:
    """The table in Markdown."""
    entries, counts = whole["architectures"], whole["summary"]
    text = [
        "# Models",
        "",
        f"Every image-text-to-text architecture of transformers {whole['transformers']} "
        f"({len(entries)}), built from its own config with small sizes and random weights, fed synthetic prompts and "
        "checked. `python -m tests.architectures` writes this page; nothing is listed by hand.",
        "",
        ", ".join(f"{number} {status}" for status, number in counts.items()) + ".",
        "",
        "Checks, each for a method that cuts before the decoder and one that cuts inside it: with `ratio=1.0` no bit "
        "changes; with `ratio=0.4` surviving columns have the logits of the unpatched model that cannot see the "
        "dropped ones; so has every generated token, and beam search finds the same text; a sample in a batch padded "
        "on either side is treated as alone; text passes untouched; after `remove` nothing is left. Where clips could "
        'be fed, they are checked inside the decoder too. "Pixels" went through the vision tower, "features" were put '
        "in its place.",
        "",
        _tower_summary(entries),
        "",
    ]
    for status in _ORDER:
        chosen = [e for e in entries if e["status"] == status]
        if not chosen:
            continue
        text += [f"## {_TITLES[status]} ({len(chosen)})", ""]
        if status == "passes":
            text += [
                "| architecture | class | input | clips | decoder | tower | notes |",
                "| --- | --- | --- | --- | --- | --- | --- |",
            ]
            text += [
                f"| {e['architecture']} | {e['class']} | {e['input']} | {_cell(e.get('video', ''))} | {e['decoder']} | "
                f"{_cell(_tower(e))} | {_cell(_notes(e))} |"
                for e in chosen
            ]
        else:
            text += ["| architecture | class | reason |", "| --- | --- | --- |"]
            text += [f"| {e['architecture']} | {e['class']} | {_cell(e['reason'])} |" for e in chosen]
        text.append("")
    return "\n".join(text)


def _tower(entry: dict[str, Any]) -> str:
    """The table's entry for the vision tower; reasons are listed below the table."""
    return entry.get("tower", "").partition(":")[0]


def _tower_summary(entries: list[dict[str, Any]]) -> str:
    """Number of towers that can be cut, and the reasons for the others."""
    told = [(e["architecture"], e["tower"]) for e in entries if e.get("tower")]
    passing = sum(text == "passes" for _, text in told)
    others = [f"- {name}: {_cell(text)}" for name, text in told if text != "passes"]
    return "\n".join(
        [
            f"Cuts inside the vision tower (`tower=`) were tried on {len(told)} towers; {passing} pass: with all "
            "patches kept no bit changes, rows that ran have the states of the tower that may not attend to the "
            "others, a picture keeps the same patches alone and in a batch, merge groups stay whole, and nothing is "
            "left on the model. Models that were fed features had their tower called by itself. The others:",
            "",
            *others,
        ]
    )


def _notes(entry: dict[str, Any]) -> str:
    notes = list(entry.get("notes", []))
    for method, row in entry["checks"].items():
        others = {text: name for name, text in reversed(row.items()) if text != "ok"}
        notes += [f"{method}, {name}: {text}" for text, name in others.items()]
    return "; ".join(dict.fromkeys(notes))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
