# SPDX-License-Identifier: Apache-2.0
"""Time saved by cuts inside the vision tower: writes `benchmarks/results/towers-cpu.json`.

    python -m benchmarks.towers [--rounds 3]
    python -m benchmarks.towers --device cuda --shape qwen2.5-vl-7b --out FILE

Whole requests are measured on Qwen2.5-VL-7B in full width with a quarter of its tower blocks and decoder layers; the
tower alone, compared with its limit, has all blocks. Weights and pixels are random. The picture has 78 x 138 patches
(1080 x 1920 pixels after the processor's rounding), 2,691 visual tokens, and the prompt 40 text tokens. Variants
alternate in rounds; on a CPU the time is processor time of one thread, which excludes other work on the machine. The
limit of a cut is the same tower with its later blocks run on the kept rows only, with precomputed arguments. An
interrupted run goes on with the part that the file lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import vtprune
from vtprune import towers
from vtprune.bench import layouts, shapes
from vtprune.models import attention_probe
from vtprune.study import progress
from vtprune.towers import products
from vtprune.towers.structure import find_parts

OUT = Path(__file__).resolve().parent / "results" / "towers-cpu.json"
TOKENS, TEXT = 2691, 40  # 1080 x 1920 pixels
WARM = 300  # visual tokens of the warm-up runs
RATIO, KEEP = 0.1, 0.35
LIMITS = {"Similar": ("merger",), "Pixels": ("merger", "patch_embed")}
METHOD = "divprune"  # cuts before the decoder's first layer, at any depth


def clock(device: torch.device) -> float:
    """Seconds: processor time of this process on a CPU, else wall time after the device has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def timed(run: Callable[[], Any], device: torch.device) -> float:
    start = clock(device)
    run()
    return clock(device) - start


@contextlib.contextmanager
def clocked(module: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Records when calls of a module start, negative, and end; their sum is the time inside."""
    spans: list[float] = []
    handles = [
        module.register_forward_pre_hook(lambda m, a: spans.append(-clock(device)), prepend=True),
        module.register_forward_hook(lambda m, a, o: spans.append(clock(device))),
    ]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def first_token(model: nn.Module, inputs: dict[str, Tensor], rounds: int, device: torch.device) -> dict[str, Any]:
    """Times to the first token, those of the vision tower and of its patch embedding, and the report's operations."""
    tower = vtprune.inspect(model).vision_tower
    parts = {"tower_seconds": tower, "embedding_seconds": tower.patch_embed}
    decoder = {"ratio": RATIO, "method": METHOD}
    variants: dict[str, dict[str, Any]] = {
        "unpruned": {},
        f"decoder {RATIO}": decoder,
        f"tower {KEEP}": {"tower": KEEP},
        f"tower {KEEP}, decoder {RATIO}": {"tower": KEEP, **decoder},
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    within: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name in variants}
    counted: dict[str, Any] = {}
    for _ in range(rounds):
        for name, options in variants.items():
            patch = vtprune.patch(model, **options) if options else None
            with contextlib.ExitStack() as stack:
                spans = {part: stack.enter_context(clocked(module, device)) for part, module in parts.items()}
                seconds[name].append(timed(lambda: model(**inputs, logits_to_keep=1), device))
            for part, span in spans.items():
                within[name][part].append(sum(span))
            if patch is not None:
                last = patch.last
                counted[name] = {"visual_tokens": last.tokens, **last.tower.to_dict()}
                patch.remove()
    rows = {}
    for name in variants:
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            **{part: statistics.median(values) for part, values in within[name].items()},
            "rounds": seconds[name],
            "gain": statistics.median(a / b for a, b in zip(seconds["unpruned"], seconds[name], strict=True)),
            **counted.get(name, {}),
        }
    return rows


class Limit:
    """The uncut tower whose blocks get precomputed arguments, recorded in a cut run.

    Its patch embedding is a matrix product, as that of a cut tower.

    Args:
        tower, blocks: The tower and its blocks.
        run: Calls the cut tower.
        parts: Names of other modules of the tower that run on the kept rows only: "merger", "patch_embed".
    """

    def __init__(
        self, tower: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], Any], parts: Sequence[str] = ()
    ) -> None:
        self.calls: list[tuple[tuple, dict]] = []
        self.tower, self.blocks, self.parts = tower, blocks, parts
        handles = [block.register_forward_pre_hook(self._note, with_kwargs=True) for block in blocks]
        last = blocks[-1].register_forward_hook(lambda module, args, output: setattr(self, "states", output))
        run()
        for handle in [*handles, last]:
            handle.remove()

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not attention_probe.is_probing():
            self.calls.append((args, dict(kwargs)))

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Makes the tower's next call the limit."""
        calls, ran = iter(self.calls), len(self.calls[-1][0][0])
        handles = [
            block.register_forward_pre_hook(lambda m, a, k: next(calls), with_kwargs=True) for block in self.blocks
        ]
        handles.append(self.blocks[-1].register_forward_hook(lambda m, a, o: self.states))
        for name in self.parts:
            rows, width = len(self.states), self.states.shape[-1]
            if name == "merger":
                rows, width = rows // self.tower.spatial_merge_unit, self.tower.config.out_hidden_size
            full, part = self.states.new_zeros(rows, width), getattr(self.tower, name)
            handles.append(part.register_forward_pre_hook(lambda m, a: (a[0][:ran], *a[1:])))
            handles.append(part.register_forward_hook(lambda m, a, o, full=full: full))
        with contextlib.ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            for conv, product in products.find_products([self.tower.patch_embed], lambda: True):
                stack.enter_context(mock.patch.object(conv, products.NAME, product))
            yield


