# SPDX-License-Identifier: Apache-2.0
"""What a call's visual features were made from.

`generate` runs the image encoder before it calls the model, takes the arguments that describe the pictures (sizes,
grids) away with the pixels, and repeats the features for beams. So the model's `get_image_features` and
`get_video_features` are
watched, wherever they are called from: their arguments, the length of what they return, and what the method's taps saw
inside are kept until the next encoding of the same kind in the same thread.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .transformers_names import ENCODER_OUTPUTS

# What transformers' models call pixels and features of pictures; sounds and text have features as well.
_PICTURES = re.compile(r"pixel|image|video|visual|vision|picture|patches|frames")


@dataclass
class Encoded:
    """One run of an image or video encoder.

    Attributes:
        kind: "image" or "video".
        inputs: Arguments of the encoder by name.
        lengths: Tokens of each picture or clip; None where the output does not say.
        records: What taps recorded inside.
        output: Weak reference to the encoder's output, by which a later call shows that it uses it.
    """

    kind: str
    inputs: dict[str, Any]
    lengths: list[int] | None
    records: dict[str, list] = field(default_factory=dict)
    output: Callable[[], Any] = field(default=lambda: None)

    @property
    def total(self) -> int | None:
        """Number of feature rows."""
        return None if self.lengths is None else sum(self.lengths)


def watch(kind: str, encode: Callable, args: tuple, kwargs: dict, records: dict[str, list]) -> tuple[Any, Encoded]:
    """Runs an encoder and notes what it was given and what it returned.

    Args:
        kind: "image" or "video".
        encode: The bound method.
        args, kwargs: Its arguments.
        records: Filled by taps while it runs.

    Returns:
        tuple: The encoder's output and the note.
    """
    output = encode(*args, **kwargs)
    bound = inspect.signature(encode).bind_partial(*args, **kwargs).arguments
    bound.update(bound.pop("kwargs", {}))
    try:
        reference: Callable[[], Any] = weakref.ref(output)
    except TypeError:  # a plain tuple cannot be referenced weakly; then nothing can be recognized later

        def reference() -> None:
            return None

    lengths = _lengths(getattr(output, "pooler_output", None))
    return output, Encoded(kind, dict(bound), lengths, records, reference)


def _lengths(features: Any) -> list[int] | None:
    if isinstance(features, Tensor):
        return [features.shape[-2]] * features.shape[0] if features.dim() == 3 else [features.shape[0]]
    if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) for f in features):
        return [f.shape[:-1].numel() for f in features]
    return None


def supplied(
    inputs: dict[str, Any], encoded: dict[str, Encoded], fresh: set[str], kinds: list[str]
) -> dict[str, Encoded]:
    """Which kinds of features a call brings along.

    Args:
        inputs: Keyword arguments of the composite's call.
        encoded: The thread's last encoding of each kind.
        fresh: Kinds that were encoded inside this very call.
        kinds: The kinds that the model has placeholders for.

    Returns:
        dict: For each kind that comes with features, what is known of them.
    """
    given = inputs.get(ENCODER_OUTPUTS)
    given = given if isinstance(given, dict) else {}
    found = {}
    for kind in kinds:
        known = encoded.get(kind)
        if known is not None and kind in fresh and known.total == 0:
            continue  # pixels of no picture
        if known is not None and (kind in fresh or (given.get(kind) is not None and known.output() is given[kind])):
            found[kind] = known
        elif given.get(kind) is not None or any(_holds_something(inputs[n]) for n in _pixel_names(kind, inputs)):
            found[kind] = Encoded(kind, {}, None)
    return found


def _holds_something(value: Any) -> bool:
    """Whether an argument brings features: numbers in rows, not a flag, a size or a mask, and not the empty tensors
    that some collators pass beside text."""
    if isinstance(value, Tensor):
        return value.dim() >= 2 and value.numel() > 0 and (value.is_floating_point() or value.dtype == torch.uint8)
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(map(_holds_something, value))


def _pixel_names(kind: str, inputs: dict[str, Any]) -> list[str]:
    """Arguments that may hold features of a kind, for models without a `get_*_features` method."""
    names = [n for n in inputs if _PICTURES.search(n) and "mask" not in n]
    video = [n for n in names if "video" in n]
    return video if kind == "video" else [n for n in names if n not in video]
