# SPDX-License-Identifier: Apache-2.0
"""Clips in vLLM, pruned by the plug-in and by vLLM itself: writes `benchmarks/results/vllm-videos.json`.

    python -m benchmarks.vllm_videos              # in the environment of `make test-vllm`
    python -m benchmarks.vllm_videos --clips 2 --out /tmp/videos.json

Both models need torchvision, or `tests/vllm_tests/torchvision_ops` in PYTHONPATH: the built-in Qwen2.5-VL, and a random
Qwen3-VL, the only class for which vLLM has VidCom2. All engines of a model run in one process and alternate on the same
clips, at the same number of tokens. Recorded are prompt tokens, KL of the next token to the unpruned engine's, equal
and right answers, and CPU time of a request (from frames to the last token) relative to the unpruned engine.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import serving
from vtprune import refvlm
from vtprune.refvlm import clips, qwen
from vtprune.study import intervals, progress

OUT = Path(__file__).resolve().parent / "results" / "vllm-videos.json"
SHARE, GRID, STEPS = 0.3, (8, 8), 5  # 96 of 320 tokens; EVS always keeps the first 64
LENGTH = 1024  # limit of prompt and answer tokens
WARM = 2  # warm-up clips
PUBLISHED = {  # tokens that vLLM's class for Qwen3-VL writes into prompts
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
ANSWER = 4  # tokens generated for each clip
OWN = ("evs", "vidcom2", "vcast", "resprune")
MODELS = {"Qwen2.5-VL, built in": ("evs",), "Qwen3-VL, random weights": ("evs", "vidcom2")}  # with vLLM's own methods
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
ENVIRONMENT |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def engines(model: str) -> dict[str, dict[str, Any]]:
    """Options of `LLM` of each engine, by name."""
    theirs = {
        f"vLLM: {name}": {"video_pruning_rate": 1 - SHARE, "video_pruning_method": name} for name in MODELS[model]
    }
    ours = {
        f"vtprune: {name}": {"additional_config": {"vtprune": {"ratio": SHARE, "video_method": name}}} for name in OWN
    }
    return {"unpruned": {}, **theirs, **ours}


def marks(model: str) -> dict[str, str]:
    """The placeholder and tag tokens of a model."""
    return PUBLISHED if model.startswith("Qwen3") else {name: f"<{name}>" for name in PUBLISHED}


def save(folder: Path, model: str) -> None:
    """Writes a model for vLLM: weights, tokenizer, and a transformers processor with video support."""
    import torch
    import transformers

    source = refvlm.MODELS["qwen2_5_vl"]
    special = {f"{name}_token": word for name, word in marks(model).items()}
    words = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, extra_special_tokens=special)
    config = transformers.Qwen2_5_VLConfig.from_pretrained(source, local_files_only=True)
    config.text_config.max_position_embeddings = LENGTH  # positions have no weights
    kind = "Qwen3VL" if model.startswith("Qwen3") else "Qwen2_5_VL"
    if kind == "Qwen2_5_VL":
        shutil.copy(source / "model.safetensors", folder)
        config.save_pretrained(folder)
    else:
        torch.manual_seed(0)
        random = transformers.Qwen3VLForConditionalGeneration(_qwen3(words)).float().eval()
        with torch.no_grad():
            for parameter in random.parameters():  # larger weights, so that different clips get different answers
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.1)
        random.save_pretrained(folder)
    grid = {"patch_size": qwen.PATCH_SIZE, "temporal_patch_size": 2, "merge_size": qwen.MERGE_SIZE}
    grid |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    grid["size"] = {"shortest_edge": qwen.CELL**2, "longest_edge": 2 * STEPS * math.prod(GRID) * qwen.CELL**2}
    videos = transformers.Qwen3VLVideoProcessor if kind == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    images = transformers.Qwen2VLImageProcessor(**grid)
    getattr(transformers, f"{kind}Processor")(
        image_processor=images, tokenizer=words, video_processor=videos(**grid)
    ).save_pretrained(folder)


def _qwen3(words: Any) -> Any:
    """Configuration of a Qwen3-VL with the built-in tower's patches and a decoder of twelve layers."""
    from transformers import Qwen3VLConfig

    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    media = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in PUBLISHED}
    vision = {"depth": 4, "hidden_size": 128, "intermediate_size": 320, "num_heads": 4, "out_hidden_size": 192}
    vision |= {"patch_size": qwen.PATCH_SIZE, "spatial_merge_size": qwen.MERGE_SIZE, "temporal_patch_size": 2}
    vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [1, 2]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {"hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 12, "num_attention_heads": 6}
    text |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": LENGTH, "rope_parameters": rope}
    text |= {"vocab_size": len(words), "tie_word_embeddings": False, **ids}
    return Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **media)


