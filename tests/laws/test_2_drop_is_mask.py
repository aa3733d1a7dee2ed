# SPDX-License-Identifier: Apache-2.0
"""Law 2: a cut before layer k equals the unpatched model with the dropped tokens masked from layer k on."""

import pytest
import torch
from families import FAMILIES
from support import CLIP, LAYOUTS, MIXED, ONE, model_of, pruned, reference, survivors

from vtprune.methods import ResPrune


def check(model: torch.nn.Module, method: object, batch: dict, **budget: object) -> None:
    with pruned(model, method, **budget) as (patch, spy):
        out = model(**batch, output_hidden_states=True)
        drops = [spy.drops()]
        assert sum(map(len, patch.last.kept)) < sum(map(len, patch.last.visual))
    with reference(model, drops, batch):
        expected = model(**batch, output_hidden_states=True)
    alive = survivors(drops, batch)
    torch.testing.assert_close(
        out.logits[alive], expected.logits[alive], rtol=1e-5, atol=1e-5 * expected.logits.abs().max()
    )
    assert len(out.hidden_states) == len(expected.hidden_states)
    for got, want in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(got[alive], want[alive], rtol=1e-4, atol=1e-5 * want.abs().max())
    dropped = ~alive & batch["attention_mask"].bool()
    assert not out.hidden_states[-1][dropped].any()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_methods(family: str, method: str, padding: str) -> None:
    check(model_of(family), method, FAMILIES[family].batch(MIXED, padding))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_the_default_in_deep_decoders(name: str) -> None:
    """In deep decoders, where the default cuts before layer 1 instead of before the decoder, the law holds."""
    check(model_of(name), ResPrune(layer=1), FAMILIES[name].batch(MIXED))


def test_layouts(family: str, layout: str, attention: str) -> None:
    model = model_of(family, attention)
    for prompts in (ONE, MIXED):
        check(model, LAYOUTS[layout], FAMILIES[family].batch(prompts), ratio=0.3)


def test_video(family: str, method: str) -> None:
    if FAMILIES[family].video is None:
        pytest.skip("this family takes no video")
    check(model_of(family), method, FAMILIES[family].batch(CLIP))


def test_bfloat16(family: str, layout: str) -> None:
    model = model_of(family, dtype=torch.bfloat16)
    batch = FAMILIES[family].batch(MIXED, dtype=torch.bfloat16)
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (_, spy):
        got = model(**batch).logits.float()
        drops = [spy.drops()]
    with reference(model, drops, batch):
        want = model(**batch).logits.float()
    alive = survivors(drops, batch)
    assert (got - want)[alive].abs().max() < 0.05 * want.abs().max()


def test_without_cache(family: str, layout: str) -> None:
    check(model_of(family), LAYOUTS[layout], FAMILIES[family].batch(ONE) | {"use_cache": False}, ratio=0.3)
