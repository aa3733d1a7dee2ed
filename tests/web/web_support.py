# SPDX-License-Identifier: Apache-2.0
"""Paths and requirements of the web tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "examples" / "space"
# Folder of screenshots; those of the documentation are only overwritten on request.
SHOTS = ROOT / os.environ.get("VTPRUNE_SHOTS", "out")


def missing() -> str | None:
    """Reason to skip the web tests, or None."""
    if os.environ.get("VTPRUNE_WEB") != "1":
        return "tests of the web demo run with `make test-web`"
    for module in ("gradio", "gradio_client", "selenium"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; `make test-web` installs it"
    return None


def browser_missing() -> str | None:
    """Reason to skip the browser tests, or None."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed; on Debian: apt-get install chromium chromium-driver"
    return None


def chromium(window: str) -> Any:
    """A headless Chromium.

    Args:
        window: Width and height in pixels, as "1280,1400".
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    flags = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"window-size={window}")
    for flag in flags:
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
