# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's requests as batches of prompts and pictures, and what is logged about each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import Instance, TokenCounts

from ...report.pruning import Pruning
from . import options


@dataclass
class PrunedTokenCounts(TokenCounts):
    """lmms-eval's token counts of a request, and what pruning did to it.

    Written to the samples file (`--log_samples`) under `token_counts`.

    Attributes:
        visual_tokens: Visual tokens of the prompt; 0 where the request has no picture.
        kept_visual_tokens: Those that survived to the last layer.
        mean_ratio: Mean share of the visual tokens over the inputs of the decoder layers.
        stages: `[layer, visual tokens kept]` for every cut; layer 0 is before the decoder.
    """

    visual_tokens: int = 0
    kept_visual_tokens: int = 0
    mean_ratio: float = 1.0
    stages: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, pruning: Pruning | None, sample: int, counts: TokenCounts) -> PrunedTokenCounts:
        """Counts of one sample of a prefill; of a request without visual tokens where `pruning` is None."""
        mine = cls(input_tokens=counts.input_tokens, output_tokens=counts.output_tokens)
        if pruning is None or not len(pruning.visual[sample]):
            return mine
        mine.visual_tokens = len(pruning.visual[sample])
        mine.kept_visual_tokens = len(pruning.kept[sample])
        layers = pruning.per_layer(sample)
        mine.mean_ratio = sum(layers) / (len(layers) * mine.visual_tokens)
        mine.stages = tuple((layer, len(kept[sample])) for layer, kept in pruning.stages)
        return mine

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "visual_tokens": self.visual_tokens,
            "kept_visual_tokens": self.kept_visual_tokens,
            "mean_ratio": round(self.mean_ratio, 6),
            "stages": [list(stage) for stage in self.stages],
        }


def batches(requests: Sequence[Instance], size: int, alike: Callable[[Instance], Any]) -> Iterator[list[Instance]]:
    """Neighboring requests for which `alike` is the same, at most `size` together; tasks may share a batch."""
    for _, group in itertools.groupby(requests, key=alike):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def until(text: str, ends: str | Sequence[str] | None) -> str:
    """An answer up to the first of the texts at which a task says that it ends."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        if end:
            text = text.split(end)[0]
    return text


def answers(tokenizer: Any, prompts: Sequence[str], continuations: Sequence[str]) -> list[list[int]]:
    """Token ids of answers as they stand behind their prompts.

    A tokenizer may write the first word of a text otherwise than one inside a text, so prompt and answer are read
    together where the prompt's own ids come out the same.

    Raises:
        ArgumentError: An answer has no tokens.
    """
    found = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        before, whole, alone = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt, prompt + continuation, continuation)
        )
        ids = whole[len(before) :] if whole[: len(before)] == before else alone
        if not ids:
            raise options.ArgumentError(
                f"the answer {continuation!r} has no tokens; log-likelihoods need answers of at least one token"
            )
        found.append(ids)
    return found
