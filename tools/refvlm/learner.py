# SPDX-License-Identifier: Apache-2.0
"""Training losses: patch labels, class token labels and answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tools.refvlm import data
from vtprune.refvlm import model

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
        words = [[model.VOCABULARY[word] for word in group] for group in data.GROUPS.values()]
        self.words = [torch.tensor(group) for group in words]

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
        hits: dict[str, float] = {}
        for column, (group, words) in enumerate(zip(data.GROUPS, self.words, strict=True)):
            logits = SHARPNESS * (patches.float() @ table[words.to(table.device)].T)
            none = logits.new_full((*logits.shape[:2], 1), SHARPNESS / 2)
            logits, target = torch.cat((logits, none), dim=-1), batch.patches[..., column]
            shown = (target != len(words)) & (target != data.IGNORE)
            weight = torch.where(shown, 1.0, NULL_WEIGHT) * (target != data.IGNORE)
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=data.IGNORE, reduction="none")
            loss = loss + (each * weight.flatten()).sum() / weight.sum()
            with torch.no_grad():
                right = logits.argmax(-1) == target
                hits[group] = (
                    right[shown].float().mean() if shown.any() else right.new_ones((), dtype=torch.float)
                ).item()
        return patches, loss, hits

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


def score(batch: data.Batch, predicted: torch.Tensor) -> Counter:
    """Right answers and questions by kind, as `Counter({(kind, "right"): n, (kind, "asked"): m})`."""
    wrong = (predicted != batch.labels).cpu()
    tally: Counter = Counter()
    for row, dialogues in enumerate(batch.asked):
        for number, (kind, _, _) in enumerate(dialogues, start=1):
            tally[kind, "asked"] += 1
            tally[kind, "right"] += not wrong[row, batch.segments[row].cpu() == number].any()
    return tally
