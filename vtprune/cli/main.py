# SPDX-License-Identifier: Apache-2.0
"""The command `vtprune`. Errors are one line on standard error and an exit code; see `EXIT_CODES`.

Modules of this package import PyTorch and transformers inside functions, so that `vtprune --help` is fast.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..errors import VTPruneError, one_line
from . import answer, bench, certify, completion, describe, doctor, fidelity, study
from .parser import EXIT_CODES, Parser

DONE, FAILED, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
# Errors of the system about a path that was given: it does not exist, has too long a name, must not be read, ...
BAD_PATHS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ENXIO),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program name; by default those of the process.

    Returns:
        int: The exit code, see `EXIT_CODES`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_streams()
        _run(arguments)
        sys.stdout.flush()  # raises for a full disk here instead of at interpreter exit
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard(sys.stdout)
        _discard(sys.stderr)
        return PIPE_CLOSED
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _explain(error)
    return DONE


def build_parser() -> Parser:
    """Builds the parser with all commands."""
    parser = Parser(
        "vtprune",
        description="Prune redundant visual tokens of vision-language models.",
        epilog=EXIT_CODES,
        examples=(
            "demo",
            "run --model OWNER/NAME --image photo.png --question 'What is on the table?' --ratio 0.1",
            "doctor",
        ),
    )
    parser.set_defaults(program=parser)
    parser.add_argument("--version", action="version", version=f"vtprune {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for module in (answer, describe, study, fidelity, certify, bench, doctor, completion):
        module.add(commands)
    _add_help(parser, commands)
    return parser


def _run(arguments: list[str]) -> None:
    try:
        args = build_parser().parse_args(arguments)
    except SystemExit:  # raised by --help and --version
        sys.stdout.flush()
        raise
    _show_warnings()
    args.command(args)


def _add_help(parser: Parser, commands: argparse._SubParsersAction) -> None:
    """Adds `vtprune help [COMMAND]` and `vtprune version`."""

    def show(args: argparse.Namespace) -> None:
        topic = parser if args.topic is None else commands.choices[args.topic]
        print(topic.format_help(), end="")

    helper = commands.add_parser(
        "help",
        help="show the help of a command",
        description="Shows the help of a command, the same as COMMAND --help.",
        examples=("help fidelity",),
    )
    helper.add_argument(
        "topic",
        nargs="?",
        choices=[*commands.choices, "version"],
        metavar="COMMAND",
        help="a command; without one, the list of them",
    )
    helper.set_defaults(command=show)
    version = commands.add_parser(
        "version", help="show the version", description="Shows the version of vtprune.", examples=("version",)
    )
    version.set_defaults(command=lambda args: print(f"vtprune {__version__}"))


def _check_streams() -> None:
    """Prepares standard output and standard error.

    Raises:
        OSError: Standard output is closed.
    """
    if sys.stderr is None:  # closed; without this, `print(file=None)` would write to standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks


def _explain(error: Exception) -> int:
    """Prints an error as one line and returns its exit code."""
    bad_path = isinstance(error, OSError) and error.filename is not None and error.errno in BAD_PATHS
    known = isinstance(error, VTPruneError) or bad_path
    if known:
        text = one_line(error, limit=600)
    elif isinstance(error, OSError) and error.errno is not None:
        text = one_line(error)
    elif isinstance(error, MemoryError) or "allocate memory" in str(error):  # PyTorch raises RuntimeError
        text = f"not enough memory: {one_line(error)}"
    elif isinstance(error, RecursionError):
        text = f"not enough stack: {one_line(error)}"
    else:
        text = f"{type(error).__name__}: {one_line(error)} (use --debug for a traceback)"
    try:
        print(f"vtprune: error: {text}", file=sys.stderr)
    except OSError:  # standard error is a full disk or a closed pipe: the exit code has to do
        _discard(sys.stderr)
    if isinstance(error, OSError) and error.filename is None:
        _discard(sys.stdout)  # otherwise the interpreter tries to write again at exit
    return BAD_INPUT if known else FAILED


def _discard(stream: Any) -> None:
    """Redirects a stream to the null device, so that flushing its buffer at exit does not fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError, AttributeError):  # standard output has no file descriptor, as in tests
        return


def _show_warnings() -> None:
    """Sends warnings of the library to standard error, unless it already has a log handler."""
    # Warnings of Pillow, NumPy and PyTorch name their source files; what cannot be used raises our own errors.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    log = logging.getLogger("vtprune")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("vtprune: warning: %(message)s"))
        log.addHandler(handler)
