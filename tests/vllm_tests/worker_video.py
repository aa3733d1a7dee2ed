# SPDX-License-Identifier: Apache-2.0
"""Asks an unpruned and a pruned model about a video: the plug-in leaves videos whole.

python -m vllm_tests.worker_video MODEL FOLDER RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from vllm_tests import families, plans
from vllm_tests.worker import ENVIRONMENT, _release

PROMPT = "word1 <|vision_start|><|video_pad|><|vision_end|> word2 word3"


def main(name: str, folder: Path, result: Path) -> None:
    """The same request with and without pruning."""
    os.environ.update(ENVIRONMENT)
    families.FAMILIES[name].build(folder)
    from vllm import LLM, SamplingParams

    frames = np.random.default_rng(0).integers(0, 255, (4, 48, 64, 3), dtype=np.uint8)
    told = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    told |= {"video_backend": "opencv", "do_sample_frames": False}
    request = {"prompt": PROMPT, "multi_modal_data": {"video": [(frames, told)]}}
    sampling = SamplingParams(temperature=0, max_tokens=plans.TOKENS, ignore_eos=True)
    out: dict[str, Any] = {}
    for key, extra in (("unpruned", {}), ("pruned", {"additional_config": {"vtprune": {"ratio": 0.25}}})):
        llm = LLM(model=str(folder), dtype="float32", enforce_eager=True, max_model_len=1024, **extra)
        answer = llm.generate([request], sampling, use_tqdm=False)[0]
        out[key] = (len(answer.prompt_token_ids), list(answer.outputs[0].token_ids))
        del llm
        _release()
    result.write_text(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
