# SPDX-License-Identifier: Apache-2.0
"""Mapping of projector rows to visual tokens, and budgets per crop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.tokens import Tokens
from ..core.transfer import to_device
from ..errors import MethodError
from ..models.any_resolution import pack, tiles_per_image

_PIXELS = (("image", "pixel_values"), ("video", "pixel_values_videos"))


@dataclass
class Arrangement:
    """The layout that the model gives the rows of one projector call before they enter the prompt.

    Attributes:
        apply: Linear map `[n, R, C]` -> `[R', C]`: the model's packed layout without newlines, its pooling of video
            frames, or a flattening.
        blends: Whether rows of different crops may be mixed (tiles of one image that are shrunk together).
    """

    apply: Callable[[Tensor], Tensor]
    blends: bool = False

    def crop_numbers(self, n: int, rows: int, device: torch.device) -> Tensor:
        """Crop number `[R']` of each arranged row; of several crops, the one with the largest weight."""
        if not self.blends:
            numbers = torch.arange(n, device=device).float()
            return self.apply(numbers[:, None, None].expand(n, rows, 1))[:, 0].round().long()
        return self.apply(torch.eye(n, device=device, dtype=torch.float32)[:, None].expand(n, rows, n)).argmax(1)


def arrangements(tokens: Tokens, crops: Sequence[int]) -> list[Arrangement]:
    """The arrangement of each projector call.

    Args:
        tokens: Tokens of the first stage.
        crops: Number of crops in each call of the projector.
    """
    assert tokens.anatomy is not None
    composite, inputs = tokens.anatomy.composite, tokens.inputs
    kinds = [kind for kind, name in _PIXELS if inputs.get(name) is not None]
    kinds = kinds if len(kinds) == len(crops) else ["image"] * len(crops)
    out = []
    for kind, n in zip(kinds, crops, strict=True):
        tiles = tiles_per_image(tokens.anatomy, tokens.inputs) if kind == "image" else None
        if tiles is not None and sum(tiles) == n:
            out.append(Arrangement(functools.partial(_pack, tokens, tiles), blends=True))
        elif kind == "video" and hasattr(composite, "apply_pooling"):
            out.append(Arrangement(lambda x: composite.apply_pooling(x).flatten(0, 1)))
        else:
            out.append(Arrangement(lambda x: x.flatten(0, 1)))
    return out


def _pack(tokens: Tokens, tiles: list[int], x: Tensor) -> Tensor:
    """Runs the model's packed layout on tiles `[n, R, C]`, without newlines."""
    assert tokens.anatomy is not None
    strategy = getattr(tokens.anatomy.config, "vision_feature_select_strategy", None) or "default"
    return torch.cat(pack(tokens.anatomy, x.split(tiles), tokens.inputs["image_sizes"], None, strategy))


def _fingerprints(x: Tensor) -> Tensor:
    """Hashes `[N]` int64 of the bits of rows, from 64 evenly spaced features of each."""
    picked = torch.linspace(0, x.shape[1] - 1, min(64, x.shape[1]), dtype=torch.float32).long().to(x.device)
    bits = x[:, picked].contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).long()
    factors = torch.randint(-(2**62), 2**62, (len(picked),), generator=torch.Generator().manual_seed(0))
    return (bits * (2 * factors + 1).to(x.device)).sum(1)  # modulo 2^64


def _occurrence(values: Tensor) -> Tensor:
    """Number `[N]` of equal values before each value."""
    order = torch.sort(values, stable=True).indices
    place = torch.arange(len(values), device=values.device)
    run_starts = torch.ones_like(values, dtype=torch.bool)
    run_starts[1:] = values[order][1:] != values[order][:-1]
    out = torch.empty_like(place)
    out[order] = place - torch.where(run_starts, place, 0).cummax(0).values
    return out


def match_rows(rows: Tensor, tokens: Tokens, method: str) -> Tensor:
    """Matches the arranged projector rows with the states that the decoder receives.

    Args:
        rows: `[R, D]` in the dtype of the decoder.
        tokens: Tokens of the first stage.
        method: Name of the method, for messages.

    Returns:
        Tensor: `[M]` int64 row of each token, -1 for tokens that were inserted later (newlines). Equal rows are matched
        in order.

    Raises:
        MethodError: A token that has a place in an image matches no row.
    """
    # Beams share features: one token stands for all copies.
    features, copy = torch.unique(tokens.feature, return_inverse=True)
    numbers = torch.arange(len(tokens), device=copy.device)
    first = torch.full_like(features, len(tokens)).scatter_reduce(0, copy, numbers, "amin")
    hidden, placed = tokens.hidden[first], tokens.grid_row[first] >= 0
    if rows.shape == hidden.shape and torch.equal(rows, hidden):
        return copy
    kinds = torch.unique(torch.cat([_fingerprints(rows), _fingerprints(hidden)]), return_inverse=True)[1]
    have, want = kinds[: len(rows)], kinds[len(rows) :]
    size = max(len(rows), len(hidden)) + 1
    have, want = have * size + _occurrence(have), want * size + _occurrence(want)
    have, order = torch.sort(have)
    at = torch.searchsorted(have, want).clamp_max(max(len(have) - 1, 0))
    index = torch.where(have[at] == want, order[at], -1)
    lost = (index < 0) & placed
    newline = getattr(tokens.anatomy and tokens.anatomy.composite, "image_newline", None)
    if newline is not None:  # newlines are also recognized by their embedding
        lost &= (hidden != newline.to(hidden)).any(1)
    if not lost.any() and (index >= 0).any():
        return index[copy]
    if rows.shape == hidden.shape and _same_direction(rows, hidden):
        return copy
    raise MethodError(
        f"{method} could not trace {int(lost.sum())} of {len(hidden)} visual tokens back to the projector's output "
        f"({len(rows)} rows): the model changes or reorders its features in an unknown way; choose a method that reads "
        "the decoder only, such as 'divprune' or 'iwp'"
    )


