# SPDX-License-Identifier: Apache-2.0
"""Law 10: the same kept set whatever computes attention; nothing needs eager attention or attention maps."""

from __future__ import annotations

from typing import Any

import pytest
from families import FAMILIES
from support import MIXED, model_of, pruned
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
    """No call gets `output_attentions`, and no tensor of the size of an attention map is made while deciding."""
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
