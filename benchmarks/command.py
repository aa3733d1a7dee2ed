# SPDX-License-Identifier: Apache-2.0
"""What the commands of several benchmarks share: options, methods, and results that are filled row by row."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import vtprune
from vtprune.study import progress

METHODS = [name for name in vtprune.methods.names() if name != "debiased"]  # which needs a curve fitted before


def parser(about: str | None, out: Path, resumes: bool = True) -> argparse.ArgumentParser:
    """A parser with `--out` and, for results that can be resumed, `--force`. Limits PyTorch to one thread.

    Args:
        about: Its first line describes the command.
        out: The usual result file.
        resumes: Whether an existing result is completed rather than written anew.
    """
    torch.set_num_threads(1)
    name = f"python -m benchmarks.{Path(sys.argv[0]).stem}"
    made = argparse.ArgumentParser(prog=name, description=(about or "").split("\n")[0])
    made.add_argument("--out", type=Path, default=out)
    if resumes:
        made.add_argument("--force", action="store_true", help="overwrite existing results")
    return made


def fill(
    args: argparse.Namespace,
    header: Mapping[str, Any],
    section: str,
    keys: Iterable[Any],
    run: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    """Measures what a section of the result file lacks, and returns the section.

    Args:
        args: Of `parser`.
        header: Conditions of the result.
        section: Entry of the file.
        keys: Keys of the rows.
        run: Measures a row.
    """
    with progress.script(args.out):
        data: dict[str, Any] = {**header, **progress.load(args.out, header, args.force)}
        rows = data.setdefault(section, {})
        for key, row in progress.work([key for key in keys if str(key) not in rows], run, section):
            rows[str(key)] = row
            progress.save(args.out, data)
    return rows
