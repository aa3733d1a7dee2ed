# SPDX-License-Identifier: Apache-2.0
"""Opens picture files with limits on formats, bytes, pixels, memory and time; all of vtprune reads them through here.

Pillow decodes. It reads everything through the file object that it is given, so that object counts reads and processor
time, and refuses to return large metadata in one piece.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..errors import InputError
from .files import FileError, check_size, read_bytes, read_stdin

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow opens phones' MPO as JPEG
SUFFIXES = (".png", ".jpg", ".jpeg", ".mpo", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 80_000_000  # below the number that Pillow warns of
MAX_SIDE = 4096  # of the returned image; no processor of transformers keeps more
MAX_SECONDS = 10.0  # of this thread's processor time
MAX_SCANS = 25  # of a progressive JPEG; encoders write about 10, and each can cost a pass over all pixels
# Limits on what comes before the pixels, where a file can hold a million empty chunks, tags or comments:
_MAX_METADATA = 2**19  # bytes that a reader may ask for in one piece; Pillow asks for a megabyte at most
_MAX_PARTS = 20_000  # reads
_METADATA_SECONDS = 1.0


@dataclass(frozen=True)
class Picture:
    """The first image of a picture file, decoded.

    Attributes:
        image: RGB, rotated as its EXIF orientation says, no side above the limit.
        size: Width and height in pixels of the file, before rotation and resizing.
        mode: Pillow's name of the file's color mode.
        animated: Whether the file has further images.
    """

    image: Image
    size: tuple[int, int]
    mode: str
    animated: bool


def open_picture(
    source: str | Path | bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    max_seconds: float = MAX_SECONDS,
) -> Picture:
    """Reads the first picture of a file.

    Args:
        source: Path of the file, or its content.
        max_bytes: Limit on the size of the file.
        max_pixels: Limit on the number of pixels, checked before decoding.
        max_side: Longest side of the returned image in pixels; larger ones are scaled down.
        max_seconds: Limit on the processor time of reading and decoding.

    Raises:
        FileError: It is none of `FORMATS`, broken, or exceeds a limit; the message does not name the file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    data = check_size(source, max_bytes) if isinstance(source, bytes) else read_bytes(source, max_bytes)
    file = _BoundedFile(data)
    try:
        with Image.open(file, formats=FORMATS) as image:
            size, mode = image.size, image.mode
            _check_pixels(size, max_pixels)
            if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
                raise FileError(f"a JPEG of more than {MAX_SCANS} scans is not decoded")
            animated = bool(getattr(image, "is_animated", False))  # never n_frames, which reads all of them
            file.allow_pixels(max_seconds)
            image.draft("RGB", (2 * max_side, 2 * max_side))  # a JPEG is decoded at a fraction of its size
            ImageOps.exif_transpose(image, in_place=True)
            picture = _eight_bits(image).convert("RGB")
    except FileError:
        raise
    except Image.DecompressionBombError:
        raise FileError(f"it has too many pixels; at most {max_pixels // 10**6} million are read") from None
    except UnidentifiedImageError:
        raise FileError("no picture that can be read; expected PNG, JPEG, WebP, GIF, BMP or TIFF") from None
    except MemoryError:
        raise FileError("there is not enough memory to decode it") from None
    except Exception as error:  # Pillow's readers raise KeyError, struct.error, SyntaxError and others on broken files
        raise FileError(f"the file is broken: {_reason(error)}") from error
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side))
    return Picture(picture, size, mode, animated)


def _eight_bits(image: Image) -> Image:
    """A grayscale image of 16 or 32 bits with its range scaled to 8; `convert` would make all above 255 white.

    White is 65,535 for 16 bits. For 32 bits, which have no agreed white, it is the first of 1 (fractions only), 255,
    65,535 and the largest value that no value exceeds.
    """
    if image.mode[:1] not in "IF":
        return image
    whole = image.mode != "F"
    _, peak = cast("tuple[float, float]", image.getextrema())
    white = 65_535.0
    if ";" not in image.mode:
        white = next((white for white in (1.0, 255.0, 65_535.0)[whole:] if peak <= white), peak)
    wide = image.convert("I") if whole else image
    return wide.point(lambda value: value * (255 / white) + 0).convert("L")


def _check_pixels(size: tuple[int, int], most: int) -> None:
    width, height = size
    if width * height > most:
        raise FileError(f"it has {width} x {height} pixels; at most {most // 10**6} million are read")


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


class _BoundedFile(io.BytesIO):
    """A file in memory that raises after too many reads (one per metadata chunk) or too much processor time."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._end = time.thread_time() + _METADATA_SECONDS
        self._parts: int | None = _MAX_PARTS

    def allow_pixels(self, seconds: float) -> None:
        """Lifts the limits on reads, for the given seconds of processor time."""
        self._parts, self._end = None, time.thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end:
            raise FileError("reading it takes too long")
        if self._parts is not None:
            self._parts -= 1
            if self._parts < 0:
                raise FileError("it has too many parts before its pixels")
            # Readers that ask for the whole file (WebP) pass it to a library with checks of its own.
            if size is not None and size > _MAX_METADATA:
                raise FileError(f"a piece of its metadata is larger than {_MAX_METADATA // 2**10} KiB")
        return super().read(size)


@contextmanager
def _silenced() -> Iterator[None]:
    """Sends the process's standard error to the null device: libtiff writes lines of its own about damaged files."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def picture(path: str) -> Image:
    """Reads a picture file as `open_picture` does; `-` is standard input.

    Raises:
        InputError: It cannot be read; the message names the file.
    """
    try:
        source = read_stdin(MAX_BYTES) if path == "-" else path
        with _silenced():
            return open_picture(source).image
    except FileError as error:
        raise InputError(f"cannot read {'standard input' if path == '-' else path} as a picture: {error}") from error


def picture_files(place: str) -> list[str]:
    """Paths of the picture at `place`, or of all pictures in that folder in order of their names; none is opened yet.

    Raises:
        InputError: There is no such file, or no picture in the folder.
    """
    folder = Path(place).expanduser()
    if place == "-" or folder.is_file():
        return [place]
    if not folder.is_dir():
        raise InputError(f"no picture at {place}: expected a file, or a folder of pictures")
    found = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise InputError(f"no picture in the folder {place}: expected files such as .png or .jpg")
    return found


def pictures(place: str) -> list[Image]:
    """Reads a picture, or all pictures of a folder in order of their names; other files in it are ignored.

    Raises:
        InputError: There is no picture, or one cannot be read.
    """
    return [picture(file) for file in picture_files(place)]
