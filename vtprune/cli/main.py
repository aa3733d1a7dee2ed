# SPDX-License-Identifier: Apache-2.0
"""The command `vtprune`. Wrong input is one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..core import images
from ..errors import InputError, VTPruneError, one_line
from ..refvlm.loading import EMBEDDED

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..study.timing import Side
from .arguments import as_dtype, count, quiet, ratio, share, words

# A held-out scene of the built-in model's own kind, and which of its questions the demo asks.
DEMO_SCENE, DEMO_KIND = 7, "digit"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        int: 0, or 2 for input that cannot be used, or 130 after an interrupt.
    """
    debug = False
    try:
        args = _parser().parse_args(argv)
        debug = args.debug
        _show_warnings()
        args.command(args)
    except VTPruneError as error:
        if debug:
            raise
        print(f"vtprune: error: {one_line(error, limit=600)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("vtprune", description="Prune redundant visual tokens of vision-language models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"vtprune {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="the model inside the package, with and without pruning, in seconds")
    demo.add_argument("--image", metavar="FILE", help="a picture of your own")
    demo.add_argument("--question", type=words, metavar="TEXT", help="a question of your own")
    _pruning(demo, max_new_tokens=8, repeats=5, output="vtprune-demo.png")
    demo.set_defaults(command=_demo, model=EMBEDDED, device="cpu", dtype="auto")

    run = commands.add_parser("run", help="the same with any vision-language model of transformers")
    run.add_argument("--model", required=True, metavar="NAME_OR_FOLDER", help="a local folder, or a name on the hub")
    run.add_argument("--image", required=True, metavar="FILE")
    run.add_argument("--question", required=True, type=words, metavar="TEXT")
    _pruning(run, max_new_tokens=32, repeats=3, output="vtprune-run.png")
    run.add_argument("--device", default="auto", help="cpu, cuda, ... (default: the accelerator if there is one)")
    run.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as stored)")
    run.set_defaults(command=_run)

    listing = commands.add_parser("methods", help="the pruning methods, where they cut, and their options")
    listing.set_defaults(command=_methods)

    look = commands.add_parser("inspect", help="the parts of a model that pruning touches")
    look.add_argument(
        "--model", default=EMBEDDED, metavar="NAME_OR_FOLDER", help="default: the model inside the package"
    )
    look.set_defaults(command=_inspect)

    from . import study  # it uses the helpers here

    study.add(commands)
    from . import bench

    bench.add(commands)
    return parser


