# SPDX-License-Identifier: Apache-2.0
"""Positions of a prompt whose outputs are read after the decoder, and the position where its question ends.

A token whose output is read is never dropped: generation and classification heads read the last token of a row, a loss
reads the token before every labeled one (or that one itself, where the model classifies tokens), and `logits_to_keep`
names positions. If labels or the caller tell where an answer begins, methods see the prompt as if it ended there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.log import warn_once
from ..errors import VTPruneError
from ..models.anatomy import Anatomy

_IGNORED = -100  # label that transformers' losses ignore


def read_columns(arguments: dict[str, Any], real: Tensor, anatomy: Anatomy) -> Tensor:
    """Marks the positions whose outputs are read.

    Args:
        arguments: Keyword arguments of the outermost model's forward.
        real: `[B, T]` bool on the CPU, False for padding.
        anatomy: Parts of the model, which tell what its head reads.

    Returns:
        Tensor: `[B, T]` bool on the CPU.
    """
    batch, length = real.shape
    columns = torch.arange(length)
    last = torch.where(real, columns, -1).amax(1, keepdim=True)  # -1 in a row of padding
    read = columns == last
    if anatomy.padding_id is not None:
        ids = _matrix(arguments.get("input_ids"), real)
        if ids is not None:
            read |= columns == torch.where(ids != anatomy.padding_id, columns, -1).amax(1, keepdim=True)
    if anatomy.reads_first:
        read[:, 0] = True
    labels, shifted = _matrix(arguments.get("labels"), real), _matrix(arguments.get("shift_labels"), real)
    if shifted is not None:
        read |= shifted != _IGNORED
    elif labels is not None and anatomy.labels_next:
        read[:, :-1] |= labels[:, 1:] != _IGNORED
    elif labels is not None:
        read |= labels != _IGNORED  # of a classifier of tokens, or of an encoder that fills in words
    wanted = arguments.get("logits_to_keep")
    if wanted is not None and not (isinstance(wanted, int) and wanted == 0):  # as transformers indexes the states by it
        index = slice(-wanted, None) if isinstance(wanted, int) else wanted
        read[:, index.cpu() if isinstance(index, Tensor) else index] = True
    return read & real


def positions_asked(arguments: dict[str, Any]) -> int | None:
    """What the read positions depend on besides the padding: how many last ones are asked for, 0 for the very last;
    None if labels or a list of positions tell them."""
    wanted = arguments.get("logits_to_keep")
    if any(arguments.get(name) is not None for name in ("labels", "shift_labels")):
        return None
    if wanted is None:
        return 0
    return int(wanted) if isinstance(wanted, int) and wanted >= 0 else None


def warn_of_labels(arguments: dict[str, Any], read: int, planned: int) -> None:
    """Says once that labels keep more visual tokens (`read`) than the budget (`planned`)."""
    if read > planned and (arguments.get("labels") is not None or arguments.get("shift_labels") is not None):
        warn_once(
            "the labels of a call name more visual tokens than the budget keeps; the loss reads them, so all of them "
            "stay, and little or nothing is pruned; set the labels of placeholders to -100, as collators for "
            "vision-language models do"
        )


def answer_starts(
    question_end: Any, arguments: dict[str, Any], real: Tensor, visual: Tensor, anatomy: Anatomy
) -> list[int] | None:
    """Finds where the answer begins in every row.

    Args:
        question_end: Argument of `Patch.question`, or None.
        arguments: Keyword arguments of the outermost model's forward.
        real: `[B, T]` bool on the CPU, False for padding.
        visual: `[B, T]` bool on the CPU.
        anatomy: Parts of the model.

    Returns:
        list[int]: Position for each row, `T` if all of it is prompt; None if unknown.

    Raises:
        VTPruneError: The number of positions does not fit the batch, or one lies outside the call.
    """
    batch, length = real.shape
    if question_end is not None:
        ends = _ends(question_end, batch)
        if any(not -length <= end <= length for end in ends):
            raise VTPruneError(f"question(end={ends}) is outside a call of {length} tokens; expected 0 to {length}")
        return [end + length if end < 0 else end for end in ends]
    labels, shifted = _matrix(arguments.get("labels"), real), _matrix(arguments.get("shift_labels"), real)
    if (labels is None and shifted is None) or not anatomy.labels_next:  # labels of the prompt's own tokens
        return None
    if shifted is not None:  # a shifted label is one position before its token
        labeled = torch.zeros_like(real)
        labeled[:, 1:] = shifted[:, :-1] != _IGNORED
    else:
        assert labels is not None
        labeled = labels != _IGNORED
    columns = torch.arange(length)
    last = torch.where(visual, columns, -1).amax(1, keepdim=True)
    return torch.where(labeled & (columns > last), columns, length).amin(1).tolist()


def _matrix(values: Any, real: Tensor) -> Tensor | None:
    """Labels or ids on the CPU if there is one for every position, else None."""
    return values.cpu() if isinstance(values, Tensor) and values.shape == real.shape else None


def _ends(question_end: int | Sequence[int] | Tensor, batch: int) -> list[int]:
    values = question_end.flatten().tolist() if isinstance(question_end, Tensor) else question_end
    ends = list(values) if isinstance(values, Iterable) else [values]
    if ends and batch % len(ends) == 0:
        ends = [end for end in ends for _ in range(batch // len(ends))]  # `generate` copies every row for its beams
    if len(ends) != batch or not all(isinstance(end, int) for end in ends):
        raise VTPruneError(
            f"question(end={question_end!r}) does not fit a batch of {batch}; expected one whole number, or one for "
            "each row"
        )
    return ends
