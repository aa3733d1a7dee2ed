# SPDX-License-Identifier: Apache-2.0
"""`vtprune fidelity`: how much pruning changes a model's answers, without labels, and its time."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import files, images
from ..errors import InputError
from ..refvlm.loading import EMBEDDED_MODELS
from .arguments import add_device, add_model, add_pictures, chosen_methods, count, quiet, share
from .output import Output, add_json
from .parser import description

if TYPE_CHECKING:
    from ..methods import Method
    from ..study.fidelity import Prompt, Variant

# Questions that suit any picture. The built-in model has a small vocabulary and gets its own question.
GENERIC = (
    "Describe this picture in one sentence.",
    "What is the most important thing in this picture?",
    "Which words or numbers can be read in this picture?",
)
GENERIC_EMBEDDED = ("describe the image",)
RATIOS = (0.5, 0.25, 0.1, 0.05)


def add(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "fidelity",
        help="measure how much pruning changes a model's answers, and its time",
        description=description(
            "Measures, without labels, how much every method changes the answers of a model at several ratios, and the "
            "time to the first token, beside the same model on smaller pictures. Results are saved after every prompt; "
            "the same command resumes from them."
        ),
        examples=(
            "fidelity --images FOLDER",
            "fidelity --model OWNER/NAME --images FOLDER --questions questions.txt --ratios 0.25 0.1",
            "fidelity --model embedded-qwen2_5_vl --clip --methods vcast evs uniform",
        ),
    )
    add_model(parser)
    add_pictures(parser)
    parser.add_argument(
        "--clip",
        action="store_true",
        help="clips in place of pictures: a folder of frames, ordered by name, or a folder of such folders (default: "
        "clips that vtprune draws); an even number of frames each",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="NAME or NAME:option=value,..., or strategy files (default: all)",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=share,
        default=list(RATIOS),
        metavar="SHARE",
        help=f"shares KEPT (default: {' '.join(map(str, RATIOS))})",
    )
    parser.add_argument("--max-new-tokens", type=count, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--repeats", type=count, default=2, metavar="N", help="timed calls per prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time of the process, which other programs do not affect (default: %(default)s)",
    )
    add_json(parser, "the results", default="vtprune-fidelity.json")
    parser.add_argument("--plot", metavar="FILE", help=".svg, .png or .pdf (default: the JSON file's name, .svg)")
    add_device(parser)
    parser.set_defaults(command=_fidelity)


def _fidelity(args: argparse.Namespace) -> None:
    """Runs the command; checks all arguments before loading the model."""
    from ..refvlm import loading
    from ..study import charts, fidelity_view, progress

    output = Output(args, resumes=True)
    methods = chosen_methods(args.methods)
    pairs = prompt_pairs(args)
    plot = _plot_file(args, output)
    loading.is_local(args.model)
    quiet()
    model, processor = loading.model_and_processor(args.model, args.device, args.dtype)
    if args.clock == "cpu" and model.device.type != "cpu":
        raise InputError(
            f"--clock cpu needs a model on the CPU, but this one runs on {model.device}; leave --clock out"
        )
    header = _header(args, model, pairs, methods)
    path, variants = output.file, _variants(args, methods)
    data = progress.load(path, header, args.force, _schema(variants, len(pairs))) or dict(header)
    if "rows" not in data:
        with progress.interruptible(path):
            rows = _measure(args, model, processor, pairs, variants, data, path)
        data = header | {"load": data.get("load"), "rows": rows}
        progress.save(path, data)
    fidelity_view.show(data, output.console())
    if path is None:
        output.write(data)
    else:
        output.say(f"table written to {args.json}")
    if plot is not None:
        charts.save([fidelity_view.chart(data)], plot)
        output.say(f"plot written to {plot}")


def _variants(args: argparse.Namespace, methods: Mapping[str, Method]) -> list[Variant]:
    from ..study.fidelity import Variant, with_resizing

    return with_resizing(
        [Variant(label, method, ratio) for label, method in methods.items() for ratio in _ratios(args)]
    )


def _schema(variants: Sequence[Variant], prompts: int) -> dict[str, Any]:
    """JSON Schema of a result file; its records are JSON strings, which `_check_records` checks."""
    from ..study.fidelity import rows_schema

    records = {"type": "array", "items": {"type": "string"}, "maxItems": prompts}
    return {"properties": {"load": {"type": ["number", "null"]}, "records": records, "rows": rows_schema(variants)}}


def _measure(
    args: argparse.Namespace,
    model: Any,
    processor: Any,
    pairs: Sequence[tuple[str, Any, str]],
    variants: Sequence[Variant],
    data: dict[str, Any],
    path: Path | None,
) -> list[dict[str, Any]]:
    """Measures the prompts missing in `data`, and saves it after each, with the largest load average."""
    from ..study import progress
    from ..study.fidelity import measure_prompt, summarize

    done: list[str] = data.setdefault("records", [])  # one JSON string per prompt, which is faster to write
    _check_records(done, variants, path)
    with progress.bar("prompts", len(pairs), len(done)) as step:
        for prompt in prompts(pairs[len(done) :], model, processor):
            clock = time.process_time if args.clock == "cpu" else time.perf_counter
            settings = {"max_new_tokens": args.max_new_tokens, "repeats": args.repeats, "clock": clock}
            done.append(json.dumps(measure_prompt(model, prompt, variants, turn=len(done), **settings)))
            data["load"] = max(filter(None, (data.get("load"), progress.load_average())), default=None)
            progress.save(path, data)
            step(str(prompt.picture))
    return summarize([json.loads(record) for record in done], [name for name, _, _ in pairs], variants)


def _check_records(records: Sequence[str], variants: Sequence[Variant], path: Path | None) -> None:
    from ..study.fidelity import record_schema
    from ..study.progress import StaleResultError

    schema = record_schema(variants)
    for number, record in enumerate(records):
        try:
            files.parse_json(record, schema)
        except files.FileError as error:
            advice = "use another file, or --force to overwrite it"
            raise StaleResultError(f"{path} is damaged (records[{number}]: {error}); {advice}") from error


def _ratios(args: argparse.Namespace) -> list[float]:
    return sorted({f"{ratio:g}": ratio for ratio in args.ratios}.values(), reverse=True)  # as rows name them


def prompt_pairs(args: argparse.Namespace) -> list[tuple[str, Any, str]]:
    """`(name of the picture, the picture or its path, question)` of every prompt; every picture is opened once.

    With `--clip`, the frames of a clip or their paths stand for the picture.
    """
    from .. import refvlm
    from ..refvlm import evaluate

    asked = [args.question] if args.question else None
    if args.questions:
        asked = _lines(args.questions)
    pictures: list[tuple[str, Any]]
    if getattr(args, "clip", False):
        if args.images is None and args.model in EMBEDDED_MODELS and asked is None:
            drawn = map(refvlm.clips.clip, range(args.limit or 24))
            return [(f"clip {clip.seed}", list(clip.frames), clip.questions[0].text) for clip in drawn]
        pictures = _clips(args)
    elif args.images is None:
        count = args.limit or 24
        if args.model in EMBEDDED_MODELS and asked is None:
            samples = enumerate(evaluate.held_out_scenes(count))
            return [(f"scene {number}", sample.image, sample.question) for number, sample in samples]
        pictures = [(f"scene {number}", refvlm.scenes.scene(number).image) for number in range(count)]
    elif args.images == "-":
        pictures = [("standard input", images.picture("-"))]
    else:
        found = images.picture_files(args.images)[: args.limit]
        for file in found:
            images.picture(file)  # finds broken files before a long run
        pictures = [(Path(file).name, file) for file in found]
    asked = asked or list(GENERIC_EMBEDDED if args.model in EMBEDDED_MODELS else GENERIC)
    return [(name, picture, question) for name, picture in pictures for question in asked]


def _clips(args: argparse.Namespace) -> list[tuple[str, list[Any]]]:
    """Name of each clip, and its frames or their paths."""
    from .. import refvlm

    if args.images is None:
        return [(f"clip {number}", list(refvlm.clips.clip(number).frames)) for number in range(args.limit or 24)]
    place = Path(args.images).expanduser()
    inside = sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    folders = (inside or [place])[: args.limit]
    return [(folder.name, images.picture_files(str(folder))) for folder in folders]


def _lines(path: str) -> list[str]:
    """Reads questions from a file, one per line."""
    name = "standard input" if path == "-" else path
    try:
        text = files.decode(files.read_stdin(files.MAX_SETTINGS)) if path == "-" else files.read_text(path)
    except files.FileError as error:
        raise InputError(f"cannot read {name} as questions: {error}") from error
    found = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not found:
        raise InputError(f"{name} has no question; expected one per line")
    return found


def prompts(pairs: Sequence[tuple[str, Any, str]], model: Any, processor: Any) -> Iterator[Prompt]:
    """Yields the model inputs of each prompt, with only one picture in memory at a time."""
    from ..refvlm import loading
    from ..study.fidelity import Prompt
    from ..study.resize import Frames, shrinking

    for name, picture, question in pairs:
        if isinstance(picture, list):
            image: Any = Frames(images.picture(frame) if isinstance(frame, str) else frame for frame in picture)
            made = partial(loading.clip_prompt, model, processor, question=question)
        else:
            image = images.picture(picture) if isinstance(picture, str) else picture
            made = partial(loading.inputs, model, processor, question=question)
        yield Prompt(made(image), name, shrinking(model, processor, image, made))


def content_of(picture: Any) -> bytes:
    """Digest of a picture or of its file, or the digests of a clip's frames one after another."""
    found = b""
    for one in picture if isinstance(picture, list) else [picture]:
        content = files.read_bytes(one, images.MAX_BYTES) if isinstance(one, str) else one.tobytes()
        found += hashlib.sha256(content).digest()
    return found


