# SPDX-License-Identifier: Apache-2.0
"""Decoders that mix neighboring columns regardless of masks: padding inside a row has the same effect in a batch."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Image

import vtprune
from tests.architectures import build, prompts, run


@pytest.mark.parametrize("method", ["uniform", "divprune"])
@torch.no_grad()
def test_an_answer_behind_right_padding(method: str) -> None:
    names = run.registered()
    if "lfm3_vl" not in names:
        pytest.skip("this transformers has no LFM3-VL")
    torch.manual_seed(0)
    model = build.widen(build.build("lfm3_vl", names["lfm3_vl"]).model).eval()
    parts = vtprune.inspect(model)
    assert parts.mixes_columns
    made = prompts.prompts_for(model, parts.placeholders)
    short, long = [3, prompts.IMAGE, 4], [8, prompts.IMAGE, 12]
    one, both = made.batch([short]), made.batch([short, long], "right")
    pad, answer = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[20, 21, 22]])
    row = torch.cat([one["input_ids"], pad, answer], 1)
    mask = torch.cat([one["attention_mask"], pad, torch.ones_like(answer)], 1)
    alone = one | {"input_ids": row, "attention_mask": mask}
    for name, value in (("input_ids", row), ("attention_mask", mask)):
        both[name][0] = 0
        both[name][0, : row.shape[1]] = value[0]
    end = row.shape[1]
    with vtprune.patch(model, ratio=0.3, method=method) as patch:
        want = model(**alone).logits[0, -3:]
        kept = patch.last.kept[0].tolist()
        got = model(**both).logits[0, end - 3 : end]
        assert patch.last.kept[0].tolist() == kept
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [-1e4, -1e9, float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("method", ["uniform", "iwp"])
@torch.no_grad()
def test_float_masks_hide_by_any_low_value(method: str, low: float) -> None:
    """A prepared mask `[B, 1, T, T]` has the effect of the mask of padding that it was made from."""
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch([[3, Image(0), 5], [1, Image(0), 1]], "right")
    real = batch["attention_mask"].bool()
    seen = torch.ones(real.shape[1:] * 2, dtype=torch.bool).tril() & real[:, None, :]
    prepared = torch.zeros(seen.shape).masked_fill(~seen, low)[:, None]
    with vtprune.patch(model, ratio=0.3, method=method) as patch:
        want = model(**batch).logits[real]
        kept = [columns.tolist() for columns in patch.last.kept]
        got = model(**batch | {"attention_mask": prepared}).logits[real]
        assert [columns.tolist() for columns in patch.last.kept] == kept
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sees", ["itself", "everything"])
@pytest.mark.parametrize("method", ["uniform", "iwp", "debiased"])
@torch.no_grad()
def test_what_padding_sees_does_not_matter(method: str, sees: str, side: str) -> None:
    """Queries of padding that see something, so that softmax stays finite, make no difference to real tokens."""
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch([[3, Image(0), 5], [1, Image(0), 1], [4]], side)
    real = batch["attention_mask"].bool()
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, :]
    other = torch.eye(length, dtype=torch.bool) if sees == "itself" else torch.ones(1, dtype=torch.bool)
    prepared = torch.where(real[:, :, None], causal, other)[:, None]
    places = {"position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    with vtprune.patch(model, ratio=0.3, method=method) as patch:
        want = model(**batch, **places).logits[real]
        kept = [columns.tolist() for columns in patch.last.kept]
        got = model(**batch | {"attention_mask": prepared}, **places).logits[real]
        assert [columns.tolist() for columns in patch.last.kept] == kept
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
