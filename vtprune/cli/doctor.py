# SPDX-License-Identifier: Apache-2.0
"""`vtprune doctor`: installed packages, methods that work with a model, and the parts of a prompt's time."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

from .. import __version__
from ..errors import InputError, VTPruneError, one_line
from ..refvlm.loading import EMBEDDED_MODELS
from ..study.terminal import wrap
from .arguments import add_device, add_model, quiet
from .output import Output, add_json, plural, width
from .parser import description

NEEDED = ("torch", "transformers", "safetensors", "numpy", "pillow", "rich", "jsonschema", "shtab")
# Package -> purpose.
OPTIONAL = {
    "triton": "kernels on a GPU",
    "kernels": "kernels from the hub, VTPRUNE_KERNELS",
    "flash-attn": "attn_implementation='flash_attention_2'",
    "accelerate": "device_map",
    "peft": "adapters",
    "optuna": "vtprune tune",
    "scipy": "vtprune tune",
    "matplotlib": "plots",
    "vllm": "serving",
    "lmms-eval": "evaluation",
    "gradio": "the demo in a browser",
}
REPEATS = 5


def add(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "doctor",
        help="check the installation and a model, and time a prompt",
        description=description(
            "Shows the installed packages, attention implementations and kernels, the methods that work with a model, "
            "and the time of the parts of a prompt. For a model outside the package only its configuration is read, "
            "unless --time is given."
        ),
        examples=("doctor", "doctor --model OWNER/NAME", "doctor --model FOLDER --time --json -"),
    )
    add_model(parser)
    parser.add_argument("--time", action="store_true", help="load the weights of --model and time a prompt")
    add_device(parser)
    add_json(parser, "the report")
    parser.set_defaults(command=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from ..refvlm import loading

    output = Output(args)
    loading.is_local(args.model)
    if not args.time and (args.device, args.dtype) != ("auto", "auto"):
        raise InputError("--device and --dtype are for timing a prompt; add --time, or leave them out")
    quiet()
    found: dict[str, Any] = {"installed": installed(), "machine": machine(), "kernels": kernels()}
    found["model"] = examine(args.model)
    if args.time or args.model in EMBEDDED_MODELS:
        found["time"] = time_prompt(args.model, args.device, args.dtype)
    for line in _lines(found):
        output.say(line)
    output.write(found)


def installed() -> dict[str, str | None]:
    """Versions of required and optional packages; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "vtprune": __version__}
    return found | {name: _version(name) for name in (*NEEDED, *OPTIONAL)}


def _version(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Processor, accelerator, and available attention implementations of transformers."""
    import torch
    from transformers.utils import import_utils

    flash = getattr(import_utils, "is_flash_attn_2_available", lambda: False)
    attention = ["eager", "sdpa"] + ["flash_attention_2"] * bool(flash())
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    name = None
    if accelerator is not None:
        name = torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": name,
        "attention": attention,
    }


def kernels() -> dict[str, str]:
    """Location of the kernels, and the back end that runs them."""
    import importlib.util

    import torch

    import vtprune_kernels

    on_gpu = torch.accelerator.is_available() and importlib.util.find_spec("triton") is not None
    return {
        "from": str(os.path.dirname(vtprune_kernels.__file__ or "")),
        "run_by": "Triton" if on_gpu else "PyTorch",
    }


def examine(name: str) -> dict[str, Any]:
    """Parts of a model, built from its configuration, and the methods that can prune it."""
    from .. import methods
    from ..engine.patching import inspect, patch
    from ..refvlm import loading

    skeleton = loading.skeleton(name)
    try:
        parts = inspect(skeleton)
    except VTPruneError as error:
        return {"name": name, "refused": one_line(error)}
    works, refused = [], {}
    for method in methods.names():
        try:
            patch(skeleton, ratio=0.5, method=method).remove()
            works.append(method)
        except VTPruneError as error:
            refused[method] = one_line(error)
    kind = type(parts.model).__name__
    return {"name": name, "class": kind, "layers": parts.num_layers, "works": works, "refused_methods": refused}


def time_prompt(name: str, device: str, dtype: str) -> dict[str, Any]:
    """Median seconds of the parts of one prompt, unpruned and with the default method at ratio 0.1."""
    import statistics

    from ..engine.patching import inspect, patch
    from ..refvlm import loading, scenes
    from ..study import stopwatch

    model, processor = loading.model_and_processor(name, device, dtype)
    scene = scenes.scene(7)
    inputs = loading.inputs(model, processor, scene.image, scene.questions[0].text, new_tokens=2)
    parts = inspect(model)
    runs: dict[str, list[stopwatch.Run]] = {"all tokens": [], "pruned": []}
    for _ in range(REPEATS + 1):  # the first of each warms up
        runs["all tokens"].append(stopwatch.generate(parts, inputs, 2))
        with patch(model, ratio=0.1) as patched:
            runs["pruned"].append(stopwatch.generate(parts, inputs, 2, [stage.layer for stage in patched.schedule]))
    found: dict[str, Any] = {"model": name, "device": str(model.device), "dtype": str(model.dtype).split(".")[-1]}
    for variant, taken in runs.items():
        found[variant] = {
            part: statistics.median(getattr(run, part) or 0.0 for run in taken[1:])
            for part in ("vision", "decision", "prefill", "token")
        }
    return found


def _lines(found: dict[str, Any]) -> list[str]:
    """The report as text."""
    have, lines = found["installed"], ["installed"]
    lines += wrap(", ".join(f"{n} {have[n] or 'MISSING'}" for n in ("python", "vtprune", *NEEDED)), width(), "  ")
    lines.append("optional")
    for name, purpose in OPTIONAL.items():
        lines.append(f"  {name:<11} {have[name] or '-':<12} {purpose}")
    about = found["machine"]
    accelerator = about["accelerator"] or "no accelerator"
    lines += [
        "machine",
        f"  {about['system']}, {plural(about['cores'], 'core')}, {plural(about['threads'], 'thread')}, {accelerator}",
    ]
    lines += [f"  attention: {', '.join(about['attention'])}"]
    lines += [f"  kernels: {found['kernels']['run_by']}, from {found['kernels']['from']}"]
    lines += _model_lines(found["model"])
    return lines + (_time_lines(found["time"]) if "time" in found else [])


def _model_lines(model: dict[str, Any]) -> list[str]:
    if "refused" in model:
        return ["model", *wrap(f"{model['name']} cannot be pruned: {model['refused']}", width(), "  ")]
    lines = [f"model {model['name']} ({model['class']}, {plural(model['layers'], 'layer')})"]
    lines += wrap(f"works: {', '.join(model['works'])}", width(), "  ")
    for method, reason in model["refused_methods"].items():
        lines += wrap(f"refused: {method}: {reason}", width(), "  ")
    return lines


def _time_lines(time: dict[str, Any]) -> list[str]:
    lines = [f"time of a prompt, ms, medians of {REPEATS} ({time['model']}, {time['device']}, {time['dtype']})"]
    lines.append(f"  {'':<11} {'vision':>8} {'selection':>10} {'prefill':>8} {'per token':>10}")
    for variant in ("all tokens", "pruned"):
        cells = time[variant]
        shown = [1e3 * cells[part] for part in ("vision", "decision", "prefill", "token")]
        lines.append(f"  {variant:<11} {shown[0]:8.1f} {shown[1]:10.1f} {shown[2]:8.1f} {shown[3]:10.1f}")
    return lines
