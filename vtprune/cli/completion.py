# SPDX-License-Identifier: Apache-2.0
"""`vtprune completion`: a shell completion script."""

from __future__ import annotations

import argparse
from typing import Any

from .parser import description

SHELLS = ("bash", "zsh", "fish", "tcsh")


def add(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "completion",
        help="print a shell completion script",
        description=description("Prints a completion script. Create it again after an upgrade of vtprune."),
        examples=(
            "completion bash > ~/.local/share/bash-completion/completions/vtprune",
            "completion zsh > ~/.zfunc/_vtprune",
            "completion fish > ~/.config/fish/completions/vtprune.fish",
        ),
    )
    parser.add_argument("shell", choices=SHELLS, help="your shell")
    parser.set_defaults(command=_completion)


def _completion(args: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(args.program, shell=args.shell))
