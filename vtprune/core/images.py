# SPDX-License-Identifier: Apache-2.0
"""Pictures read from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image


def picture(path: str) -> Image:
    """Reads a picture as RGB, turned the way its camera says.

    Raises:
        InputError: There is no such file, or it is not a picture that Pillow can read to its end.
    """
    from PIL import Image, ImageOps

    if not Path(path).expanduser().is_file():
        raise InputError(f"no picture at {path}: expected a file")
    try:
        with Image.open(Path(path).expanduser()) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path} as a picture: {one_line(error)}") from error


def picture_files(place: str) -> list[str]:
    """The picture at `place`, or all picture files of that folder in order of their names; other files are passed over.

    Raises:
        InputError: There is no such file, or no picture in the folder. Nothing is opened yet.
    """
    from PIL import Image

    folder = Path(place).expanduser()
    if not folder.is_dir():
        if not folder.is_file():
            raise InputError(f"no picture at {place}: expected a file, or a folder of pictures")
        return [place]
    kinds = Image.registered_extensions()
    found = sorted(str(file) for file in folder.iterdir() if file.is_file() and file.suffix.lower() in kinds)
    if not found:
        raise InputError(f"no picture in the folder {place}: expected files such as .png or .jpg")
    return found


def pictures(place: str) -> list[Image]:
    """Reads a picture, or all pictures of a folder in order of their names; other files in it are passed over.

    Raises:
        InputError: There is no picture, or one cannot be read.
    """
    return [picture(file) for file in picture_files(place)]
