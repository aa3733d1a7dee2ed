# SPDX-License-Identifier: Apache-2.0
"""Records of the encoder runs that a call's visual features come from.

`generate` runs the image encoder before it calls the model, removes the arguments that describe the images (sizes,
grids) together with the pixels, and repeats the features for beams. Therefore every call of the model's
`get_image_features` and `get_video_features` is recorded: its arguments, the lengths of its output, and the records of
the method's taps are kept until the next encoding of the same kind in the same thread.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .arguments import parameters
from .transformers_names import ENCODER_OUTPUTS

# Argument names of pixels and image features in transformers' models; audio and text have features as well.
_PICTURES = re.compile(r"pixel|image|video|visual|vision|picture|patches|frames")


@dataclass
class Encoded:
    """One run of an image or video encoder; by default, one of which nothing is known.

    Attributes:
        kind: "image" or "video".
        inputs: Arguments of the encoder by name.
        lengths: Number of tokens of each image or clip; None if the output does not tell.
        records: Records of taps inside the encoder.
        output: Weak reference to the encoder's output, by which later calls that pass it are recognized.
    """

    kind: str
    inputs: dict[str, Any] = field(default_factory=dict)
    lengths: list[int] | None = None
    records: dict[str, list] = field(default_factory=dict)
    output: Callable[[], Any] = field(default=lambda: None)

    @property
    def total(self) -> int | None:
        """Number of feature rows."""
        return None if self.lengths is None else sum(self.lengths)


def watch(kind: str, encode: Callable, args: tuple, kwargs: dict, records: dict[str, list]) -> tuple[Any, Encoded]:
    """Runs an encoder and records its arguments and output.

    Args:
        kind: "image" or "video".
        encode: The bound method.
        args, kwargs: Its arguments.
        records: Dictionary that taps fill while it runs.

    Returns:
        tuple: The encoder's output and the record.
    """
    output = encode(*args, **kwargs)
    encoded = Encoded(
        kind, parameters(encode).bind(args, kwargs), _lengths(getattr(output, "pooler_output", None)), records
    )
    with suppress(TypeError):  # a plain tuple has no weak references; later calls with it are not recognized
        encoded.output = weakref.ref(output)
    return output, encoded


def _lengths(features: Any) -> list[int] | None:
    if isinstance(features, Tensor):
        return [features.shape[-2]] * features.shape[0] if features.dim() == 3 else [features.shape[0]]
    if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) for f in features):
        return [f.shape[:-1].numel() for f in features]
    return None


def supplied(
    inputs: dict[str, Any], encoded: dict[str, Encoded], fresh: set[str], kinds: list[str]
) -> dict[str, Encoded]:
    """Finds the kinds of features that a call gets.

    Args:
        inputs: Keyword arguments of the composite's call.
        encoded: The thread's last encoder run of each kind.
        fresh: Kinds that were encoded inside this call.
        kinds: The kinds that the model has placeholders for.

    Returns:
        dict: The encoder run of each kind that comes with features; one without inputs if the run is unknown.
    """
    given = inputs.get(ENCODER_OUTPUTS)
    given = given if isinstance(given, dict) else {}
    found = {}
    for kind in kinds:
        known = encoded.get(kind)
        if known is not None and kind in fresh and known.total == 0:
            continue  # pixels of zero images
        if known is not None and (kind in fresh or _same_features(known.output(), given.get(kind))):
            found[kind] = known
        elif given.get(kind) is not None:  # encoded elsewhere
            found[kind] = Encoded(kind, {}, _lengths(getattr(given[kind], "pooler_output", None)))
        elif any(_holds_features(inputs[n]) for n in _pixel_names(kind, inputs)):
            found[kind] = Encoded(kind)
    return found


def _same_features(known: Any, given: Any) -> bool:
    """Whether `given` is an encoder's output, or a copy of its container: accelerate makes one for offloaded models."""
    if known is None or given is None:
        return False
    mine, theirs = (getattr(output, "pooler_output", None) for output in (known, given))
    mine, theirs = ([x] if isinstance(x, Tensor) else x if isinstance(x, (list, tuple)) else [] for x in (mine, theirs))
    return known is given or (0 < len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True)))


def _holds_features(value: Any) -> bool:
    """Whether an argument holds pixels or features, not flags, sizes, masks, or the empty tensors of some collators."""
    if isinstance(value, Tensor):
        return value.dim() >= 2 and value.numel() > 0 and (value.is_floating_point() or value.dtype == torch.uint8)
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(map(_holds_features, value))


def _pixel_names(kind: str, inputs: dict[str, Any]) -> list[str]:
    """Names of arguments that may hold features of a kind, for models without a `get_*_features` method."""
    names = [n for n in inputs if _PICTURES.search(n) and "mask" not in n]
    video = [n for n in names if "video" in n]
    return video if kind == "video" else [n for n in names if n not in video]
