# SPDX-License-Identifier: Apache-2.0
"""Time saved by cuts inside the vision tower: writes `benchmarks/results/towers-cpu.json`.

    python -m benchmarks.towers [--scale 4] [--rounds 3]
    python -m benchmarks.towers --device cuda --scale 1 --dtype bfloat16 --out benchmarks/results/towers-cuda.json

The shape is that of Qwen2.5-VL-7B with every depth and width divided by `--scale`; weights and pixels are drawn. Its
picture has 78 x 138 patches (1080 x 1920 pixels as the processor rounds them), 2,691 visual tokens, and the prompt 40
text tokens. All variants take turns, round after round; on a CPU the time is that of one thread's processor time, which
other work on the machine does not count into. The limit of a cut is the same tower whose later blocks are called on
nothing but the kept rows, with arguments that were prepared before.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from vtprune import towers
from vtprune.bench import shapes
from vtprune.models import attention_probe
from vtprune.study import progress
from vtprune.towers.structure import find_parts

OUT = Path(__file__).resolve().parent / "results" / "towers-cpu.json"
GRID, TEXT = (1, 78, 138), 40
RATIO, KEEP = 0.1, 0.35


def build(scale: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Qwen2.5-VL-7B with every depth and width divided by `scale`; tokens keep their ids, the vocabulary its size."""
    from transformers import AutoModelForImageTextToText

    config = copy.deepcopy(shapes.get("qwen2.5-vl-7b").config())
    text, vision = config.text_config, config.vision_config
    for part, names in (
        (text, ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")),
        (vision, ("hidden_size", "intermediate_size", "depth", "num_heads", "out_hidden_size")),
    ):
        for name in names:
            setattr(part, name, getattr(part, name) // scale)
    text.layer_types = text.layer_types[: text.num_hidden_layers]
    whole = vision.fullatt_block_indexes
    vision.fullatt_block_indexes = [i for i in whole if i < vision.depth] or [vision.depth - 1]
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def prompt(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """One picture and a question."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(1)
    patches = GRID[0] * GRID[1] * GRID[2]
    tokens = patches // config.vision_config.spatial_merge_size**2
    ids = torch.randint(10, 1000, (TEXT,), generator=generator).tolist()
    row = [*ids[:4], config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]
    row = torch.tensor([[*row, *ids[6:]]])
    side = config.vision_config.patch_size
    return {
        "input_ids": row.to(device),
        "attention_mask": torch.ones_like(row).to(device),
        "mm_token_type_ids": (row == config.image_token_id).long().to(device),
        "pixel_values": torch.randn(patches, 3 * 2 * side * side, generator=generator).to(device, dtype),
        "image_grid_thw": torch.tensor([GRID]).to(device),
    }


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


def first_token(model: nn.Module, inputs: dict[str, Tensor], rounds: int, device: torch.device) -> dict[str, Any]:
    """Times to the first token, the vision tower's part among it, and what the report counts."""
    tower = vtprune.inspect(model).vision_tower
    variants: dict[str, dict[str, Any]] = {
        "unpruned": {},
        f"decoder {RATIO}": {"ratio": RATIO},
        f"tower {KEEP}": {"tower": KEEP},
        f"tower {KEEP}, decoder {RATIO}": {"tower": KEEP, "ratio": RATIO},
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    in_tower: dict[str, list[float]] = {name: [] for name in variants}
    counted: dict[str, Any] = {}
    spans: list[float] = []
    for _ in range(rounds + 1):  # the first round warms up
        for name, options in variants.items():
            patch = vtprune.patch(model, **options) if options else None
            handles = [
                tower.register_forward_pre_hook(lambda m, a: spans.append(-clock(device)), prepend=True),
                tower.register_forward_hook(lambda m, a, o: spans.append(clock(device))),
            ]
            spans.clear()
            seconds[name].append(timed(lambda: model(**inputs, logits_to_keep=1), device))
            in_tower[name].append(sum(spans))
            for handle in handles:
                handle.remove()
            if patch is not None:
                last = patch.last
                counted[name] = {"visual_tokens": last.tokens, **last.tower.to_dict()}
                patch.remove()
    rows = {}
    for name in variants:
        whole, part = statistics.median(seconds[name][1:]), statistics.median(in_tower[name][1:])
        rows[name] = {
            "seconds": whole,
            "tower_seconds": part,
            "rounds": seconds[name][1:],
            "gain": statistics.median(a / b for a, b in zip(seconds["unpruned"][1:], seconds[name][1:], strict=True)),
            **counted.get(name, {}),
        }
    return rows


class Calls:
    """The block calls of one run of a tower, to be repeated in isolation."""

    def __init__(self, tower: nn.Module, blocks: nn.ModuleList) -> None:
        self.calls: list[tuple[nn.Module, tuple, dict]] = []
        self.tower = tower
        self.handles = [
            block.register_forward_pre_hook(lambda m, a, k: self._note(m, a, k), with_kwargs=True) for block in blocks
        ]

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not attention_probe.is_probing():
            self.calls.append((module, args, dict(kwargs)))

    def again(self, pixels: Tensor, states: Tensor) -> None:
        """Patch embedding, blocks on the rows they were given, merger on all rows."""
        tower: Any = self.tower
        tower.patch_embed(pixels)
        for block, args, kwargs in self.calls:
            block.forward(*args, **kwargs)
        tower.merger(states)


def limits(model: nn.Module, inputs: dict[str, Tensor], rounds: int, device: torch.device) -> dict[str, Any]:
    """The cut tower beside the same tower whose later blocks get only the kept rows, method by method."""
    anatomy = vtprune.inspect(model)
    parts = find_parts(anatomy)
    tower, pixels, grid = anatomy.vision_tower, inputs["pixel_values"], inputs["image_grid_thw"]
    rows: dict[str, Any] = {}
    for name in ("Uniform", "Change", "Similar", "Attention", "Pixels"):
        method = getattr(towers, name)(keep=KEEP)
        with vtprune.patch(model, tower=method) as patch:
            calls = Calls(tower, parts.blocks)
            states = tower(pixels, grid).last_hidden_state
            for handle in calls.handles:
                handle.remove()
            assert patch.tower is method
            cut, limit = [], []
            for _ in range(rounds + 1):
                cut.append(timed(lambda: tower(pixels, grid), device))
                with patch.paused():
                    limit.append(timed(lambda calls=calls, states=states: calls.again(pixels, states), device))
        ratio = statistics.median(a / b for a, b in zip(cut[1:], limit[1:], strict=True))
        rows[name] = {
            "block": method.block_of(len(parts.blocks)),
            "seconds": statistics.median(cut[1:]),
            "limit_seconds": statistics.median(limit[1:]),
            "over_limit": ratio - 1,
        }
        print(f"{name:<10} {100 * (ratio - 1):5.1f} % above its limit", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.towers", description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=int, default=4, help="divides every depth and width (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.set_num_threads(1)
    with torch.no_grad():
        model = build(args.scale, device, dtype)
        inputs = prompt(model, device, dtype)
        answers = first_token(model, inputs, args.rounds, device)
        for name, row in answers.items():
            print(
                f"{name:<28} {row['gain']:5.2f}x of unpruned, tower {100 * row['tower_seconds'] / row['seconds']:.0f} %"
            )
        result = {
            "shape": f"Qwen2.5-VL-7B with every depth and width divided by {args.scale}",
            "patches": GRID[0] * GRID[1] * GRID[2],
            "visual_tokens": GRID[0] * GRID[1] * GRID[2] // 4,
            "text_tokens": TEXT,
            "device": args.device,
            "dtype": args.dtype,
            "rounds": args.rounds,
            "clock": "processor time of one thread" if device.type == "cpu" else "wall time",
            "versions": progress.versions(),
            "first_token": answers,
            "towers": limits(model, inputs, args.rounds, device),
        }
    progress.save(args.out, result)
    print(json.dumps({name: round(row["gain"], 2) for name, row in answers.items()}))


if __name__ == "__main__":
    main()