def _header(
    args: argparse.Namespace, model: Any, pairs: Sequence[tuple[str, Any, str]], methods: Mapping[str, Method]
) -> dict[str, Any]:
    """Settings and conditions of the results."""
    import torch

    from .. import refvlm
    from ..models import identity
    from ..study import progress

    own = args.images is None and args.model in EMBEDDED_MODELS and not (args.question or args.questions)
    # Pictures, questions and options are compared by their digest when a run is resumed.
    digest = hashlib.sha256(repr(methods).encode())
    for name, picture, question in pairs:
        digest.update(f"{name} {question}".encode(errors="surrogateescape"))  # names of files may be any bytes
        digest.update(content_of(picture))
    device, threads = model.device, torch.get_num_threads()
    machine = f"{os.cpu_count()} {platform.machine()} cores, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    kind = "clips" if args.clip else "scenes"
    header: dict[str, Any] = {
        "model": args.model,
        "pictures": len({name for name, _, _ in pairs}),
        "of": f"drawn {kind}" if args.images is None else Path(args.images).name,
        "prompts": len(pairs),
        "questions": f"the {'clips' if args.clip else 'scenes'}' own"
        if own
        else list(dict.fromkeys(question for _, _, question in pairs)),
        "methods": list(methods),
        "ratios": _ratios(args),
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "clock": args.clock,
        "inputs_sha256": digest.hexdigest(),
    }
    if args.model in EMBEDDED_MODELS:
        header["weights_sha256"] = refvlm.weights_sha256(EMBEDDED_MODELS[args.model])
    else:
        header |= {"config_hash": identity.config_hash(model.config), "weights_hash": identity.weights_hash(model)}
    dtype = str(model.dtype).removeprefix("torch.")
    return header | {"versions": progress.versions(), "machine": f"{machine}, {dtype}"}


def _plot_file(args: argparse.Namespace, output: Output) -> Path | None:
    """File of the plot; None if none was requested and matplotlib is missing, or the JSON goes to standard output."""
    from ..study import charts

    if args.plot:
        return output.claim_chart(args.plot)
    if output.file is None or not charts.available():
        return None
    return output.claim_chart(output.file.with_suffix(".svg"))
