# SPDX-License-Identifier: Apache-2.0
"""lmms-eval on the built-in model with several pruning methods: writes `benchmarks/results/lmms_eval.json`.

    make eval                                             # creates its environment, then runs this and the test
    python -m benchmarks.lmms --limit 100 --methods iwp random --out /tmp/lmms.json

Every row is one run of `lmms-eval --model vtprune` on the local tasks in `benchmarks/lmms_tasks/`, with numbers from
the results and samples that lmms-eval wrote. Some rows are repeated by `accelerate launch` with two CPU processes,
which must give the same answers and kept tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vtprune import refvlm
from vtprune.errors import VTPruneError
from vtprune.refvlm.loading import EMBEDDED
from vtprune.study import progress
from vtprune.study.intervals import wilson

TASKS_FOLDER = Path(__file__).resolve().parent / "lmms_tasks"
OUT = Path(__file__).resolve().parent / "results" / "lmms_eval.json"
README = Path(__file__).resolve().parent / "README.md"
TASKS = ("vtprune_scenes", "vtprune_easy_vqa", "vtprune_scenes_without_picture")
METHODS = ("random", "divprune", "fastv", "iwp")
TWICE = ("none", "iwp")  # also run with two processes
RATIO = 0.1


class LmmsEvalError(VTPruneError, RuntimeError):
    """lmms-eval ended with an error."""


@dataclass(frozen=True)
class Job:
    """One run of lmms-eval: a method, `none` for unpruned, in one process or several."""

    method: str
    processes: int = 1

    @property
    def model_args(self) -> str:
        budget = "" if self.method == "none" else f",ratio={RATIO}"
        return f"pretrained={EMBEDDED},method={self.method}{budget}"

    def __str__(self) -> str:
        return self.method if self.processes == 1 else f"{self.method} in {self.processes} processes"


def command(job: Job, tasks: Iterable[str], limit: int, batch: int, folder: str) -> list[str]:
    """Command line of a run with results in `folder`."""
    launcher = [sys.executable, "-m"]
    if job.processes > 1:
        launcher += ["accelerate.commands.launch", "--cpu", "--num_machines=1", f"--num_processes={job.processes}"]
        launcher += ["--mixed_precision=no", "--dynamo_backend=no", "-m"]
    options = ["--model", "vtprune", "--model_args", job.model_args, "--batch_size", str(batch)]
    options += ["--tasks", ",".join(tasks), "--include_path", str(TASKS_FOLDER), "--limit", str(limit)]
    return [*launcher, "lmms_eval", *options, "--log_samples", "--output_path", folder]


def run(job: Job, tasks: Sequence[str] = TASKS, limit: int = 150, batch: int = 32) -> dict[str, Any]:
    """Runs lmms-eval and reads its results.

    Returns:
        dict: Method, `model_args`, processes, and `task_row` of every task.

    Raises:
        LmmsEvalError: lmms-eval failed; the message ends with its last output.
    """
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command(job, tasks, limit, batch, folder),
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        found = sorted(Path(folder).rglob("*_results.json"))
        if done.returncode or not found:
            raise LmmsEvalError(f"lmms-eval ended with code {done.returncode}:\n{done.stdout[-3000:]}")
        results = json.loads(found[-1].read_text(encoding="utf-8"))["results"]
        rows = {}
        for task in tasks:
            lines = next(Path(folder).rglob(f"*_samples_{task}.jsonl")).read_text(encoding="utf-8").splitlines()
            rows[task] = task_row(results[task], [json.loads(line) for line in lines])
    return {"method": job.method, "model_args": job.model_args, "processes": job.processes, "tasks": rows}


def task_row(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One task of one run.

    Args:
        result: The task's entry in lmms-eval's results file.
        samples: Content of its samples file.

    Returns:
        dict: lmms-eval's `accuracy`, `right` of `total` with the 95 % interval; for a pruned run visual tokens before
        and after and the mean ratio, as means over samples; `answers` is a hash of all answers and counts.

    Raises:
        LmmsEvalError: lmms-eval's accuracy differs from that of its samples.
    """
    right, total = sum(sample["right"] for sample in samples), len(samples)
    if abs(result["right,none"] - right / total) > 1e-9:
        raise LmmsEvalError(f"lmms-eval reports {result['right,none']}, but {right:.0f} of {total} samples are right")
    counts = [sample["token_counts"][0] for sample in samples]
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    answers = [[s["doc_id"], s["filtered_resps"], s["token_counts"][0]] for s in ordered]
    low, high = wilson(right, total)
    names = ("visual_tokens", "kept_visual_tokens", "mean_ratio")
    kept = {name: _mean(count[name] for count in counts) for name in names if name in counts[0]}
    return {
        "accuracy": round(result["right,none"], 4),
        "right": int(right),
        "total": total,
        "interval": [round(low, 4), round(high, 4)],
        **kept,
        "answers": hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16],
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4)


