# SPDX-License-Identifier: Apache-2.0
"""Invalid uploads get a message and leave the demo working; concurrent visitors are all served."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile_pictures
import pytest
from PIL import Image


def picture(size=(96, 64), mode="RGB", form="PNG", **options) -> bytes:
    """Bytes of a picture file."""
    buffer = io.BytesIO()
    Image.new(mode, size, "red" if mode != "CMYK" else (0, 200, 200, 0)).save(buffer, form, **options)
    return buffer.getvalue()


def huge(width: int, height: int) -> bytes:
    """A PNG of a few bytes that decodes to width x height pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated() -> bytes:
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "lime")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


UPLOADS = {
    "text.png": (b"this is no picture\n" * 50, "no picture that can be read"),
    "notes.txt": (b"nor is this", "no picture that can be read"),
    "empty.png": (b"", "no picture that can be read"),
    "page.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture that can be read"),
    "dot.png": (picture((1, 1)), "1 x 1 pixels; at least 8"),
    "huge.png": (huge(20_000, 20_000), "too many pixels; at most 40 million"),
    "large.png": (huge(9_000, 9_000), "9000 x 9000 pixels; at most 40 million"),
    "cut.jpg": (picture((640, 480), form="JPEG")[:1500], "broken"),
    "cut.png": (picture((640, 480))[:120], "broken"),
    "print.jpg": (picture(mode="CMYK", form="JPEG"), "CMYK colors were turned into RGB"),
    "moving.gif": (animated(), "several pictures, of which the first is used"),
    "wide.png": (picture((3000, 40)), "made smaller, 1024 x 14"),
    "good.png": (picture(), ""),
    "pages.tif": (hostile_pictures.tiff_of_pages(300_000), "several pictures, of which the first is used"),
    "second.tif": (hostile_pictures.tiff_second_page_without_size(), "several pictures, of which the first is used"),
    "chunks.png": (hostile_pictures.png_of_chunks(1_000_000), "too many parts"),
    "runs.bmp": (hostile_pictures.bmp_of_runs(10_000_000), "takes too long"),
}
NOTED = {"print.jpg", "moving.gif", "wide.png", "good.png", "pages.tif", "second.tif"}


@pytest.fixture(scope="module")
def client(server):
    from gradio_client import Client

    return Client(server.url, verbose=False)


def _ask(
    client,
    file=None,
    choice="my upload",
    question="what color is the object?",
    methods=("uniform",),
    how="a share of them",
):
    return client.predict(file, choice, question, 0.25, list(methods), [QWEN], how, False, api_name="/ask")


def _file(tmp_path: Path, name: str):
    from gradio_client import handle_file

    path = tmp_path / name
    path.write_bytes(UPLOADS[name][0])
    return handle_file(str(path))


@pytest.mark.parametrize("name", UPLOADS)
def test_every_upload_gets_a_message_and_the_next_visitor_an_answer(client, tmp_path, name):
    output, result = _ask(client, _file(tmp_path, name))
    assert UPLOADS[name][1] in output
    assert ("<svg" in result) == (name in NOTED)
    _, preview, shown = client.predict(_file(tmp_path, name), api_name="/uploaded")
    assert UPLOADS[name][1] in shown and bool(preview) == (name in NOTED)
    assert 'data-kept="1"' in _ask(client, choice="scene 7")[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "  "}, "Ask something"),
        ({"question": "x" * 501}, "at most 500"),
        ({"methods": []}, "at least one method"),
        ({"choice": "my upload"}, "No picture was uploaded"),
    ],
)
def test_questions_that_cannot_be_asked_get_a_message(client, change, message):
    output, result = _ask(client, **{"choice": "scene 7", **change})
    assert message in output and not result


AUTO = "auto: as many as each picture needs, with that share as the mean over the pictures"
QWEN = "embedded-qwen2_5_vl"


def test_the_count_is_that_of_a_certificate_or_of_the_picture(client):
    from web_support import SPACE

    import vtprune

    known = vtprune.Certificate.load(SPACE / "certificate.json")
    named = f"certified: {known.ratio:g} with {known.method}, at most {known.risk:.0%} changed"
    _, result = _ask(client, choice="scene 7", how=named)
    assert f"Certified: ratio {known.ratio:g} with {known.method} changes at most" in result
    assert result.count('data-kept="1"') == round(known.ratio * 144) and "uniform" not in result
    shares = []
    for name in ("crowd 27", "crowd 8", "crowd 3", "smaller crowd", "page", "scene 7", "scene 12"):
        _, result = _ask(client, choice=name, how=AUTO)
        shares.append(result.count('data-kept="1"') / result.count("data-kept="))
        assert "Certified" not in result
    assert len(set(shares)) > 1 and all(0 < share <= 0.5 for share in shares)
    assert sum(shares) / len(shares) == pytest.approx(0.25, rel=0.25)


def test_what_visitors_write_is_shown_as_text(client):
    output, result = _ask(client, choice="scene 7", question="<script>alert(1)</script>")
    assert "<script" not in output + result


def test_a_method_that_is_not_offered_is_refused(client):
    with pytest.raises(Exception, match="not in the list of choices"):
        _ask(client, choice="scene 7", methods=["no such"])


def test_files_of_the_server_are_out_of_reach(server):
    import httpx

    secret = server.temp.parent / "secret.png"  # a valid picture that was not uploaded
    secret.write_bytes(picture())
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    data = [file, "my upload", "what color is the object?", 0.25, ["uniform"], [QWEN], "a share of them", False]
    call = httpx.post(f"{server.url}/gradio_api/call/ask", json={"data": data}, timeout=60).json()
    events = httpx.get(f"{server.url}/gradio_api/call/ask/{call['event_id']}", timeout=60).text
    assert "event: error" in events and "<svg" not in events


def test_uploads_that_are_too_long_are_cut_off(client, server, tmp_path):
    before = sum(f.stat().st_size for f in server.temp.rglob("*") if f.is_file())
    with pytest.raises(Exception, match="(?i)size|large|413"):
        from gradio_client import handle_file

        path = tmp_path / "long.png"
        path.write_bytes(picture() + b"\0" * (21 * 2**20))
        _ask(client, handle_file(str(path)))
    after = sum(f.stat().st_size for f in server.temp.rglob("*") if f.is_file())
    assert after - before < 20 * 2**20


def test_a_file_name_does_not_lead_out_of_the_temporary_folder(client, server):
    import httpx

    files = {"files": ("../../../escaped.png", picture(), "image/png")}
    answer = httpx.post(f"{server.url}/gradio_api/upload", files=files, timeout=60)
    stored = [Path(p) for p in answer.json()] if answer.status_code == 200 else []
    assert all(server.temp.resolve() in p.resolve().parents for p in stored)
    assert not list(server.temp.parent.glob("escaped*")) and not list(server.cwd.parent.parent.glob("escaped*"))
    assert list(server.cwd.iterdir()) == []  # no upload wrote to the working directory


def test_twenty_visitors_at_once_are_all_served(server):
    from gradio_client import Client

    def visit(number: int) -> str:
        mine = Client(server.url, verbose=False)
        method = ("iwp", "uniform", "divprune", "fastv")[number % 4]
        output, result = _ask(mine, choice=("scene 7", "scene 12")[number % 2], methods=[method])
        assert f'data-method="{method}"' in result and 'class="error"' not in result
        return output

    with ThreadPoolExecutor(20) as visitors:
        assert list(visitors.map(visit, range(20))) == ["Done."] * 20
