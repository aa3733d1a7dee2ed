# SPDX-License-Identifier: Apache-2.0
"""Training losses: labels of visual tokens, and answers."""

from __future__ import annotations

from functools import lru_cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from ..learner import label_loss
from . import build
from .data import GROUPS, IGNORE, Batch

# On many training rows, text does not attend to the pictures in the first decoder layers. Word vectors and visual
# tokens match so well in this model that it would otherwise read everything there, unlike large models, and dropping
# any visual tokens after those layers would cost nothing.
BLIND_LAYERS, BLIND_SHARE = 2, 0.5
EARLY_WEIGHT = 0.3  # weight of the answer loss at a middle layer


class TextAttention:
    """Decoder attention for training: causal prefix; packed questions attend to the prefix and to themselves.

    Attributes:
        prefix: positions before the text.
        mask: bool `[B, 1, text, prefix + text]`, for the queries of the text.
        blind: the mask of the first `BLIND_LAYERS` layers.
    """

    prefix = 0
    mask: Tensor
    blind: Tensor

    def __call__(self, module, query, key, value, mask, scaling=None, **_):
        mask = self.blind if module.layer_idx < BLIND_LAYERS else self.mask
        prefix, repeats = self.prefix, query.shape[1] // key.shape[1]
        # float32: on CPUs the bfloat16 backward pass is slower than all else.
        with torch.autocast(query.device.type, enabled=False):
            query = query.float()
            key, value = (x.float().repeat_interleave(repeats, dim=1) for x in (key, value))
            seen = F.scaled_dot_product_attention(
                query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True, scale=scaling
            )
            attended = F.scaled_dot_product_attention(query[:, :, prefix:], key, value, attn_mask=mask, scale=scaling)
        return torch.cat((seen, attended), dim=2).transpose(1, 2), None


@lru_cache(maxsize=256)
def _parts(lengths: tuple[int, ...]) -> tuple[tuple[int, Tensor], ...]:
    """Row indices of all windows of each length."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return tuple(
        (wanted, torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=False) if n == wanted]))
        for wanted in sorted(set(lengths))
    )


def attend(self, hidden_states, cu_seqlens, position_embeddings=None, **_):
    """Vision attention in one call per window size; the loop of transformers makes one call per window."""
    query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    parts = _parts(tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist()))
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        if len(parts) == 1:
            q, k, v = (x.unflatten(0, (-1, parts[0][0])).transpose(1, 2) for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling).transpose(1, 2).flatten(0, 1)
        else:
            out = torch.empty_like(value)
            for length, rows in parts:
                index = rows.to(value.device)
                q, k, v = (x[index].unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
                part = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
                out = out.index_copy(0, index, part.transpose(1, 2).flatten(0, 1))
    return self.proj(out.flatten(1))


def embed_patches(self, pixels):
    """The patch embedding as a matrix product; the convolution of transformers is five times slower on CPUs."""
    return F.linear(pixels, self.proj.weight.flatten(1))


class Learner(nn.Module):
    """A model and its losses, without additional weights."""

    def __init__(self, vlm: Any):
        super().__init__()
        self.attention = TextAttention()
        transformers.AttentionInterface.register("refvlm_training", self.attention)
        vlm.model.language_model.set_attn_implementation("refvlm_training")
        vlm.model.visual.patch_embed.forward = MethodType(embed_patches, vlm.model.visual.patch_embed)
        for block in vlm.model.visual.blocks:
            block.attn.forward = MethodType(attend, block.attn)
        self.vlm = vlm
        self.words = {
            group: torch.tensor([build.VOCABULARY[word] for word in words]) for group, words in GROUPS.items()
        }

    def see(self, batch: Batch) -> Tensor:
        """Visual tokens `[rows, visual tokens, D]`."""
        patches = batch.patches.float() / 127.5 - 1
        count = len(batch.tokens)
        grid = torch.tensor([(time, 2 * rows, 2 * columns) for time, rows, columns in batch.grids]).repeat(count, 1)
        return self.vlm.model.visual(patches, grid_thw=grid).pooler_output.unflatten(0, (count, -1))

    def look(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Visual tokens, their label loss, and hit rates by group."""
        seen = self.see(batch)
        table = self.vlm.get_input_embeddings().weight.detach()
        return seen, *label_loss(seen.new_zeros((), dtype=torch.float), seen, batch.cells, table, self.words)

    def places(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Tokens and position ids of the prefix before the text.

        Returns:
            tuple: tokens `[prefix]`, with -1 for visual ones; position ids `[3, prefix]`; the next position.
        """
        words, parts, start = [build.VOCABULARY["<bos>"]], [torch.zeros(3, 1)], 1
        for time, rows, columns in batch.grids:
            cells = torch.cartesian_prod(torch.arange(time), torch.arange(rows), torch.arange(columns)).T
            words += [build.VOCABULARY["<vision_start>"], *[-1] * cells.shape[1], build.VOCABULARY["<vision_end>"]]
            end = start + 1 + max(rows, columns)
            parts += [torch.full((3, 1), start), start + 1 + cells, torch.full((3, 1), end)]
            start = end + 1
        return torch.tensor(words), torch.cat(parts, dim=1).long(), start

    def answer(self, batch: Batch, seen: Tensor, blind: float = 0.0) -> tuple[Tensor, Tensor]:
        """The answer loss, and the predicted tokens `[rows, TEXT]`."""
        words, places, start = self.places(batch)
        count, prefix = len(batch.tokens), len(words)
        embed = self.vlm.get_input_embeddings()
        before = embed(words.clamp_min(0)).expand(count, -1, -1)
        order = torch.zeros(prefix, dtype=torch.long)
        visual = words == -1
        order[visual] = torch.arange(int(visual.sum()))
        before = torch.where(visual[None, :, None], seen.to(before.dtype)[:, order], before)
        own = batch.segments[:, :, None] == batch.segments[:, None]
        own = own & torch.ones(own.shape[-1], own.shape[-1], dtype=torch.bool).tril()
        mask = torch.cat((torch.ones(count, own.shape[1], prefix, dtype=torch.bool), own), dim=-1)[:, None]
        hidden = mask
        if blind:
            hidden = mask.clone()
            hidden[: round(blind * count), :, :, 1:prefix] = False
        self.attention.prefix, self.attention.mask, self.attention.blind = prefix, mask, hidden
        after = start + batch.positions
        positions = torch.cat((places[:, None].expand(-1, count, -1), after.expand(3, -1, -1)), dim=2)
        decoder = self.vlm.model.language_model
        states = torch.cat((before, embed(batch.tokens).to(before.dtype)), dim=1)
        rotary = decoder.rotary_emb(states, positions)
        asked = batch.labels != IGNORE
        labels, early = batch.labels[asked], None
        for number, layer in enumerate(decoder.layers):
            states = layer(states, attention_mask=None, position_embeddings=rotary, position_ids=None)
            states = states[0] if isinstance(states, tuple) else states
            if number + 1 == len(decoder.layers) * 2 // 3:
                early = decoder.norm(states[:, prefix:][asked])
        final = self.vlm.lm_head(decoder.norm(states[:, prefix:][asked])).float()
        loss = F.cross_entropy(final, labels)
        if early is not None:
            loss = loss + EARLY_WEIGHT * F.cross_entropy(self.vlm.lm_head(early).float(), labels)
        predicted = torch.full_like(batch.labels, IGNORE)
        predicted[asked] = final.argmax(-1)
        return loss, predicted
