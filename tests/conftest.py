# SPDX-License-Identifier: Apache-2.0
"""Options and paths shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# From a checkout that was not installed the kernels are found where they lie.
if importlib.util.find_spec("vtprune_kernels") is None:
    sys.path.insert(0, str(ROOT / "kernels" / "torch-ext"))

# Read when Triton is imported: without a GPU its sources are run by the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        default=str(ROOT.parent / "shared" / "golden"),
        help="folder with the golden data of the methods (default: %(default)s)",
    )
