# SPDX-License-Identifier: Apache-2.0
"""Long-running work: progress bars, incremental result files, and resuming after an interrupt.

A result file is a JSON object. Some of its entries, the *header*, describe the conditions of its results: versions,
machine, weights, settings. Work resumes with a file of the same header and refuses one with another header.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.files import MAX_RESULTS, FileError, check_schema, read_json
from ..errors import VTPruneError
from .terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

Job = TypeVar("Job")
Result = TypeVar("Result")


class StaleResultError(VTPruneError, ValueError):
    """A result file is of another version or other settings, or unreadable."""


def versions() -> dict[str, str]:
    """Versions that results depend on, for a header."""
    import torch
    import transformers

    from .. import __version__

    return {"vtprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def load_average() -> float | None:
    """Load average of the last minute; None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def load(
    path: str | Path | None, header: Mapping[str, Any], force: bool = False, schema: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reads earlier results to resume from.

    Args:
        path: The result file, or None.
        header: Entries that the file must have.
        force: Ignore the file.
        schema: A JSON Schema of the rest of the file.

    Returns:
        dict: Content of the file; empty without a file or with `force`.

    Raises:
        StaleResultError: The header differs, and the message says where, or the file is unreadable.
    """
    if path is None or force or not Path(path).exists():
        return {}
    advice = "use another file, or --force to overwrite it"
    try:
        data = read_json(path, None, MAX_RESULTS)
    except FileError as error:
        raise StaleResultError(f"{path} cannot be read as a result ({error}); {advice}") from error
    if not isinstance(data, dict):
        raise StaleResultError(f"{path} is not a result file (expected a JSON object); {advice}")
    wanted = json.loads(json.dumps(dict(header)))
    differing = list(_differences(data, wanted))
    if differing:
        raise StaleResultError(f"{path} has results of another version or setting: {'; '.join(differing)}; {advice}")
    try:
        check_schema(data, schema or {})
    except FileError as error:
        raise StaleResultError(f"{path} is damaged ({error}); {advice}") from error
    return data


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    for key, value in wanted.items():
        old, name = found.get(key), f"{inside}{key}"
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _differences(old, value, f"{name}.")
        elif old != value:
            yield f"{name} is {_short(old)} there and {_short(value)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def save(path: str | Path | None, data: Mapping[str, Any]) -> None:
    """Writes results as JSON atomically: an interrupt leaves either the old file or the new one.

    Args:
        path: The result file, whose folder is created; None writes nothing.
        data: The results.

    Raises:
        StaleResultError: The path exists and is not a regular file, such as a device.
    """
    if path is None:
        return
    path = Path(path)
    if path.exists() and not path.is_file():
        raise StaleResultError(f"{path} is not a regular file; expected the name of a file for results")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields the name of a file that takes the place of `path` when it is written; an interrupt leaves the old one."""
    part = Path(path).with_name(f"{Path(path).name}.part{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def bar(what: str, total: int, done: int = 0, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar on standard error; if that is not a terminal, only its final state.

    Args:
        what: Description of the work.
        total: Total number of steps.
        done: Steps done by an earlier run.
        console: Console to use instead of standard error.

    Yields:
        Callable: Function to call after each step, with a text to show beside the bar.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    counts = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TextColumn("{task.fields[now]}"))
    # Redirected standard output, such as to a file, must not be captured by the bar.
    with Progress(*columns, console=console or make_console(stderr=True), redirect_stdout=sys.stdout.isatty()) as shown:
        task = shown.add_task(what, total=total, completed=done, now="")

        def step(now: str = "") -> None:
            shown.update(task, advance=1, now=now)

        yield step


def work(
    jobs: Sequence[Job],
    run: Callable[[Job], Result],
    what: str,
    *,
    done: int = 0,
    processes: int = 1,
    name: Callable[[Job], str] = str,
) -> Iterator[tuple[Job, Result]]:
    """Runs jobs under a progress bar and yields each with its result as soon as it is done.

    An interrupt ends the work after the running jobs.

    Args:
        jobs: Jobs to run.
        run: Runs one job; with several processes it and the jobs must be picklable.
        what: Text of the bar.
        done: Number of jobs done by an earlier run.
        processes: Number of processes; with several, results come in any order.
        name: Text of a finished job for the bar.
    """
    with bar(what, done + len(jobs), done) as step:
        if processes == 1 or len(jobs) <= 1:
            for job in jobs:
                result = run(job)
                step(name(job))
                yield job, result
            return
        pool = ProcessPoolExecutor(processes)
        try:
            futures = {pool.submit(run, job): job for job in jobs}
            for future in as_completed(futures):
                result = future.result()
                step(name(futures[future]))
                yield futures[future], result
        finally:
            pool.shutdown(cancel_futures=True)


def each(
    data: dict[str, Any],
    names: Sequence[str],
    run: Callable[[str], Result],
    what: str,
    write: Callable[[], None],
    *,
    processes: int = 1,
) -> Iterator[tuple[str, Result]]:
    """Runs checks by name and resumes an interrupted run.

    Checks of a finished run are run again, because code can change within one version. `data["left"]` has the names
    that remain to be run, and is removed at the end.

    Args:
        data: Content of the result file; the caller adds each result when it is yielded.
        names: Names of the checks.
        run: Runs one, as in `work`.
        what: Text of the bar.
        write: Writes `data`; called after each result.
        processes: Number of processes.
    """
    left = data.get("left", [])
    todo = [name for name in names if name in left] if left and set(left) <= set(names) else list(names)
    data["left"] = list(dict.fromkeys([*left, *todo]))
    for name, result in work(todo, run, what, done=len(names) - len(todo), processes=processes):
        yield name, result
        data["left"].remove(name)
        if not data["left"]:
            del data["left"]
        write()


@contextmanager
def script(path: str | Path | None) -> Iterator[None]:
    """`interruptible` for `main` of a script; a refused result file also ends it, with one line and exit code 2."""
    try:
        with interruptible(path):
            yield
    except StaleResultError as error:
        _say(f"refused: {error}")
        raise SystemExit(2) from None


@contextmanager
def interruptible(path: str | Path | None, resume: str = "run the same command to resume") -> Iterator[None]:
    """Ends an interrupted script with exit code 130 and, if it has a result file, a hint on how to resume.

    Args:
        path: The result file, or None.
        resume: The hint.
    """
    try:
        yield
    except KeyboardInterrupt:
        where = f"finished results are in {path}; " if path is not None and Path(path).exists() else ""
        _say(f"interrupted: {where}{resume}" if path is not None else "interrupted")
        raise SystemExit(130) from None


def _say(text: str) -> None:
    make_console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
