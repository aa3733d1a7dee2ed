# SPDX-License-Identifier: Apache-2.0
"""CDPruner: a diverse subset of the visual tokens, conditioned on the instruction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from vtprune_kernels import dpp_map

from ..core.method import Choice, Method, Stage, Tap
from ..core.options import Range
from ..core.ragged import from_order
from ..core.registry import register
from ..core.tokens import Tokens
from ..errors import MethodError
from ..vision.crops import by_crop
from ..vision.tower import Vision, crops_seen, projector_tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

from torch.nn.functional import normalize

_SEGMENT = 77  # tokens that CLIP's text tower reads at once


def similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Mean over the text rows of the cosine.

    Args:
        image_embeds: `[..., C]`.
        text_embeds: `[m, C]`.

    Returns:
        Tensor: `[...]` float32.
    """
    return normalize(image_embeds.float(), dim=-1) @ normalize(text_embeds.float(), dim=-1).mean(0)


def clip_patches(clip: Any, features: Tensor) -> Tensor:
    """`[R, C]` CLIP embeddings of patches `[R, F]`, the vision tower's features before the projector.

    Raises:
        MethodError: The features are not as wide as those of the CLIP model `clip`.
    """
    weights = clip.visual_projection.weight
    if features.shape[1] != weights.shape[1]:
        raise MethodError(
            f"clip projects features of width {weights.shape[1]}, the model's are {features.shape[1]} wide; "
            "expected the CLIP model that the vision tower was taken from"
        )
    return clip.visual_projection(clip.vision_model.post_layernorm(features.to(weights)))


