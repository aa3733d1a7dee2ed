# SPDX-License-Identifier: Apache-2.0
"""What is trained, how it begins, and the loss of the answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.real import drawn, parts, photo_vlm, picture_vlm
from tools.packing import IGNORE

from . import data

# Pictures that the projector learns from before anything else: kind, grid, and how many of a thousand.
LOOKED_AT = (
    ("scene", 12, 350), ("scene", 16, 250), ("crowd", 16, 150), ("page", 16, 100), ("page", 20, 100), ("page", 24, 50)
)  # fmt: skip
# Of everything that is frozen: bfloat16 on processors that compute with it, which others emulate slowly.
FAST = any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
DTYPE = torch.bfloat16 if FAST else torch.float32
BACKGROUND = 0.15  # share of the patches of bare background that are looked at
SHARPNESS = 2.0  # of the product of a patch and a word


class Attention(torch.autograd.Function):
    """Attention with plain matrix products: on a CPU twice as fast as `sdpa`, whose backward is slow."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        shape, groups = query.shape, key.shape[0] * key.shape[1]
        query, key, value = (x.reshape(groups, -1, shape[-1]) for x in (query * scale, key, value))
        scores = query @ key.transpose(1, 2)
        scores.view(*shape[:3], -1).add_(bias)
        weights = scores.softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.shape = scale, shape
        return (weights @ value).view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, weights = ctx.saved_tensors
        gradient = gradient.reshape(query.shape)
        to_value = weights.transpose(1, 2) @ gradient
        to_scores = gradient @ value.transpose(1, 2)
        to_scores = torch._softmax_backward_data(to_scores, weights, -1, weights.dtype)
        few = (ctx.shape[0], -1, key.shape[1], ctx.shape[-1])
        to_query, to_key = (to_scores @ key) * ctx.scale, to_scores.transpose(1, 2) @ query
        return to_query.view(ctx.shape), to_key.view(few), to_value.view(few), None, None


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
    """`Attention` as transformers calls it; `mask` is what is added to the scores, `[B, 1, L, L]`."""
    return Attention.apply(query, key, value, mask, scaling).transpose(1, 2), None


