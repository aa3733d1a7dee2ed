# SPDX-License-Identifier: Apache-2.0
"""Serves a tiny Idefics3 on two tensor-parallel ranks, and writes their answers and those of transformers.

python -m vllm_tests.two_ranks FOLDER RESULT.json METHOD
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vllm_tests import families, plans
from vllm_tests.reference import Reference

from vtprune.integrations.vllm.settings import parse


def main(folder: Path, result: Path, method: str) -> None:
    """Uses one core per rank; the model has one KV head, which both ranks hold."""
    os.environ.update({"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"})
    family, config = families.FAMILIES["idefics3"], {"method": method, "ratio": 0.25}
    family.build(folder)
    requests = plans.requests()
    reference = Reference(folder, parse(config))
    wanted = [reference.answer(family.prompt(r), r, plans.TOKENS) for r in requests]

    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "limit_mm_per_prompt": {"image": 4}}
    options |= {"additional_config": {"vtprune": config}, "disable_log_stats": True}
    llm = LLM(model=str(folder), tensor_parallel_size=2, **options)
    inputs = [
        {"prompt": family.prompt(r), **({"multi_modal_data": {"image": r.pictures()}} if r.images else {})}
        for r in requests
    ]
    outputs = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=plans.TOKENS, ignore_eos=True))
    found = [(len(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]
    result.write_text(json.dumps({"wanted": wanted, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