def clip_text(clip: Any, clip_tokenizer: Any, text: str) -> Tensor:
    """`[m, C]` CLIP embeddings of a text, one for every 77 tokens of it."""
    tokens = torch.tensor(clip_tokenizer(text.strip())["input_ids"])
    offsets = tokens.new_zeros(-(-len(tokens) // _SEGMENT), _SEGMENT)
    offsets.view(-1)[: len(tokens)] = tokens
    output = clip.get_text_features(input_ids=offsets.to(clip.device))
    return output if isinstance(output, Tensor) else output.pooler_output


_TEXT = "cdpruner.text"


def scale(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Min-max scaling inside each group: `(v - min + 1e-6) / (max - min)`; ones where all values are equal.

    Args:
        values: `[M]`.
        group: `[M]` int64.
        groups: Number of groups.
    """
    low = values.new_zeros(groups).scatter_reduce(0, group, values, "amin", include_self=False)[group]
    high = values.new_zeros(groups).scatter_reduce(0, group, values, "amax", include_self=False)[group]
    return torch.where(high > low, (values - low + 1e-6) / (high - low), 1.0)


@register("cdpruner")
@dataclass
class CDPruner(Method):
    """Greedy MAP of a determinantal point process conditioned on relevance, crop by crop, before the decoder.

    Paper: CDPruner, arXiv 2506.10967 (NeurIPS 2025), method section. With relevance `r_i` of token `i` to the
    instruction and the projected features `z`, the kernel is `L_ij = r_i cos(z_i, z_j) r_j`; tokens are picked one by
    one, each adding most to the determinant. `r` is min-max scaled over the crops of a sample.

    Relevance: with `clip` as published, the NEGATIVE cosine of CLIP-space patches (features before the projector
    through CLIP's last norm and projection), which are anti-correlated with text, and CLIP embeddings of the question,
    in segments of 77 tokens. No model of transformers carries CLIP's text tower; without `clip` the visual embeddings
    are compared with the decoder's embeddings of the text after the image, the paper's way for models without CLIP.
    They are not anti-correlated: there it is the cosine itself, and it enters the kernel as `exp(theta / (2 - 2 theta)
    r_i)`, the bounded form with a weight of relevance `theta` that the release has beside the other, because a
    relevance of 0 bars a token whatever else it shows (`benchmarks/cdpruner_relevance.py`).

    Differences from the release: min and max are taken per sample, unless `scale_over="batch"`; crops share the exact
    budget evenly, and LLaVA-NeXT keeps its unpadded layout (there every crop is full), newlines going first; with
    `clip` the question is all text after the image, chat template included.

    Attributes:
        relevance: `"none"` leaves the text out: the plain determinantal point process, as with `theta=0`.
        theta: Weight of relevance against diversity in [0, 1); `"released"` is `r_i` itself in the kernel, and `"auto"`
            that with `clip` and 0.5 without.
        scale_over: "sample", or "batch" as released.
        clip: A `CLIPModel` whose vision tower is the one of the model.
        clip_tokenizer: Its tokenizer.
        tokenizer: Tokenizer of the vision-language model, to read the question back from the prompt.
        positions: `"compact"` renumbers the survivors 0, 1, 2, ..., as in the release, where ids are made after the
            cut; by default they keep their positions. Not for models that place tokens on several axes.
    """

    relevance: Literal["text", "none"] = "text"
    theta: Annotated[float, Range(0, 1, open=(1,))] | Literal["auto", "released"] = "auto"
    scale_over: Literal["sample", "batch"] = "sample"
    clip: Any = None
    clip_tokenizer: Any = None
    tokenizer: Any = None
    positions: Literal["original", "compact"] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [v is not None for v in (self.clip, self.clip_tokenizer, self.tokenizer)]
        if any(given) and not all(given):
            raise MethodError("clip, clip_tokenizer and tokenizer go together: give all three or none")

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0, 0.1112),)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        text = Tap(_TEXT, anatomy.embeddings, lambda args, kwargs, output: (*args, *kwargs.values(), output))
        if self.relevance == "none" and anatomy.projector is None:
            return ()
        if anatomy.projector is None and self.clip is None:
            return (text,)
        projector = projector_tap(anatomy, self.name)
        return (projector,) if self.relevance == "none" else (text, projector)

    def choose(self, tokens: Tokens) -> Choice:
        relevance = self.text_relevance(tokens) if self.relevance == "text" else None
        weights = tokens.hidden.new_ones(len(tokens), dtype=torch.float32) if relevance is None else relevance
        crops = by_crop(tokens, crops_seen(tokens, self.name))
        rows = crops.rows
        features, inside = tokens.hidden[rows], self.in_kernel(weights)[rows]
        order = dpp_map(features, inside, crops.offsets, crops.budgets, crops.max_budget, crops.max_length)
        keep = from_order(torch.where(order >= 0, rows[order], -1), len(tokens))
        return Choice(keep, scores=relevance)

    def in_kernel(self, relevance: Tensor) -> Tensor:
        """What scaled relevance `[M]` is on both sides of the cosine in the kernel."""
        theta = self.theta
        if theta == "auto":
            theta = "released" if self.clip is not None else 0.5
        return relevance if isinstance(theta, str) else torch.exp(theta / (2 - 2 * theta) * relevance)

    def text_relevance(self, tokens: Tokens) -> Tensor:
        """`[M]` relevance of every visual token to the text after the image of its sample, scaled.

        Raises:
            MethodError: The embedded text holds NaN or Inf.
        """
        cosine = self.cosine(tokens)
        if not bool(torch.isfinite(cosine).all()):
            bad = ", ".join(map(str, tokens.sample[~torch.isfinite(cosine)].unique().tolist()))
            raise MethodError(f"the embedded text of sample {bad} holds NaN or Inf: relevance would be meaningless")
        group = tokens.group if self.scale_over == "sample" else torch.zeros_like(tokens.group)
        # Negation belongs to the space of CLIP alone.
        return scale(cosine if self.clip is None else -cosine, group, len(tokens.offsets) - 1)

    def cosine(self, tokens: Tokens) -> Tensor:
        """`[M]` mean cosine of every visual token with the text after the image of its sample."""
        ids, embeds = self._text(tokens)
        prompt = tokens.prompt
        assert prompt is not None
        out = tokens.hidden.new_zeros(len(tokens), dtype=torch.float32)
        patches = None if self.clip is None else self._clip_patches(tokens)
        for rows in prompt.text.split(prompt.text_offsets.diff().tolist()):
            place = prompt.batch[rows].to(embeds.device), prompt.slot[rows].to(embeds.device)
            mine = tokens.sample == prompt.batch[rows[0]]
            if patches is None:
                out[mine] = similarity(tokens.hidden[mine], embeds[place].to(out.device)).float()
            else:
                out[mine] = similarity(patches[mine], self._clip_text(ids[place]).to(out.device)).float()
        return out

    def _text(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """`[B, T]` ids and `[B, T, D]` embeddings of the prompt."""
        assert tokens.prompt is not None
        rows, columns = int(tokens.prompt.batch.max()), int(tokens.prompt.slot.max())
        for *inputs, output in reversed(tokens.recorded.get(_TEXT, [])):
            if output.dim() == 3 and output.shape[0] > rows and output.shape[1] > columns:
                return inputs[0], output
        raise MethodError(
            f"{self.name} reads the instruction from the embedding layer, which was not called for this prompt; pass "
            "input_ids, not inputs_embeds"
        )

    def _clip_patches(self, tokens: Tokens) -> Tensor:
        """`[M, C]`; newlines are in no image: relevance 0 lies between the extremes of a cosine."""
        vision = Vision(tokens, self.name)
        return vision.to_tokens(clip_patches(self.clip, vision.features)).nan_to_num(0.0)

    def _clip_text(self, ids: Tensor) -> Tensor:
        question = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return clip_text(self.clip, self.clip_tokenizer, question)
