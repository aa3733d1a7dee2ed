# SPDX-License-Identifier: Apache-2.0
"""T6: from the cut on, a cut tower costs as much as a tower run on the kept rows only.

Cost is counted in floating-point operations of matrix products, which are the same on every machine;
benchmarks/towers.py measures time.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from families import FAMILIES
from support import MIXED, model_of
from torch.utils.flop_counter import FlopCounterMode
from tower_reference import blocks_of, prefix_of

import vtprune
from vtprune import towers
from vtprune.towers.embedding import EarlyChoice
from vtprune.towers.structure import find_parts


def tower_flops(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[int, list[int], list[int]]:
    """Total floating-point operations of the blocks, and the operations and rows of each."""
    blocks = blocks_of(vtprune.inspect(model).vision_tower)
    flops, rows, counters = [0] * len(blocks), [0] * len(blocks), {}
    handles = []
    for number, block in enumerate(blocks):

        def enter(module: Any, args: tuple, kwargs: dict, number: int = number) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            rows[number] += states.shape[:-1].numel()
            counters[number] = FlopCounterMode(display=False)
            counters[number].__enter__()

        def leave(module: Any, args: tuple, kwargs: dict, output: Any, number: int = number) -> None:
            counters[number].__exit__(None, None, None)
            flops[number] += counters[number].get_total_flops()

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        # Runs before the hook of the cut, whose rebuilding of rows is not counted.
        handles.append(block.register_forward_hook(leave, with_kwargs=True, prepend=True))
    model(**batch)
    for handle in handles:
        handle.remove()
    return sum(flops), flops, rows


@pytest.mark.parametrize("name", ["Change", "Similar", "Uniform"])
def test_later_blocks_run_on_kept_rows_only(family: str, name: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    _, whole, rows = tower_flops(model, batch)
    with vtprune.patch(model, tower=getattr(towers, name)(keep=0.3)) as patch:
        _, cut, left = tower_flops(model, batch)
        runs = patch.last.tower_runs
    prefix = prefix_of(vtprune.inspect(model).vision_tower)
    kept = sum(len(k) for run in runs for k in run.kept)
    entries = sum(len(run.kept) for run in runs) * prefix
    for number, (before, after) in enumerate(zip(whole, cut, strict=True)):
        if number < runs[0].block:
            assert after == before and left[number] == rows[number]
        else:
            assert left[number] == kept + entries
            assert after <= 1.001 * before * left[number] / rows[number], "linear in the rows, less for attention"


def test_the_report_counts_what_runs(family: str) -> None:
    """Reported multiply-adds are half of the counted operations of the blocks (fused attention is not counted)."""
    model, batch = model_of(family, "eager"), FAMILIES[family].batch(MIXED)
    with vtprune.patch(model, tower=towers.Uniform(keep=0.3)) as patch:
        total, _, _ = tower_flops(model, batch)
        runs = patch.last.tower_runs
        whole = sum(work.flops[0] for run in runs for work in run.work)
        counted = sum(work.flops[1] for run in runs for work in run.work)
    assert counted == pytest.approx(total / 2, rel=1e-3)
    assert whole == pytest.approx(tower_flops(model, batch)[0] / 2, rel=1e-3)


def test_shares_of_the_first_token(family: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    with vtprune.patch(model, ratio=0.2, method="random", tower=0.3) as patch:
        model(**batch)
        tower, text = patch.last.tower, patch.last.report()
    (before, after), (share, share_after) = tower.flops, tower.share
    assert 0 < after < before and 0 < share < 1 and 0 < share_after < 1
    assert tower.bound == pytest.approx((after + tower.rest[0]) / after)
    assert f"at most {tower.bound:.1f}x" in text and "vision tower" in text
    with vtprune.patch(model, ratio=0.2, method="random") as patch:
        model(**batch)
        alone = patch.last.tower
    assert alone.flops[0] == alone.flops[1] and alone.bound == pytest.approx(1 / alone.share[0])
    assert "not cut" in patch.last.report()
    assert alone.flops[0] == pytest.approx(before, rel=0.02)  # class tokens count as patches where nothing is cut


@pytest.mark.parametrize("name", ["Similar", "Pixels"])
def test_mergers_run_on_kept_groups_where_the_others_are_copies(family: str, name: str) -> None:
    """Mergers skip copied merge groups, and the visual tokens equal those of a merger run on all groups."""
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    tower = vtprune.inspect(model).vision_tower
    mergers = [m for n, m in tower.named_modules() if re.fullmatch(r"merger|deepstack_merger_list\.\d+", n)]
    rows, merged, ran = [], [], []
    with contextlib.ExitStack() as stack:
        for merger in mergers:
            linear = [m for m in merger.modules() if isinstance(m, torch.nn.Linear)][-1]
            stack.callback(linear.register_forward_hook(lambda m, a, o: ran.append(len(o))).remove)
            stack.callback(merger.register_forward_pre_hook(lambda m, a: rows.append((m, a[0]))).remove)
            stack.callback(merger.register_forward_hook(lambda m, a, o: merged.append(o)).remove)
        with vtprune.patch(model, tower=getattr(towers, name)(keep=0.3)) as patch:
            model(**batch)  # the first call checks that the mergers treat groups independently
            ran.clear(), rows.clear(), merged.clear()
            model(**batch)
            run = patch.last.tower_runs[0]
    group = vtprune.inspect(model).config.vision_config.spatial_merge_size ** 2 if mergers else 1
    kept, all_groups = sum(map(len, run.kept)) // group, sum(run.patches) // group
    assert ran == [kept] * len(mergers)
    for (merger, states), tokens in zip(rows, merged, strict=True):
        torch.testing.assert_close(tokens, merger(states), rtol=1e-5, atol=1e-5)
    weights = sum(p.numel() for merger in mergers for p in merger.parameters() if p.dim() > 1)
    parts = find_parts(vtprune.inspect(model))
    embedded = parts.embedding_weights * group if name == "Pixels" and mergers else 0
    assert run.spared == (all_groups - kept) * (weights + embedded)
    assert run.flops[0] - run.flops[1] >= run.spared


def test_the_patch_embedding_runs_on_kept_patches_where_pixels_select_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept sets and states are unchanged, also where the order of patches is known only at the first block."""
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    tower = vtprune.inspect(model).vision_tower
    embedding = next(
        (m for n, m in tower.named_modules() if n == "patch_embed" and hasattr(tower, "spatial_merge_size")), None
    )
    embedded: list[int] = []
    with contextlib.ExitStack() as stack:
        if embedding is not None:
            stack.callback(
                embedding.register_forward_hook(lambda m, a, o: embedded.append(len(a[0])), prepend=True).remove
            )
        found, ran = {}, {}
        for how in ("early", "order unknown", "late"):
            with monkeypatch.context() as changed, vtprune.patch(model, tower=towers.Pixels(keep=0.3)) as patch:
                if how == "order unknown":
                    changed.setattr(EarlyChoice, "fits", lambda self, layout: False)
                if how == "late":
                    changed.setattr(towers.Pixels, "needs_states", True)
                embedded.clear()
                found[how] = [model(**batch).logits for _ in range(2)]
                ran[how], run = list(embedded), patch.last.tower_runs[0]
    for other in found.values():
        torch.testing.assert_close(other, found["late"], rtol=1e-5, atol=1e-5)
    if embedding is not None:
        kept, whole = sum(map(len, run.kept)), sum(run.patches)
        assert ran == {"early": [kept] * 2, "order unknown": [kept, whole, whole], "late": [whole] * 2}


def test_states_that_a_hook_changes_between_blocks_are_the_next_blocks() -> None:
    """A block is handed the rows that the one before returned, unless somebody has changed them since."""
    model, batch = model_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch(MIXED)
    block = blocks_of(vtprune.inspect(model).vision_tower)[1]
    logits = []

    def in_place(module: Any, args: tuple, output: torch.Tensor) -> None:
        output.neg_()

    for change in (lambda m, a, o: None, in_place, lambda m, a, o: -o):
        with vtprune.patch(model, tower=towers.Uniform(keep=0.3, block=0)), torch.no_grad():
            handle = block.register_forward_hook(change)
            logits.append(model(**batch).logits)
            handle.remove()
    assert torch.equal(logits[1], logits[2]) and not torch.equal(logits[0], logits[1])
