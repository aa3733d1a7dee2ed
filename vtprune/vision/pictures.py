# SPDX-License-Identifier: Apache-2.0
"""Finds the patches of each picture among the rows of a tower's states, and their places in it.

The only source is the tower's arguments: a grid is an argument whose products add up to the number of patches; pixels
are a floating-point argument whose shape fits it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .patch_sizes import PatchSizes


@dataclass
class Grid:
    """Places of the patches of one picture or clip.

    Attributes:
        frames, rows, cols: Patches along each axis.
        merge: Side of the square of patches that is one unit.
        place: `[n]` raster number `(frame * rows + row) * cols + col` of each patch, in the tower's order.
    """

    frames: int
    rows: int
    cols: int
    merge: int
    place: Tensor

    def cells(self) -> Tensor:
        """Numbers `[C, merge**2]` of the patches of each cell, cells and patches in raster order."""
        number = torch.empty_like(self.place)
        number[self.place] = torch.arange(len(self.place))
        m = self.merge
        number = number.reshape(self.frames, self.rows // m, m, self.cols // m, m)
        return number.transpose(2, 3).reshape(-1, m * m)

    def units(self) -> Tensor:
        """Unit `[C]` of each cell: units are numbered in the order of their first patch in the tower."""
        return torch.argsort(torch.argsort(self.cells().min(1).values))


@dataclass
class Layout:
    """The pictures of one tower call.

    Attributes:
        batch, length: Shape `[B, L]` of the tower's states; 1 for a packed sequence.
        rows: `[N]` index of each patch among the `B * L` rows, by picture.
        offsets: `[S + 1]` offsets of the pictures in `rows`.
        fixed: `[B, L]` bool, class and register tokens.
        grids: Grid of each picture, or None if it is unknown.
        unit: `[N]` unit of each patch.
        unit_offsets: `[S + 1]` offsets of the pictures in units.
        pixels: Returns the pixels `[N, F]` of each patch.
        order: `[N]` number in the processor's order of each patch; None if that is the tower's order.
    """

    batch: int
    length: int
    rows: Tensor
    offsets: Tensor
    fixed: Tensor
    grids: list[Grid | None]
    unit: Tensor
    unit_offsets: Tensor
    pixels: Callable[[], Tensor]
    order: Tensor | None = None


def find_pictures(
    parts: PatchSizes,
    given: dict[str, Any],
    shape: tuple[int, int],
    offsets: Tensor | None,
    mask: Tensor | None,
    constant_rows: Callable[[], Tensor],
    group: bool,
    tables: Sequence[Tensor] = (),
) -> Layout:
    """Finds the pictures in the states of a tower call.

    Args:
        parts: Sizes of the tower.
        given: The tower's arguments by name.
        shape: Shape `[B, L]` of the states.
        offsets: The coarsest offsets of sequences that attend to each other in a packed sequence; or None.
        mask: The attention mask of the blocks, or None.
        constant_rows: Returns `[L]` bool, the rows that do not depend on the pixels; called if there are more rows than
            patches.
        group: Whether patches that are merged later form one unit.
        tables: Other arguments `[L, ...]` of the blocks, such as rotations.
    """
    batch, length = shape
    fixed = torch.zeros(shape, dtype=torch.bool)
    images = _image_tensor(given, batch)
    if images is not None:
        tall, wide = images.shape[-2] // parts.patch[0], images.shape[-1] // parts.patch[1]
        if tall * wide < length and batch == len(images):
            fixed[:] = constant_rows().cpu()
            if int((~fixed[0]).sum()) != tall * wide:
                raise UnsupportedModelError(
                    f"the vision tower {type(parts.tower).__name__} cannot be cut: {int((~fixed[0]).sum())} of its "
                    f"{length} tokens depend on the pixels, but the picture has {tall} x {wide} patches"
                )
    valid = _valid(mask, batch, length) & ~fixed
    sizes = _sizes(given, parts, batch, length, valid)
    total = int(valid.sum())
    counts = _picture_lengths(sizes, offsets, mask, total) if batch == 1 else valid.sum(1).tolist()
    rows = valid.reshape(-1).nonzero()[:, 0]
    bounds = torch.tensor([0, *counts]).cumsum(0)
    merge = _merge(parts, counts) if group else 1
    squares = parts.packed_merge if sizes is not None and _in_squares(tables, sizes[0], parts) else 1
    coordinates = _coordinates(given, batch, length)
    grids: list[Grid | None] = []
    for number, count in enumerate(counts):
        if sizes is not None:
            grids.append(_grid(sizes[number], merge, squares))
        elif coordinates is not None:
            grids.append(_placed(coordinates[number][valid[number]], merge))
        else:
            grids.append(_whole_row(images, batch, count, merge, parts))
    unit, unit_offsets = _units(grids, counts, merge if group and offsets is not None else 1)
    layout = Layout(batch, length, rows, bounds, fixed, grids, unit, unit_offsets, lambda: rows)
    layout.pixels = lambda: _pixels(layout, given, images, parts)
    if sizes is not None and batch == 1:
        _permute_windows(layout, given, parts)
    return layout


def _numbers(value: Any) -> list[list[int]] | None:
    """Rows of two or three positive integers, from a tensor or nested lists; None for anything else."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.dtype == torch.bool or value.dim() != 2 or not value.numel():
            return None
        value = value.tolist() if value.shape[1] in (2, 3) else None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    rows = [list(row) for row in value if isinstance(row, (list, tuple)) and len(row) in (2, 3)]
    if len(rows) != len(value) or not all(isinstance(n, int) and n > 0 for row in rows for n in row):
        return None
    return rows


