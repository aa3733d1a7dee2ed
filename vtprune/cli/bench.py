# SPDX-License-Identifier: Apache-2.0
"""`vtprune bench`, and `python -m benchmarks.latency`, which is the same."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import default_method, images
from ..errors import InputError
from ..refvlm.loading import EMBEDDED
from .arguments import add_device, count, quiet, share, words
from .fidelity import content_of
from .output import Output, add_json
from .parser import description

if TYPE_CHECKING:
    from ..bench.measure import Setting

ON_ACCELERATOR = ((1, 8, 32), (576, 2880, 8192))
ON_CPU = ((1,), (576, 2880))
MAX_THREADS = 1_024
TEXT_TOKENS = 64


def add(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory with and without pruning, beside the possible gain",
        description=description(
            "Measures prefill, decoding and memory with and without pruning, beside the limit: a prompt that has only "
            "the kept tokens. By default, an architecture with random weights is used."
        ),
        examples=(
            "bench --model llava-1.5-7b",
            "bench --model OWNER/NAME --methods iwp fastv:layer=2 --ratios 0.25 0.1 --json bench.json",
        ),
    )
    arguments(parser)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--model",
        default="small",
        metavar="NAME_OR_FOLDER_OR_SHAPE",
        help="a local folder, a name on the hub, or an architecture with random weights: llava-1.5-7b, llava-next-7b, "
        "llava-onevision-7b, qwen2.5-vl-7b, qwen3-vl-8b, internvl3-8b (-shallow: full width, cut evenly in depth, for "
        "CPUs), smolvlm-500m, small, tiny (default: %(default)s)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[default_method.NAME],
        metavar="METHOD",
        help=f"NAME or NAME:option=value,... (default: {default_method.NAME}; random and pooling are always run)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--ratios", nargs="+", type=share, metavar="SHARE", help="shares KEPT (default: 0.1)")
    budget.add_argument("--keep", nargs="+", type=count, metavar="N", help="counts kept instead")
    parser.add_argument("--batch", nargs="+", type=count, metavar="N", help="samples (default: 1 8 32; on a CPU 1)")
    parser.add_argument(
        "--visual-tokens",
        nargs="+",
        type=count,
        metavar="N",
        help="per sample, as closely as the model allows (default: 576 2880 8192; on a CPU 576 2880)",
    )
    parser.add_argument(
        "--image", metavar="FILE", help="use your own picture instead (not for architectures with random weights)"
    )
    parser.add_argument(
        "--clip",
        action="store_true",
        help="a clip in place of pictures: the frames in the folder --image; noise of 16 frames for an architecture",
    )
    parser.add_argument("--question", type=words, metavar="TEXT", help="the question about it")
    parser.add_argument(
        "--text-tokens", type=count, metavar="N", help=f"of architectures with random weights (default: {TEXT_TOKENS})"
    )
    parser.add_argument("--new-tokens", type=count, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="runs of each (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--attention", help="attention of architectures with random weights (default: sdpa)")
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="time in table and plot: wall-clock time, or CPU time of the process, which other programs do not affect; "
        "the JSON has both (default: %(default)s)",
    )
    add_json(parser, "results after every round, from which the same command resumes,")
    parser.add_argument("--plot", metavar="FILE", help="a chart, .svg, .png or .pdf")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; checks all arguments before building a model.

    Returns:
        dict: Measurements, see `vtprune.bench.measure.run`, with their `rows`.
    """
    from ..bench import measure, plot, summary, table
    from ..bench.variants import variants
    from ..models import identity
    from ..study import progress

    output = Output(args, resumes=True)
    _check(args)
    if args.plot:
        output.claim_chart(args.plot)
    chosen = variants(args.methods, _budgets(args))
    picture = _picture(args)
    model, make_prompt, name = _model(args, picture)
    bench = measure.Bench(model, make_prompt, chosen, args.new_tokens)
    settings = _settings(args, next(model.parameters()).device.type)
    own = make_prompt is not None and args.image
    header = measure.header(bench, name, None if own or not _is_shape(args.model) else args.text_tokens)
    header |= {"clip": True} if args.clip else {}
    if not _is_shape(args.model):
        header |= {"weights_hash": identity.weights_hash(model), "inputs_sha256": _digest(args.question, picture)}
    out = output.file
    with progress.interruptible(out):
        data = measure.run(bench, settings, args.rounds, header, out, args.force)
    data["rows"] = summary.rows(data)
    if bench.device.type == "cpu":
        data["rows_in_cpu_time"] = summary.rows(data, cpu=True)
    progress.save(out, data)
    if out is None:
        output.write(data)
    table.show(data, output.console(), args.clock == "cpu")
    if args.plot:
        plot.save(data, args.plot, args.clock == "cpu")
    return data


