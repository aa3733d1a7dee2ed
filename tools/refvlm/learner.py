# SPDX-License-Identifier: Apache-2.0
"""Training losses: patch labels, class token labels and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tools.refvlm import data, model

SHARPNESS = 6.0  # scale of the word logits (products of patch and word vector); "no word" has the product 0.5
EARLY = 4  # decoder layers before the additional early answer
# On most training pictures, text does not attend to the picture in the first decoder layers. Word vectors and patches
# match so well in this model that it would otherwise read everything there, unlike large models, and dropping any
# visual tokens after those layers would cost nothing. No visual token is dropped in training.
BLIND_LAYERS = 2
BLIND_SHARE = 0.6
NULL_WEIGHT = 0.15  # most patches show background, which would dominate the loss


class Attention:
    """`sdpa` in float32 (on CPUs its bfloat16 backward pass is slower than all else), with a mask for the first layers.

    Attributes:
        blind: bool mask that replaces the model's own in the first `BLIND_LAYERS` decoder layers, or None.
    """

    def __init__(self) -> None:
        self.blind: torch.Tensor | None = None

    def __call__(self, module, query, key, value, mask, scaling=None, **_):
        if mask is not None and self.blind is not None and module.layer_idx < BLIND_LAYERS:
            mask = self.blind
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = query.float(), key.float(), value.float()
            causal = mask is None and getattr(module, "is_causal", False)
            if key.shape[1] != query.shape[1]:
                key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, is_causal=causal)
        return out.transpose(1, 2), None


class Learner(nn.Module):
    """The model with its training heads (for the class token) and losses."""

    KNOWING = 2  # features that have to predict the contents of the whole picture
    LOOK, ANSWER, RATE = 700, 1200, 2e-3  # steps of the two phases, learning rate
    SIZES: data.Sizes = (data.SQUARE,)  # picture sizes, one per step

    def __init__(self, vlm: nn.Module):
        super().__init__()
        self.attention = Attention()
        transformers.AttentionInterface.register("refvlm_training", self.attention)
        vlm.set_attn_implementation("refvlm_training")
        self.vlm = vlm
        config: Any = vlm.config
        width = config.vision_config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, len(data.PRESENT)) for _ in range(self.KNOWING))
        self.words = {
            group: torch.tensor([model.VOCABULARY[word] for word in words]) for group, words in data.GROUPS.items()
        }

    def processor(self) -> Any:
        return model.processor()

    def see(self, batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected patches `[B, N, D]`, and the auxiliary loss of the vision tower."""
        tower = self.vlm.model.vision_tower(data.pixels(batch.images), output_hidden_states=True)
        features = tower.hidden_states[self.vlm.config.vision_feature_layer]
        # The class token predicts the picture's contents, so that its attention is meaningful.
        known = (self.heads[0](features[:, 0]), self.heads[1](tower.pooler_output))
        loss = torch.stack([F.binary_cross_entropy_with_logits(x.float(), batch.present) for x in known]).sum()
        return self.vlm.model.multi_modal_projector(features[:, 1:]), loss

    def positions(self, batch: data.Batch, prefix: int) -> torch.Tensor:
        """Position ids `[B, prefix + TEXT]`: `<bos>`, the picture, and every question directly after it."""
        before = torch.arange(prefix, device=batch.tokens.device).expand(len(batch.tokens), -1)
        return torch.cat((before, prefix + batch.positions), dim=1)

    def look(self, batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Projected patches `[B, N, D]`, the patch loss, and hit rates."""
        patches, loss = self.see(batch)
        table = self.vlm.get_input_embeddings().weight.detach()
        return patches, *label_loss(loss, patches, batch.patches, table, self.words)

    def answer(self, batch: data.Batch, patches: torch.Tensor, blind: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer loss, and the predicted tokens `[B, TEXT]`.

        For a share `blind` of the pictures, text does not attend to the picture in early layers.
        """
        count, prefix = len(batch.tokens), 1 + patches.shape[1]
        mask = batch.mask(prefix)
        self.attention.blind = None
        if blind:
            hidden = mask.clone()
            hidden[: round(blind * count), :, prefix:, 1:prefix] = False
            self.attention.blind = hidden
        embed = self.vlm.get_input_embeddings()
        start = embed(batch.tokens.new_full((count, 1), model.VOCABULARY["<bos>"]))
        inputs = torch.cat((start, patches.to(start.dtype), embed(batch.tokens)), dim=1)
        states = self.vlm.model.language_model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=self.positions(batch, prefix),
            use_cache=False,
            output_hidden_states=True,
        )
        asked = batch.labels != data.IGNORE
        labels = batch.labels[asked]
        final = self.vlm.lm_head(states.last_hidden_state[:, prefix:][asked]).float()
        early = self.vlm.model.language_model.norm(states.hidden_states[EARLY][:, prefix:][asked])
        early = self.vlm.lm_head(early).float()
        loss = F.cross_entropy(final, labels) + 0.3 * F.cross_entropy(early, labels)
        predicted = torch.full_like(batch.labels, data.IGNORE)
        predicted[asked] = final.argmax(-1)
        return loss, predicted


def label_loss(
    loss: torch.Tensor, seen: torch.Tensor, labels: torch.Tensor, table: torch.Tensor, words: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Adds the loss of the words that visual tokens show.

    Args:
        loss: scalar to add to.
        seen: projected tokens `[B, N, D]`.
        labels: int64 `[B, N, len(words)]`, index of the word in its group, the group's size for none, or `IGNORE`.
        table: word vectors `[V, D]`.
        words: ids of the words of every group.

    Returns:
        tuple: the sum, and the hit rate of every group of which a word is shown.
    """
    hits: dict[str, float] = {}
    for column, (group, ids) in enumerate(words.items()):
        target = labels[..., column]
        shown = (target != len(ids)) & (target != data.IGNORE)
        logits = SHARPNESS * (seen.float() @ table[ids.to(table.device)].T)
        logits = torch.cat((logits, logits.new_full((*logits.shape[:2], 1), SHARPNESS / 2)), dim=-1)
        weight = torch.where(shown, 1.0, NULL_WEIGHT) * (target != data.IGNORE)
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=data.IGNORE, reduction="none")
        loss = loss + (each * weight.flatten()).sum() / weight.sum()
        with torch.no_grad():
            if shown.any():
                hits[group] = (logits.argmax(-1) == target)[shown].float().mean().item()
    return loss, hits


def muon_and_adamw(learner: nn.Module, scale: Callable[[str], float]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for word vectors, norms, biases and the patch embedding.

    Args:
        learner: model to train.
        scale: factor of the learning rate of a parameter, by its name; every group of parameters has it as `scale`.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, weight in learner.named_parameters():
        inside = ".layers." in name or ".blocks." in name
        groups.setdefault((weight.ndim == 2 and inside, scale(name)), []).append(weight)
    matrices, others = (
        [{"params": weights, "scale": factor} for (inside, factor), weights in groups.items() if inside is wanted]
        for wanted in (True, False)
    )
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def score(batch: Any, predicted: torch.Tensor) -> Counter:
    """Right answers and questions by kind, as `Counter({(kind, "right"): n, (kind, "asked"): m})`."""
    wrong = (predicted != batch.labels).cpu()
    tally: Counter = Counter()
    for row, dialogues in enumerate(batch.asked):
        for number, (kind, _, _) in enumerate(dialogues, start=1):
            tally[kind, "asked"] += 1
            tally[kind, "right"] += not wrong[row, batch.segments[row].cpu() == number].any()
    return tally
