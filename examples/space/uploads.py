# SPDX-License-Identifier: Apache-2.0
"""Looks at an uploaded file before anything is done with it. Nothing here writes files."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 40_000_000  # of the file; what a phone takes fits
MIN_SIDE = 8
SHOWN_SIDE = 1024  # larger pictures are made smaller before a model sees them
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO")


class UploadError(ValueError):
    """The file cannot be used; the text is for the person who sent it."""


def read(path: str | Path) -> tuple[Image.Image, str]:
    """Reads an uploaded picture.

    Args:
        path: Of the file.

    Returns:
        tuple: The picture, RGB, at most `SHOWN_SIDE` pixels a side, and what was changed about it ("" for nothing).

    Raises:
        UploadError: It is no picture, broken, too small or too large.
    """
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise UploadError(f"The file has {size / 2**20:.0f} MiB; at most {MAX_BYTES // 2**20} are taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is looked at below
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise UploadError(
            f"The picture is too large; at most {MAX_PIXELS // 10**6} million pixels are taken."
        ) from None
    except Exception:  # whatever a reader stumbles over
        raise UploadError("This is no picture that can be read: send PNG, JPEG, WebP, GIF, BMP or TIFF.") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UploadError(
                f"The picture has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are taken."
            )
        if min(width, height) < MIN_SIDE:
            raise UploadError(f"The picture has {width} x {height} pixels; at least {MIN_SIDE} a side are needed.")
        notes = []
        if getattr(image, "n_frames", 1) > 1:
            notes.append(f"it is animated: the first of {image.n_frames} frames is used")  # type: ignore[attr-defined]
        if image.mode not in ("RGB", "L", "P", "1"):
            notes.append(f"its {image.mode} colours were turned into RGB")
        try:
            image.draft("RGB", (2 * SHOWN_SIDE, 2 * SHOWN_SIDE))
            picture = ImageOps.exif_transpose(image).convert("RGB")
        except Exception:  # truncated or broken inside
            raise UploadError("The picture is broken: its file ends too early or holds nonsense.") from None
    if max(picture.size) > SHOWN_SIDE:
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        notes.append(f"it was made smaller, {picture.width} x {picture.height}")
    return picture, f"About your picture: {'; '.join(notes)}." if notes else ""
