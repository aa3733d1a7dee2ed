# SPDX-License-Identifier: Apache-2.0
"""TransPrune: keeps the tokens that layers change most and that the instruction attends to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vtprune_kernels import transition_variation

from ..core.attention import visual_attention
from ..core.method import Choice, ScoreMethod, Stage, Tap
from ..core.options import Layers, Positive, Share, Shares
from ..core.ragged import group_ids
from ..core.registry import register
from ..core.schedule import scale_schedule
from ..core.taps import layer_input, layer_output, over_prompt
from ..core.tokens import Tokens
from ..errors import MethodError

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

Direction = Literal["signed", "absolute"]
MODULES = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "feedforward", "ffn", "moe"),
}


def submodule(layer: nn.Module, part: Literal["attention", "mlp"]) -> nn.Module | None:
    """The attention or the MLP of a decoder layer, found by the names of the layer's own children; None without one."""
    for name, child in layer.named_children():
        is_norm = "norm" in name.lower() or "norm" in type(child).__name__.lower()
        named = any(word in name.lower() for word in MODULES[part])
        if named and not is_norm and next(child.parameters(), None) is not None:
            return child
    return None


def change(x_in: Tensor, x_out: Tensor, direction: Direction = "signed") -> Tensor:
    """Change of every token by a module, not yet normalized over tokens.

    Args:
        x_in: `[..., D]` normed input of the module.
        x_out: `[..., D]` its output before the residual addition.
        direction: `"signed"` for `1 - cos`, `"absolute"` for `1 - |cos|`.

    Returns:
        Tensor: `[..., 2]` float32, change of length `|out| / |in|` and of direction.
    """
    ratio, turn = transition_variation(x_in, x_out)
    if direction == "absolute":
        turn = 1 - (1 - turn).abs()
    return torch.stack([ratio, turn], -1)


def recorded_change(args: tuple, kwargs: dict[str, Any], output: Any, direction: Direction) -> Tensor | None:
    """`change` of a module as `[B, T, 2]`, for a tap; None at decoding steps.

    Raises:
        MethodError: Input and output of the module are not both `[B, T, D]`.
    """
    x_in, x_out = layer_input(args, kwargs, output), layer_output(args, kwargs, output)
    if x_in.dim() == 3 and x_in.shape[1] == 1:
        return None
    if x_in.dim() != 3 or x_out.numel() != x_in.numel():
        raise MethodError(
            f"a module of a decoder layer turns {tuple(x_in.shape)} into {tuple(x_out.shape)}; TransPrune expects "
            "[batch, length, width] on both sides; use a method that reads attention only, such as fastv"
        )
    return change(x_in, x_out.reshape(x_in.shape), direction)


def variation(changes: Tensor, offsets: Tensor) -> Tensor:
    """Token transition variation of one module: `ratio * softmax(turn)`, the softmax over the tokens of a sample.

    Args:
        changes: `[C, 2]` of `change`.
        offsets: `[S + 1]` offsets of the samples.

    Returns:
        Tensor: `[C]`.
    """
    ratio, turn = changes.unbind(-1)
    weight = torch.exp(turn)  # turn is at most 2
    return ratio * weight / group_sum(weight, offsets)


def group_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """`[M]` sum over the group of each row."""
    groups = group_ids(offsets, len(values))
    return values.new_zeros(len(offsets) - 1).index_add_(0, groups, values)[groups]


def combine(ttv: Tensor, attention: Tensor, offsets: Tensor, alpha: float = 0.5) -> Tensor:
    """Score of a cut: both parts as shares of their group's sum, weighted `2 alpha` and `2 (1 - alpha)`, `[M]`."""
    parts = [x / (group_sum(x, offsets) + 1e-8) for x in (ttv, attention)]
    return 2 * alpha * parts[0] + 2 * (1 - alpha) * parts[1]


