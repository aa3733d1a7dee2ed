# SPDX-License-Identifier: Apache-2.0
"""Law 12 for every optional argument of `forward` and `generate`: with text, with a picture and while decoding."""

from __future__ import annotations

import inspect

import arguments
import pytest
import torch
from arguments import Subject
from families import FAMILIES, IMAGE, TEXT
from reference import Drops
from support import ONE, model_of, reference
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("no_grad")


def subject_of(family: str) -> Subject:
    model, make = model_of(family), FAMILIES[family]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    batch = make.batch(ONE)
    return Subject(
        model,
        picture=lambda: make.batch(ONE),
        text=lambda: make.batch([[9]]),
        placeholder=IMAGE,
        masked=lambda last: reference(model, [Drops.of(last)], batch),
    )


def faults(outcomes: dict[str, str], refused: tuple[str, ...] = ()) -> dict[str, str]:
    """Outcomes other than an equal result, except refusals of the arguments in `refused`."""
    assert sum(outcome == "equal" for outcome in outcomes.values()) > 50
    allowed = {what for what, outcome in outcomes.items() if outcome.startswith("refused") and what.startswith(refused)}
    return {what: outcome for what, outcome in outcomes.items() if outcome != "equal" and what not in allowed}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_forward(family: str) -> None:
    assert faults(dict(arguments.forward_outcomes(subject_of(family)))) == {}


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_generate(family: str) -> None:
    torch.manual_seed(0)
    assistant = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 2})).eval()
    assistant.generation_config.eos_token_id = None
    outcomes = dict(arguments.generate_outcomes(subject_of(family), assistant))
    assert faults(outcomes, refused=("generate(prefill_chunk_size",)) == {}


def test_every_setting_of_generate_is_listed() -> None:
    known = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    assert known - set(arguments.settings(torch.nn.Identity())) - set(arguments.LEFT_OUT) == set()
