# SPDX-License-Identifier: Apache-2.0
"""Files named by users: reads regular ones of bounded size, validates JSON against a schema, and writes."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line

MIB = 2**20
MAX_SETTINGS = 1 * MIB  # strategies, curves, lists of questions
MAX_RESULTS = 64 * MIB  # what a long measurement writes
MAX_DEPTH = 32  # of nested lists and objects


class FileError(InputError):
    """A file cannot be read: missing, not a regular file, too large, or not what was expected."""


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Reads a regular file of at most `limit` bytes.

    Devices and pipes are refused before a byte is read, because they may have no end or block.

    Args:
        path: The file; `~` is expanded.
        limit: Largest size in bytes.

    Raises:
        FileError: The file cannot be read; the message does not name it.
    """
    try:
        # Opening a pipe without this flag waits until somebody writes to it.
        descriptor = os.open(Path(path).expanduser(), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a name with NUL; RuntimeError: ~nobody
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(f"{reason.lower()}; expected a file that can be read") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileError("not a regular file; expected a file, and no device, pipe or folder")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise FileError(f"{error.strerror or error}".lower()) from error
    finally:
        os.close(descriptor)
    return check_size(data, limit, status.st_size)


def read_stdin(limit: int) -> bytes:
    """Reads standard input, at most `limit` bytes.

    Raises:
        FileError: It is closed, or longer.
    """
    if sys.stdin is None:
        raise FileError("it is closed")
    return check_size(sys.stdin.buffer.read(limit + 1), limit)


def check_size(data: bytes, limit: int, size: int | None = None) -> bytes:
    """Returns `data`, or raises `FileError` if it is longer than `limit` bytes."""
    if len(data) > limit:
        found = f"{size / MIB:,.1f} MiB" if size and size > limit else f"more than {limit / MIB:,.1f} MiB"
        raise FileError(f"it has {found}; at most {limit / MIB:,.0f} MiB are read")
    return data


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file; `~` is expanded. A pipe that nobody reads is refused, because opening it would wait for a reader.

    Raises:
        InputError: It cannot be written.
        OSError: The disk is full.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(Path(path).expanduser(), flags | getattr(os, "O_NONBLOCK", 0), 0o666)
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise InputError(f"cannot write {path}: {one_line(error)}") from error


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def read_text(path: str | Path, limit: int = MAX_SETTINGS) -> str:
    """Reads a UTF-8 text file with the limits of `read_bytes`; a byte-order mark is dropped."""
    return decode(read_bytes(path, limit))


def decode(data: bytes) -> str:
    """Decodes UTF-8, or raises `FileError`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"not UTF-8 text: {error.reason} at byte {error.start:,}") from error


def read_json(path: str | Path, schema: Mapping[str, Any] | None = None, limit: int = MAX_SETTINGS) -> Any:
    """Reads a JSON file with the limits of `read_bytes`.

    Stricter than `json.loads`: NaN, infinite numbers, duplicate keys and nesting beyond `MAX_DEPTH` are refused.

    Args:
        path: The file.
        schema: A JSON Schema (draft 2020-12) that the content must satisfy.
        limit: Largest size in bytes.

    Raises:
        FileError: The file cannot be read or breaks the schema; the message says where, but does not name the file.
    """
    return parse_json(read_text(path, limit), schema)


def parse_json(text: str, schema: Mapping[str, Any] | None = None) -> Any:
    """Parses JSON text as `read_json` does."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError:
        raise FileError(f"nested more than {MAX_DEPTH} levels deep") from None
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"not JSON: {error}") from error
    _check_depth(value)
    if schema is not None:
        check_schema(value, schema)
    return value


def check_schema(value: Any, schema: Mapping[str, Any]) -> None:
    """Raises `FileError`, with the path inside `value`, if it does not satisfy a JSON Schema."""
    import jsonschema

    try:
        problem = next(iter(jsonschema.Draft202012Validator(schema).iter_errors(value)), None)
    except (OverflowError, RecursionError) as error:  # an integer of hundreds of digits against a bound
        raise FileError(f"a number is out of range: {error}") from error
    if problem is not None:
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem.absolute_path)
        message = problem.message if len(problem.message) <= 160 else f"{problem.message[:157]}..."
        raise FileError(f"{path.lstrip('.') + ': ' if path else ''}{message}")


def _refuse_constant(name: str) -> Any:
    raise FileError(f"{name} is not a number in JSON; expected finite numbers")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FileError(f"{text[:40]} is out of range; expected finite numbers")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1) if len(names) < 1000 else names[0]
        raise FileError(f"the key {twice[:40]!r} is given twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise FileError(f"nested more than {MAX_DEPTH} levels deep")
