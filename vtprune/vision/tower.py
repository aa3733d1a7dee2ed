# SPDX-License-Identifier: Apache-2.0
"""Vision-side features and attention, mapped to the visual tokens of the prompt.

Two taps record them: the projector's calls (features before it) and the calls of one vision layer (its attention). The
mapping to the prompt differs between models, which drop class tokens, merge patches, pack, unpad or shrink tiles,
permute windows and insert newlines. It is derived without a table of models:

* patches -> projector rows: by counts. Tokens in front of a square number of patches are a prefix (class and register
  tokens); several patches per row are a square block of a crop, or consecutive patches of a packed sequence.
* projector rows -> prompt positions: the projector's output is laid out by the model's own `pack_image_features`, if it
  has one, and then matched bit by bit with the states that the decoder receives. A row without a match is an error, so
  a wrong order is never used silently.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.log import warn_once
from ..core.method import Tap
from ..core.tokens import Tokens
from ..errors import MethodError
from ..models.any_resolution import tiles_per_image
from .attention import LAYER, Attention, Queries, has_class_token, layer_tap, read_attention
from .crops import arrangements, match_rows

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

_PROJECTOR = "vision.projector"
__all__ = [
    "Attention",
    "Queries",
    "Vision",
    "crops_seen",
    "layer_tap",
    "over_patches",
    "patches_of_rows",
    "pixel_crops",
    "projector_tap",
]


def projector_tap(anatomy: Anatomy, method: str) -> Tap:
    """Tap that records the calls of the projector.

    Raises:
        MethodError: The model has no projector of its own.
    """
    if anatomy.projector is None:
        raise MethodError(
            f"{method} reads the features before the projector, and no projector was found in "
            f"{type(anatomy.model).__name__}; 'divprune' needs none"
        )
    return Tap(_PROJECTOR, anatomy.projector, _call_with_features)


def _first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


def _call_with_features(args: tuple, kwargs: dict[str, Any], output: Any) -> tuple | None:
    """A call of the projector; None for token ids, of which a table of visual words makes separators (Ovis 2)."""
    return (args, kwargs, output) if _first_tensor(args, kwargs).is_floating_point() else None


def patches_of_rows(x: Tensor, rows: int, packed: bool) -> Tensor:
    """Groups patches `[n, P, C]` by projector row: `[n, rows, P / rows, C]`, in raster order."""
    n, patches, width = x.shape
    k = patches // max(rows, 1)
    side, block = math.isqrt(patches), math.isqrt(k)
    if k == 1 and patches == rows:
        return x[:, :, None]
    if packed and k * rows == patches:
        return x.reshape(n, rows, k, width)
    if packed or side * side != patches or block * block != k or k * rows != patches or side % block:
        raise MethodError(
            f"cannot tell which of {patches} vision patches make up which of {rows} projected features; expected "
            "square blocks of a square crop, or the same number of consecutive patches each; choose a method that "
            "needs none, such as 'divprune'"
        )
    x = x.reshape(n, side // block, block, side // block, block, width)
    return x.transpose(2, 3).reshape(n, rows, k, width)  # [n, row of blocks, column of blocks, in block, C]


def over_patches(values: Tensor, patches: int, rows: int, packed: bool) -> Tensor:
    """Copies one set of values `[k, C]` to the `k` patches of every projector row: `[patches, C]`."""
    numbers = torch.arange(patches, device=values.device)[None, :, None]
    members = patches_of_rows(numbers, rows, packed)[0, :, :, 0]  # [rows, k]
    out = values.new_empty(patches, values.shape[1])
    out[members] = values
    return out


class _Unhooked(nn.Module):
    """Runs a module's forward without its hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


class ProjectorCall(NamedTuple):
    """One call of the projector.

    Attributes:
        x: Input `[n, P, C]`.
        y: Output `[n, R, D]`.
        packed: Whether the patches are one packed sequence.
    """

    x: Tensor
    y: Tensor
    packed: bool