class Learner(nn.Module):
    """Real parts, frozen, in `DTYPE`; the projector and LoRA in float32, and nothing else in `state_dict`.

    The decoder computes with a copy of LoRA in `DTYPE` (`live`); with float32 and autocast a fifth of a step would go
    into conversions.
    """

    def __init__(self) -> None:
        super().__init__()
        transformers.AttentionInterface.register("realvlm_training", attend)
        vlm = picture_vlm.untrained()
        self.projector = vlm.model.multi_modal_projector
        layers = vlm.model.language_model.to(DTYPE)
        layers.set_attn_implementation("realvlm_training")
        adapted = picture_vlm.adapted(layers)
        self.live = [weight for weight in adapted.parameters() if weight.requires_grad]
        self.lora = nn.ParameterList([weight.detach().float() for weight in self.live])
        self.frozen = [adapted, vlm.model.vision_tower.to(DTYPE)]  # in a list: no part of `state_dict`
        self.words = layers.embed_tokens.weight.detach()  # no parameter of this module, either

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """What the tower's chosen layers say of every patch, float32 `[B, N, D]`."""
        states = self.frozen[1](pixels.to(DTYPE), output_hidden_states=True).hidden_states
        return torch.cat([states[layer][:, 1:] for layer in picture_vlm.TOWER_LAYERS], dim=-1).float()

    def forward(self, batch: data.Batch) -> tuple[Tensor, Tensor]:
        """The mean loss of the answers' tokens, and the predicted tokens `[B, TEXT]`."""
        self.refresh()
        patches = self.projector(self.features(batch.pixels)).to(DTYPE)
        start = self.words[batch.tokens.new_full((len(patches), 1), START)]
        embedded = torch.cat((start, patches, self.words[batch.tokens]), dim=1)
        prefix = 1 + patches.shape[1]
        before = torch.arange(prefix).expand(len(patches), -1)
        states = self.frozen[0](
            inputs_embeds=embedded,
            attention_mask=bias(batch.segments, prefix),
            position_ids=torch.cat((before, prefix + batch.positions), dim=1),
            use_cache=False,
        ).last_hidden_state
        asked = batch.labels != IGNORE
        logits = (states[:, prefix:][asked] @ self.words.T).float()
        predicted = torch.full_like(batch.labels, IGNORE)
        predicted[asked] = logits.argmax(-1)
        return F.cross_entropy(logits, batch.labels[asked]), predicted

    @torch.no_grad()
    def refresh(self) -> None:
        """Gives the decoder the present LoRA."""
        for live, weight in zip(self.live, self.lora, strict=True):
            live.copy_(weight)

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of everything that is trained."""
        loss.backward()
        for live, weight in zip(self.live, self.lora, strict=True):
            weight.grad, live.grad = live.grad.float(), None

    @torch.no_grad()
    def look_at(self, thousands: float) -> tuple[Tensor, Tensor]:
        """What the tower says of patches, bfloat16 `[N, D]`, and which words they show, int64 `[N, len(SHOWN)]`."""
        seen, shown, seed = [], [], 2 * 10**9
        for kind, grid, share in LOOKED_AT:
            for _ in range(max(1, round(share * thousands))):
                picture = drawn.picture(kind, seed, grid)
                labels = torch.from_numpy(data.patch_labels(picture)).long()
                bare = labels[:, list(data.SHOWN).index("background")] == 0
                chosen = ~bare | (torch.rand(len(bare), generator=torch.Generator().manual_seed(seed)) < BACKGROUND)
                seen.append(self.features(photo_vlm.pixels([picture.image]))[0, chosen].to(torch.bfloat16))
                shown.append(labels[chosen])
                seed += 1
        return torch.cat(seen), torch.cat(shown)

    def begin(self, thousands: float, rounds: int = 8, rows: int = 512, rate: float = 2e-3) -> dict[str, float]:
        """Trains the projector alone: every patch becomes about the mean vector of the words that describe it.

        The decoder knows these words, so it reads a patch as words from its first step on. A regression in closed form
        found far fewer of the colors and shapes.

        Args:
            thousands: of pictures to look at.
            rounds, rows, rate: passes over the patches, patches a step, and the learning rate at first.

        Returns:
            dict: Share of right words in every group, of the patches in the last steps.
        """
        seen, shown = self.look_at(thousands)
        middle, spread = seen.float().mean(0), seen.float().std(0)
        vectors = [self._vectors(words) for words in data.SHOWN.values()]
        described = self._described(shown, vectors)
        mean = described.mean(0)
        apart = [(group - group.mean(0)).T for group in vectors]
        background = torch.where(shown[:, list(data.SHOWN).index("background")] == 0, 0.3, 1.0)
        optim = torch.optim.AdamW(self.projector.parameters(), lr=rate, weight_decay=0.05)
        self.projector.linear_2.bias.data.copy_(mean)
        generator, steps = torch.Generator().manual_seed(0), max(1, rounds * len(seen) // rows)
        hits: Counter = Counter()
        for step in range(steps):
            part = torch.randint(len(seen), (rows,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=DTYPE is torch.bfloat16):
                out = self.projector(((seen[part].float() - middle) / spread).to(DTYPE)).float()
            loss = ((out - described[part]).square().sum(1) * background[part]).mean() / 10
            for number, (group, words) in enumerate(zip(data.SHOWN, apart, strict=True)):
                label = shown[part, number]
                here = (label >= 0) & (label < words.shape[1])
                if words.shape[1] > 1 and here.any():
                    logits = SHARPNESS * (out[here] - mean) @ words
                    loss = loss + 0.3 * F.cross_entropy(logits, label[here])
                    if step >= 0.9 * steps:
                        hits[group, "right"] += int((logits.argmax(1) == label[here]).sum())
                        hits[group, "asked"] += int(here.sum())
            for settings in optim.param_groups:
                settings["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / steps)
            optim.zero_grad()
            loss.backward()
            optim.step()
        with torch.no_grad():  # the model sees features as they are
            first = self.projector.linear_1
            first.weight.div_(spread)
            first.bias.sub_(first.weight @ middle)
        return {group: round(hits[group, "right"] / hits[group, "asked"], 3) for group, _ in hits}

    def _vectors(self, words: tuple[str, ...]) -> Tensor:
        """The vectors of words, float32 `[words, D]`; a word in several pieces has the mean of theirs."""
        return torch.stack([self.words[list(data.encode(f" {word}"))].float().mean(0) for word in words])

    def _described(self, shown: Tensor, vectors: list[Tensor]) -> Tensor:
        """The sum of the vectors of each patch's words over the root of their number, about as long as one of them."""
        total, count = torch.zeros(len(shown), self.words.shape[1]), torch.zeros(len(shown), 1)
        for number, group in enumerate(vectors):
            here = (shown[:, number] >= 0) & (shown[:, number] < len(group))
            total[here] += group[shown[here, number]]
            count[here] += 1
        return total / count.clamp(min=1).sqrt()

    def save(self, path: Any) -> None:
        """Projector and LoRA in float16, as `picture_vlm.load` reads them."""
        from peft import get_peft_model_state_dict

        self.refresh()
        whole = {f"projector.{name}": value for name, value in self.projector.state_dict().items()}
        whole |= get_peft_model_state_dict(self.frozen[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().half().contiguous() for name, value in whole.items()}, path)


START = parts.tokenizer().convert_tokens_to_ids(picture_vlm.START)


def bias(segments: Tensor, prefix: int) -> Tensor:
    """What is added to attention scores, `[B, 1, L, L]`: causal, and no question sees another one.

    Args:
        segments: number of every text position's question `[B, TEXT]`.
        prefix: positions before the text, the start token and the picture.
    """
    owner = F.pad(segments, (prefix, 0), value=-1)
    length = owner.shape[1]
    allowed = (torch.arange(length) < prefix) | (owner[:, :, None] == owner[:, None, :])
    allowed &= torch.ones(length, length, dtype=torch.bool).tril()
    return torch.where(allowed, 0.0, -1e4)[:, None].to(DTYPE)
