# SPDX-License-Identifier: Apache-2.0
"""Rows for modes of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from tests.supported.models import METHODS, build, greedy, kept, patched, prompt
from tests.supported.table import row


def _assistant() -> torch.nn.Module:
    """A text model with the main model's vocabulary, for assisted generation."""
    from families import PAD, TEXT
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = TEXT | {"num_hidden_layers": 1, "hidden_size": 16}
    assistant = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    assistant.generation_config.eos_token_id, assistant.generation_config.pad_token_id = None, PAD
    return assistant


def _same(**mode: Any) -> None:
    """Asserts that a generation mode keeps the same tokens and gives the same text as greedy decoding."""
    model, inputs = build(), prompt()
    unpruned = greedy(model, inputs)
    _as_far_as_unpatched(model, inputs, mode)
    for method in METHODS:
        with patched(model, method) as patch:
            want, columns = greedy(model, inputs), kept(patch)
            assert want != unpruned, "pruning did not change the text, so the comparison is vacuous"
            assert greedy(model, inputs, **mode) == want
            assert kept(patch) == columns


def _as_far_as_unpatched(model: torch.nn.Module, inputs: dict[str, Any], mode: dict[str, Any]) -> None:
    """Skips modes that fail unpatched: transformers 5.19 passes pixels to a text assistant, which rejects them."""
    try:
        greedy(model, inputs, **mode)
    except ValueError as error:
        if Version(transformers.__version__) >= Version("5.23"):
            raise
        import pytest

        pytest.skip(f"transformers {transformers.__version__} fails unpatched, too: {error}")


@row("Assisted generation, `assistant_model`")
def assisted(folder: Path) -> None:
    """A text model proposes, the pruned model checks: same kept tokens and same text as without it. The first
    proposal, which would come along with the prompt, is left out."""
    _same(assistant_model=_assistant())


@row("Assisted generation by the model itself")
def itself(folder: Path) -> None:
    """The unpruned model as its own assistant, pictures included; its guesses are often right, so many are accepted."""
    model, inputs = build(), prompt()
    with patched(model) as patch:
        want, columns = greedy(model, inputs), kept(patch)
        assert greedy(model, inputs, assistant_model=build()) == want
        assert kept(patch) == columns


@row("Prompt lookup, `prompt_lookup_num_tokens`")
def lookup(folder: Path) -> None:
    """Same kept tokens and same text as without it."""
    _same(prompt_lookup_num_tokens=3)


class _Collector:
    """A streamer that collects its tokens."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.pieces.append([])


@row("Streamers")
def streamer(folder: Path) -> None:
    """`generate(streamer=...)` hands out the tokens of the pruned model one by one."""
    model, inputs = build(), prompt()
    with patched(model) as patch:
        collector = _Collector()
        want = greedy(model, inputs, streamer=collector)
        kept(patch)
    assert [token for piece in collector.pieces[1:] for token in piece] == want[0]


@row('`pipeline("image-text-to-text")`')
def pipeline(folder: Path) -> None:
    """The built-in model in a pipeline answers as its own `generate` does with the same tokens kept."""
    from vtprune import refvlm

    model, processor = refvlm.load()
    scene = refvlm.scenes.scene(7)
    text = refvlm.prompt(scene.questions[0].text)
    inputs = processor(images=scene.image, text=text, return_tensors="pt")
    made = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    with patched(model) as patch, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        columns = kept(patch)
        settings = {"max_new_tokens": 4, "do_sample": False}
        generated = made(images=scene.image, text=text, return_full_text=False, generate_kwargs=settings)
        assert kept(patch) == columns
    assert generated[0]["generated_text"].strip() == processor.decode(out, skip_special_tokens=True).strip()
