# SPDX-License-Identifier: Apache-2.0
"""`docs/support.md` matches its rows when they are run again; `SUPPORT=all` includes slow rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parent.parent
from tests.supported import rows, table  # noqa: E402

COMMITTED = json.loads((ROOT / "docs" / table.FILE).read_text())


def test_the_page_shows_the_rows_that_there_are() -> None:
    assert [entry["feature"] for entry in COMMITTED["rows"]] == list(rows.ROWS)
    assert {entry["outcome"] for entry in COMMITTED["rows"]} == {"works", "refused"}
    assert (ROOT / "docs" / "support.md").read_text() == table.render(COMMITTED)


@pytest.mark.parametrize("entry", COMMITTED["rows"], ids=lambda entry: entry["feature"])
def test_row(entry: dict[str, str]) -> None:
    row = rows.ROWS[entry["feature"]]
    if row.missing:
        pytest.skip(f"takes {', '.join(row.missing)}")
    if row.slow and os.environ.get("SUPPORT") != "all":
        pytest.skip("slow; SUPPORT=all tries it")
    found = table.run(row)
    assert found["outcome"] == entry["outcome"], found
    assert found["tried"] == entry["tried"]
    if transformers.__version__ == COMMITTED["transformers"]:
        assert found["reason"] == entry["reason"]


def test_a_feature_that_stops_working_is_noticed() -> None:
    """A row that fails, and a missing refusal, are reported as failures."""

    def broken(folder: Path) -> None:
        """Does not work."""
        raise RuntimeError("shape mismatch")

    def accepted(folder: Path) -> str:
        """Is expected to be refused, but is not."""
        return table.refused(lambda: None)

    for check in (broken, accepted):
        assert table.run(table.Row("x", "", check))["outcome"] == "fails"
    assert table.run(table.Row("x", "", broken, ("no_such_package",)))["outcome"] == "package missing"