def _sizes(
    given: dict[str, Any], parts: PatchSizes, batch: int, length: int, valid: Tensor
) -> list[tuple[int, int, int]] | None:
    """Frames, rows and columns of each picture's patches, from an argument whose values fit their number; or None."""
    for value in given.values():
        rows = _numbers(value)
        if rows is None:
            continue
        tall, wide = parts.patch
        for in_pixels in (False, True):
            sizes = [(1, *row) if len(row) == 2 else tuple(row) for row in rows]
            if in_pixels:
                sizes = [(t, h // tall, w // wide) for t, h, w in sizes]
            counts = [math.prod(size) for size in sizes]
            if (batch == 1 and sum(counts) == int(valid.sum())) or counts == valid.sum(1).tolist():
                return sizes  # type: ignore[return-value]
    return None


def _picture_lengths(
    sizes: list[tuple[int, int, int]] | None, offsets: Tensor | None, mask: Tensor | None, total: int
) -> list[int]:
    """Number of patches of each picture in a packed sequence."""
    if sizes is not None:
        return [math.prod(size) for size in sizes]
    if offsets is not None:
        return offsets.diff().tolist()
    if mask is not None and mask.dim() == 4 and mask.shape[-1] == mask.shape[-2] == total:
        seen = _allowed(mask)[0, 0]
        starts = torch.ones(total, dtype=torch.bool, device=seen.device)
        starts[1:] = (seen[1:] != seen[:-1]).any(1)  # the mask changes at the first patch of a picture
        edges = [*starts.nonzero()[:, 0].tolist(), total]
        return [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]
    return [total]


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > -1 if mask.is_floating_point() else mask > 0


def _valid(mask: Tensor | None, batch: int, length: int) -> Tensor:
    """Mask `[B, L]` on the host, False for padding: rows that no query attends to."""
    if mask is None or mask.shape[-1] != length:
        return torch.ones(batch, length, dtype=torch.bool)
    seen = _allowed(mask) if mask.dim() > 2 else mask > 0
    seen = seen.reshape(len(seen), -1, length).any(1)
    return seen.cpu().expand(batch, -1)


def _merge(parts: PatchSizes, counts: list[int]) -> int:
    if parts.merge == 1 and parts.tokens and all(n % parts.tokens == 0 for n in counts):
        side = math.isqrt(counts[0] // parts.tokens)
        return side if side**2 * parts.tokens == counts[0] else 1
    return parts.merge


def _in_squares(tables: Sequence[Tensor], size: tuple[int, int, int], parts: PatchSizes) -> bool:
    """Whether the patches of a packed picture are ordered square by square, as processors of merging towers do.

    In a square of 2 x 2, the second patch is right of the first and the third below it, so their rotations differ from
    that of the first in different channels; in raster order they differ in the same channels. Without rotations, the
    order is raster order if a convolution merges patches.
    """
    m = parts.packed_merge
    if m == 1 or size[2] <= m:
        return m > 1
    for table in tables:
        if table.is_floating_point() and len(table) > m:
            first, right, next_row = (table[i].flatten() for i in (0, 1, m))
            return not bool(((right != first) & (next_row != first)).any())
    return not parts.merges_by_convolution


def _grid(size: tuple[int, int, int], merge: int, squares: int) -> Grid:
    """Grid of a picture in raster order, or square by square."""
    frames, rows, cols = size
    place = torch.arange(frames * rows * cols)
    if squares > 1 and rows % squares == 0 and cols % squares == 0:
        place = place.reshape(frames, rows // squares, squares, cols // squares, squares).transpose(2, 3).reshape(-1)
    fits = rows % merge == 0 and cols % merge == 0
    return Grid(frames, rows, cols, merge if fits else 1, place)


def _coordinates(given: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """Column and row `[B, L, 2]` of each patch, from an argument of this shape; -1 for padding."""
    for value in given.values():
        if isinstance(value, Tensor) and value.shape == (batch, length, 2) and not value.is_floating_point():
            return value.cpu().long()
    return None


def _placed(coordinates: Tensor, merge: int) -> Grid | None:
    """Grid of a picture from the coordinates of its patches; None if they do not fill a rectangle."""
    cols, rows = (int(n) + 1 for n in coordinates.amax(0))
    place = coordinates[:, 1] * cols + coordinates[:, 0]
    if rows * cols != len(place) or int(coordinates.min()) < 0 or len(place.unique()) != len(place):
        return None
    fits = rows % merge == 0 and cols % merge == 0
    return Grid(1, rows, cols, merge if fits else 1, place)


def _whole_row(images: Tensor | None, batch: int, count: int, merge: int, parts: PatchSizes) -> Grid | None:
    """Grid, in raster order, of a picture that is alone in its row of the batch; None if its size does not fit."""
    if images is None or len(images) != batch:
        return None
    rows, cols = images.shape[-2] // parts.patch[0], images.shape[-1] // parts.patch[1]
    return _grid((1, rows, cols), merge, 1) if rows * cols == count else None


def _units(grids: list[Grid | None], counts: list[int], consecutive: int) -> tuple[Tensor, Tensor]:
    """Unit of each patch, and offsets of the pictures in units."""
    units: list[Tensor] = []
    totals: list[int] = []
    for grid, count in zip(grids, counts, strict=True):
        step = consecutive**2 if count % consecutive**2 == 0 else 1
        unit = torch.arange(count) // step
        if grid is not None:
            unit = torch.empty(count, dtype=torch.int64)
            unit[grid.cells()] = grid.units()[:, None]
        units.append(unit + sum(totals))
        totals.append(int(unit.max()) + 1 if count else 0)
    return torch.cat(units), torch.tensor([0, *totals]).cumsum(0)


def _permute_windows(layout: Layout, given: dict[str, Any], parts: PatchSizes) -> None:
    """Reorders places and units in the way a tower with window attention reorders its patches."""
    index = window_order(layout, given, parts)
    if index is None:
        return
    order = index[:, None] * parts.packed_merge**2 + torch.arange(parts.packed_merge**2)
    order = layout.order = order.reshape(-1)
    grids = layout.grids
    counts = layout.offsets.diff().tolist()
    for number, (start, count) in enumerate(zip(layout.offsets[:-1].tolist(), counts, strict=True)):
        grid = grids[number]
        assert grid is not None
        grid.place = grid.place[order[start : start + count] - start]
    layout.unit, layout.unit_offsets = _units(grids, counts, 1)
    in_order = layout.pixels
    layout.pixels = lambda: in_order()[order] if _packed_pixels(given, layout) is not None else in_order()


def window_order(layout: Layout, given: dict[str, Any], parts: PatchSizes) -> Tensor | None:
    """Order `[N / m**2]` of the merge squares in a tower with window attention; None for the processor's order."""
    config = parts.config
    tower: Any = parts.tower
    window = getattr(config, "window_size", None)
    if not window or not hasattr(tower, "window_size"):
        return None
    if isinstance(given.get("window_index"), Tensor):
        return given["window_index"].cpu()
    grids = torch.tensor([[g.frames, g.rows, g.cols] for g in layout.grids if g is not None])
    if hasattr(tower, "get_window_index"):
        return torch.as_tensor(tower.get_window_index(grids)[0]).cpu()
    if hasattr(tower, "get_window_index_thw"):  # vLLM's classes, picture by picture
        counts = grids.prod(1) // parts.packed_merge**2
        starts = (counts.cumsum(0) - counts).tolist()
        parts_of = zip(grids.tolist(), starts, strict=True)
        return torch.cat([tower.get_window_index_thw(*grid)[0].cpu() + start for grid, start in parts_of])
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(
        grids, spatial_merge_size=parts.packed_merge, window_size=window, patch_size=parts.patch[0]
    )[0]


def _image_tensor(given: dict[str, Any], batch: int) -> Tensor | None:
    """Pixels `[n, channels, height, width]` among the tower's arguments, or None."""
    for value in given.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 4 and value.shape[1] in (1, 3):
            return value
    return None


def _packed_pixels(given: dict[str, Any], layout: Layout) -> Tensor | None:
    """Pixels `[N, F]` of patches among the tower's arguments, in the processor's order, or None."""
    for value in given.values():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if layout.batch == 1 and value.dim() in (2, 4) and len(value) == layout.length:
            return value.flatten(1)
        if value.dim() == 3 and value.shape[:2] == (layout.batch, layout.length):
            return value.flatten(0, 1)[layout.rows.to(value.device)]
    return None


def _pixels(layout: Layout, given: dict[str, Any], images: Tensor | None, parts: PatchSizes) -> Tensor:
    packed = _packed_pixels(given, layout)
    tall, wide = parts.patch
    if packed is not None:
        copies = packed.shape[1] // (3 * tall * wide)
        if copies * 3 * tall * wide == packed.shape[1] and copies > 1:
            apart = packed.reshape(len(packed), 3, copies, -1)
            if bool((apart == apart[:, :, :1]).all()):  # a picture; the frames of a clip differ
                packed = apart[:, :, 0].flatten(1)
        return packed.float()
    pictures = len(layout.offsets) - 1
    if images is None or len(images) != pictures or any(grid is None for grid in layout.grids):
        raise UnsupportedModelError(
            f"the pixels of the patches of {type(parts.tower).__name__} were not found: expected an argument with a "
            "row of pixels for every patch, or pictures of a whole number of patches; choose a tower method that reads "
            "states, such as Change"
        )
    out = []
    for image, grid in zip(images.float(), layout.grids, strict=True):
        assert grid is not None
        image = image[:, : grid.rows * tall, : grid.cols * wide].reshape(-1, grid.rows, tall, grid.cols, wide)
        out.append(image.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)[grid.place.to(image.device)])
    return torch.cat(out)
