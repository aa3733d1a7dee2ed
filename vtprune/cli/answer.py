# SPDX-License-Identifier: Apache-2.0
"""`vtprune demo` and `vtprune run`: one question about one picture, with and without pruning."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import default_method, files, images
from ..errors import InputError, VTPruneError, one_line
from ..refvlm.loading import EMBEDDED
from .arguments import add_device, add_model, chosen_methods, count, patches, quiet, ratio, share, short, words
from .output import Output, add_json, plural
from .parser import description

if TYPE_CHECKING:
    from PIL import Image

    from ..report.pruning import Pruning
    from ..study.timing import Side

# What the demo shows: a held-out crowd of 1,296 visual tokens, whose vision tower is cut as well, or a small scene.
DEMO_MODEL, DEMO_CROWD, DEMO_TOWER = f"{EMBEDDED}-qwen2_5_vl", (0, (36, 36), "color"), 0.35
SMALL_SCENE, SMALL_KIND = 7, "digit"
_MARK = "vtprune"  # "Software" field of the pictures written here


def add(commands: Any) -> None:
    """Adds the commands to the subparsers of the command line."""
    demo = commands.add_parser(
        "demo",
        help="run a model inside the package with and without pruning",
        description=description(
            "Asks a small model inside the package a question about a large picture, with all visual tokens and with "
            "few. Writes a picture in which dropped tokens are dark."
        ),
        examples=("demo", "demo --image photo.png --question 'how many stars are there?' --ratio 0.2"),
    )
    demo.add_argument("--image", metavar="FILE", help="your own picture; - is standard input")
    demo.add_argument("--question", type=words, metavar="TEXT", help="your own question")
    demo.add_argument("--small", action="store_true", help="the smaller model, a LLaVA, and a picture of 144 tokens")
    _pruning(demo, max_new_tokens=8, repeats=5, output="vtprune-demo.png", tower=f"{DEMO_TOWER}, with --small 1")
    demo.set_defaults(command=_demo, device="cpu", dtype="auto")

    run = commands.add_parser(
        "run",
        help="run a vision-language model of transformers with and without pruning",
        description=description(
            "Asks a model a question about a picture, with all visual tokens and with few. Writes a picture in which "
            "dropped tokens are dark."
        ),
        examples=("run --model OWNER/NAME --image photo.png --question 'What is on the table?' --ratio 0.1",),
    )
    add_model(run, required=True)
    run.add_argument("--image", required=True, metavar="FILE", help="the picture; - is standard input")
    run.add_argument("--question", required=True, type=words, metavar="TEXT", help="the question about it")
    _pruning(run, max_new_tokens=32, repeats=3, output="vtprune-run.png", tower="1")
    add_device(run)
    run.set_defaults(command=_run)


def _pruning(parser: argparse.ArgumentParser, *, max_new_tokens: int, repeats: int, output: str, tower: str) -> None:
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--ratio",
        type=ratio,
        metavar="SHARE",
        help="share of visual tokens KEPT, or auto to choose it per picture (default: 0.1)",
    )
    budget.add_argument("--keep", type=count, metavar="N", help="number of visual tokens kept instead")
    budget.add_argument("--auto", metavar="FILE", help="automatic ratio calibrated by vtprune tune --auto")
    budget.add_argument("--certificate", metavar="FILE", help="ratio and method certified by vtprune certify")
    budget.add_argument("--mean-ratio", type=share, metavar="SHARE", help="mean share over all decoder layers instead")
    parser.add_argument(
        "--tower",
        type=patches,
        metavar="SHARE",
        help=f"share of patches in the tower's later blocks (default: {tower})",
    )
    parser.add_argument("--method", help=f"see vtprune methods (default: {default_method.NAME}, or the certificate's)")
    parser.add_argument(
        "--max-new-tokens", type=count, metavar="N", help=f"default: {max_new_tokens}, or the certificate's"
    )
    parser.set_defaults(answer_length=max_new_tokens)
    parser.add_argument("--repeats", type=count, default=repeats, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--output", default=output, metavar="FILE", help="the picture to write (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="print the full report of the pruned prefill as well")
    add_json(parser, "both answers and their costs")


def _demo(args: argparse.Namespace) -> None:
    from .. import refvlm

    seed, grid, kind = DEMO_CROWD
    drawn: Any = refvlm.scenes.scene(SMALL_SCENE) if args.small else refvlm.crowds.crowd(seed, grid)
    asked = next(question for question in drawn.questions if question.kind == (SMALL_KIND if args.small else kind))
    truth = None if args.image or args.question else asked.answer
    args.question = args.question or asked.text
    args.model = EMBEDDED if args.small else DEMO_MODEL
    args.tower = args.tower or (None if args.small or args.certificate else DEMO_TOWER)
    _side_by_side(args, drawn.image if args.image is None else None, truth)


def _run(args: argparse.Namespace) -> None:
    _side_by_side(args, None, None)


def _budget(args: argparse.Namespace) -> dict[str, Any]:
    """Budget arguments for `vtprune.patch`."""
    from ..core.certificate import Certificate
    from ..core.energy import Auto

    if args.auto:
        return {"ratio": Auto.load(Path(args.auto).expanduser())}
    if args.certificate:
        return {"ratio": Certificate.load(Path(args.certificate).expanduser())}
    given = {"keep": args.keep, "mean_ratio": args.mean_ratio}
    return {name: value for name, value in given.items() if value} or {"ratio": args.ratio or 0.1}


def _side_by_side(args: argparse.Namespace, image: Image.Image | None, truth: str | None) -> None:
    """Runs both variants; checks all arguments before loading the model."""
    from ..engine.patching import patch
    from ..refvlm import loading
    from ..study import timing

    output = Output(args)
    method = next(iter(chosen_methods([args.method]).values())) if args.method else None
    _claim_picture(output, args.output)
    budget = _budget(args)
    args.max_new_tokens = _answer_length(args, budget.get("ratio"))
    image = image or images.picture(args.image)
    loading.is_local(args.model)
    quiet()
    model, processor = loading.model_and_processor(args.model, args.device, args.dtype)
    inputs = loading.inputs(model, processor, image, args.question, args.max_new_tokens)
    with patch(model, **budget, method=method, tower=args.tower) as patched:
        before, after = timing.measure_side_by_side(
            model, processor, inputs, patched, max_new_tokens=args.max_new_tokens, repeats=args.repeats
        )
        last, args.method = patched.last, patched.method.name
    if last is None:
        raise InputError("the prompt has no visual token, because the processor put no image placeholder into it")
    _print_sides(output, args, before, after)
    for note in _notes(args, before, after, truth):
        output.say(note)
    if args.report:
        output.say(last.report())
    about = {"model": args.model, "question": args.question, "method": args.method}
    about |= {"budget": str(last.budget), "tower": args.tower}
    output.write(about | {"all_tokens": dataclasses.asdict(before), "pruned": dataclasses.asdict(after)})
    try:
        _write_picture(args.output, image, last, (before.answer, after.answer))
    except VTPruneError as error:  # of a picture that the processor changed beyond recognition
        output.say(f"no picture was written: {one_line(error)}")
    else:
        output.say(f"picture written to {args.output}; dropped tokens are dark")


def _answer_length(args: argparse.Namespace, ratio: Any) -> int:
    """Most tokens of the answers, which a certificate limits."""
    from ..core.certificate import Certificate

    most = ratio.about.get("max_new_tokens") if isinstance(ratio, Certificate) else None
    if most is None:
        return args.max_new_tokens or args.answer_length
    if args.max_new_tokens and args.max_new_tokens > most:
        raise InputError(
            f"the certificate is for answers of at most {most} tokens; found --max-new-tokens {args.max_new_tokens}"
        )
    return args.max_new_tokens or most


def _claim_picture(output: Output, path: str) -> None:
    """Checks that a picture can be written to a file, which may replace one that vtprune wrote."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"cannot write {path} as a picture; expected a file name that ends in .png or .jpg")
    output.claim(path, _is_ours)


