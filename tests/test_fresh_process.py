# SPDX-License-Identifier: Apache-2.0
"""The README's two lines in a fresh process that imports only `vtprune`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import sys
sys.path[:0] = ["tests"]
import torch
from families import FAMILIES, Image
import vtprune
model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch([[3, Image(0), 5]])
with torch.no_grad(), vtprune.patch(model, ratio=0.2) as patch:
    model(**batch)
print(patch.last.method, len(patch.last.kept[0]))
"""


def test_patch_knows_the_methods_by_itself() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["resprune", "5"], done.stderr[-2000:]


def test_a_certificate_knows_the_methods_by_itself() -> None:
    program = "import vtprune\nfound = vtprune.Certificate.load('examples/space/certificate.json')\n"
    command = [sys.executable, "-c", f"{program}print(found.make_method().name)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["resprune"], done.stderr[-2000:]
