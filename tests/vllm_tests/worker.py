# SPDX-License-Identifier: Apache-2.0
"""Serves one model with vLLM in all its runs, and writes results and expected results.

    python -m vllm_tests.worker MODEL FOLDER RESULT.json [RUN ...]

The engine runs in this process, so that its scheduler can be inspected. References are computed first, because vLLM's
Transformers back end changes classes of transformers.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from vllm_tests import families, plans, reference_mrope
from vllm_tests.plans import Request, Run
from vllm_tests.reference import Reference

from vtprune.integrations.vllm import prompts
from vtprune.integrations.vllm.settings import parse

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
# One thread per process: synchronized threads are slower on shared cores.
ENVIRONMENT |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def main(name: str, folder: Path, result: Path, *chosen: str) -> None:
    """Builds the model, then runs all or the chosen runs."""
    os.environ.update(ENVIRONMENT)
    family = families.FAMILIES[name]
    if not (folder / "config.json").is_file():
        family.build(folder)
    single = family.requests()
    runs = [run for run in family.runs() if not chosen or run.name in chosen]
    start = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models do not benefit from threads
    expected = {run.name: expect(family, folder, run, plans.batch(single)) for run in runs}
    print("references", round(time.monotonic() - start), "s", flush=True)
    torch.set_num_threads(threads)
    out = {}
    for run in runs:
        out[run.name] = {"expected": expected[run.name], **serve(family, folder, run, single)}
        result.write_text(json.dumps(out))


def expect(family: families.Family, folder: Path, run: Run, requests: list[Request]) -> list[dict[str, Any]]:
    """Answers of transformers with the same cut, and the expected number of placeholders of each image."""
    settings = None if run.config is None else parse(run.config)
    reference = (reference_mrope.MRoPEReference if family.mrope else Reference)(folder, settings)
    out = []
    for request in requests:
        text = family.prompt(request)
        length, tokens = reference.answer(text, request, plans.TOKENS)
        images = reference.runs(text, request)
        kept = images if settings is None else [settings.counts(lengths) for lengths in images]
        out.append({"length": length, "tokens": tokens, "images": [[n for n in image if n] for image in kept]})
    return out


def serve(family: families.Family, folder: Path, run: Run, single: list[Request]) -> dict[str, Any]:
    """vLLM's answers to the same requests: one by one, repeated (from the prefix cache), and sixteen at once."""
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16}
    options |= {"block_size": plans.BLOCK, "disable_log_stats": True, "seed": 0}
    options |= {"limit_mm_per_prompt": {"image": 4 if family.several else 1}, **run.engine, **family.engine}
    if run.config is not None:
        options["additional_config"] = {"vtprune": run.config}
    published = folder / "published"  # vLLM and transformers may read different files
    llm = LLM(model=str(published if published.is_dir() else folder), **options)
    blocks = _watch_blocks()
    sampling = SamplingParams(temperature=0, max_tokens=plans.TOKENS, ignore_eos=True)

    def ask(engine: Any, requests: list[Request]) -> list[dict[str, Any]]:
        inputs = []
        for request in requests:
            given: dict[str, Any] = {"prompt": family.prompt(request)}
            if request.data():
                given["multi_modal_data"] = request.data()
            inputs.append(given)
        outputs = engine.generate(inputs, sampling, use_tqdm=False)
        return [_record(output, engine, blocks) for output in outputs]

    alone = [ask(llm, [request])[0] for request in single]
    again = [ask(llm, [request])[0] for request in single]
    llm.reset_prefix_cache()
    out = {"alone": alone, "again": again, "batch": ask(llm, plans.batch(single)), "budget": _budget(llm)}
    out["plugin"] = hasattr(type(llm.llm_engine.vllm_config).__post_init__, "_vtprune_wraps")
    del llm
    _release()
    return out


def _record(output: Any, llm: Any, blocks: dict[str, int]) -> dict[str, Any]:
    ids = output.prompt_token_ids
    config = llm.llm_engine.vllm_config.model_config.hf_config
    media = torch.tensor([config.image_token_id, getattr(config, "video_token_id", config.image_token_id)])
    used = [n for name, n in blocks.items() if name == output.request_id or name.startswith(f"{output.request_id}-")]
    assert len(used) == 1, (output.request_id, list(blocks))
    blocks.clear() if len(blocks) == 1 else None
    return {
        "length": len(ids),
        "tokens": list(output.outputs[0].token_ids),
        "placeholders": prompts.runs_of(torch.isin(torch.tensor(ids), media)),
        "cached": output.num_cached_tokens,
        "blocks": used[0],
    }


def _watch_blocks() -> dict[str, int]:
    """Number of KV cache blocks of each finished request, by request id."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    held: dict[str, int] = {}
    original = getattr(KVCacheManager.free, "original", KVCacheManager.free)

    def free(self: Any, request: Any) -> None:
        held[request.request_id] = len(self.get_block_ids(request.request_id)[0])
        original(self, request)

    free.original = original  # type: ignore[attr-defined]
    KVCacheManager.free = free
    return held


def _budget(llm: Any) -> dict[str, int]:
    """Tokens of the largest image, and the encoder's budgets per step and in its cache."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    budget = MultiModalBudget(llm.llm_engine.vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
    return {
        "image": budget.mm_max_toks_per_item["image"],
        "compute": budget.encoder_compute_budget,
        "cache": budget.encoder_cache_size,
    }


def _release() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
