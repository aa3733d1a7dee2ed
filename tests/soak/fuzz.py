# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of all file readers: bytes are flipped, cut, doubled and taken from other files."""

from __future__ import annotations

import json
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_pictures

import vtprune
from vtprune import methods
from vtprune.cli.describe import list_methods
from vtprune.core.files import read_json
from vtprune.core.images import open_picture
from vtprune.core.registry import make
from vtprune.methods.debiased.position_curve import Curve
from vtprune.study import progress
from vtprune.study.tune import Search

SECONDS = 15.0  # limit of processor time per file
_TRIAL = {"threshold": 1.0, "alpha": 0.0, "grid": 3.0, "first": 0.3, "second": 0.9, "value": 1.0}
_SEARCH = {"mean_ratio": 0.3, "num_layers": 28, "samples": 1, "seed": 0, "trials": [_TRIAL], "agreement": 1.0}
_STRATEGY = {"method": "vflowopt", "threshold": 1.0, "alpha": 0.0, "grid": 3.0, "first": 0.5, "depth": 28}
_STRATEGY |= {"later": [0.9, 0.8], "layers": [9, 18]}
_NAMED = {"required": ["name", "options"], "minProperties": 2, "maxProperties": 2, "type": "object"}
_TOKENS = [b"NaN", b"1e999", b"true", b"null", b"[", b"{", b'"', b"-1", b"0" * 400, b"1" + b"0" * 5000, b"\xff", b"\0"]
_VALUES = [None, True, -1, 0, 1, 0.5, 3, 1e300, -1e300, float("nan"), float("inf"), 10**400, "", "x", [], [[]], {}]


def targets() -> dict[str, tuple[Callable[[Path], Any], list[bytes]]]:
    """For every reader, a function that reads a file, and valid files to damage."""
    curve = {"form": "exponential", "coefficients": [1.0]}
    auto = {"ratio": "auto", "energy": 0.9, "min": 0.02, "max": 0.5}
    certificate = {"ratio": 0.1, "auto": None, "method": "pyramiddrop", "options": {"layers": [8, 16, 24]}}
    certificate |= dict.fromkeys(("method_repr", "model", "config_hash", "weights_hash"), "x")
    certificate |= {"risk": 0.1, "confidence": 0.9, "pictures": 3, "questions": 3, "changed": 0.0}
    options = [
        json.dumps({"name": item["name"], "options": item["options"]}).encode()
        for item in list_methods()
        if item["name"] not in ("debiased", "sink_aware")
    ]
    pictures = [hostile_pictures.picture(form=form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    pictures += [make() for make, _ in hostile_pictures.READ.values()]
    pictures = [data for data in pictures if len(data) < 200_000]
    return {
        "picture": (open_picture, pictures),
        "strategy": (methods.VFlowOpt.load, [json.dumps(_STRATEGY).encode()]),
        "search": (Search.load, [json.dumps(_STRATEGY | {"about": _SEARCH | {"versions": {}}}).encode()]),
        "options": (lambda path: make(*read_json(path, _NAMED).values()), options),
        "curve": (Curve.load, [json.dumps(curve).encode()]),
        "automatic ratio": (vtprune.Auto.load, [json.dumps(auto).encode()]),
        "certificate": (lambda path: vtprune.Certificate.load(path).make_method(), [json.dumps(certificate).encode()]),
        "results": (
            lambda path: progress.load(path, {"rows": [1]}),
            [json.dumps({"rows": [1, 2], "load": 1.0}).encode()],
        ),
    }


def damaged(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Damages a file in one to four places; half of the JSON files get one other value and still parse."""
    if data.startswith(b"{") and draw.random() < 0.5:
        content = place = json.loads(data)
        name = draw.choice(list(place))
        while isinstance(place[name], (dict, list)) and place[name] and draw.random() < 0.7:
            place = place[name]
            name = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        place[name] = draw.choice(_VALUES)
        return json.dumps(content).encode()
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(out) + 1), draw.randrange(5)
        if kind == 0 and at < len(out):
            out[at] = draw.randrange(256)
        elif kind == 1:
            del out[at : at + draw.randint(1, 64)]
        elif kind == 2:
            out[at:at] = out[at : at + draw.randint(1, 4096)] * draw.randint(1, 50)
        elif kind == 3:
            out[at:at] = draw.choice(_TOKENS)
        else:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            out[at : at + 16] = other[start : start + 16]
    return bytes(out)


def run(cases: int, seed: int) -> dict[str, Any]:
    """Reads `cases` damaged files, divided among the readers.

    Returns:
        dict: Numbers of files read and refused per reader, and the longest processor time in seconds.

    Raises:
        AssertionError: A file raised an error that is not vtprune's, or took too long; the message names its copy.
    """
    draw, counts, longest = random.Random(seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata
        path = Path(folder) / "file"
        found = targets()
        for name, (read, good) in found.items():
            for _ in range(-(-cases // len(found))):
                data = damaged(draw.choice(good), good, draw)
                path.write_bytes(data)
                started = time.thread_time()
                try:
                    read(path)
                    counts[f"{name}: read"] += 1
                except vtprune.VTPruneError:
                    counts[f"{name}: refused"] += 1
                except Exception as error:
                    raise AssertionError(f"{name}: {error!r} from {_kept(data)}") from error
                spent = time.thread_time() - started
                longest = max(longest, spent)
                assert spent < SECONDS, f"{name}: {spent:.1f} s for {_kept(data)}"
    return {**dict(sorted(counts.items())), "longest_seconds": round(longest, 2)}


def _kept(data: bytes) -> str:
    """Writes `data` to a file and returns its path."""
    with tempfile.NamedTemporaryFile(prefix="vtprune-fuzz-", delete=False) as file:
        file.write(data)
    return file.name