def _is_ours(path: Path) -> bool:
    """Whether a file is a picture written by `_write_picture`."""
    from PIL import Image

    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            program = image.info.get("Software") or image.info.get("comment")
    except Exception:  # not a picture
        return False
    return program in (_MARK, _MARK.encode())


def _write_picture(path: str, image: Image.Image, last: Pruning, answers: tuple[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ..report import overlay

    mark = PngInfo()
    mark.add_text("Software", _MARK)
    place = Path(path).expanduser()
    options: dict[str, Any] = {"pnginfo": mark} if place.suffix.lower() == ".png" else {"comment": _MARK}
    buffer = BytesIO()
    shown = overlay.before_and_after(image, last.show(image), answers)
    shown.save(buffer, Image.registered_extensions()[place.suffix.lower()], **options)
    files.write_bytes(place, buffer.getvalue())


def _print_sides(output: Output, args: argparse.Namespace, before: Side, after: Side) -> None:
    rows: list[tuple[str, Callable[[Side], Any], str]] = [
        ("answer", lambda side: short(side.answer, 200) or "(nothing)", ""),
        ("visual tokens", lambda side: side.visual_tokens, ""),
        ("prompt tokens", lambda side: side.prompt_tokens, ""),
        ("time to first token", lambda side: side.seconds, " s"),
        ("of which vision tower", lambda side: side.vision, " s"),
        ("of which selection", lambda side: side.selection_time, " s"),
        ("of which decoder", lambda side: side.decoder, " s"),
        ("KV cache", lambda side: side.kv_bytes, " B"),
    ]
    cells = []
    for name, value, unit in rows:
        one, two = value(before), value(after)
        change = f"{100 * (two / one - 1):+.0f} %" if one and not isinstance(one, str) else ""
        cells.append((name, _shown(one, unit), _shown(two, unit), change))
    title = f"{args.model}: {short(args.question)}"
    output.table(title, ("", "all tokens", f"pruned ({args.method})", "change"), cells)


def _shown(value: Any, unit: str) -> str:
    if isinstance(value, float):
        return f"{value:.4f}{unit}"
    return f"{value:,}{unit}" if isinstance(value, int) else value


def _notes(args: argparse.Namespace, before: Side, after: Side, truth: str | None) -> list[str]:
    """Notes below the table."""
    of = "Times are of one run" if args.repeats == 1 else f"Times are medians of {plural(args.repeats, 'run')}"
    notes = [f"The right answer is {truth!r}."] if truth else []
    notes.append(f"{of}, alternating, after a warm-up.")
    if args.tower:
        notes.append(f"The later blocks of the vision tower run on {args.tower:.0%} of the patches.")
    if after.bound:
        notes.append(
            f"The vision tower takes {after.vision / after.seconds:.0%} of the pruned time to first token: pruning the "
            f"decoder further can make it at most {after.bound:.1f} times as fast."
        )
    if after.visual_tokens >= before.visual_tokens:
        notes.append(f"None of the {before.visual_tokens} visual tokens of the prompt was dropped.")
    elif after.seconds > before.seconds and args.model.startswith(EMBEDDED):
        notes.append(
            "In a model this small, selection takes longer than it saves; in a model of billions of parameters it is a "
            "small part of the prefill. Judge the answer and the memory here."
        )
    return notes
