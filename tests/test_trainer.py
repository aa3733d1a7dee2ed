# SPDX-License-Identifier: Apache-2.0
"""A patched model in transformers' own Trainer, with mixed precision and with gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, Image
from transformers import Trainer, TrainingArguments

import vtprune


class Samples(torch.utils.data.Dataset):
    """Prompts of one picture each, with an answer of three tokens."""

    def __init__(self, family: str) -> None:
        self.batches = [FAMILIES[family].batch([[3, Image(0), 5]], seed=seed) for seed in range(4)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        batch = self.batches[number]
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -3:] = batch["input_ids"][:, -3:]
        return batch | {"labels": labels}


def together(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("llava", "iwp", {"bf16": True}),
        ("qwen2_5_vl", "divprune", {"bf16": True}),
        ("qwen3_vl", "pyramiddrop", {"bf16": True, "gradient_checkpointing": True}),
        ("llava_onevision", "divprune", {"bf16": True}),
    ],
)
def test_the_trainer_trains_on_pruned_prompts(
    family: str, method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = FAMILIES[family].build().train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    kept = []
    with vtprune.patch(model, ratio=0.3, method=method) as patch:
        trainer = Trainer(model, arguments, train_dataset=Samples(family), data_collator=together)
        model.register_forward_hook(lambda *_: kept.append([len(k) for k in patch.last.kept]) or None)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    count = int((Samples(family)[0]["input_ids"] == IMAGE).sum())
    assert len(losses) == 3 and torch.isfinite(torch.tensor(losses)).all() and losses[-1] < losses[0]
    assert kept and all(row == [max(1, round(0.3 * count))] * 2 for row in kept)
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert any(
        "vision" in name or "visual" in name for name in changed
    )  # gradients reach the tower through kept tokens
    assert any("language_model" in name for name in changed)