def _same_direction(rows: Tensor, hidden: Tensor) -> bool:
    """Whether the states are the rows in the same order, up to scale."""
    return bool((torch.cosine_similarity(rows.float(), hidden.float()) > 0.999).all())


def share(total: int, sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Splits a budget over crops in proportion to weights, limited by their sizes.

    What exceeds the size of a crop goes to the others in the same proportion; what is then left (all others have weight
    0) goes to the crops in order. Fractions go to the largest remainders, ties to the smaller number.

    Args:
        total: Tokens to distribute, at most `sum(sizes)`.
        sizes: Number of tokens in each crop.
        weights: Weight of each crop, not negative.

    Returns:
        list[int]: Sums to `total`.
    """
    out = [0] * len(sizes)
    open_, left = [i for i, w in enumerate(weights) if w > 0], total
    while open_ and left > 0:
        unit = left / sum(weights[i] for i in open_)
        full = [i for i in open_ if weights[i] * unit >= sizes[i]]
        if not full:
            quota = {i: weights[i] * unit for i in open_}
            for i in open_:
                out[i] = int(quota[i])
            left -= sum(out[i] for i in open_)
            for i in sorted(open_, key=lambda i: (out[i] - quota[i], i))[:left]:
                out[i] += 1
            return out
        for i in full:
            out[i] = sizes[i]
            left -= sizes[i]
        open_ = [i for i in open_ if i not in full]
    for i in range(len(sizes)):
        extra = min(left, sizes[i] - out[i])
        out[i] += extra
        left -= extra
    return out


@dataclass
class Crops:
    """The tokens sorted by crop, as a ragged batch with a budget per crop.

    Attributes:
        rows: `[M]` rows of the tokens, sorted by crop, then by position; those of no crop (newlines) come last in their
            group.
        offsets: `[C + 1]` offsets of the crops in `rows`.
        budgets: `[C]` budget of each crop; those of a group sum to the group's budget.
        placed: `[C]` bool, False for newlines.
        max_budget: The largest of `budgets`, known on the host.
        max_length: Length of the longest crop, likewise.
    """

    rows: Tensor
    offsets: Tensor
    budgets: Tensor
    placed: Tensor
    max_budget: int
    max_length: int

    def each(self) -> Iterator[tuple[Tensor, int, bool]]:
        """Yields rows and budget of each crop, and whether it is one (False for newlines)."""
        rows = self.rows.split(self.offsets.diff().tolist())
        yield from zip(rows, self.budgets.tolist(), self.placed.tolist(), strict=True)


def by_crop(
    tokens: Tokens, crop: Tensor | None = None, weights: Tensor | None = None, keep_newlines: bool = False
) -> Crops:
    """Splits every group's budget over its crops.

    Args:
        tokens: Tokens of one stage.
        crop: `[M]` number of each token's crop, -1 for none; by default `tokens.crop` (the tiles of an image are then
            one crop).
        weights: `[M]` weight of each token's crop (the largest in the crop counts); by default all crops of an image
            weigh as much as its largest has tokens, so that an unpadded tile keeps its full share, as published.
        keep_newlines: Tokens of no crop are kept first, if they fit into half of the group's budget; otherwise they get
            what the crops leave over.
    """
    device = tokens.hidden.device
    if crop is None:
        crop = torch.where((tokens.grid_row < 0) & (tokens.grid_row >= 0).any(), -1, tokens.crop)
    crop = crop.cpu()
    keys = torch.stack([tokens.group.cpu(), (crop < 0).long(), tokens.image.cpu(), tokens.frame.cpu(), crop])
    groups, group, sizes = torch.unique(keys, dim=1, return_inverse=True, return_counts=True)  # sorted, groups first
    rows = torch.sort(group, stable=True).indices
    if weights is None:
        images = torch.unique(groups[[0, 2]], dim=1, return_inverse=True)[1]
        placed_sizes = torch.where(groups[1] == 0, sizes, 0)
        weight = torch.zeros_like(sizes).scatter_reduce(0, images, placed_sizes, "amax")[images].double()
    else:
        weight = torch.zeros(len(sizes), dtype=torch.float64)
        weight = weight.scatter_reduce(0, group, weights.double().cpu(), "amax", include_self=False)
    weight = torch.where(groups[1] == 0, weight, 0.0)
    budgets = torch.zeros_like(sizes)
    for number, total in enumerate(tokens.budgets.tolist()):
        members = (groups[0] == number).nonzero()[:, 0]
        newlines = members[groups[1, members] == 1]
        if keep_newlines and 2 * int(sizes[newlines].sum()) <= total:
            budgets[newlines] = sizes[newlines]
            total -= int(sizes[newlines].sum())
            members = members[groups[1, members] == 0]
        shares = share(total, sizes[members].tolist(), weight[members].tolist())
        budgets[members] = torch.tensor(shares, dtype=torch.int64)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    max_budget, max_length = (int(x.max()) if len(x) else 0 for x in (budgets, sizes))
    rows, offsets, budgets, placed = (to_device(t, device) for t in (rows, offsets, budgets, groups[1] == 0))
    return Crops(rows, offsets, budgets, placed, max_budget, max_length)
