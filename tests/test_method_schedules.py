# SPDX-License-Identifier: Apache-2.0
"""Published schedules at the published depth keep the token counts and means of the official code."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from families import IMAGE, TEXT, Family, Image, Pixels

import vtprune
from vtprune import methods, refvlm
from vtprune.core.budget import Budget, plan
from vtprune.methods import FastV, Method, PyramidDrop, SparseVLM, TransPrune, VFlowOpt
from vtprune.methods.sparsevlm.recycling import split_budget, with_clusters

N = 576


def deep(layers: int) -> Family:
    """A tiny LLaVA with the token count of LLaVA-1.5 and `layers` decoder layers."""

    def config() -> Any:
        from transformers import LlavaConfig

        vision = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
        vision |= {"num_attention_heads": 1, "image_size": 48, "patch_size": 2, "projection_dim": 8}
        text = TEXT | {"num_hidden_layers": layers, "max_position_embeddings": 1024}
        text |= {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
        return LlavaConfig(
            vision_config=vision,
            text_config={"model_type": "llama", **text},
            image_token_id=IMAGE,
            image_seq_length=N,
        )

    return Family(
        f"llava-{layers}",
        config,
        lambda size, generator: Pixels(N, {"pixel_values": torch.randn(1, 3, 48, 48, generator=generator)}),
    )


@lru_cache
def model_and_batch(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    family = deep(layers)
    return family.build(), family.batch([[35, Image(0), 12]])


PUBLISHED = [
    # method, depth, official counts by layer, official mean over layer inputs
    (FastV(layer=2), 32, {2: 128}, 156.0),
    (PyramidDrop(), 32, {8: 288, 16: 144, 24: 72}, 270.0),
    (PyramidDrop((2, 10, 20), (0.32, 0.16, 0.08), depth=None), 32, {2: 184, 10: 92, 20: 46}, 128.0),
    (TransPrune(), 32, {7: 504, 9: 360, 12: 72}, 236.25),
    (TransPrune(shares=(0.625, 0.1875, 0.0625), depth=None), 32, {7: 360, 9: 108, 12: 36}, 181.125),
    (SparseVLM(shares=(303 / N, 110 / N, 36 / N)), 32, {3: 303, 7: 110, 16: 36}, 140.8125),
    # The release adds clusters: 9, 7 and 3 of the 273, 202 and 81 dropped tokens.
    (SparseVLM.released((303, 110, 36)), 32, {3: 312, 7: 117, 16: 39}, 145.40625),
    (SparseVLM.released((238, 108, 60), version=2), 32, {3: 238, 7: 108, 16: 60}, 144.125),
    (VFlowOpt(preset=0.5), 28, {0: 417, 9: 312, 18: 152}, 288.6071),
    (VFlowOpt(preset=0.25), 28, {0: 153, 9: 150, 18: 132}, 144.5357),
    (VFlowOpt(preset=0.1), 28, {0: 67, 9: 67, 18: 40}, 57.3571),
    (VFlowOpt(preset=0.25, layers=(10, 20), depth=None), 32, {0: 153, 10: 150, 20: 132}, 144.1875),
]


@pytest.mark.parametrize(("method", "depth", "counts", "mean"), PUBLISHED, ids=lambda x: str(x)[:40])
@torch.no_grad()
def test_survivors_and_mean_are_the_official_ones(
    method: Method, depth: int, counts: dict[int, int], mean: float
) -> None:
    model, batch = model_and_batch(depth)
    stages, last_count = method.schedule(depth), list(counts.values())[-1]
    budgets = [Budget(keep=last_count), Budget(mean_ratio=mean / N)]
    if not isinstance(method, FastV):  # FastV's count is the budget itself
        budgets.append(Budget(ratio=stages[-1].share))
    for budget in budgets:
        planned = plan(budget, stages, depth, [N], [[0]])
        # Solving for the ratio may round a count the other way.
        slack = 0 if budget.mean_ratio is None else 1
        assert all(abs(n - want) <= slack for (n,), want in zip(planned, counts.values(), strict=True))
    with vtprune.patch(model, keep=last_count, method=method) as patch:
        model(**batch)
        last = patch.last
    assert {layer: len(kept[0]) for layer, kept in last.stages} == counts
    assert last.mean_ratio * N == pytest.approx(mean, abs=1e-4)
    text = last.report()
    assert f"{N} -> {last_count} " in text and f"mean ratio     {mean / N:.3f} over" in text
    assert all(f"{count} before layer {layer}" in text for layer, count in counts.items())


def test_released_counts_of_sparsevlm_leave_what_the_release_keeps_by_score() -> None:
    left = [round(N * stage.share) for stage in SparseVLM.released((303, 110, 36)).schedule(32)]
    assert [split_budget(*pair) for pair in zip([N, *left], left, strict=False)] == [(303, 9), (110, 7), (36, 3)]
    assert with_clusters((40, 29, 10), 31) == [31, 30, 11]  # at least one goes into a cluster


def test_layers_and_shares_are_checked() -> None:
    model, _ = model_and_batch(28)
    with pytest.raises(vtprune.MethodError, match="one share per layer"):
        vtprune.patch(model, ratio=0.1, method=PyramidDrop((2, 4), (0.5,)))
    with pytest.raises(vtprune.MethodError, match="before layer 28"):
        vtprune.patch(model, ratio=0.1, method=VFlowOpt(layers=(9, 28), depth=None))
    with pytest.raises(vtprune.MethodError, match="at least as many layers as the 2 shares of later"):
        VFlowOpt(layers=(9,))
    with pytest.raises(vtprune.MethodError, match="falling shares"):
        vtprune.patch(model, ratio=0.1, method=TransPrune((7, 9), (0.2, 0.5)))


@pytest.mark.parametrize("name", [n for n in methods.names() if not methods.get(n).needs_frames])
def test_a_method_says_whether_it_reads_the_question(name: str) -> None:
    model, processor = refvlm.load()
    differs = False
    for scene in map(refvlm.scenes.scene, range(3)):
        kept = []
        for question in ("what digit is on the sign?", "how many red stars are there in the picture?"):
            inputs = processor(images=scene.image, text=refvlm.prompt(question), return_tensors="pt")
            first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
            with vtprune.patch(model, ratio=0.1, method=name) as patch, torch.no_grad():
                model(**inputs)
                columns = patch.last.kept[0]
            kept.append(columns[(columns >= first) & (columns < first + 144)].tolist())
        differs = differs or kept[0] != kept[1]
    assert methods.get(name)().question_aware == differs
