# SPDX-License-Identifier: Apache-2.0
"""`vtprune compare` and `vtprune tune`: comparison of methods, and tuning, on your own pictures."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import files, images
from ..errors import InputError
from ..refvlm.loading import EMBEDDED
from .arguments import add_device, add_model, chosen_methods, count, quiet, share, short, words
from .output import Output, add_json, plural
from .parser import description

if TYPE_CHECKING:
    from ..study.compare import Row
    from ..study.tune import Search

TRIALS = 30  # of the search of a strategy
LEAST, MOST = 0.02, 0.5  # bounds of automatic ratios


def add(commands: Any) -> None:
    """Adds the commands to the subparsers of the command line."""
    compare = commands.add_parser(
        "compare",
        help="compare methods at equal cost with the unpruned model",
        description=description(
            "Runs methods at the same mean share of visual tokens and compares the next token after the prompt with "
            "that of the unpruned model."
        ),
        examples=(
            "compare --image photo.png --question 'how many stars are there?'",
            "compare --images FOLDER --question 'what is this?' --methods iwp fastv strategy.json --json table.json",
        ),
    )
    text = "mean share of visual tokens over all decoder layers, the same for all methods"
    _prompts(compare, None, f"{text} (default: the smallest tenth that all shown methods can meet)")
    compare.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="NAME or NAME:option=value,..., or strategy files of vtprune tune (default: all; always shown are random, "
        "uniform, and resize, which is the unpruned model on smaller pictures)",
    )
    compare.add_argument(
        "--clip",
        action="store_true",
        help="the pictures of the folder are the frames of one clip, ordered by name; an even number",
    )
    compare.add_argument(
        "--repeats", type=count, default=3, metavar="N", help="timed calls per picture (default: %(default)s)"
    )
    add_json(compare, "the table")
    compare.set_defaults(command=_compare)

    tune = commands.add_parser(
        "tune",
        help="search a strategy of vflowopt, or calibrate automatic ratios, on your own pictures",
        description=description(
            "Searches parameters of vflowopt that keep the last hidden state closest to the unpruned one (needs the "
            "packages optuna and scipy), or, with --auto or --pixels, calibrates automatic ratios."
        ),
        examples=(
            "tune --images FOLDER --question 'what is this?' --mean-ratio 0.25 --out strategy.json",
            "tune --auto --images FOLDER --question 'what is this?' --mean-ratio 0.25 --out auto.json",
            "tune --pixels --images FOLDER --mean-ratio 0.25 --out ratio.json",
        ),
    )
    text = "mean share of visual tokens over all decoder layers; with --auto and --pixels, over the pictures"
    _prompts(tune, 0.25, f"{text} (default: %(default)s)", required=False)
    kinds = tune.add_mutually_exclusive_group()
    kinds.add_argument(
        "--auto",
        action="store_true",
        help="calibrate automatic ratios: find the energy that keeps --mean-ratio of the tokens on average",
    )
    kinds.add_argument(
        "--pixels",
        action="store_true",
        help="calibrate automatic ratios for vLLM, which are read from pixels alone: no question, no model",
    )
    tune.add_argument("--min", type=share, metavar="SHARE", help=f"with --auto or --pixels (default: {LEAST})")
    tune.add_argument("--max", type=share, metavar="SHARE", help=f"with --auto or --pixels (default: {MOST})")
    tune.add_argument("--trials", type=count, metavar="N", help=f"of the search (default: {TRIALS})")
    tune.add_argument("--seed", type=int, metavar="N", help="of the search (default: 0)")
    tune.add_argument(
        "--out",
        metavar="FILE",
        help="file to write; the search writes it after every trial (default: strategy.json; auto.json with --auto, "
        "ratio.json with --pixels)",
    )
    tune.add_argument("--resume", action="store_true", help="resume the search in the file")
    add_json(tune, "the best strategy and its agreement")
    tune.set_defaults(command=_tune)


def _prompts(parser: argparse.ArgumentParser, mean_ratio: float | None, text: str, required: bool = True) -> None:
    parser.add_argument(
        "--image",
        "--images",
        required=True,
        metavar="FILE_OR_FOLDER",
        help="a picture, or a folder of pictures; - is standard input",
    )
    parser.add_argument("--question", required=required, type=words, metavar="TEXT", help="asked about every picture")
    add_model(parser)
    parser.add_argument("--mean-ratio", type=share, default=mean_ratio, metavar="SHARE", help=text)
    add_device(parser)


def _batches(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]], Callable[[int, int], Any] | None]:
    """The model; a prompt per picture, or one for all frames of a clip; a function for prompts of smaller pictures."""
    from ..refvlm import loading

    if args.question is None:
        raise InputError("--question is missing; expected a text that is asked about every picture")
    pictures = images.pictures(args.image)
    loading.is_local(args.model)
    quiet()
    model, processor = loading.model_and_processor(args.model, args.device, args.dtype)
    if getattr(args, "clip", False):
        return model, [loading.clip_prompt(model, processor, pictures, args.question)], None

    def prompt(picture: Any) -> Any:
        return loading.inputs(model, processor, picture, args.question)

    def smaller(number: int, tokens: int) -> tuple[Any, int]:
        from ..study.resize import shrinking

        return shrinking(model, processor, pictures[number], prompt)(tokens)

    return model, [prompt(picture) for picture in pictures], smaller


def _compare(args: argparse.Namespace) -> None:
    from .. import __version__, inspect
    from .. import methods as registry
    from ..study.compare import common_ratio, compare

    output = Output(args)
    chosen = chosen_methods(args.methods or (registry.names() if args.clip else None))
    model, batches, smaller = _batches(args)
    args.mean_ratio = args.mean_ratio or common_ratio(chosen.values(), inspect(model).num_layers)
    rows = compare(model, batches, args.mean_ratio, chosen, repeats=args.repeats, smaller=smaller)
    _print_rows(output, args, rows, len(batches))
    about = {"model": args.model, "question": args.question, "mean_ratio": args.mean_ratio}
    about |= {"pictures": len(batches), "repeats": args.repeats, "vtprune": __version__}
    output.write(about | {"rows": [dataclasses.asdict(row) for row in rows]})


def _print_rows(output: Output, args: argparse.Namespace, rows: list[Row], pictures: int) -> None:
    cells = []
    for row in rows:
        if row.reason is not None:
            cells.append((row.method, *["-"] * 6))
            continue
        cells.append(
            (
                row.method,
                f"{row.kept:.4g} of {row.visual:.4g}",
                f"{row.mean_ratio:.3f}",
                f"{row.kl:.4f}",
                f"{row.top1:.0%}",
                f"{1e3 * (row.seconds or 0):.2f} ms",
                "-" if row.tower is None or row.decoder is None else f"{row.tower:.2f} + {row.decoder:.2f}",
            )
        )
    some = "a clip" if args.clip else plural(pictures, "picture")
    title = f"{args.model}, {some}, mean ratio {args.mean_ratio:g}: {short(args.question)}"
    output.table(title, ("method", "kept", "mean", "KL", "top-1", "selection", "operations"), cells)
    for row in rows:
        if row.reason is not None:
            output.say(f"{row.method}: {row.reason}")
    output.say("mean: share of the visual tokens, averaged over the inputs of the decoder layers.")
    output.say(
        "KL (nats) and top-1 compare the distribution of the next token after the prompt with the unpruned model's."
    )
    tower = next((row.tower for row in rows if row.tower and row.method != "resize"), None)
    if tower is not None:
        output.say(
            "operations: of vision tower + decoder to the first token, as shares of the unpruned ones; pruning the "
            f"decoder alone can make them at most {1 / tower:.1f} times fewer."
        )


def _tune(args: argparse.Namespace) -> None:
    from ..study import progress
    from ..study.tune import Search, tune

    output = Output(args)
    _refuse_unused(args)
    args.trials, args.seed = args.trials or TRIALS, args.seed or 0
    args.min, args.max = args.min or LEAST, args.max or MOST
    args.out = args.out or ("ratio.json" if args.pixels else "auto.json" if args.auto else "strategy.json")
    path = output.claim(args.out, lambda found: args.resume)
    if args.pixels:
        return _calibrate_pixels(args, output, path)
    if args.auto:
        return _calibrate(args, output, path)
    model, batches, _ = _batches(args)

    def log(search: Search, step: Callable[[str], None]) -> None:
        last, best = search.trials[-1]["value"] / search.samples, search.best["value"] / search.samples
        output.say(f"trial {len(search.trials)} of {args.trials}: {last:.6f}, best {best:.6f}")
        step("")

    done = len(Search.load(path).trials) if args.resume else 0
    resume = "run the same command with --resume to continue"
    with progress.interruptible(path, resume), progress.bar("trials", max(args.trials, done), done) as step:
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
    output.say(
        f"cosine to the unpruned last state: {first:.6f} for the released strategy, {best:.6f} for the best one found"
    )
    output.say(f"strategy written to {args.out}; use it with vtprune.methods.VFlowOpt.load({args.out!r})")
    output.write(
        {"agreement": best, "released_agreement": first, "trials": len(search.trials), "strategy": search.best}
    )


def _refuse_unused(args: argparse.Namespace) -> None:
    """Refuses options that the kind of calibration does not use."""
    search, bounds = ("trials", "seed", "resume"), ("min", "max")
    kind = "--pixels" if args.pixels else "--auto" if args.auto else "the search of a strategy"
    unused = (*search, "question") if args.pixels else search if args.auto else bounds
    given = [name for name in unused if getattr(args, name) is not None and getattr(args, name) is not False]
    if args.pixels and args.model != EMBEDDED:
        given.append("model")
    if given:
        raise InputError(f"{kind} does not use --{' and --'.join(given)}; leave it out")


def _calibrate_pixels(args: argparse.Namespace, output: Output, path: Path) -> None:
    from ..core.pixel_auto import PixelAuto

    pictures = images.pictures(args.image)
    auto = PixelAuto(args.mean_ratio, args.min, args.max).fit(pictures)
    kept = [auto.ratio(picture) for picture in pictures]
    config = {"ratio": {name: round(number, 6) for name, number in dataclasses.asdict(auto).items()}}
    files.write_text(path, json.dumps({"vtprune": config}) + "\n")
    output.say(
        f"typical {auto.typical:.4g} keeps {sum(kept) / len(kept):.3f} of the tokens on average over "
        f"{plural(len(kept), 'picture')}, from {min(kept):.3f} to {max(kept):.3f}"
    )
    output.say(f'written to {args.out}; use it with vllm serve MODEL --additional-config "$(cat {args.out})"')
    output.write(config | {"kept": kept})


def _calibrate(args: argparse.Namespace, output: Output, path: Path) -> None:
    from ..study.auto import calibrate

    model, batches, _ = _batches(args)
    auto, kept = calibrate(model, batches, args.mean_ratio, args.min, args.max)
    mean = sum(kept) / len(kept)
    auto.save(path, mean_ratio=mean, least=min(kept), most=max(kept), pictures=len(kept), model=args.model)
    output.say(
        f"energy {auto.energy:.6g} keeps {mean:.3f} of the tokens on average over {plural(len(kept), 'picture')}, from "
        f"{min(kept):.3f} to {max(kept):.3f}"
    )
    output.say(f"written to {args.out}; use it with vtprune.patch(model, ratio=vtprune.Auto.load({args.out!r}))")
    output.write({"energy": auto.energy, "min": auto.min, "max": auto.max, "kept": kept})
