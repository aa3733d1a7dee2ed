# SPDX-License-Identifier: Apache-2.0
"""Pruned models in vLLM: a general plug-in that does nothing until it is configured.

    vllm serve MODEL --additional-config '{"vtprune": {"method": "divprune", "ratio": 0.25}}'
    LLM(MODEL, additional_config={"vtprune": {"method": "divprune", "ratio": 0.25}})

Every image, and with M-RoPE every clip, then gets fewer placeholders in its prompt (`prompts`), and as many of its
features are chosen between the projector and the decoder (`selection`), by the methods and kernels of the transformers
path. Scheduling, prefix cache, tensor and data parallelism stay vLLM's own: it sees shorter prompts, nothing else.
`hooks` is where the two meet.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of the group `vllm.general_plugins`, called in every process of vLLM; may be called again."""
    from . import hooks

    hooks.install()
