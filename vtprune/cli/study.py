# SPDX-License-Identifier: Apache-2.0
"""The commands that run a model over several pictures: `vtprune compare`, `tune` and `fidelity` (`cli_fidelity`)."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import images
from ..errors import InputError
from ..refvlm.loading import EMBEDDED
from .arguments import as_dtype, check_folder, chosen_methods, count, quiet, share, words, write

if TYPE_CHECKING:
    from ..study.compare import Row
    from ..study.tune import Search


def add(commands: Any) -> None:
    """Adds the commands to the subparsers of the command line."""
    compare = commands.add_parser("compare", help="all methods at equal cost, against the unpruned model")
    _prompts(compare, mean_ratio=None, default="the least, in tenths, that all methods shown can meet")
    compare.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="names, or strategy files of vtprune tune (default: all; random and uniform are always shown)",
    )
    compare.add_argument("--repeats", type=count, default=3, metavar="N", help="calls per picture, for the time")
    compare.add_argument("--json", metavar="FILE", help="write the table as JSON")
    compare.set_defaults(command=_compare)

    tune = commands.add_parser(
        "tune", help="search a strategy of vflowopt, or calibrate automatic ratios, on your own pictures"
    )
    _prompts(tune, mean_ratio=0.25, default="%(default)s")
    tune.add_argument(
        "--auto",
        action="store_true",
        help="find the energy at which automatic ratios keep --mean-ratio of the tokens, mean over the pictures",
    )
    tune.add_argument("--min", type=share, default=0.02, metavar="SHARE", help="with --auto (default: %(default)s)")
    tune.add_argument("--max", type=share, default=0.5, metavar="SHARE", help="with --auto (default: %(default)s)")
    tune.add_argument("--trials", type=count, default=30, metavar="N", help="default: %(default)s")
    tune.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    tune.add_argument(
        "--out", default="strategy.json", metavar="FILE", help="written after every trial (default: %(default)s)"
    )
    tune.add_argument("--resume", action="store_true", help="go on with the search that the file holds")
    tune.add_argument("--force", action="store_true", help="overwrite a strategy that the file holds")
    tune.set_defaults(command=_tune)

    from . import certify, fidelity  # they use the helpers here

    fidelity.add(commands)
    certify.add(commands)


def _prompts(parser: argparse.ArgumentParser, mean_ratio: float | None, default: str) -> None:
    parser.add_argument(
        "--image", "--images", required=True, metavar="FILE_OR_FOLDER", help="a picture, or a folder of pictures"
    )
    parser.add_argument("--question", required=True, type=words, metavar="TEXT")
    parser.add_argument(
        "--model", default=EMBEDDED, metavar="NAME_OR_FOLDER", help="default: the model inside the package"
    )
    parser.add_argument(
        "--mean-ratio",
        type=share,
        default=mean_ratio,
        metavar="SHARE",
        help=f"mean share of visual tokens over all decoder layers, the same for all (default: {default})",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as stored)")


def _batches(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """The model, and one prompt per picture."""
    from ..refvlm import loading

    pictures = images.pictures(args.image)
    loading.is_local(args.model)
    quiet()
    model, processor = loading.model_and_processor(args.model, args.device, args.dtype)
    prompts = [loading.prompt(processor, picture, args.question).to(model.device) for picture in pictures]
    return model, [{name: as_dtype(value, model.dtype) for name, value in prompt.items()} for prompt in prompts]


def _compare(args: argparse.Namespace) -> None:
    from .. import __version__, inspect
    from ..study.compare import common_ratio, compare

    chosen = chosen_methods(args.methods)
    if args.json:
        check_folder(args.json)
    model, batches = _batches(args)
    args.mean_ratio = args.mean_ratio or common_ratio(chosen.values(), inspect(model).num_layers)
    rows = compare(model, batches, args.mean_ratio, chosen, repeats=args.repeats)
    _print_rows(args, rows, len(batches))
    if args.json:
        about = {"model": args.model, "question": args.question, "mean_ratio": args.mean_ratio}
        about |= {"pictures": len(batches), "repeats": args.repeats, "vtprune": __version__}
        write(args.json, json.dumps(about | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n")
        print(f"table written to {args.json}")


def _print_rows(args: argparse.Namespace, rows: list[Row], pictures: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    some = "1 picture" if pictures == 1 else f"{pictures} pictures"
    title = f"{args.model}, {some}, mean ratio {args.mean_ratio:g}: {args.question}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("method")
    for heading in ("survivors", "mean ratio", "KL (nats)", "same top-1", "deciding"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.reason is not None:
            table.add_row(Text(row.method), *["-"] * 5)
            continue
        table.add_row(
            Text(row.method),
            f"{row.kept:.4g} of {row.visual:.4g}",
            f"{row.mean_ratio:.3f}",
            f"{row.kl:.4f}",
            f"{row.top1:.0%}",
            f"{1e3 * (row.seconds or 0):.2f} ms",
        )
    console = Console()
    console.print(table)
    for row in rows:
        if row.reason is not None:
            console.print(Text(f"{row.method}: {row.reason}"))
    console.print(Text("KL and top-1: distribution of the next token after the prompt, against the unpruned model."))


def _tune(args: argparse.Namespace) -> None:
    from ..study import progress
    from ..study.tune import Search, tune

    check_folder(args.out)
    if args.auto:
        return _calibrate(args)
    model, batches = _batches(args)

    def log(search: Search, step: Callable[[str], None]) -> None:
        last, best = search.trials[-1]["value"] / search.samples, search.best["value"] / search.samples
        print(f"trial {len(search.trials)} of {args.trials}: {last:.6f}, best {best:.6f}", flush=True)
        step("")

    path = Path(args.out).expanduser()
    done = len(Search.load(path).trials) if args.resume else 0
    with progress.interruptible(path), progress.bar("trials", max(args.trials, done), done) as step:
        search = tune(
            model,
            batches,
            args.mean_ratio,
            trials=args.trials,
            seed=args.seed,
            path=path,
            resume=args.resume,
            force=args.force,
            log=lambda search: log(search, step),
        )
    first, best = search.trials[0]["value"] / search.samples, search.best["value"] / search.samples
    print(f"cosine to the unpruned last state: {first:.6f} with the released strategy, {best:.6f} with the best found")
    print(f"strategy written to {args.out}; use it with vtprune.methods.VFlowOpt.load({args.out!r})")


def _calibrate(args: argparse.Namespace) -> None:
    from ..study.auto import calibrate

    path = Path(args.out).expanduser()
    if path.exists() and not args.force:
        raise InputError(f"{args.out} exists: --force overwrites it")
    model, batches = _batches(args)
    auto, kept = calibrate(model, batches, args.mean_ratio, args.min, args.max)
    mean = sum(kept) / len(kept)
    auto.save(path, mean_ratio=mean, least=min(kept), most=max(kept), pictures=len(kept), model=args.model)
    print(
        f"energy {auto.energy:.6g} keeps {mean:.3f} of the tokens, mean over {len(kept)} pictures; {min(kept):.3f} of "
        f"the simplest and {max(kept):.3f} of the richest"
    )
    print(f"written to {args.out}; use it with vtprune.patch(model, ratio=vtprune.Auto.load({args.out!r}))")
