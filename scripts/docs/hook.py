# SPDX-License-Identifier: Apache-2.0
"""MkDocs hook: completes written pages, adds generated ones, and rejects a site that loads external resources."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _path in (ROOT, ROOT / "kernels" / "torch-ext"):  # works from a checkout that is not installed
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

from mkdocs.exceptions import PluginError  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402

from scripts.docs import pages, results  # noqa: E402

# URL of the shim that the theme's offline plug-in loads for search from disk, and its local replacement.
_SHIM, _OWN_SHIM = "https://unpkg.com/iframe-worker/shim", "offline-search.js"
_MADE: dict[str, str] = {}
_LOADS = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>", re.I)


def on_config(config: Any) -> Any:
    """Adds the generated pages to the navigation."""
    _MADE.update(pages.made())
    added = pages.navigation()
    for entry in config.nav:
        for title, children in entry.items():
            if title in added:
                children += [child for child in added[title] if child not in children]
    return config


def on_files(files: Files, config: Any) -> Files:
    for place, text in _MADE.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = page.file.src_uri
    return results.linked(markdown if place in _MADE else pages.own(f"docs/{place}"))


def on_post_build(config: Any) -> None:
    """Checks that the site loads no external resources, so that it works offline and without tracking."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        if _SHIM in text:
            text = text.replace(_SHIM, Path(os.path.relpath(Path(config.site_dir) / _OWN_SHIM, path.parent)).as_posix())
            path.write_text(text, encoding="utf-8")
        loads = _LOADS.findall(text)
        if loads:
            raise PluginError(f"{path.name} loads an external resource: {loads[0]}")