def differences(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Differences between runs in several processes and in one."""
    alone = {row["method"]: row["tasks"] for row in rows if row["processes"] == 1}
    return [
        f"{row['method']}, {task}: {mine} in {row['processes']} processes, {alone[row['method']][task]} in one"
        for row in rows
        if row["processes"] > 1 and row["method"] in alone
        for task, mine in row["tasks"].items()
        if mine != alone[row["method"]][task]
    ]


def table(data: Mapping[str, Any]) -> str:
    """The rows of a result file as a Markdown table."""
    titles = {task: task.removeprefix("vtprune_").replace("_", " ") for task in TASKS}
    lines = [
        f"{data['questions'].capitalize()}, ratio {data['ratio']}, batches of {data['batch']}; with 95 % intervals.",
        "",
        "| method | processes | visual tokens | mean over layers | " + " | ".join(titles.values()) + " |",
        "| --- " * (4 + len(titles)) + "|",
    ]
    for row in data["rows"]:
        seen = row["tasks"][TASKS[0]]
        kept = f"{seen['visual_tokens']:.0f} to {seen['kept_visual_tokens']:.0f}" if "visual_tokens" in seen else "all"
        cells = [
            f"{c['accuracy']:.1%} ({c['interval'][0]:.1%} to {c['interval'][1]:.1%})" for c in row["tasks"].values()
        ]
        mean = f"{seen['mean_ratio']:.1%}" if "mean_ratio" in seen else "100.0%"
        name = "unpruned" if row["method"] == "none" else f"`{row['method']}`"
        lines.append(f"| {name} | {row['processes']} | {kept} | {mean} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str, data: Mapping[str, Any]) -> str:
    """The page with the table between its markers updated."""
    start, end = "<!-- begin:lmms -->\n", "<!-- end:lmms -->"
    return text[: text.index(start) + len(start)] + table(data) + "\n" + text[text.index(end) :]


def header(limit: int, batch: int) -> dict[str, Any]:
    """Conditions that must be equal for results to be comparable."""
    return {
        "questions": f"the first {limit} of every task",
        "batch": batch,
        "ratio": RATIO,
        "weights_sha256": refvlm.weights_sha256("llava"),
        "versions": {**progress.versions(), "lmms-eval": version("lmms-eval"), "accelerate": version("accelerate")},
    }


def measure(methods: Sequence[str], limit: int, batch: int, out: Path, force: bool) -> dict[str, Any]:
    """Runs everything that is missing in `out` and returns its new content."""
    data = header(limit, batch)
    data["rows"] = progress.load(out, data, force).get("rows", [])
    jobs = [Job(name) for name in ("none", *methods)]
    jobs += [Job(job.method, 2) for job in jobs if job.method in TWICE]
    done = {(row["method"], row["processes"]) for row in data["rows"]}
    left = [job for job in jobs if (job.method, job.processes) not in done]

    def one(job: Job) -> dict[str, Any]:
        return run(job, limit=limit, batch=batch)

    for job, row in progress.work(left, one, "lmms-eval", done=len(jobs) - len(left)):
        data["rows"].append(row)
        progress.save(out, data)
        scores = ", ".join(f"{task} {cell['accuracy']:.1%}" for task, cell in row["tasks"].items())
        print(f"{job}: {scores}")
    return data


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lmms", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="*", default=METHODS, help="besides the unpruned model")
    parser.add_argument("--limit", type=int, default=150, help="questions per task")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    args = parser.parse_args(argv)

    with progress.script(args.out):
        data = measure(args.methods, args.limit, args.batch, args.out, args.force)
    if args.out == OUT:
        README.write_text(with_table(README.read_text(encoding="utf-8"), data), encoding="utf-8")
    found = differences(data["rows"])
    print("\n".join(found) or "two processes: the same answers and kept counts as one")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
