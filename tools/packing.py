# SPDX-License-Identifier: Apache-2.0
"""Several questions and answers behind one picture, packed to a row of text that attends within each question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # label of positions without a loss
Dialogue = tuple[str, str, str]  # kind, question, answer


class Packed(NamedTuple):
    """Questions of the pictures of a batch; fields as in the batches of the trainings.

    Attributes:
        tokens: int64 `[B, length]`, the questions with their answers.
        labels: int64 `[B, length]`, the token to predict at each position, or `IGNORE`.
        segments: int64 `[B, length]`, number of the question, 0 for padding.
        positions: int64 `[B, length]`, positions after the picture, counted for each question separately.
        asked: per picture, the questions that fitted, in the order of `segments`.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor
    positions: Tensor
    asked: list[list[Dialogue]]


def pack_questions(
    rows: Sequence[Sequence[Dialogue]], encode: Callable[[str], Sequence[int]], end: int, length: int
) -> Packed:
    """Converts as many questions of each picture as fit to tensors.

    Args:
        rows: the questions of each picture.
        encode: converts a text to tokens.
        end: token that ends an answer.
        length: text positions of a picture.
    """
    tokens, segments, positions = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    labels = torch.full((len(rows), length), IGNORE)
    kept: list[list[Dialogue]] = []
    for row, asked in enumerate(rows):
        used, fitted = 0, []
        for dialogue in asked:
            question, answer = encode(f"{dialogue[1]} answer:"), encode(dialogue[2])
            words = (*question, *answer)
            if used + len(words) > length:
                continue
            fitted.append(dialogue)
            span = slice(used, used + len(words))
            tokens[row, span] = torch.tensor(words)
            segments[row, span] = len(fitted)
            positions[row, span] = torch.arange(len(words))
            labels[row, used + len(question) - 1 : used + len(words)] = torch.tensor((*answer, end))
            used += len(words)
        kept.append(fitted)
    return Packed(tokens, labels, segments, positions, kept)