@register("transprune")
@dataclass
class TransPrune(ScoreMethod):
    """Keeps, at three depths, the tokens that layers change most and that the instruction attends to.

    Paper: TransPrune, arXiv 2507.20630, sections 3.2 and 3.3. Cuts before layers 7, 9 and 12 of 32. Reads input and
    output of the attention and of the MLP in the layers from the one before the first cut to the one before the last,
    and queries and keys of the layer after the cut.

    For a module with normed input `x` and output `y` before the residual: `TTV = |y|/|x| * softmax(1 - cos(y, x))`,
    added up over both modules of the layers seen so far. `IGA` is the attention from the text after the image, mean
    over heads and text tokens. `score = alpha * TTV / sum(TTV) + (1 - alpha) * IGA / sum(IGA)`.

    As in the release and unlike the paper: the sign of the cosine counts (`direction="absolute"` is the paper's form),
    the softmax runs over text and visual tokens (`support="visual"` is the paper's), both parts are normalized before
    they are added. Differences from the release: the softmax runs over a sample instead of the whole batch, counts are
    rounded, grouped-query attention is supported, all images of a sample are one group, everything is in float32; kept
    tokens keep their positions, unless `positions="compact"`.

    Attributes:
        layers: Cuts, as layers of a decoder of `depth` layers, scaled to the actual depth (cuts at the same layer
            become one).
        shares: Share of the original tokens kept after each cut.
        depth: Decoder depth that `layers` refers to; None uses them unscaled.
        alpha: Weight of TTV.
        direction: `"signed"` or `"absolute"` change of direction.
        support: Tokens that the softmax runs over, `"all"` or `"visual"`.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ... after every cut, as released; by default they keep
            their position ids. Not for models with position ids on several axes (M-RoPE).
    """

    question_aware: ClassVar[bool] = True

    layers: Layers = (7, 9, 12)
    shares: Shares = (0.875, 0.625, 0.125)
    depth: Positive | None = 32
    alpha: Share = 0.5
    direction: Literal["signed", "absolute"] = "signed"
    support: Literal["all", "visual"] = "all"
    positions: Literal["original", "compact"] = "original"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return scale_schedule(self.layers, self.shares, self.depth, num_layers, "TransPrune")

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        cuts = self.schedule(anatomy.num_layers)
        watched = range(max(cuts[0].layer - 1, 0), cuts[-1].layer)
        record = partial(recorded_change, direction=self.direction)
        found = [
            Tap("transprune.change", module, record)
            for layer in watched
            for part in ("attention", "mlp")
            if (module := submodule(anatomy.layers[layer], part)) is not None
        ]
        if watched and not found:
            raise MethodError(
                f"TransPrune found neither attention nor MLP in {type(anatomy.layers[watched[0]]).__name__}: expected "
                f"children named like {MODULES['attention']} or {MODULES['mlp']}; use a method that reads attention "
                "only, such as fastv"
            )
        return found

    def score(self, tokens: Tokens) -> Tensor:
        ttv = self._new_variation(tokens)
        if "transprune.ttv" in tokens.memory:
            ttv = ttv + tokens.memory["transprune.ttv"]
        tokens.memory["transprune.ttv"] = ttv
        return combine(ttv, visual_attention(tokens.attention_inputs()), tokens.offsets, self.alpha)

    def select(self, tokens: Tokens, scores: Tensor) -> Choice:
        choice = super().select(tokens, scores)
        tokens.memory["transprune.ttv"] = tokens.memory["transprune.ttv"][choice.keep]
        return choice

    def _new_variation(self, tokens: Tokens) -> Tensor:
        """`[M]` TTV of the visual tokens in the modules that ran since the last cut."""
        records, prompt = tokens.recorded.get("transprune.change", []), tokens.prompt
        seen = tokens.memory.get("transprune.seen", 0)
        tokens.memory["transprune.seen"] = len(records)
        total = torch.zeros(len(tokens), device=tokens.hidden.device, dtype=torch.float32)
        for record in records[seen:]:
            changes = over_prompt(record, tokens)  # [C, 2]
            assert prompt is not None
            if self.support == "all":
                total += variation(changes, prompt.offsets)[prompt.visual]
            else:
                total += variation(changes[prompt.visual], tokens.offsets)
        return total