class Vision:
    """Vision-side features and attention of one prefill, mapped to its visual tokens.

    Args:
        tokens: The tokens of the first stage, at layer 0, with the records of `projector_tap` (and `layer_tap`).
        method: Name of the method, for messages.

    Attributes:
        calls: Calls of the projector.
        features: `[R, F]` inputs of the projector for each row of its output; the patches of a row are concatenated.
        index: `[M]` arranged projector row of each visual token, -1 for tokens that do not come from the projector
            (newlines).

    Raises:
        MethodError: Nothing was recorded, or the tokens cannot be matched with the projector's output.
    """

    def __init__(self, tokens: Tokens, method: str) -> None:
        if tokens.anatomy is None or not tokens.recorded.get(_PROJECTOR):
            raise MethodError(
                f"{method} reads the vision tower, which did not run in this call (precomputed visual features?); pass "
                "pixels, or choose a method that needs none, such as 'divprune'"
            )
        self.tokens, self.anatomy, self.method = tokens, tokens.anatomy, method
        self._extra = [(args, kwargs) for args, kwargs, _ in tokens.recorded[_PROJECTOR]]
        self.calls: list[ProjectorCall] = []
        for args, kwargs, output in tokens.recorded[_PROJECTOR]:
            x = _first_tensor(args, kwargs)
            y = output[0] if isinstance(output, tuple) else output
            packed, x = y.dim() == 2 and x.dim() == 2, x[None] if x.dim() == 2 else x
            self.calls.append(ProjectorCall(x, y.reshape(len(x), -1, y.shape[-1]), packed))
        self._arrange = arrangements(tokens, [len(call.y) for call in self.calls])
        arranged = [a.apply(call.y).to(tokens.hidden) for a, call in zip(self._arrange, self.calls, strict=True)]
        self.index = match_rows(torch.cat(arranged), tokens, method)

    @functools.cached_property
    def features(self) -> Tensor:
        return torch.cat([self.patches(call).flatten(2).flatten(0, 1) for call in range(len(self.calls))])

    def patches(self, call: int) -> Tensor:
        """Input of a recorded call of the projector, by row of its output: `[n, R, k, C]`, see `patches_of_rows`.

        Raises:
            MethodError: It is not `[n, P, C]`, or the number of patches does not fit.
        """
        x, y, packed = self.calls[call]
        if x.dim() != 3:
            raise MethodError(
                f"{self.method} reads the patches of each visual token before the projector, and "
                f"{type(self.anatomy.projector).__name__} takes {tuple(x.shape)}; expected [crops, patches, width]; "
                "'divprune' needs none"
            )
        return patches_of_rows(x, y.shape[1], packed)

    @functools.cached_property
    def crop(self) -> Tensor | None:
        """Number `[M]` of each token's crop, counted through all calls; -1 for tokens of no crop.

        None if the tower packs images into one sequence.
        """
        if any(call.packed for call in self.calls):
            return None
        numbers, before = [], 0
        for arrangement, (_, y, _) in zip(self._arrange, self.calls, strict=True):
            numbers.append(arrangement.crop_numbers(len(y), y.shape[1], y.device) + before)
            before += len(y)
        return torch.where(self.index >= 0, torch.cat(numbers).to(self.index.device)[self.index], -1)

    def run_projector(self, call: int, x: Tensor) -> Tensor:
        """Runs the projector on `x` `[n, P, C]` instead of the input of a recorded call; returns `[n, R, D]`.

        It is computed in the dtype of `x`, whatever the dtype of the projector's weights.
        """
        args, kwargs = self._extra[call]
        original = _first_tensor(args, kwargs)
        x = x[0] if original.dim() == 2 else x
        args = tuple(x if v is original else v for v in args)
        kwargs = {k: x if v is original else v for k, v in kwargs.items()}
        projector = self.anatomy.projector
        assert projector is not None
        if x.dtype == original.dtype:
            out = projector.forward(*args, **kwargs)  # not __call__, so that taps do not record this call
        else:
            state = {f"inner.{k}": v.to(x.dtype) for k, v in projector.named_parameters() if v.is_floating_point()}
            out = torch.func.functional_call(_Unhooked(projector), state, args, kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(1 if x.dim() == 2 else len(x), -1, out.shape[-1])

    def project(self, rows: Tensor) -> Tensor | None:
        """Projects rows like those of `features`.

        Args:
            rows: `[K, F]`.

        Returns:
            Tensor: `[K, D]` in the dtype of the decoder; None if the projector takes whole images only.
        """
        args, kwargs = self._extra[0]
        if any(isinstance(v, Tensor) and not v.is_floating_point() for v in (*args, *kwargs.values())):
            return None  # grids, sizes or masks of the images, which other rows do not have
        x, y, packed = self.calls[0]
        k, width = rows.shape[1] // x.shape[2], x.shape[2]
        rows = rows.to(x)
        # A crop of one block is the smallest image that a merging projector accepts.
        shaped = rows[None] if k == 1 else rows.reshape(1, -1, width) if packed else rows.reshape(-1, k, width)
        try:
            out = self.run_projector(0, shaped)
        except (RuntimeError, ValueError):
            out = y[:0]
        if out.shape[0] * out.shape[1] != len(rows):
            return None
        return out.reshape(len(rows), -1).to(self.tokens.hidden)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Maps values `[R, ...]` of projector rows to the visual tokens: `[M, ...]`, NaN for tokens without a row."""
        flat = rows.float().reshape(len(rows), -1)
        parts = flat.split([y.shape[0] * y.shape[1] for _, y, _ in self.calls])
        arranged = [
            a.apply(part.reshape(*y.shape[:2], -1))
            for a, part, (_, y, _) in zip(self._arrange, parts, self.calls, strict=True)
        ]
        values = torch.cat([*arranged, flat.new_full((1, flat.shape[1]), torch.nan)]).to(self.index.device)
        return values[self.index].reshape(-1, *rows.shape[1:])  # index -1 is the row of NaN

    def tokens_of_patches(
        self, per_patch: Callable[[Attention], Tensor], rope: bool = True, total: bool = False
    ) -> Tensor:
        """Maps values of patches to the visual tokens, averaged over the patches of a token.

        Args:
            per_patch: Maps the attention of one call to values `[B, N, ...]` of its tokens, prefix included.
            rope: False for queries and keys before rotation.
            total: Sums over the patches of a token instead.

        Returns:
            Tensor: `[M, ...]` float32, NaN for tokens without patches.
        """
        values = [per_patch(attention)[:, attention.prefix :] for attention in self.attention(rope)]
        return self.carry(values, total)

    def carry(self, values: list[Tensor], total: bool = False) -> Tensor:
        """Same as `tokens_of_patches` for given values: for each call `[n, P, ...]`, without the prefix."""
        rows = []
        for value, (_, y, packed) in zip(values, self.calls, strict=True):
            flat = value.float().reshape(*value.shape[:2], -1)
            patches = patches_of_rows(flat, y.shape[1], packed)  # [n, R, P / R, ...]
            rows.append((patches.sum(2) if total else patches.mean(2)).reshape(-1, *value.shape[2:]))
        return self.to_tokens(torch.cat(rows))

    def attention(self, rope: bool = True) -> list[Attention]:
        """Queries and keys of the tapped layer for each call of the tower; before rotation with `rope=False`."""
        records = self.tokens.recorded.get(LAYER, [])
        if len(records) != len(self.calls):
            raise MethodError(
                f"{self.method} recorded {len(records)} calls of a vision layer and {len(self.calls)} of the "
                "projector; expected one each for every call of the vision tower; choose a method that needs none, "
                "such as 'divprune'"
            )
        out = [
            read_attention(record, y.shape[1], packed, rope)
            for record, (_, y, packed) in zip(records, self.calls, strict=True)
        ]
        for attention, (_, y, _) in zip(out, self.calls, strict=True):
            if len(attention.query) != len(y):
                raise MethodError(
                    f"the vision layer was called with {len(attention.query)} crops and the projector with {len(y)}; "
                    "expected the same number, to map patches to tokens; choose a method that needs none, such as "
                    "'divprune'"
                )
        return out

    def class_states(self) -> Tensor:
        """States `[crops, F]` of the class token after the tapped layer.

        Raises:
            MethodError: There is no class token, or the projector does not read the output of the tapped layer.
        """
        states = []
        for call, (x, _, _) in zip(self.tokens.recorded.get(LAYER, []), self.calls, strict=True):
            output = call.output[0] if isinstance(call.output, tuple) else call.output
            if not (
                has_class_token(self.anatomy) and output.shape[1] > x.shape[1] and output[:, -x.shape[1] :].equal(x)
            ):
                raise MethodError(
                    f"{self.method} was asked to keep the class token, but the projector of "
                    f"{type(self.anatomy.model).__name__} does not read a layer that has one; choose a "
                    "method that keeps none, such as 'divprune'"
                )
            states.append(output[:, 0])
        return torch.cat(states).to(self.index.device)

    def importance(
        self, view: Callable[[Attention], Attention] = lambda attention: attention, queries: Queries = "all"
    ) -> Tensor:
        """Attention `[M]` from the class token, or mean attention received if the tower has no class token.

        Args:
            view: Changes queries and keys before attention is computed.
            queries: Without a class token, the rows that attention is received from, see `Attention.sampled`.
        """
        by_class = has_class_token(self.anatomy)
        if not by_class:
            warn_once(
                f"{self.method}: {type(self.anatomy.vision_tower).__name__} has no class token; tokens are ranked by "
                "the mean attention that they receive instead"
            )

        def of(attention: Attention) -> Tensor:
            seen = view(attention)
            return seen.of_class_token() if by_class else seen.received(seen.sampled(queries))

        found = self.tokens_of_patches(of)
        return found if self.tokens.correct_attention is None else self.tokens.correct_attention(found)


def crops_seen(tokens: Tokens, method: str) -> Tensor | None:
    """`Vision.crop` for methods that need nothing else from the vision side; None if it is unknown."""
    try:
        return Vision(tokens, method).crop if tokens.recorded.get(_PROJECTOR) else None
    except MethodError:
        return None


def pixel_crops(vision: Vision) -> list[Tensor]:
    """Normalized pixels `[n, 3, H, W]` of the crops of each projector call; raises `MethodError` for other layouts."""
    assert vision.tokens.anatomy is not None
    names = ("pixel_values", "pixel_values_videos")
    given = [v for v in (vision.tokens.inputs.get(name) for name in names) if isinstance(v, Tensor)]
    tiles, calls = tiles_per_image(vision.tokens.anatomy, vision.tokens.inputs), vision.calls
    crops = []
    for pixels in given:
        if pixels.dim() == 5 and tiles is not None and len(tiles) == len(pixels):
            pixels = torch.cat([image[:n] for image, n in zip(pixels, tiles, strict=True)])
        crops.append(pixels.flatten(0, 1) if pixels.dim() == 5 else pixels)
    if all(c.dim() == 4 for c in crops) and [len(c) for c in crops] == [len(x) for x, _, _ in calls]:
        return crops
    raise MethodError(
        f"{vision.method} reads square crops of pixels, [n, 3, H, W] or [images, tiles, 3, H, W]; got "
        f"{[tuple(p.shape) for p in given]} for {[len(x) for x, _, _ in calls]} crops; choose a method that "
        "reads no pixels, such as 'divprune'"
    )
