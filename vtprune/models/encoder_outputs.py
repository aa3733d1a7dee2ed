# SPDX-License-Identifier: Apache-2.0
"""What a call's visual features were made from.

`generate` runs the image encoder before it calls the model, takes the arguments that describe the pictures (sizes,
grids) away with the pixels, and repeats the features for beams. So the model's `get_image_features` and
`get_video_features` are
watched, wherever they are called from: their arguments, the length of what they return, and what the method's taps saw
inside are kept until the next encoding of the same kind in the same thread. A few rows of what they return are kept as
well: by them features are recognised that a caller put into embeddings by hand, where no placeholder tells.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import NothingPrunedError
from .transformers_names import ENCODER_OUTPUTS


@dataclass
class Encoded:
    """One run of an image or video encoder.

    Attributes:
        kind: "image" or "video".
        inputs: Arguments of the encoder by name.
        lengths: Tokens of each picture or clip; None where the output does not say.
        records: What taps recorded inside.
        output: Weak reference to the encoder's output, by which a later call shows that it uses it.
        rows: `[R, D]` some of the features; None where the output holds no tensors of one width.
    """

    kind: str
    inputs: dict[str, Any]
    lengths: list[int] | None
    records: dict[str, list] = field(default_factory=dict)
    output: Callable[[], Any] = field(default=lambda: None)
    rows: Tensor | None = None

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
    if kind == "video" and "pixel_values" in bound:  # as transformers 5.17 calls the frames of a clip
        bound["pixel_values_videos"] = bound.pop("pixel_values")
    try:
        reference: Callable[[], Any] = weakref.ref(output)
    except TypeError:  # a plain tuple cannot be referenced weakly; then nothing can be recognised later

        def reference() -> None:
            return None

    lengths = _lengths(getattr(output, "pooler_output", None))
    return output, Encoded(kind, dict(bound), lengths, records, reference, _some_rows(output))


def _lengths(features: Any) -> list[int] | None:
    if isinstance(features, Tensor):
        return [features.shape[-2]] * features.shape[0] if features.dim() == 3 else [features.shape[0]]
    if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) for f in features):
        return [f.shape[:-1].numel() for f in features]
    return None


def _some_rows(output: Any) -> Tensor | None:
    """`[R, D]` two features of each picture or clip, where the encoder's output shows them apart."""
    features = getattr(output, "pooler_output", output)
    parts = list(features) if isinstance(features, (list, tuple)) else [features]
    if not all(isinstance(p, Tensor) and p.dim() > 1 and p.shape[-1] == parts[0].shape[-1] for p in parts):
        return None
    # A flat tensor may hold several pictures.
    rows = [p[:: max(1, len(p) // 8)] if p.dim() == 2 else p[..., :: max(1, p.shape[-2] // 2), :] for p in parts]
    return torch.cat([r.detach().reshape(-1, r.shape[-1]).to(parts[0]) for r in rows]) if rows else None


def refuse_merged(embeds: Any, encoded: dict[str, Encoded], composite: str) -> None:
    """Raises where a caller put features among the embeddings: nobody can tell then which columns they fill.

    Args:
        embeds: `[B, T, D]`, or None.
        encoded: The thread's last encoding of each kind.
        composite: Class that takes features, for the message.

    Raises:
        NothingPrunedError: A feature stands in the embeddings, bit for bit.
    """
    if not isinstance(embeds, Tensor):
        return
    merged = [kind for kind, known in encoded.items() if known.rows is not None and _any_row(embeds, known.rows)]
    if merged:
        raise NothingPrunedError(
            f"inputs_embeds hold {' and '.join(merged)} features that were put there by hand, so nothing would be "
            f"pruned; expected input_ids with placeholders, and pixels or mm_encoder_outputs, given to {composite} and "
            "not to its language model; patch.paused() runs such a call unpruned"
        )


def _any_row(embeds: Tensor, rows: Tensor) -> bool:
    """Whether one of `rows` `[R, D]` is a row of `embeds` `[B, T, D]`."""
    if rows.shape[-1] != embeds.shape[-1]:
        return False
    rows = rows.to(embeds)
    rows = rows[rows.any(-1)]  # zeros are padding's too
    near = embeds[torch.isin(embeds[..., 0], rows[:, 0])]  # [n, D], mostly none
    return any(bool((near == row).all(-1).any()) for row in rows) if len(near) else False


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
    """Whether an argument brings features: some collators pass empty tensors beside text."""
    return value is not None and not (isinstance(value, Tensor) and value.numel() == 0)


def _pixel_names(kind: str, inputs: dict[str, Any]) -> list[str]:
    """Arguments that hold features of a kind, for models without a `get_*_features` method."""
    words = ("pixel", "embeds", "features", "hidden_states", "patches")
    names = [
        n
        for n in inputs
        if any(w in n for w in words) and n not in ("inputs_embeds", "pixel_mask", "pixel_attention_mask")
    ]
    video = [n for n in names if "video" in n]
    return (
        video if kind == "video" else [n for n in names if n not in video and "audio" not in n and "input_f" not in n]
    )
