# SPDX-License-Identifier: Apache-2.0
"""Looks at an uploaded file before anything is done with it. Nothing here writes files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vtprune.core.files import FileError
from vtprune.core.images import open_picture

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 40_000_000  # of the file; enough for phone cameras
MIN_SIDE = 8
SHOWN_SIDE = 1024  # larger pictures are downscaled before a model sees them
MAX_SECONDS = 4.0  # CPU time; a regular picture of 40 million pixels takes one or two


class UploadError(ValueError):
    """The file cannot be used; the text is for the person who sent it."""


def read(path: str | Path) -> tuple[Image.Image, str]:
    """Reads an uploaded picture.

    Args:
        path: Of the file.

    Returns:
        tuple: The picture, RGB, at most `SHOWN_SIDE` pixels a side, and what was changed about it ("" for nothing).

    Raises:
        UploadError: It is no picture, broken, too small or beyond a limit.
    """
    try:
        found = open_picture(
            path, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS, max_side=SHOWN_SIDE, max_seconds=MAX_SECONDS
        )
    except FileError as error:
        raise UploadError(f"The picture cannot be used: {error}.") from None
    width, height = found.size
    if min(width, height) < MIN_SIDE:
        raise UploadError(f"The picture has {width} x {height} pixels; at least {MIN_SIDE} a side are needed.")
    notes = []
    if found.animated:
        notes.append("the file has several pictures, of which the first is used")
    if found.mode not in ("RGB", "L", "P", "1"):
        notes.append(f"its {found.mode} colors were turned into RGB")
    if max(width, height) > SHOWN_SIDE:
        notes.append(f"it was made smaller, {found.image.width} x {found.image.height}")
    return found.image, f"About your picture: {'; '.join(notes)}." if notes else ""
