# SPDX-License-Identifier: Apache-2.0
"""The command `vtprune`. Errors are one line on standard error and an exit code; see `EXIT_CODES`.

Modules of this package import PyTorch and transformers inside functions, so that `vtprune --help` is fast.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import VTPruneError, one_line
from . import answer, bench, certify, completion, describe, doctor, fidelity, study
from .parser import EXIT_CODES, Parser

DONE, FAILED, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program name; by default those of the process.

    Returns:
        int: The exit code, see `EXIT_CODES`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(arguments)
        sys.stdout.flush()  # raises for a full disk here instead of at interpreter exit
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
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

    topics = [*commands.choices]
    helper = commands.add_parser("help", help="show the help of a command", examples=("help fidelity",))
    helper.add_argument("topic", nargs="?", choices=topics, metavar="COMMAND")
    helper.set_defaults(command=show)
    version = commands.add_parser("version", help="show the version", examples=("version",))
    version.set_defaults(command=lambda args: print(f"vtprune {__version__}"))


def _explain(error: Exception) -> int:
    """Prints an error as one line and returns its exit code."""
    known = isinstance(error, VTPruneError)
    if known:
        text = one_line(error, limit=600)
    elif isinstance(error, OSError) and error.errno is not None:
        text = one_line(error)
    elif isinstance(error, (MemoryError, RecursionError)):
        text = f"not enough {'memory' if isinstance(error, MemoryError) else 'stack'}: {one_line(error)}"
    else:
        text = f"{type(error).__name__}: {one_line(error)} (use --debug for a traceback)"
    print(f"vtprune: error: {text}", file=sys.stderr)
    if isinstance(error, OSError) and error.filename is None:
        _discard_output()  # otherwise the interpreter tries to write again at exit
    return BAD_INPUT if known else FAILED


def _discard_output() -> None:
    """Redirects standard output to the null device, so that flushing its buffer at exit does not fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # standard output has no file descriptor, as in tests
        return


def _show_warnings() -> None:
    """Sends warnings of the library to standard error, unless it already has a log handler."""
    # Pillow's warnings about damaged metadata name its source files; unreadable pictures raise our own errors.
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    log = logging.getLogger("vtprune")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("vtprune: warning: %(message)s"))
        log.addHandler(handler)
