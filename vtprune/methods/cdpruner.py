# SPDX-License-Identifier: Apache-2.0
"""CDPruner: a diverse subset of the visual tokens that is relevant to the instruction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

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

_SEGMENT = 77  # context length of CLIP's text tower
_TEXT = "cdpruner.text"  # key of the recorded embedding layer


def similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Cosine of every image embedding with every text embedding, averaged over the texts.

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
            f"the features before the projector are {features.shape[1]} wide, but clip projects features of width "
            f"{weights.shape[1]}; pass the CLIP model that the vision tower was taken from"
        )
    return clip.visual_projection(clip.vision_model.post_layernorm(features.to(weights)))


def clip_text(clip: Any, clip_tokenizer: Any, text: str) -> Tensor:
    """`[m, C]` CLIP embeddings of a text, one for every segment of 77 tokens."""
    tokens = torch.tensor(clip_tokenizer(text.strip())["input_ids"])
    segments = tokens.new_zeros(-(-len(tokens) // _SEGMENT), _SEGMENT)
    segments.view(-1)[: len(tokens)] = tokens
    output = clip.get_text_features(input_ids=segments.to(clip.device))
    return output if isinstance(output, Tensor) else output.pooler_output


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
    """Keeps a diverse and relevant subset by greedy MAP of a determinantal point process, before the decoder.

    Paper: CDPruner, arXiv 2506.10967 (NeurIPS 2025), method section. With relevance `r_i` of token `i` to the
    instruction and the projected features `z`, the kernel is `L_ij = r_i cos(z_i, z_j) r_j`; tokens are picked one by
    one in each crop, each increasing the determinant most. `r` is min-max scaled over the crops of a sample.

    Relevance: with `clip` as published, the NEGATIVE cosine of CLIP-space patches (features before the projector
    through CLIP's last norm and projection) and CLIP embeddings of the question, in segments of 77 tokens: these
    patches are anti-correlated with text. Models of transformers do not include CLIP's text tower; without `clip` the
    visual embeddings are compared with the decoder's embeddings of the text after the image, as the paper does for
    models without CLIP. Those are not anti-correlated, so the cosine itself is used. It enters the kernel in the
    release's bounded form `exp(theta / (2 - 2 theta) r_i)`, because a relevance of 0 would exclude a token altogether
    (`benchmarks/cdpruner_relevance.py`).

    Differences from the release: min and max are taken per sample, unless `scale_over="batch"`; crops share the exact
    budget evenly, and LLaVA-NeXT keeps its unpadded layout (there every crop is full), newlines being dropped first;
    with `clip` the question is all text after the image, chat template included.

    Attributes:
        relevance: `"none"` leaves the text out: the plain determinantal point process, as with `theta=0`.
        theta: Weight of relevance against diversity in [0, 1); `"released"` is `r_i` itself in the kernel, and `"auto"`
            that with `clip` and 0.5 without.
        scale_over: "sample", or "batch" as released.
        clip: A `CLIPModel` whose vision tower is the one of the model.
        clip_tokenizer: Its tokenizer.
        tokenizer: Tokenizer of the vision-language model, to decode the question from the prompt.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ..., as the release does; by default they keep their
            position ids. Not for models with position ids on several axes (M-RoPE).
    """

    question_aware: ClassVar[bool] = True

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
            raise MethodError("CDPruner got only some of clip, clip_tokenizer and tokenizer; pass all three or none")

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
        """`[M]` factors on both sides of the cosine in the kernel, from scaled relevance `[M]`."""
        theta = self.theta
        if theta == "auto":
            theta = "released" if self.clip is not None else 0.5
        return relevance if isinstance(theta, str) else torch.exp(theta / (2 - 2 * theta) * relevance)

    def text_relevance(self, tokens: Tokens) -> Tensor:
        """`[M]` relevance of every visual token to the text after the image of its sample, scaled.

        Raises:
            MethodError: The text embeddings contain NaN or Inf.
        """
        cosine = self.cosine(tokens)
        if not bool(torch.isfinite(cosine).all()):
            bad = ", ".join(map(str, tokens.sample[~torch.isfinite(cosine)].unique().tolist()))
            raise MethodError(
                f"the text embeddings of sample {bad} contain NaN or Inf, so relevance cannot be computed; check "
                "the prompt's embeddings, or pass relevance='none'"
            )
        group = tokens.group if self.scale_over == "sample" else torch.zeros_like(tokens.group)
        # Only in CLIP space are patches anti-correlated with text.
        return scale(cosine if self.clip is None else -cosine, group, len(tokens.offsets) - 1)

    def cosine(self, tokens: Tokens) -> Tensor:
        """`[M]` mean cosine of every visual token with the text after the image of its sample."""
        ids, embeds = self._text(tokens)
        prompt = tokens.prompt
        assert prompt is not None
        out = tokens.hidden.new_zeros(len(tokens), dtype=torch.float32)
        patches = None if self.clip is None else self._clip_patches(tokens)
        for rows in prompt.text.split(prompt.text_offsets.diff().tolist()):
            index = prompt.batch[rows].to(embeds.device), prompt.slot[rows].to(embeds.device)
            mine = tokens.sample == prompt.batch[rows[0]]
            if patches is None:
                out[mine] = similarity(tokens.hidden[mine], embeds[index].to(out.device)).float()
            else:
                out[mine] = similarity(patches[mine], self._clip_text(ids[index]).to(out.device)).float()
        return out

    def _text(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """`[B, T]` ids and `[B, T, D]` embeddings of the prompt."""
        assert tokens.prompt is not None
        last_row, last_slot = int(tokens.prompt.batch.max()), int(tokens.prompt.slot.max())
        for *inputs, output in reversed(tokens.recorded.get(_TEXT, [])):
            if output.dim() == 3 and output.shape[0] > last_row and output.shape[1] > last_slot:
                return inputs[0], output
        raise MethodError(
            f"{self.name} reads the instruction from the embedding layer, which was not called for this prompt; pass "
            "input_ids instead of inputs_embeds, and patch the model again if an adapter has replaced the layer"
        )

    def _clip_patches(self, tokens: Tokens) -> Tensor:
        """`[M, C]` CLIP embeddings of the visual tokens; 0 for newlines, whose cosine is then 0."""
        vision = Vision(tokens, self.name)
        return vision.to_tokens(clip_patches(self.clip, vision.features)).nan_to_num(0.0)

    def _clip_text(self, ids: Tensor) -> Tensor:
        question = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return clip_text(self.clip, self.clip_tokenizer, question)
