# SPDX-License-Identifier: Apache-2.0
"""Long-running work: result file, progress bar, and interrupts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import vtprune
from vtprune.study import progress

HEADER = {"versions": {"vtprune": "1", "torch": "2"}, "ratios": (0.1, 0.5)}


def test_results_of_the_same_header_are_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    assert progress.load(path, HEADER) == {} == progress.load(None, HEADER)
    progress.save(path, {**HEADER, "rows": [1]})
    assert progress.load(path, HEADER)["rows"] == [1]
    assert progress.load(path, HEADER, force=True) == {}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]
    progress.save(None, HEADER)


def test_another_header_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    progress.save(path, {"versions": {"vtprune": "0", "torch": "2"}, "rows": [1]})
    before = path.read_text()
    with pytest.raises(progress.StaleResultError) as raised:
        progress.load(path, HEADER)
    message = str(raised.value)
    assert 'versions.vtprune is "0" there and "1" here' in message and "torch" not in message
    assert "ratios is null there and [0.1, 0.5] here" in message and "--force" in message
    assert path.read_text() == before
    for text in ("[1]", "{", ""):
        path.write_text(text)
        with pytest.raises(vtprune.VTPruneError, match="use another file, or --force"):
            progress.load(path, HEADER)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    progress.save(path, {"rows": [1]})
    with pytest.raises(TypeError):
        progress.save(path, {"rows": [object()]})
    assert json.loads(path.read_text()) == {"rows": [1]} and len(list(tmp_path.iterdir())) == 1


def _square(number: int) -> int:
    return number**2


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_come_with_their_results(processes: int) -> None:
    found = list(progress.work([3, 1, 2], _square, "numbers", processes=processes))
    assert sorted(found) == [(1, 1), (2, 4), (3, 9)]


def test_what_came_before_an_interrupt_was_handed_over(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    def run(job: int) -> int:
        if job == 2:
            raise KeyboardInterrupt
        return job

    path, done = tmp_path / "a.json", []
    with pytest.raises(SystemExit) as raised, progress.interruptible(path):
        for job, _ in progress.work([0, 1, 2, 3], run, "jobs"):
            done.append(job)
            progress.save(path, {"done": done})
    assert raised.value.code == 130 and json.loads(path.read_text()) == {"done": [0, 1]}
    assert "interrupted: finished results are in" in capfd.readouterr().err


def test_the_bar_counts_from_what_was_done() -> None:
    screen = io.StringIO()
    with progress.bar("rounds", 5, 3, Console(file=screen, force_terminal=True, width=100)) as step:
        step("one")
    shown = screen.getvalue()
    assert "rounds" in shown and "3/5" in shown and "4/5" in shown and "5/5" not in shown and "one" in shown