def limits(
    model: nn.Module, inputs: dict[str, Tensor], rounds: int, device: torch.device, methods: Sequence[str]
) -> dict[str, Any]:
    """Times of the cut tower and of its limit, for each method.

    If dropped patches are copies of kept ones, the limit's merger runs on the kept rows only, and so does the patch
    embedding if the cut is before the first block.
    """
    anatomy = vtprune.inspect(model)
    parts = find_parts(anatomy)
    tower, pixels, grid = anatomy.vision_tower, inputs["pixel_values"], inputs["image_grid_thw"]
    rows: dict[str, Any] = {}
    for name in methods:
        method = getattr(towers, name)(keep=KEEP)
        cut, least = [], []
        with vtprune.patch(model, tower=method) as patch:
            limit = Limit(tower, list(parts.blocks), lambda: tower(pixels, grid), LIMITS.get(name, ()))
            for _ in range(rounds):
                cut.append(timed(lambda: tower(pixels, grid), device))
                with patch.paused(), limit.prepared():
                    least.append(timed(lambda: tower(pixels, grid), device))
        rows[name] = {
            "block": method.block_of(len(parts.blocks)),
            "seconds": cut,
            "limit_seconds": least,
            "over_limit": statistics.median(a / b for a, b in zip(cut, least, strict=True)) - 1,
        }
        print(f"{name:<10} {100 * rows[name]['over_limit']:5.1f} % above its limit", flush=True)
    return rows


def whole_tower(name: str) -> shapes.Shape:
    """The full-depth tower of a `-shallow` shape, with a single decoder layer."""
    shape = shapes.get(name.removesuffix("-shallow"))
    config = copy.deepcopy(shape.config())
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    return dataclasses.replace(shape, config=lambda: config)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.towers", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-vl-7b-shallow", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="visual tokens (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=["Uniform", "Change", "Similar", "Attention", "Pixels"])
    parser.add_argument("--rounds", type=int, default=3, help="of whole requests (default: %(default)s)")
    parser.add_argument("--tower-rounds", type=int, default=1, help="of towers of full depth (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="float32 on a CPU by default, else bfloat16"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true", help="overwrite an existing result")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    torch.set_num_threads(1)
    with progress.script(args.out), torch.no_grad():
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Measures what `args.out` does not hold yet: whole requests, then the tower alone."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = shapes.get(args.shape)
    header = {
        "shape": shape.name,
        "about": shape.about,
        "text_tokens": TEXT,
        "device": args.device if device.type == "cpu" else torch.cuda.get_device_name(device),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "tower_rounds": args.tower_rounds,
        "clock": "processor time of one thread" if device.type == "cpu" else "wall time",
        "method": METHOD,
        "versions": progress.versions(),
    }
    result: dict[str, Any] = header | progress.load(args.out, header, args.force)
    if "first_token" not in result:
        model = shape.build(device, dtype)
        first_token(model, layouts.prompt(model, shape.layout, 1, min(args.tokens, WARM), TEXT), 1, device)
        inputs = layouts.prompt(model, shape.layout, 1, args.tokens, TEXT)
        result |= {
            "patches": len(inputs["pixel_values"]),
            "visual_tokens": int((inputs["input_ids"] == model.config.image_token_id).sum()),
            "first_token": first_token(model, inputs, args.rounds, device),
        }
        del model
        progress.save(args.out, result)
    for name, row in result["first_token"].items():
        tower_share = 100 * row["tower_seconds"] / row["seconds"]
        print(f"{name:<28} {row['gain']:5.2f}x of unpruned, tower {tower_share:.0f} %", flush=True)
    if "towers" not in result:
        whole = whole_tower(args.shape).build(device, dtype)
        inputs = layouts.prompt(whole, shape.layout, 1, args.tokens, TEXT)
        result["towers"] = limits(whole, inputs, args.tower_rounds, device, args.methods)
        progress.save(args.out, result)


if __name__ == "__main__":
    main()