def _pruning(parser: argparse.ArgumentParser, *, max_new_tokens: int, repeats: int, output: str) -> None:
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--ratio",
        type=ratio,
        metavar="SHARE",
        help="share of visual tokens KEPT, or auto for one of each picture's own (default: 0.1)",
    )
    budget.add_argument("--keep", type=count, metavar="N", help="number of visual tokens kept instead")
    budget.add_argument("--auto", metavar="FILE", help="automatic ratio calibrated by vtprune tune --auto")
    budget.add_argument("--certificate", metavar="FILE", help="ratio and method certified by vtprune certify")
    budget.add_argument("--mean-ratio", type=share, metavar="SHARE", help="mean share over all decoder layers instead")
    parser.add_argument("--method", help="see vtprune methods (default: iwp, or the certificate's)")
    parser.add_argument(
        "--max-new-tokens", type=count, default=max_new_tokens, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--repeats", type=count, default=repeats, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--output", default=output, metavar="FILE", help="the picture written (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="print the full report of the pruned prefill as well")


def _demo(args: argparse.Namespace) -> None:
    from .. import refvlm

    scene = refvlm.scenes.scene(DEMO_SCENE)
    asked = next(question for question in scene.questions if question.kind == DEMO_KIND)
    truth = None if args.image or args.question else asked.answer
    args.question = args.question or asked.text
    _side_by_side(args, scene.image if args.image is None else None, truth)


def _run(args: argparse.Namespace) -> None:
    _side_by_side(args, None, None)


def _budget(args: argparse.Namespace) -> dict[str, Any]:
    """The budget among the arguments of `vtprune.patch`."""
    import vtprune

    if args.auto:
        return {"ratio": vtprune.Auto.load(Path(args.auto).expanduser())}
    if args.certificate:
        return {"ratio": vtprune.Certificate.load(Path(args.certificate).expanduser())}
    given = {"keep": args.keep, "mean_ratio": args.mean_ratio}
    return {name: value for name, value in given.items() if value} or {"ratio": args.ratio or 0.1}


def _side_by_side(args: argparse.Namespace, image: Image | None, truth: str | None) -> None:
    """Everything that can be refused is refused before the model is loaded."""
    import vtprune

    from .. import methods
    from ..refvlm import loading
    from ..report import overlay
    from ..study import timing

    method = methods.get(args.method) if args.method else None
    _check_output(args.output)
    budget = _budget(args)
    image = image or images.picture(args.image)
    loading.is_local(args.model)
    quiet()
    model, processor = loading.model_and_processor(args.model, args.device, args.dtype)
    inputs = loading.prompt(processor, image, args.question).to(model.device)
    inputs = {name: as_dtype(value, model.dtype) for name, value in inputs.items()}
    with vtprune.patch(model, **budget, method=method and method()) as patch:
        before, after = timing.measure_side_by_side(
            model, processor, inputs, patch, max_new_tokens=args.max_new_tokens, repeats=args.repeats
        )
        last, args.method = patch.last, patch.method.name
    if last is None:
        raise InputError("the prompt held no visual token: the processor put no image placeholder into it")
    _print_sides(args, before, after, truth)
    if args.report:
        print(last.report())
    try:
        overlay.before_and_after(image, last.show(image), (before.answer, after.answer)).save(
            Path(args.output).expanduser()
        )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {args.output}: {one_line(error)}") from error
    print(f"picture written to {args.output}: what was dropped is dark")


def _check_output(path: str) -> None:
    """Refuses a picture file that cannot be written."""
    from PIL import Image

    if not Path(path).expanduser().absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: its folder does not exist")
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise InputError(f"cannot write {path} as a picture: expected a file name that ends in .png or .jpg")


def _print_sides(args: argparse.Namespace, before: Side, after: Side, truth: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows: list[tuple[str, Callable[[Side], Any], str]] = [
        ("answer", lambda side: side.answer or "(nothing)", ""),
        ("visual tokens", lambda side: side.visual_tokens, ""),
        ("prompt tokens", lambda side: side.prompt_tokens, ""),
        ("time to first token", lambda side: side.seconds, " s"),
        ("of which selection", lambda side: side.selection_time, " s"),
        ("KV cache", lambda side: side.kv_bytes, " B"),
    ]
    table = Table(title=Text(f"{args.model}: {args.question}"), title_justify="left")
    table.add_column("")
    table.add_column("all tokens")
    table.add_column(f"pruned ({args.method})")
    table.add_column("change")
    for name, value, unit in rows:
        one, two = value(before), value(after)
        change = f"{100 * (two / one - 1):+.0f} %" if one and not isinstance(one, str) else ""
        shown = [
            f"{v:.4f}{unit}" if isinstance(v, float) else f"{v:,}{unit}" if isinstance(v, int) else v
            for v in (one, two)
        ]
        table.add_row(name, *map(Text, shown), change)
    console = Console()
    console.print(table)
    notes = [f"The right answer is {truth!r}."] if truth else []
    notes.append(f"Times are medians of {before.repeats} runs in turn, after a warm-up.")
    console.print(Text(" ".join(notes)))


def _methods(args: argparse.Namespace) -> None:
    import dataclasses

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .. import methods

    table = Table(title="in a decoder of 32 layers", title_justify="left")
    for heading in ("method", "cuts before layer", "what it does", "options"):
        table.add_column(heading)
    for name in methods.names():
        cls = methods.get(name)
        method = cls()
        cuts = ", ".join(str(stage.layer) if stage.layer else "input" for stage in method.schedule(32))
        fields: tuple[dataclasses.Field, ...] = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
        options = ", ".join(f"{f.name}={getattr(method, f.name)!r}" for f in fields if f.init)
        summary = (cls.__doc__ or "").strip().split("\n\n")[0]
        table.add_row(*map(Text, (name, cuts, " ".join(summary.split()), options)))
    Console().print(table)


def _inspect(args: argparse.Namespace) -> None:
    import vtprune

    from ..refvlm import loading

    loading.is_local(args.model)
    quiet()
    print(vtprune.inspect(loading.skeleton(args.model)))


def _show_warnings() -> None:
    """What the library warns of goes to standard error, once, whoever else has set up logging."""
    log = logging.getLogger("vtprune")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("vtprune: warning: %(message)s"))
        log.addHandler(handler)
