# SPDX-License-Identifier: Apache-2.0
"""What is trained, how it begins, and the loss of the answers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.real import drawn, parts, photo_vlm, picture_vlm
from vtprune.refvlm import scenes

from . import data

RIDGE = 3.0
HIDDEN_PER_SIGN = 288  # half of the projector's hidden width


class Attention(torch.autograd.Function):
    """Attention in bfloat16 with plain matrix products: on a CPU twice as fast as `sdpa`, whose backward is slow."""

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
    """Real parts, frozen, in bfloat16; the projector and LoRA in float32, and nothing else in `state_dict`.

    The decoder computes with a bfloat16 copy of LoRA (`live`); with float32 and autocast a fifth of a step would go
    into conversions.
    """

    def __init__(self) -> None:
        super().__init__()
        transformers.AttentionInterface.register("realvlm_training", attend)
        vlm = picture_vlm.untrained()
        self.projector = vlm.model.multi_modal_projector
        layers = vlm.model.language_model.to(torch.bfloat16)
        layers.set_attn_implementation("realvlm_training")
        adapted = picture_vlm.adapted(layers)
        self.live = [weight for weight in adapted.parameters() if weight.requires_grad]
        self.lora = nn.ParameterList([weight.detach().float() for weight in self.live])
        self.frozen = [adapted, vlm.model.vision_tower.to(torch.bfloat16)]  # in a list: no part of `state_dict`
        self.words = layers.embed_tokens.weight.detach()  # no parameter of this module, either

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """What the tower's chosen layers say of every patch, float32 `[B, N, D]`."""
        states = self.frozen[1](pixels.to(torch.bfloat16), output_hidden_states=True).hidden_states
        return torch.cat([states[layer][:, 1:] for layer in picture_vlm.TOWER_LAYERS], dim=-1).float()

    def forward(self, batch: data.Batch) -> tuple[Tensor, Tensor]:
        """The mean loss of the answers' tokens, and the predicted tokens `[B, TEXT]`."""
        self.refresh()
        patches = self.projector(self.features(batch.pixels)).to(torch.bfloat16)
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
        asked = batch.labels != data.IGNORE
        logits = (states[:, prefix:][asked] @ self.words.T).float()
        predicted = torch.full_like(batch.labels, data.IGNORE)
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
    def begin(self, count: int, grids: tuple[int, ...] = (12, 16)) -> float:
        """Fits the projector in closed form: every patch becomes the mean vector of the words that describe it.

        Hidden neurons come in pairs of opposite signs along the directions that matter, so that the projector starts as
        the linear regression and a little more: GELU(x) - GELU(-x) = x.

        Args:
            count: pictures to fit on.

        Returns:
            float: Share of the targets' variance that is explained.
        """
        seen, wanted = [], []
        table = self.words.float()
        for number in range(count):
            kind, grid = drawn.KINDS[number % 3], grids[number // 3 % len(grids)]
            picture = drawn.picture(kind, scenes.TRAIN_SEEDS - 1 - number + 10**9, grid)
            seen.append(self.features(photo_vlm.pixels([picture.image]))[0].double())
            wanted += [self._described(words, table) for words in data.patch_words(picture)]
        features, goal = torch.cat(seen), torch.stack(wanted).double()
        middle, spread = features.mean(0), features.std(0)
        scaled = (features - middle) / spread
        linear = ridge(scaled, goal - goal.mean(0))
        # First the directions that the linear regression needs, then the largest ones of what the tower says.
        needed = torch.linalg.svd(linear).U[:, : HIDDEN_PER_SIGN // 2]
        rest = scaled - scaled @ needed @ needed.T
        largest = torch.linalg.eigh(rest.T @ rest).eigenvectors.flip(1)[:, : HIDDEN_PER_SIGN - needed.shape[1]]
        directions = torch.cat((needed, largest), dim=1)
        directions = directions / (scaled @ directions).std(0)
        one, two = self.projector.linear_1, self.projector.linear_2
        one.weight.copy_(torch.cat((directions, -directions), dim=1).T / spread)
        one.bias.copy_(-(one.weight.double() @ middle))
        hidden = F.gelu(F.linear(features, one.weight.double(), one.bias.double()))
        weight = ridge(hidden - hidden.mean(0), goal - goal.mean(0)).T
        two.weight.copy_(weight)
        two.bias.copy_(goal.mean(0) - weight @ hidden.mean(0))
        left = goal - F.linear(hidden, two.weight.double(), two.bias.double())
        return 1 - float(left.square().sum() / (goal - goal.mean(0)).square().sum())

    def _described(self, words: tuple[str, ...], table: Tensor) -> Tensor:
        """The sum of words' vectors over the root of their number, about as long as a word's vector."""
        vectors = [table[list(data.encode(f" {word}"))].mean(0) for word in words]
        return torch.stack(vectors).sum(0) / len(vectors) ** 0.5

    def save(self, path: Any) -> None:
        """Projector and LoRA in float16, as `picture_vlm.load` reads them."""
        from peft import get_peft_model_state_dict

        self.refresh()
        whole = {f"projector.{name}": value for name, value in self.projector.state_dict().items()}
        whole |= get_peft_model_state_dict(self.frozen[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().half().contiguous() for name, value in whole.items()}, path)


START = parts.tokenizer().convert_tokens_to_ids(picture_vlm.START)


def ridge(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Weights `[in, out]` of the ridge regression of centered values."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * len(inputs) / 1000)
    return torch.linalg.solve(gram, inputs.T @ outputs)


def bias(segments: Tensor, prefix: int) -> Tensor:
    """What is added to attention scores, bfloat16 `[B, 1, L, L]`: causal, and no question sees another one.

    Args:
        segments: number of every text position's question `[B, TEXT]`.
        prefix: positions before the text, the start token and the picture.
    """
    owner = F.pad(segments, (prefix, 0), value=-1)
    length = owner.shape[1]
    allowed = (torch.arange(length) < prefix) | (owner[:, :, None] == owner[:, None, :])
    allowed &= torch.ones(length, length, dtype=torch.bool).tril()
    return torch.where(allowed, 0.0, -1e4)[:, None].to(torch.bfloat16)
