# SPDX-License-Identifier: Apache-2.0
"""Renders every committed result: docs/results.md with its charts, and the tables of README.md.

    python -m benchmarks.report            # rewrites the pages
    python -m benchmarks.report --check    # exit code 1 if a page or chart is out of date, with its name

Each kind of result file in `benchmarks/results/` has a renderer in `SECTIONS`; a file without one is an error. Pages
are deterministic. Drawing charts needs matplotlib, checking them does not: their metadata contains a digest of the
data.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import report_charts, report_measured, report_readme, report_real, report_sections, serving_table
from vtprune.study import charts
from vtprune.study.charts import Chart

ROOT = report_readme.ROOT


@dataclass(frozen=True)
class Section:
    """Rendering of a kind of result file.

    Attributes:
        files: Pattern of file names.
        title: Heading.
        render: Renders the content as Markdown.
        command: Command that repeats the measurement.
        chart: Makes a chart of the content, or None.
    """

    files: str
    title: str
    render: Callable[[Any], str]
    command: str
    chart: Callable[[Any], Chart] | None = None


SECTIONS = (
    Section("refvlm*.json", "The built-in models", report_sections.refvlm, "python -m vtprune.refvlm.evaluate"),
    Section(
        "accuracy*.json",
        "Accuracy",
        report_sections.accuracy,
        "python -m benchmarks.accuracy",
        report_charts.accuracy,
    ),
    Section("drawn.json", "Pages and crowds", report_sections.drawn, "python -m benchmarks.drawn"),
    Section("kinds*.json", "Accuracy by kind of question", report_measured.kinds, "python -m benchmarks.kinds"),
    Section(
        "fidelity*.json",
        "Quality without labels, and time",
        report_sections.fidelity,
        "vtprune fidelity --model MODEL --limit 32 --repeats 1 --max-new-tokens 8 --json FILE",
        report_charts.fidelity,
    ),
    Section("video.json", "Clips", report_sections.video, "python -m benchmarks.video"),
    Section(
        "clip_fidelity*.json",
        "Clips: quality without labels, and time",
        report_sections.fidelity,
        "vtprune fidelity --model MODEL --clip --limit 16 --repeats 1 --max-new-tokens 4 --methods METHODS "
        "--ratios 0.75 0.25 0.1 --json FILE",
        report_charts.fidelity,
    ),
    Section("latency-*.json", "Speed and memory", report_measured.latency, "python -m benchmarks.latency"),
    Section(
        "bench-*-long.json",
        "Speed and memory of long prompts",
        report_measured.latency,
        "vtprune bench --model MODEL --device cpu --visual-tokens 8192 --batch 8 --rounds 1 --new-tokens 2 "
        "--methods random --ratios 0.1 --json FILE",
    ),
    Section("towers-*.json", "Cuts in the vision tower: speed", report_measured.towers, "python -m benchmarks.towers"),
    Section(
        "first_token-*.json",
        "Quality and time to the first token",
        report_measured.tower_quality,
        "python -m benchmarks.first_token",
        report_charts.first_token,
    ),
    Section(
        "tower_quality*.json",
        "Cuts in the vision tower: quality",
        report_measured.tower_quality,
        "python -m benchmarks.tower_quality",
    ),
    Section(
        "tower_photographs.json",
        "Cuts in the vision tower: photographs",
        report_real.tower_photographs,
        "python -m benchmarks.tower_photographs",
    ),
    Section(
        "real-quality.json",
        "Answers of a model of real parts",
        report_real.quality,
        "python -m benchmarks.real_quality",
    ),
    Section("real-training.json", "Training of that model", report_real.training, "python -m tools.realvlm.train"),
    Section("needle.json", "Needles in a text", report_real.needle, "python -m benchmarks.needle"),
    Section(
        "needle_layers.json",
        "What rules see of a needle, by layer",
        report_real.needle_layers,
        "python -m benchmarks.needle_layers",
    ),
    Section("position-bias.json", "Position bias", report_real.position_bias, "python -m benchmarks.position_bias"),
    Section(
        "debiased_curve.json",
        "Undoing the position bias of FastV",
        report_real.debiased_curve,
        "python -m benchmarks.debiased_curve",
    ),
    Section("real-speed.json", "Speed of a real decoder", report_real.speed, "python -m benchmarks.real_speed"),
    Section("serving-*.json", "Serving with vLLM", serving_table.markdown, "python -m benchmarks.serving --alone"),
    Section("vllm-videos.json", "Clips in vLLM", report_measured.vllm_videos, "python -m benchmarks.vllm_videos"),
    Section("kernels-*.json", "Kernels", report_sections.kernels, "python -m benchmarks.kernels"),
    Section("overhead.json", "What pruning adds", report_sections.overhead, "python -m benchmarks.overhead"),
    Section("small_pools.json", "Small pools", report_sections.small_pools, "python -m benchmarks.small_pools"),
    Section("certify.json", "Certified ratios", report_sections.certify, "python -m benchmarks.certify"),
    Section("auto_ratio.json", "Automatic ratios", report_sections.auto_ratio, "python -m benchmarks.auto_ratio"),
    Section("lmms_eval*.json", "lmms-eval", report_measured.lmms_eval, "make eval"),
    Section("soak*.json", "Under load", report_measured.soak, "python -m tests.soak --out FILE"),
    Section("families.json", "Laws", report_readme.families_table, "python -m benchmarks.families"),
    Section(
        "cdpruner_relevance.json",
        "Relevance in CDPruner",
        report_sections.cdpruner_relevance,
        "python -m benchmarks.cdpruner_relevance",
    ),
    Section("received.json", "Sampled query rows", report_sections.received, "python -m benchmarks.received"),
    Section("readings.json", "Two readings of a method", report_sections.readings, "python -m benchmarks.readings"),
    Section("iwp_sweep.json", "Defaults of IWP", report_sections.iwp_sweep, "python -m benchmarks.iwp_sweep"),
    Section(
        "zoo_sensitivity.json",
        "Estimators of ZOO-Prune",
        report_sections.zoo_sensitivity,
        "python -m benchmarks.zoo_sensitivity",
    ),
)
HEAD = """# Results

