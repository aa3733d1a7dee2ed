# SPDX-License-Identifier: Apache-2.0
"""User files are read within bounds of content, size and time."""

from __future__ import annotations

import json
import os
import time

import hostile_pictures
import pytest

from vtprune.core import files
from vtprune.core.files import FileError
from vtprune.core.images import MAX_SIDE, open_picture
from vtprune.errors import InputError

SCHEMA = {
    "type": "object",
    "required": ["share", "layers"],
    "properties": {
        "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "layers": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    },
}
GOOD = '{"share": 0.5, "layers": [1, 2]}'


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "good.json"
    path.write_text("\ufeff" + GOOD, encoding="utf-8")
    assert files.read_json(path, SCHEMA) == {"share": 0.5, "layers": [1, 2]}
    assert files.read_bytes(path, 100) == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"share": NaN, "layers": []}', "NaN"),
        ('{"share": 1e999, "layers": []}', "out of range"),
        ('{"share": Infinity, "layers": []}', "Infinity"),
        ('{"share": true, "layers": []}', "share: True is not of type 'number'"),
        ('{"share": "x", "layers": []}', "share: 'x' is not of type"),
        ('{"share": 0.5, "layers": [1, true]}', r"layers\[1\]: True"),
        ('{"share": 0.5, "share": 0.6, "layers": []}', "given twice"),
        ('{"share": 1' + "0" * 400 + ', "layers": []}', "share"),
        ('{"share": 1' + "0" * 5000 + ', "layers": []}', "not JSON"),
        ('{"share": 0.5}', "'layers' is a required property"),
        ("[" * 40 + "]" * 40, "nested more than 32"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 32"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ("3", "not of type 'object'"),
    ],
)
def test_what_a_file_holds_is_checked(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(FileError, match=message):
        files.read_json(path, SCHEMA)


@pytest.mark.parametrize(
    "name", ["/dev/zero", "/dev/full", "/dev/null", "/dev", "missing", "nul\0byte", "~nobody-here/x"]
)
def test_what_is_no_regular_file_is_refused_at_once(name):
    started = time.monotonic()
    with pytest.raises(FileError, match="regular|no such file|null|home"):
        files.read_bytes(name, 100)
    assert time.monotonic() - started < 5


def test_pipes_and_links_to_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with pytest.raises(FileError, match="not a regular file"):
            files.read_text(tmp_path / name)


def test_a_file_that_is_too_large_or_no_text_is_refused(tmp_path):
    path = tmp_path / "large.json"
    path.write_bytes(b" " * (3 * files.MIB))
    with pytest.raises(FileError, match=r"it has 3\.0 MiB; at most 1 MiB"):
        files.read_json(path)
    assert len(files.read_bytes(path, 3 * files.MIB)) == 3 * files.MIB
    path.write_bytes(b'"\xff"')
    with pytest.raises(FileError, match="not UTF-8"):
        files.read_json(path)


@pytest.mark.parametrize("name", hostile_pictures.REFUSED)
def test_hostile_pictures_are_refused_quickly(tmp_path, name):
    make, message = hostile_pictures.REFUSED[name]
    path = tmp_path / name
    path.write_bytes(make())
    started = time.thread_time()
    with pytest.raises(FileError, match=message):
        open_picture(path)
    assert time.thread_time() - started < 2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", hostile_pictures.READ)
def test_odd_pictures_are_read_quickly(tmp_path, name):
    make, size = hostile_pictures.READ[name]
    path = tmp_path / name
    path.write_bytes(make())
    started = time.thread_time()
    found = open_picture(path)
    assert time.thread_time() - started < 2
    assert found.size == size and found.image.mode == "RGB" and max(found.image.size) <= MAX_SIDE
    assert found.animated == (name in ("pages.tif", "second.tif"))


@pytest.mark.parametrize(
    ("mode", "values", "form"),
    [
        ("I;16", [0, 16_384, 32_768, 65_535], "PNG"),
        ("I;16", [0, 16_384, 32_768, 65_535], "TIFF"),
        ("I", [0, 16_384, 32_768, 65_535], "TIFF"),
        ("I", [0, 1_000_000, 2_000_000, 4_000_000], "TIFF"),
        ("F", [0.0, 0.25, 0.5, 1.0], "TIFF"),
        ("F", [0.0, 64.0, 128.0, 255.0], "TIFF"),
        ("L", [0, 64, 128, 255], "PNG"),
    ],
)
def test_deep_grays_are_scaled_and_not_cut_off(mode, values, form):
    found = open_picture(hostile_pictures.gray(mode, values, form)).image
    reds = [found.getpixel((column, 0))[0] for column in range(4)]
    assert reds == pytest.approx([0, 64, 128, 255], abs=1)


def test_what_is_written_goes_to_files_and_to_pipes_with_a_reader(tmp_path):
    path = tmp_path / "new.json"
    files.write_text(path, "ä")
    files.write_text(path, "b")
    assert path.read_text() == "b"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot write"):
        files.write_text(tmp_path / "pipe", "nobody reads")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(tmp_path / "pipe", "read")
    assert os.read(reader, 10) == b"read"
    os.close(reader)
    for place in (tmp_path, tmp_path / "no" / "folder", tmp_path / ("a" * 300)):
        with pytest.raises(InputError, match="cannot write"):
            files.write_text(place, "x")
    with pytest.raises(OSError, match="No space left"):
        files.write_text("/dev/full", "x")


def test_decoding_has_an_end():
    started = time.thread_time()
    with pytest.raises(FileError, match="takes too long"):
        open_picture(hostile_pictures.bmp_of_runs(10_000_000), max_seconds=0.5)
    assert time.thread_time() - started < 2


def test_limits_are_the_callers():
    data = hostile_pictures.picture((300, 200))
    assert open_picture(data, max_side=100).image.size == (100, 67)
    with pytest.raises(FileError, match="300 x 200 pixels; at most 0 million"):
        open_picture(data, max_pixels=50_000)
    with pytest.raises(FileError, match="MiB"):
        open_picture(data, max_bytes=50)


def test_damaged_files_are_read_or_refused():
    """The short form of a part of the soak."""
    from tests.soak import fuzz

    counts = fuzz.run(cases=210, seed=int(os.environ.get("VTPRUNE_SEED", 0)))
    assert counts["picture: refused"] and counts["strategy: refused"] and counts["longest_seconds"] < fuzz.SECONDS


def test_errors_do_not_repeat_the_content():
    secret = json.dumps({"share": "s" * 10_000, "layers": []})
    with pytest.raises(FileError) as caught:
        files.parse_json(secret, SCHEMA)
    assert len(str(caught.value)) < 200
