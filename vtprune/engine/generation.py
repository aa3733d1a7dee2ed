# SPDX-License-Identifier: Apache-2.0
"""What `generate` does around a prompt: assistants' first proposals, and prompts that are run in chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import UnsupportedModelError


class DelayedCandidates:
    """A transformers candidate generator whose first proposal is not used.

    Args:
        inner: The generator. It is asked all the same, so that an assistant's cache holds the prompt.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.prompt_passed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Proposes tokens.

        Args:
            input_ids: `[1, T]` int, the text so far.
            kwargs: What the generator takes beside it.

        Returns:
            tuple: `[1, T + C]` the text with its proposal, and its logits `[1, C, V]` or None.
        """
        proposal = self.inner.get_candidates(input_ids, **kwargs)
        if self.prompt_passed:
            return proposal
        self.prompt_passed = True
        return input_ids, None


def delay_first_candidates(make: Callable, applies: Callable[[Tensor], bool]) -> Callable:
    """Wraps a model's `MAKE_CANDIDATES`.

    Args:
        make: The bound method.
        applies: Whether the prompt `[B, T]` is one that is pruned.
    """

    def make_later(*args: Any, **kwargs: Any) -> Any:
        inner = make(*args, **kwargs)
        prompt = kwargs.get("input_ids")
        # Generators that read the model's own outputs have nothing to propose before the prompt has passed.
        if getattr(inner, "requires_model_outputs", False) or prompt is None or not applies(prompt):
            return inner
        return DelayedCandidates(inner)

    return make_later


def refuse_chunks(prefill: Callable, applies: Callable[[Tensor], bool], see: Callable[[Any], Any]) -> Callable:
    """Wraps a model's `RUN_PROMPT` so that a prompt that will be pruned is not run in chunks.

    Args:
        prefill: The bound method.
        applies: Whether the prompt `[B, T]` is one that is pruned.
        see: Is shown the KV cache before anybody asks for its length.
    """

    @functools.wraps(prefill)
    def whole(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(("input_ids", "generation_config", "model_kwargs"), args, strict=False)) | kwargs
        see(named.get("model_kwargs", {}).get("past_key_values"))
        ids, size = named.get("input_ids"), getattr(named.get("generation_config"), "prefill_chunk_size", None)
        if size is not None and isinstance(ids, Tensor) and ids.shape[1] > size and applies(ids):
            raise UnsupportedModelError(
                f"prefill_chunk_size={size} splits a prompt of {ids.shape[1]} columns, and each chunk would choose "
                "among its own visual tokens; pass prefill_chunk_size=None (a pruned prefill needs less memory), or "
                "run it inside patch.paused()"
            )
        return prefill(*args, **kwargs)

    return whole
