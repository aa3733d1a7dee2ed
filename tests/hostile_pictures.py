# SPDX-License-Identifier: Apache-2.0
"""Malicious small picture files that take a naive reader minutes or gigabytes, and broken files."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def picture(size: tuple[int, int] = (64, 64), form: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    """A valid picture file."""
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form, **options)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_chunks(count: int, name: bytes = b"prVt", data: bytes = b"") -> bytes:
    """A PNG with so many chunks before its pixels."""
    whole = picture()
    start = whole.index(b"IDAT") - 4
    return whole[:start] + _chunk(name, data) * count + whole[start:]


def png_claiming(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    """A PNG of a few bytes whose header claims so many pixels."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + _chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + _chunk(b"IEND")


def jpeg_of_markers(count: int) -> bytes:
    """A JPEG with so many empty application segments."""
    whole = picture(form="JPEG")
    return whole[:2] + b"\xff\xe9\0\2" * count + whole[2:]


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times."""
    whole = picture(form="JPEG", progressive=True)
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * count + whole[-2:]


def gif_of_comments(count: int) -> bytes:
    """A GIF with one comment of so many blocks."""
    whole = picture(form="GIF")
    start = 13 + (3 << ((whole[10] & 7) + 1) if whole[10] & 128 else 0)
    return whole[:start] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * count + b"\0" + whole[start:]


def _directory(entries: list[tuple[int, int, int, int]], following: int) -> bytes:
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + table + struct.pack("<I", following)


def tiff_of_pages(count: int) -> bytes:
    """A TIFF with so many pages of 8 x 8 pixels."""
    entries = [(256, 4, 1, 8), (257, 4, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)]
    size = len(_directory(entries, 0))
    pages = (_directory(entries, 8 + (n + 1) * size if n + 1 < count else 0) for n in range(count))
    return b"II*\0" + struct.pack("<I", 8) + b"".join(pages)


def tiff_second_page_without_size() -> bytes:
    """A TIFF whose second page has no dimensions, which readers that count pages stumble over."""
    entries = [(256, 4, 1, 8), (257, 4, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)]
    size = len(_directory(entries, 0))
    return b"II*\0" + struct.pack("<I", 8) + _directory(entries, 8 + size) + _directory([(262, 3, 1, 1)], 0)


def tiff_of_strips(count: int) -> bytes:
    """A TIFF one pixel wide with a strip for every row."""
    table = 200
    entries = [(256, 4, 1, 1), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, count, table), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, count, table + 4 * count)]
    start = (b"II*\0" + struct.pack("<I", 8) + _directory(entries, 0)).ljust(table, b"\0")
    return start + struct.pack("<I", 8) * count + struct.pack("<I", 1) * count


def bmp_of_runs(count: int) -> bytes:
    """A run-length-encoded BMP of 10 million pixels, each run one pixel: Pillow decodes it a byte at a time."""
    data, palette = b"\1\0" * count, b"\0\0\0\0" * 256
    about = struct.pack("<IiiHHIIiiII", 40, 4000, 2500, 1, 8, 1, len(data), 0, 0, 256, 0)
    offset = 14 + len(about) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + about + palette + data


def gray(mode: str, values: list[float], form: str = "TIFF") -> bytes:
    """A grayscale picture, one pixel high, of a mode with 16 or 32 bits."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def broken_fax() -> bytes:
    """A fax TIFF with damaged code words, about which libtiff writes to the standard error of the process."""
    whole = bytearray(picture((64, 64), "TIFF", "1", compression="group4"))
    whole[8:16] = b"\x12\x34\x56\x78\x9a\xbc\xde\xf0"
    return bytes(whole)


# Name -> (content, a part of the message).
REFUSED = {
    "chunks.png": (lambda: png_of_chunks(200_000), "too many parts"),
    "texts.png": (lambda: png_of_chunks(200_000, b"tEXt", b"a\0b"), "too many parts"),
    "profile.png": (lambda: png_of_chunks(1, b"iCCP", b"a\0\0" + b"x" * 2**20), "metadata is larger"),
    "markers.jpg": (lambda: jpeg_of_markers(500_000), "too many parts"),
    "scans.jpg": (lambda: jpeg_of_scans(100), "scans"),
    "comments.gif": (lambda: gif_of_comments(50_000), "too many parts|takes too long"),
    "strips.tif": (lambda: tiff_of_strips(1_000_000), "metadata is larger"),
    "bomb.png": (lambda: png_claiming(30_000, 30_000), "pixels"),
    "large.png": (lambda: png_claiming(9_300, 9_300, 1, 0), "pixels"),
    "cut.png": (lambda: picture((640, 480))[:120], "broken"),
    "cut.jpg": (lambda: picture((640, 480), "JPEG")[:1500], "broken"),
    "text.png": (lambda: b"this is no picture\n" * 50, "no picture that can be read"),
    "eps.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),
    "empty.png": (lambda: b"", "no picture that can be read"),
}
READ = {
    "pages.tif": (lambda: tiff_of_pages(100_000), (8, 8)),
    "second.tif": (tiff_second_page_without_size, (8, 8)),
    "wide.png": (lambda: picture((20_000, 1)), (20_000, 1)),
    "tall.gif": (lambda: picture((1, 5_000), "GIF"), (1, 5_000)),
    "phone.jpg": (lambda: picture((4_000, 3_000), "JPEG"), (4_000, 3_000)),
    "print.jpg": (lambda: picture(form="JPEG", mode="CMYK"), (64, 64)),
    "deep.png": (lambda: picture(mode="I;16"), (64, 64)),
    "see-through.webp": (lambda: picture(form="WEBP", mode="RGBA"), (64, 64)),
}
