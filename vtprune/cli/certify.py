# SPDX-License-Identifier: Apache-2.0
"""`vtprune certify`: the smallest ratio that changes few answers on your pictures, with a stated risk."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..core import default_method
from .arguments import add_device, add_model, add_pictures, chosen_methods, count, probability, quiet, share
from .fidelity import content_of, prompt_pairs, prompts
from .output import Output, add_json, plural
from .parser import description


def add(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "certify",
        help="find the smallest ratio that changes at most a given share of answers, with a given confidence",
        description=description(
            "Finds the smallest ratio at which a method changes at most a given share of the model's answers, with a "
            "given confidence, on your own pictures and without labels."
        ),
        examples=("certify --images FOLDER --question 'what is this?' --risk 0.05 --out certificate.json",),
    )
    add_model(parser)
    add_pictures(parser)
    parser.add_argument(
        "--method",
        default=default_method.NAME,
        help="NAME or NAME:option=value,..., or a strategy file (default: %(default)s)",
    )
    parser.add_argument(
        "--risk",
        type=probability,
        default=0.05,
        metavar="SHARE",
        help="largest share of changed answers (default: %(default)s)",
    )
    parser.add_argument("--confidence", type=probability, default=0.95, metavar="P", help="default: %(default)s")
    tested = parser.add_mutually_exclusive_group()
    tested.add_argument(
        "--ratios",
        nargs="+",
        type=share,
        metavar="SHARE",
        help="ratios to test, from the largest down (default: from 0.9 down to 0.05)",
    )
    tested.add_argument(
        "--energies", nargs="+", type=probability, metavar="SHARE", help="energies of automatic ratios to test instead"
    )
    parser.add_argument("--max-new-tokens", type=count, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", default="certificate.json", metavar="FILE", help="default: %(default)s")
    add_device(parser)
    add_json(parser, "the certificate")
    parser.set_defaults(command=_certify)


def _certify(args: argparse.Namespace) -> None:
    """Certifies a ratio; checks all arguments before loading the model."""
    from ..core.energy import Auto
    from ..refvlm import loading
    from ..study.certify import CANDIDATES, certify

    output = Output(args)
    (method,) = chosen_methods([args.method]).values()
    pairs = prompt_pairs(args)
    path = output.claim(args.out)
    candidates: tuple[float | Auto, ...] = tuple(sorted(set(args.ratios or CANDIDATES), reverse=True))
    if args.energies:
        candidates = tuple(Auto(energy) for energy in sorted(set(args.energies), reverse=True))
    loading.is_local(args.model)
    quiet()
    model, processor = loading.model_and_processor(args.model, args.device, args.dtype)
    found = certify(
        model,
        [prompt.inputs for prompt in prompts(pairs, model, processor)],
        method=method,
        risk=args.risk,
        confidence=args.confidence,
        candidates=candidates,
        pictures=[content_of(picture) for _, picture, _ in pairs],  # copies of a picture are no further evidence
        max_new_tokens=args.max_new_tokens,
        log=output.say,
    )
    found.save(path)
    output.write(dataclasses.asdict(found))
    if found.budget == 1.0:
        output.say(f"no ratio below 1 is certified with {plural(found.pictures, 'picture')}")
    else:
        output.say(f"certified: {found}")
    output.say(
        f"certificate written to {args.out}; use it with vtprune.patch(model, ratio=vtprune.Certificate.load(...))"
    )
