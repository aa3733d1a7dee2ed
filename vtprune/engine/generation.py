# SPDX-License-Identifier: Apache-2.0
"""Wrappers of `generate`: assisted generation drafts only after the prompt, and chunked prefill is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import UnsupportedModelError
from ..models.transformers_names import cache_of
from .kv_cache import length


class DelayedCandidates:
    """A transformers candidate generator whose first proposal is discarded.

    Args:
        inner: The generator. It is called for the first proposal too, so that an assistant's cache holds the prompt.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.prompt_passed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Proposes tokens.

        Args:
            input_ids: `[1, T]` int token ids so far.
            kwargs: Further arguments of the generator.

        Returns:
            tuple: `[1, T + C]` token ids with the proposal, and its logits `[1, C, V]` or None.
        """
        proposal = self.inner.get_candidates(input_ids, **kwargs)
        if self.prompt_passed:
            return proposal
        self.prompt_passed = True
        return input_ids, None


def delay_first_candidates(make: Callable, applies: Callable[[Tensor], bool]) -> Callable:
    """Wraps a model's `MAKE_CANDIDATES` so that its generator proposes nothing before a pruned prompt has run.

    Args:
        make: The bound method.
        applies: Tells whether a prompt `[B, T]` is pruned.
    """

    def make_later(*args: Any, **kwargs: Any) -> Any:
        inner = make(*args, **kwargs)
        prompt = kwargs.get("input_ids")
        # Generators that read the model's own outputs propose nothing before the prompt has run anyway.
        if getattr(inner, "requires_model_outputs", False) or prompt is None or not applies(prompt):
            return inner
        return DelayedCandidates(inner)

    return make_later


def refuse_chunks(prefill: Callable, applies: Callable[[Tensor], bool], see: Callable[[Any], Any]) -> Callable:
    """Wraps a model's `RUN_PROMPT` so that it refuses to run a prompt that is pruned in chunks.

    Args:
        prefill: The bound method.
        applies: Tells whether a prompt `[B, T]` is pruned.
        see: Called with the KV cache before its length is read.
    """

    @functools.wraps(prefill)
    def whole(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(("input_ids", "generation_config", "model_kwargs"), args, strict=False)) | kwargs
        cache = cache_of(named.get("model_kwargs", {}))
        see(cache)
        ids, size = named.get("input_ids"), getattr(named.get("generation_config"), "prefill_chunk_size", None)
        if size is not None and isinstance(ids, Tensor) and ids.shape[1] > size and applies(ids[:, length(cache) :]):
            raise UnsupportedModelError(
                f"prefill_chunk_size={size} splits a prompt of {ids.shape[1]} tokens, and each chunk would be pruned "
                "by itself; pass prefill_chunk_size=None (a pruned prefill needs less memory), or run it inside "
                "patch.paused()"
            )
        return prefill(*args, **kwargs)

    return whole