def _picture(args: argparse.Namespace) -> Any:
    """The user's own picture, or the frames of a clip; None for drawn ones."""
    from ..study.resize import Frames

    if not args.image:
        return None
    return Frames(images.pictures(args.image)) if args.clip else images.picture(args.image)


def _digest(question: str | None, picture: Any) -> str:
    """Hash of a question, and of the picture or the frames if there are any."""
    return hashlib.sha256(str(question).encode() + (b"" if picture is None else content_of(picture))).hexdigest()


def _check(args: argparse.Namespace) -> None:
    import torch

    if _is_shape(args.model) and (args.image or args.question):
        raise InputError(f"{args.model} is an architecture without a processor; leave --image and --question out")
    if not _is_shape(args.model) and (args.attention or args.text_tokens):
        raise InputError(f"{args.model} has its own attention and prompts; leave --attention and --text-tokens out")
    args.text_tokens = args.text_tokens or TEXT_TOKENS
    if args.clip and not (_is_shape(args.model) or args.image):
        raise InputError("--clip needs --image FOLDER, the frames of a clip, with a model that has a processor")
    if args.image and args.visual_tokens:
        raise InputError("--image determines the number of visual tokens; leave --visual-tokens out")
    if args.threads and args.threads > MAX_THREADS:  # more end the process when their stacks are made
        raise InputError(f"--threads {args.threads:,}: at most {MAX_THREADS:,}")
    if args.threads:
        torch.set_num_threads(args.threads)


def _is_shape(name: str) -> bool:
    from ..bench.shapes import SHAPES

    return name in SHAPES and not Path(name).exists()


def _budgets(args: argparse.Namespace) -> list[Any]:
    from ..core.budget import Budget

    if args.keep:
        return [Budget(keep=count) for count in dict.fromkeys(args.keep)]
    return [Budget(ratio=share) for share in dict.fromkeys(args.ratios or [0.1])]


def _settings(args: argparse.Namespace, device: str) -> list[Setting]:
    from ..bench.measure import Setting

    batches, tokens = ON_CPU if device == "cpu" else ON_ACCELERATOR
    counts: list[int | None] = [None] if args.image else list(args.visual_tokens or tokens)
    return [Setting(batch, count) for count in counts for batch in args.batch or batches]


def _model(args: argparse.Namespace, picture: Any) -> tuple[Any, Callable, str]:
    """The model, a function that returns its prompts, of `picture` if there is one, and its name."""
    from ..refvlm import loading

    if not _is_shape(args.model):
        from ..bench.prompts import of_processor
        from ..bench.shapes import SHAPES

        loading.is_local(args.model, SHAPES)
        quiet()
        model, processor = loading.model_and_processor(args.model, args.device, args.dtype)
        name = (
            args.model if args.model == EMBEDDED or not Path(args.model).exists() else Path(args.model).resolve().name
        )
        return model, partial(of_processor, model, processor, picture, args.question), name

    from ..bench import layouts, shapes

    device = loading.device_of(args.device)
    kind = loading.dtype_of(args.dtype if args.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16")
    shape = shapes.get(args.model)
    layout = shape.layout
    if args.clip:
        if not isinstance(layout, layouts.Grid):
            raise InputError(f"{args.model} takes the frames of a clip as pictures; leave --clip out")
        layout = layouts.GridClip()
    quiet()
    model = shape.build(device, kind, args.attention or "sdpa")
    return model, lambda s: layouts.prompt(model, layout, s.batch, s.tokens, args.text_tokens), args.model