def start(folder: Path, options: dict[str, Any]) -> Any:
    """An engine in this process."""
    from vllm import LLM

    common = {"dtype": "float32", "enforce_eager": True, "max_model_len": LENGTH, "max_num_seqs": 1, "seed": 0}
    common |= {"block_size": 32, "num_gpu_blocks_override": 2 * LENGTH // 32}  # all engines share memory
    common |= {"enable_prefix_caching": False, "disable_log_stats": True, "max_logprobs": -1, "skip_mm_profiling": True}
    llm = LLM(model=str(folder), limit_mm_per_prompt={"image": 0, "video": 1}, **common, **options)
    if "video_pruning_rate" in options:  # read by vLLM's GPU runner, but not by its CPU runner
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        runner.is_multimodal_pruning_enabled = True
    return llm


def answer(llm: Any, model: str, clip: clips.Clip) -> dict[str, Any]:
    """An engine's answer to a clip, and its CPU time."""
    from vllm import SamplingParams

    frames = np.stack([np.asarray(frame) for frame in clip.frames])
    facts = {"fps": 2.0, "duration": len(frames) / 2, "total_num_frames": len(frames), "video_backend": "opencv"}
    facts |= {"frames_indices": list(range(len(frames))), "do_sample_frames": False}
    word = marks(model)
    # Qwen3-VL writes tags around each frame. With further tags around the clip, vLLM's own pruning mistakes the first
    # for that of a frame, and fails if little text precedes it (vLLM 0.32, transformers 5.19).
    seen = word["video"] if word is PUBLISHED else "{vision_start}{video}{vision_end}".format(**word)
    text = f"{seen} {clip.questions[0].text} answer:"
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, logprobs=-1)
    begin = time.process_time()
    out = llm.generate([{"prompt": text, "multi_modal_data": {"video": [(frames, facts)]}}], sampling, use_tqdm=False)
    spent = time.process_time() - begin
    answer = out[0].outputs[0]
    return {
        "tokens": len(out[0].prompt_token_ids),
        "said": answer.text.split("<eos>")[0].strip(),
        "logprobs": {token: entry.logprob for token, entry in answer.logprobs[0].items()},
        "seconds": spent,
    }


def summary(name: str, found: list[dict[str, Any]], whole: list[dict[str, Any]], asked: list[clips.Clip]) -> dict:
    """The row of an engine: means over clips, with 95 % intervals."""
    kl = [
        sum(math.exp(p) * (p - mine["logprobs"][token]) for token, p in full["logprobs"].items())
        for mine, full in zip(found, whole, strict=True)
    ]
    times = [mine["seconds"] / full["seconds"] for mine, full in zip(found, whole, strict=True)]
    return {
        "engine": name,
        "tokens": statistics.mean(mine["tokens"] for mine in found),
        "kl": statistics.mean(kl),
        "kl_interval": list(intervals.bootstrap(kl)),
        "same": sum(mine["said"] == full["said"] for mine, full in zip(found, whole, strict=True)),
        "right": sum(mine["said"] == clip.questions[0].answer for mine, clip in zip(found, asked, strict=True)),
        "time": statistics.median(times),
        "time_quartiles": [float(bound) for bound in np.quantile(times, (0.25, 0.75))],
    }


def measure(model: str, count: int) -> dict[str, Any]:
    """Measures all engines of a model on the same clips."""
    asked = [clips.clip(number, GRID, STEPS) for number in range(count + WARM)]
    with tempfile.TemporaryDirectory() as place:
        save(Path(place), model)
        running = {name: start(Path(place), options) for name, options in engines(model).items()}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for clip in asked:
            for name, llm in running.items():
                found[name].append(answer(llm, model, clip))
    whole = found["unpruned"][WARM:]
    rows = [summary(name, answers[WARM:], whole, asked[WARM:]) for name, answers in found.items()]
    return {"model": model, "trained": not model.startswith("Qwen3"), "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    data: dict[str, Any] = {
        "clips": args.clips,
        "visual_tokens": STEPS * math.prod(GRID),
        "share": SHARE,
        "weights_sha256": refvlm.weights_sha256("qwen2_5_vl"),
        "versions": {**progress.versions(), **serving.vllm_version()},
        "machine": f"{os.cpu_count()} {platform.machine()} cores, one thread, float32",
        "load": progress.load_average(),
        "models": [],
    }
    for model in MODELS:
        data["models"].append(measure(model, args.clips))
    progress.save(args.out, data)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
