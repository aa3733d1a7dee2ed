# SPDX-License-Identifier: Apache-2.0
"""Law 10: the kept set is the same under every attention implementation; none needs attention maps."""

from __future__ import annotations

from typing import Any

import pytest
import stand_ins  # noqa: F401  (registers the replacements)
import torch
from families import FAMILIES
from support import LAYOUTS, MIXED, ONE, model_of, pruned, survivors
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def test_same_kept_set(family: str, method: str) -> None:
    batch = FAMILIES[family].batch(MIXED)
    kept = []
    for attention in ("sdpa", "eager"):
        model = model_of(family, attention)
        with pruned(model, method) as (patch, _):
            model(**batch)
            kept.append([k.tolist() for k in patch.last.kept])
    assert kept[0] == kept[1]


def test_no_attention_map_is_asked_for(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection never requests `output_attentions` and allocates no tensor of the size of an attention map."""
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("output_attentions"))
        return sdpa(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", watched)
    with pruned(model, method):
        out = model(**batch)
    assert calls and not any(calls)
    assert getattr(out, "attentions", None) is None


@pytest.mark.parametrize("kind", ["keys_stand_in", "flex_stand_in"])
def test_masks_of_flash_and_flex_attention(family: str, layout: str, kind: str) -> None:
    """Logits, kept sets and generated tokens equal those under sdpa, with masks in the kernels' own formats."""
    make = FAMILIES[family]
    plain, other = model_of(family), make.build(kind)
    for prompts in (ONE, MIXED):
        batch = make.batch(prompts)
        seen = []
        for model in (plain, other):
            with pruned(model, LAYOUTS[layout], ratio=0.3) as (patch, spy):
                logits = model(**batch).logits
                drops = [spy.drops()]
                tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
                seen.append((logits, [k.tolist() for k in patch.last.kept], tokens.tolist()))
        alive = survivors(drops, batch)
        torch.testing.assert_close(seen[0][0][alive], seen[1][0][alive], rtol=1e-4, atol=1e-4)
        assert seen[0][1:] == seen[1][1:]
