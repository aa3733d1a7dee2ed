# SPDX-License-Identifier: Apache-2.0
"""Checks of what the functions of a study are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..core.options import fits, shorten
from ..errors import InputError, VTPruneError


def batches_of(given: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the batches that a study was given.

    Raises:
        InputError: `given` is a single batch, or one of its items is no mapping.
    """
    for batch in given:
        if isinstance(given, Mapping) or not isinstance(batch, Mapping):
            found = given if isinstance(given, Mapping) else batch
            raise InputError(
                f"found a {type(found).__name__} where batches are expected: an iterable of the keyword arguments of "
                "the model's calls, for example [processor(images=picture, text=prompt, return_tensors='pt')]"
            )
        yield batch


def refuse_below_one(**counts: int) -> None:
    """Raises `VTPruneError`, with the argument's name, unless every count is a whole number of at least 1."""
    for name, count in counts.items():
        if not fits(count, int) or count < 1:
            raise VTPruneError(f"{name} is {shorten(count)}; expected a whole number of at least 1")
