# SPDX-License-Identifier: Apache-2.0
"""Picture files sent by clients: valid, unusual and broken."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def noise(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of random noise."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def url(file: bytes, kind: str = "png") -> str:
    """A file as a `data:` URL."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares a large size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def odd() -> dict[str, str]:
    """URLs of valid pictures in unusual formats."""
    frames = [noise(seed, 48, 48) for seed in range(3)]
    animated = {"save_all": True, "append_images": frames[1:]}
    return {
        "one pixel": url(encoded(noise(1, 1, 1))),
        "one column": url(encoded(noise(2, 1, 60))),
        "animated GIF": url(encoded(frames[0], "GIF", **animated), "gif"),
        "animated WebP": url(encoded(frames[0], "WEBP", **animated), "webp"),
        "CMYK": url(encoded(noise(3, 64, 48, "CMYK"), "JPEG"), "jpeg"),
        "palette": url(encoded(noise(4, 64, 48, "P"))),
        "transparent": url(encoded(noise(5, 64, 48, "RGBA"))),
        "grey, 16 bits": url(encoded(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)))),
        "called a PNG": url(encoded(noise(6, 64, 48), "JPEG")),
    }


def broken() -> dict[str, str]:
    """URLs without a valid picture."""
    good = encoded(noise(7, 64, 64))
    return {
        "nothing": url(b""),
        "text": url(b"this is no picture"),
        "truncated": url(good[: len(good) // 2]),
        "only a head": url(good[:40]),
        "no base64": "data:image/png;base64,%%%",
        "a large claim": url(claims(60_000, 60_000)),
        "no size": url(claims(0, 0)),
        "another scheme": "file:///etc/hostname",
        "no scheme": "picture.png",
    }
