# SPDX-License-Identifier: Apache-2.0
"""Sliding windows that always include the prompt (Unlimited-OCR): pruned answers longer than the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.architectures import checks, prompts, run

NAME = "unlimited_ocr"
if NAME not in run.registered():
    pytest.skip("this transformers has no Unlimited-OCR", allow_module_level=True)


@pytest.fixture(scope="module")
def subject() -> checks.Subject:
    built, made = run.prepare(NAME, run.registered()[NAME])
    return checks.Subject(built.model, made)


pytestmark = pytest.mark.usefixtures("no_grad")


def window(subject: checks.Subject) -> int:
    return subject.model.config.get_text_config().sliding_window


def generate(subject: checks.Subject, batch: dict[str, Any], count: int, **more: Any) -> tuple[torch.Tensor, ...]:
    """Tokens and logits of greedy steps."""
    given = {"do_sample": False, "suppress_tokens": list(range(64)), "output_logits": True}
    out = subject.model.generate(
        **checks.fresh(batch), max_new_tokens=count, return_dict_in_generate=True, **{**given, **more}
    )
    return out.sequences[:, -count:], torch.stack(out.logits, 1)


@pytest.mark.parametrize("method", ["uniform", vtprune.methods.FastV(layer=2)], ids=["input", "inside"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_answers_longer_than_the_window(subject: checks.Subject, method: Any, cache: str) -> None:
    count, batch = window(subject) + 30, subject.one
    with vtprune.patch(subject.model, ratio=0.3, method=method) as patch:
        tokens, got = generate(subject, batch, count, cache_implementation=cache)
        last = patch.last
    with subject.reference(last):
        same, want = generate(subject, batch, count)
    assert torch.equal(tokens, same)
    checks._close(got, want, "a window beside the prompt")


def test_padded_rows_answer_as_alone(subject: checks.Subject) -> None:
    """A padded row answers as alone. (Not so unpruned: transformers misreads the padding once the window has moved.)"""
    count, both = window(subject) + 30, subject.prompts.batch(prompts.TWO)
    with vtprune.patch(subject.model, ratio=0.3, method="uniform"):
        alone, want = generate(subject, subject.one, count)
        together, got = generate(subject, both, count)
    assert torch.equal(together[:1], alone)
    checks._close(got[:1], want, "a window beside a padded prompt")


@pytest.mark.parametrize("before", [3, 25], ids=["filled by the turn", "already moved"])
def test_turns_longer_than_the_window(subject: checks.Subject, before: int) -> None:
    model, turn = subject.model, torch.arange(70, 70 + window(subject) + 5)[None]
    steps = torch.arange(100, 100 + before)[None]

    def chat() -> torch.Tensor:
        cache = model(**checks.fresh(subject.one), use_cache=True).past_key_values
        for token in steps[0]:
            model(input_ids=token[None, None], past_key_values=cache)
        logits = [model(input_ids=turn, past_key_values=cache).logits[0]]
        return torch.cat([*logits, model(input_ids=turn[:, :1], past_key_values=cache).logits[0]])

    with vtprune.patch(model, ratio=0.3, method="uniform") as patch:
        got, last = chat(), patch.last
    with subject.reference(last):
        want = chat()
    checks._close(got, want, "a turn beside the prompt")


def test_pictures_of_later_turns_are_refused(subject: checks.Subject) -> None:
    with vtprune.patch(subject.model, ratio=0.3, method="uniform") as patch:
        cache = subject.model(**checks.fresh(subject.one), use_cache=True).past_key_values
        more = subject.prompts.batch(prompts.ONE)
        more.pop("attention_mask", None)
        with pytest.raises(vtprune.UnsupportedModelError, match="later turns"), patch.using(ratio=0.5):
            subject.model(**checks.fresh(more), past_key_values=cache)