Rendered by `python -m benchmarks.report` from `benchmarks/results/*.json`, which only benchmarks write. Accuracies and
fidelities are of the small models inside the package, which know drawn pictures only: they compare methods, and say
nothing about how large models degrade. `load`: processes that wanted a core meanwhile, the measuring one included; on a
machine with other work, times side by side in one run compare better than times of two runs."""


def section_of(name: str) -> Section:
    """The section of a result file.

    Raises:
        ValueError: No section matches.
    """
    found = next((section for section in SECTIONS if fnmatch(name, section.files)), None)
    if found is None:
        raise ValueError(
            f"benchmarks/results/{name} has no renderer: add a Section to benchmarks/report.py; there are "
            f"{', '.join(section.files for section in SECTIONS)}"
        )
    return found


def load(results: Path) -> list[tuple[str, Section, Any]]:
    """`(stem, section, content)` of every result file, in page order.

    Raises:
        ValueError: A file has no renderer, is not JSON, or is of an interrupted run; the message names it.
    """
    found = []
    for path in sorted(results.glob("*.json")):
        section = section_of(path.name)
        try:
            found.append((path.stem, section, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise ValueError(f"benchmarks/results/{path.name} is not JSON: {error}") from error
        if found[-1][2].get("left"):
            left = ", ".join(found[-1][2]["left"])
            raise ValueError(f"benchmarks/results/{path.name} is of an interrupted run; left to do: {left}")
    return sorted(found, key=lambda item: SECTIONS.index(item[1]))


def page(loaded: list[tuple[str, Section, Any]]) -> str:
    """docs/results.md.

    Raises:
        ValueError: A file lacks data that its renderer expects; the message names it.
    """
    parts, last = [HEAD], None
    for stem, section, data in loaded:
        if section is not last:
            parts.append(f"## {section.title}")
            last = section
        source = f"benchmarks/results/{stem}.json"
        parts.append(f"From `{source}`, written by `{section.command}`.")
        if section.chart is not None:
            parts.append(f"![{section.title}](results-{stem}.svg)")
        try:
            parts.append(section.render(data))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{source} does not hold what benchmarks/report.py expects: {error!r}") from error
    return "\n\n".join(parts) + "\n"


def drawings(loaded: list[tuple[str, Section, Any]]) -> dict[str, Chart]:
    """File name in docs/ to chart."""
    return {f"results-{stem}.svg": section.chart(data) for stem, section, data in loaded if section.chart}


def stale(root: Path) -> list[str]:
    """Outdated pages and charts, as paths relative to `root`."""
    loaded = load(root / "benchmarks" / "results")
    found = [name for name, text in _texts(root, loaded).items() if _read(root / name) != text]
    wanted = drawings(loaded)
    for name, chart in wanted.items():
        if _shown(_read(root / "docs" / name)) != charts.digest([chart]):
            found.append(f"docs/{name}")
    found += [f"docs/{path.name}" for path in (root / "docs").glob("results-*.svg") if path.name not in wanted]
    return sorted(found)


def write(root: Path) -> list[str]:
    """Writes outdated pages and charts, removes charts without results, and returns the paths."""
    loaded = load(root / "benchmarks" / "results")
    old, texts, wanted = stale(root), _texts(root, loaded), drawings(loaded)
    for name in old:
        if name in texts:
            (root / name).write_text(texts[name], encoding="utf-8")
        elif (root / name).name in wanted:
            charts.save([wanted[(root / name).name]], root / name)
        else:
            (root / name).unlink()
    return old


def _texts(root: Path, loaded: list[tuple[str, Section, Any]]) -> dict[str, str]:
    readme = report_readme.render(_read(root / "README.md"), root / "benchmarks" / "results")
    return {"README.md": readme, "docs/results.md": page(loaded)}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _shown(svg: str) -> str | None:
    """Digest of the data in a chart's metadata."""
    found = re.search(r"sha256 ([0-9a-f]{64})", svg)
    return found[1] if found else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Renders committed results into docs/results.md and README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something is out of date")
    args = parser.parse_args(argv)
    try:
        found = stale(ROOT) if args.check else write(ROOT)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    for name in found:
        print(f"{name} is out of date: run python -m benchmarks.report" if args.check else f"{name} written")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
