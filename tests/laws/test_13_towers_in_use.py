# SPDX-License-Identifier: Apache-2.0
"""Law 13, T5: in pipelines and with offloaded weights, cuts inside the tower keep the same patches and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from support import MIXED, ONE
from tower_reference import blocks_of

import vtprune
from vtprune import refvlm, towers

METHODS = [towers.Change(keep=0.4), towers.Attention(keep=0.4), towers.Pixels(keep=0.4), towers.Similar(keep=0.4)]


def result(model: Any, batch: dict[str, Any], method: towers.TowerMethod) -> tuple[Any, ...]:
    """Answer, kept patches and kept tokens."""
    with vtprune.patch(model, ratio=0.5, method="divprune", tower=method) as patch:
        tokens = model.generate(**batch, max_new_tokens=3, do_sample=False).tolist()
        last = patch.last
        return tokens, [kept.tolist() for kept in last.tower.kept], [kept.tolist() for kept in last.kept]


def test_offloaded_to_the_cpu(family: str) -> None:
    """Offloading by accelerate, which moves each module's weights in and out around its call, changes no result."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(MIXED)
    want = [result(model, batch, method) for method in METHODS]
    accelerate.cpu_offload(model, execution_device="cpu")
    try:
        model.generate(**batch, max_new_tokens=1)
    except NotImplementedError:
        pytest.skip("transformers cannot generate with this model's own newline parameter offloaded")
    assert next(blocks_of(vtprune.inspect(model).vision_tower)[-1].parameters()).is_meta
    assert [result(model, batch, method) for method in METHODS] == want


def test_blocks_on_disk(family: str, tmp_path: Path) -> None:
    """Results are the same with the later half of the tower on disk (meta tensors between calls)."""
    accelerate = pytest.importorskip("accelerate")
    model, split, batch = FAMILIES[family].build(), FAMILIES[family].build(), FAMILIES[family].batch(ONE)
    want = [result(model, batch, method) for method in METHODS]
    tower = vtprune.inspect(split).vision_tower
    names = {module: name for name, module in split.named_modules()}
    blocks = blocks_of(tower)
    far = tuple(f"{names[block]}." for block in blocks[len(blocks) // 2 :])
    near = [n for n, m in split.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
    places = {name: "disk" if f"{name}.".startswith(far) else "cpu" for name in near}
    # Parameters outside the modules of `near` are listed individually.
    places |= {n: "cpu" for n, _ in split.named_parameters() if not n.startswith(tuple(f"{name}." for name in near))}
    split = accelerate.dispatch_model(split, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert next(blocks_of(vtprune.inspect(split).vision_tower)[-1].parameters()).is_meta
    assert [result(split, batch, method) for method in METHODS] == want


def test_pipeline() -> None:
    import transformers

    model, processor = refvlm.load(name="qwen2_5_vl")
    scene = refvlm.scenes.scene(7)
    text = refvlm.prompt(scene.questions[0].text)
    inputs = processor(images=[scene.image], text=[text], return_tensors="pt")
    made = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"max_new_tokens": 4, "do_sample": False}
    for method in METHODS:
        with vtprune.patch(model, ratio=0.25, tower=method) as patch, torch.no_grad():
            out = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
            kept = patch.last.tower.kept[0]
            generated = made(images=scene.image, text=text, return_full_text=False, generate_kwargs=settings)
            assert torch.equal(patch.last.tower.kept[0], kept) and len(kept) < patch.last.tower.patches[0]
        assert generated[0]["generated_text"].strip() == processor.decode(out, skip_special_tokens=True).strip()
