# SPDX-License-Identifier: Apache-2.0
"""Random prompts: budgets are exact, kept tokens are visual and in order, and samples alone equal batched ones.

`VTPRUNE_CASES` sets the number of prompts; `make soak` draws more, and different ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import CASES, Case, cases, model_of, profile
from families import FAMILIES, IMAGE, LAYERS, VIDEO, Image, Video
from hypothesis import event, given

import vtprune


def check(case: Case) -> None:
    """Runs a batch and each of its samples alone, and compares."""
    event(f"method {case.method.name or 'drawn schedule'}")
    model, batch = model_of(case.family), _batch(case, case.prompts, case.padding)
    plain = model(**batch).logits
    try:
        patch = vtprune.patch(model, method=case.method, tower=case.tower, **dict([case.budget]))
    except vtprune.VTPruneError as error:
        raise AssertionError(f"refused when patched: {error}") from error
    with patch:
        pictures = [sum(isinstance(part, Image | Video) for part in prompt) for prompt in case.prompts]
        if not any(pictures):
            event("text only")
            assert torch.equal(model(**batch).logits, plain) and patch.last is None
            return
        visual = _visual(batch)
        try:
            together = model(**batch).logits
        except vtprune.NothingPrunedError:
            event("rounds to all")
            assert case.tower is not None or _rounds_to_all(case, [len(v) for v in visual])
            return
        last = patch.last
        assert last is not None
        check_sets(case, last, visual)
        if case.budget == ("ratio", 1.0) and case.tower is None:
            assert torch.equal(together, plain)
        check_alone(case, model, patch, last, batch, together)


def check_sets(case: Case, last: Any, visual: list[torch.Tensor]) -> None:
    """Checks number, columns and order of the kept tokens."""
    images = last.places.image.split(last.places.counts)
    assert [v.tolist() for v in last.visual] == [v.tolist() for v in visual]
    before = last.visual
    for _, kept in last.stages:
        for mine, ahead in zip(kept, before, strict=True):
            assert bool((mine.diff() > 0).all()) and bool(torch.isin(mine, ahead).all())
        before = kept
    if last.stages:
        assert [k.tolist() for k in before] == [k.tolist() for k in last.kept]
    for row, (mine, kept, image) in enumerate(zip(visual, last.kept, images, strict=True)):
        pools = [len(mine)] if case.method.group == "sample" else torch.unique(image, return_counts=True)[1].tolist()
        pools = [size for size in pools if size]
        kind, wanted = case.budget
        if kind == "ratio":
            assert len(kept) == sum(max(1, round(wanted * size)) for size in pools)
        elif kind == "keep":
            assert len(kept) == min(wanted, len(mine))
        elif pools:
            check_mean(case, last, row, len(mine), len(pools))


def check_mean(case: Case, last: Any, row: int, total: int, pools: int) -> None:
    """Checks the mean ratio over layer inputs, to within one token per pool (counts are integers)."""
    cuts = {layer: len(kept[row]) for layer, kept in last.stages}
    left, seen = total, []
    for layer in range(LAYERS):
        left = cuts.get(layer, left)
        seen.append(left)
    assert abs(sum(seen) / LAYERS / total - case.budget[1]) < pools / total


def check_alone(
    case: Case, model: torch.nn.Module, patch: vtprune.Patch, last: Any, batch: dict, together: torch.Tensor
) -> None:
    """Checks that every sample of the batch has the same kept set and logits as alone."""
    for row, prompt in enumerate(case.prompts):
        single = _batch(case, [prompt], "left")
        real = batch["attention_mask"][row].bool()
        offset = int(real.nonzero()[0])
        if not any(isinstance(part, Image | Video) for part in prompt):
            assert len(last.visual[row]) == len(last.kept[row]) == 0
        try:
            alone = model(**single).logits[0]
        except vtprune.NothingPrunedError:
            # Too few tokens, or patches, to drop any.
            assert case.tower is not None or torch.equal(last.kept[row], last.visual[row])
            continue
        if len(last.visual[row]):
            assert patch.last is not None and patch.last is not last
            assert patch.last.visual[0].tolist() == (last.visual[row] - offset).tolist()
            assert patch.last.kept[0].tolist() == (last.kept[row] - offset).tolist()
        # Rotary embeddings and the merging of some methods compute in float32 at any model precision.
        torch.testing.assert_close(together[row][real], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


def _batch(case: Case, rows: Any, padding: str) -> dict[str, torch.Tensor]:
    return case.make.batch(rows, padding, seed=case.seed, dtype=torch.float64)


def _visual(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Columns of placeholder tokens, per row."""
    placeholder = (batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)
    return [row.nonzero()[:, 0] for row in placeholder]


def _rounds_to_all(case: Case, sizes: list[int]) -> bool:
    """Whether the ratio rounds to all tokens in every pool (pictures have at least four tokens)."""
    sizes = [4] if case.method.group == "image" else [n for n in sizes if n]
    return case.budget[0] != "keep" and all(max(1, round(case.budget[1] * n)) == n for n in sizes)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_prompts(family: str) -> None:
    profile(max(1, CASES // len(FAMILIES)))(given(case=cases(family))(check))()
