# SPDX-License-Identifier: Apache-2.0
"""Assisted generation: an assistant or a look-up proposes tokens, and the model checks several at a time.

transformers sends the first proposal along with the prompt. A method that reads the prompt would take the proposed
tokens for its last words, and what is kept would depend on what was guessed. So while a model is patched, the first
proposal is not sent along: the prompt passes alone, as without assistance, and proposals are checked from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

MAKER = "_get_candidate_generator"  # transformers' method that makes the generator


class LaterCandidates:
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


def after_the_prompt(make: Callable, applies: Callable[[Tensor], bool]) -> Callable:
    """Wraps a model's `MAKER`.

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
        return LaterCandidates(inner)

    return make_later
