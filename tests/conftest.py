# SPDX-License-Identifier: Apache-2.0
"""Options and paths shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Finds the kernels in a checkout that is not installed.
if importlib.util.find_spec("vtprune_kernels") is None:
    sys.path.insert(0, str(ROOT / "kernels" / "torch-ext"))

# Triton reads this on import: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Hypothesis draws the same examples in every run; `make soak` draws new ones. Some environments lack Hypothesis.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        action="append",
        help="folder with golden data of methods; may be given again (default: golden and golden-2 in ../shared)",
    )


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Runs a test without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an untrained model of the built-in architecture, saved with save_pretrained."""
    from tools.refvlm import model

    place = tmp_path_factory.mktemp("models") / "tiny"
    model.build(0).save_pretrained(place)
    model.processor().save_pretrained(place)
    return place
