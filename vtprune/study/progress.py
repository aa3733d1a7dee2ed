# SPDX-License-Identifier: Apache-2.0
"""Long work: a progress bar, results written as they come, going on after an interrupt, nothing overwritten unasked.

A result file is a JSON object. Some of its entries, the *header*, say what its results are comparable under: versions,
machine, weights, settings. Work goes on with a file of the same header and refuses one of another.
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

if TYPE_CHECKING:
    from rich.console import Console

Job = TypeVar("Job")
Result = TypeVar("Result")


class StaleResultError(VTPruneError, ValueError):
    """A result file holds results of another version or other settings, or none that can be read."""


def versions() -> dict[str, str]:
    """Versions that results depend on, for a header."""
    import torch
    import transformers

    from .. import __version__

    return {"vtprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def load_average() -> float | None:
    """Processes that wanted a core in the last minute, on average; None where the system does not count them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def load(
    path: str | Path | None, header: Mapping[str, Any], force: bool = False, schema: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reads earlier results that work can go on with.

    Args:
        path: The result file, or None.
        header: What results must have in common.
        force: Begin anew, whatever the file holds.
        schema: A JSON Schema of the rest of the file.

    Returns:
        dict: What the file holds; empty without a file, and with `force`.

    Raises:
        StaleResultError: The file is of another header, or cannot be read; the message names what differs.
    """
    if path is None or force or not Path(path).exists():
        return {}
    advice = "use another file, or --force to overwrite it"
    try:
        data = read_json(path, None, MAX_RESULTS)
    except FileError as error:
        raise StaleResultError(f"{path} cannot be read as a result ({error}); {advice}") from error
    if not isinstance(data, dict):
        raise StaleResultError(f"{path} holds no result (a JSON object was expected); {advice}")
    wanted = json.loads(json.dumps(dict(header)))
    differing = list(_differences(data, wanted))
    if differing:
        raise StaleResultError(f"{path} holds results of another version or setting: {'; '.join(differing)}; {advice}")
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
    """Writes results as JSON at once or not at all: an interrupt leaves the old file or the new one.

    Args:
        path: The result file, whose folder is made; None writes nothing.
        data: What it shall hold.

    Raises:
        StaleResultError: There is something else than a regular file, such as a device, which would be replaced.
    """
    if path is None:
        return
    path = Path(path)
    if path.exists() and not path.is_file():
        raise StaleResultError(f"{path} is not a regular file; expected the name of a file for results")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def bar(what: str, total: int, done: int = 0, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar on standard error while work is done; where that is no terminal, its end only.

    Args:
        what: What is done.
        total: Steps in all.
        done: Steps that an earlier run has done.
        console: Another place to show it.

    Yields:
        Callable: To be called after each step, with the name of the next one or of what was done.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: tuple = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    place = console or Console(stderr=True)
    columns += (TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
    # Where standard output goes to a file, what is printed must go on going there.
    with Progress(*columns, console=place, redirect_stdout=sys.stdout.isatty()) as shown:
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
    """Does jobs under a progress bar and yields each with its result as soon as it is there.

    An interrupt ends it after the jobs that are running; what was yielded before is the caller's, and saved.

    Args:
        jobs: What is left to do.
        run: Does one; with several processes it must be importable, as must the jobs.
        what: Text of the bar.
        done: Jobs that an earlier run has done.
        processes: How many at a time. Results then come in any order.
        name: What the bar says of a job that is done.
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
    """Does checks by name, again if they were done before, as code changes between two runs of one version.

    Only an interrupted run is gone on with: `data["left"]` holds what is still to be done, and is gone at the end.

    Args:
        data: What the result file holds; the caller adds each result when it is yielded.
        names: What shall be done.
        run: Does one, as in `work`.
        what: Text of the bar.
        write: Writes `data`; called after each result.
        processes: How many at a time.
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
    """For `main` of a script: as `interruptible`, and a refused result file ends it with one line and exit code 2."""
    try:
        with interruptible(path):
            yield
    except StaleResultError as error:
        _say(f"refused: {error}")
        raise SystemExit(2) from None


@contextmanager
def interruptible(path: str | Path | None) -> Iterator[None]:
    """Ends a script that is interrupted with exit code 130, and where it has a file with a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        where = f"what is done is in {path}; " if path is not None and Path(path).exists() else ""
        _say(f"interrupted: {where}the same command goes on from there" if path is not None else "interrupted")
        raise SystemExit(130) from None


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
