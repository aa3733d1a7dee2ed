# SPDX-License-Identifier: Apache-2.0
"""Serves a pruned model with a LoRA adapter of its language model, and writes the answers of the merged model.

python -m vllm_tests.worker_lora FOLDER RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from vllm_tests import families, plans
from vllm_tests.reference import Reference
from vllm_tests.worker import ENVIRONMENT

from vtprune.integrations.vllm.settings import parse

CONFIG = {"method": "divprune", "ratio": 0.25}
RANK = 8


def adapter(base: Path, folder: Path, merged: Path) -> None:
    """Writes a random adapter, and the model with the adapter merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    wanted = r".*text_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=wanted))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    tuned.save_pretrained(folder)
    tuned.merge_and_unload().save_pretrained(merged)
    AutoProcessor.from_pretrained(base).save_pretrained(merged)


def main(folder: Path, result: Path) -> None:
    """Serves requests with and without the adapter in one batch."""
    os.environ.update(ENVIRONMENT)
    family = families.FAMILIES["idefics3"]
    base, lora, merged = (folder / name for name in ("base", "lora", "merged"))
    family.build(base)
    adapter(base, lora, merged)
    requests = plans.requests()
    expected = {}
    for name, place in (("base", base), ("lora", merged)):
        reference = Reference(place, parse(CONFIG))
        expected[name] = [reference.answer(family.prompt(r), r, plans.TOKENS) for r in requests]

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16}
    options |= {"limit_mm_per_prompt": {"image": 4}, "enable_lora": True, "max_lora_rank": RANK}
    options["max_loras"] = 2  # on the CPU vLLM uses the last slot for requests without an adapter, so leave it empty
    llm = LLM(model=str(base), additional_config={"vtprune": CONFIG}, **options)
    inputs = [
        {"prompt": family.prompt(r), **({"multi_modal_data": {"image": r.pictures()}} if r.images else {})}
        for r in requests
    ]
    adapters = [None] * len(requests) + [LoRARequest("tuned", 1, str(lora))] * len(requests)
    sampling = SamplingParams(temperature=0, max_tokens=plans.TOKENS, ignore_eos=True)
    outputs = llm.generate(inputs * 2, sampling, lora_request=adapters, use_tqdm=False)
    found = [(len(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]
    result.write_text(
        json.dumps({"expected": expected, "base": found[: len(requests)], "lora": found[len(requests) :]})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
