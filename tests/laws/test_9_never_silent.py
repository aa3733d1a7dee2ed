# SPDX-License-Identifier: Apache-2.0
"""Law 9: failing to drop visual tokens is an error, text prompts are unchanged, and errors name a remedy."""

import sys
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, IMAGE, Image
from support import LAYOUTS, ONE, Middle, model_of, patched, pruned
from transformers import LlamaConfig, LlamaForCausalLM

import vtprune
from vtprune.methods import Choice, Method, ScoreMethod, Stage, Tokens


def test_text_passes_untouched(family: str, method: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch([[9], [5]])
    logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    with pruned(model, method) as (patch, _):
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(model(**batch, pixel_values=None).logits, logits)  # as collators pass it
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), tokens)
        assert patch.last is None


def test_nothing_dropped(family: str, method: str) -> None:
    """A picture so small that its ratio rounds to all tokens is answered, and the report notes it."""
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    logits = model(**batch).logits
    with patched(model, method, ratio=0.999) as patch:
        assert torch.equal(model(**batch).logits, logits)
        assert [k.tolist() for k in patch.last.kept] == [v.tolist() for v in patch.last.visual]
        assert "no cut" in patch.last.report() and "ratio=0.999" in patch.last.report()


@pytest.mark.parametrize("checked", [True, False], ids=["checked by the model", "unchecked"])
def test_features_without_placeholders(family: str, checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 11)
    if not checked:
        monkeypatch.setattr(sys.modules[type(model).__module__], "torch_compilable_check", lambda *args: None)
    with pruned(model, "random") as (patch, _):
        for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
            # The checks of some models came with later versions of transformers.
            with pytest.raises((ValueError, vtprune.NothingPrunedError) if checked else vtprune.NothingPrunedError):
                call(**batch)
        assert patch.last is None


def test_a_generated_placeholder_is_text(family: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    token = torch.tensor([[IMAGE]])
    with pruned(model, LAYOUTS["steps"], ratio=0.3) as (patch, _):
        cache = model(**batch, use_cache=True).past_key_values
        last = patch.last
        model(input_ids=token, past_key_values=cache)
        assert patch.last is last


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_features_are_named(family: str, bad: float) -> None:
    model, make = model_of(family), FAMILIES[family]
    batch = make.batch([[3, Image(0), 5], [2, Image(0), 3]])
    batch["pixel_values"] = batch["pixel_values"].clone()
    batch["pixel_values"][-1] = bad
    if family in ("llava_next", "llava_onevision"):
        batch["pixel_values"][-1, 0] = bad
    with pruned(model, "random"), pytest.raises(vtprune.MethodError, match="sample 1 hold NaN"):
        model(**batch)


def test_models_without_pictures() -> None:
    text = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    )
    with pytest.raises(vtprune.UnsupportedModelError, match="no vision tower"):
        vtprune.patch(text, ratio=0.5)
    with pytest.raises(vtprune.UnsupportedModelError, match="not a transformers model"):
        vtprune.patch(torch.nn.Linear(2, 2), ratio=0.5)
    with pytest.raises(vtprune.UnsupportedModelError, match="str"):
        vtprune.patch("llava", ratio=0.5)


def test_unknown_methods_name_near_ones() -> None:
    with pytest.raises(vtprune.MethodError, match="did you mean 'random'"):
        vtprune.patch(model_of("llava"), ratio=0.5, method="randon")
    with pytest.raises(vtprune.MethodError, match="expected a name"):
        vtprune.patch(model_of("llava"), ratio=0.5, method=3)


@dataclass
class Greedy(Method):
    """Ignores its budget."""

    def choose(self, tokens: Tokens) -> Choice:
        return Choice(torch.ones(len(tokens), dtype=torch.bool))


@dataclass
class Short(ScoreMethod):
    """Scores the wrong number of tokens."""

    def score(self, tokens: Tokens) -> torch.Tensor:
        return tokens.hidden.norm(dim=-1)[1:]


@dataclass
class Backwards(Middle):
    """Schedules its cuts in the wrong order."""

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return Stage(2, 0.5), Stage(1, 0.2)


def test_methods_that_break_the_rules() -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    for method, message in ((Greedy(), "budget"), (Short(), "one number per visual token")):
        with vtprune.patch(model, ratio=0.5, method=method), pytest.raises(vtprune.MethodError, match=message):
            model(**batch)
    with pytest.raises(vtprune.MethodError, match="ascending"):
        vtprune.patch(model, ratio=0.5, method=Backwards())
    with pytest.raises(vtprune.MethodError, match="before layer 9, but the decoder has 4"):
        vtprune.patch(model, ratio=0.5, method=Middle(layer=9))
