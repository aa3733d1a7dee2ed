# SPDX-License-Identifier: Apache-2.0
"""The competitor of pruning: the same model shown a smaller picture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import MethodError
from ..models.transformers_names import COUNT_TOKENS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

NAME = "resize"  # of its rows
MORE = (0.9, 0.75)  # shares of the visual tokens that are tried besides those of the methods
SCALES = 1024  # sizes that are tried of a processor whose tokens are not cells of the picture
ASPECT = 1.1  # largest change of the ratio of width to height
FIELDS = ("size", "min_pixels", "max_patches")  # attributes of processors that are set while sizes are tried
Key = TypeVar("Key", bound=Hashable)


class Frames(list):
    """Frames of a clip, PIL pictures of one size, that are resized as one picture is."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame."""
        return self[0].size

    def resize(self, size: tuple[int, int], resample: int | None = None) -> Frames:
        """Smaller frames."""
        return Frames(frame.resize(size, resample) for frame in self)


def shrinking(
    model: nn.Module, processor: Any, image: Image | Frames, prompt: Callable[[Any], Mapping[str, Any]]
) -> Callable[[int], tuple[Mapping[str, Any], int]]:
    """`resized` as a function of the budget alone, with tokens counted by the model's placeholders."""
    from ..engine.patching import inspect

    parts = inspect(model)

    def count(inputs: Mapping[str, Any]) -> int:
        return int(parts.is_placeholder(inputs["input_ids"]).sum())

    return lambda budget: resized(processor, image, prompt, count, budget)


def rival(cost: float, resized: Mapping[Key, float]) -> Key | None:
    """The largest of the resized pictures that cost no more; None if all cost more.

    Args:
        cost: Cost of what is compared with resizing, in any unit.
        resized: Cost of each size.
    """
    within = [key for key, other in resized.items() if other <= cost * (1 + 1e-9)]
    return max(within, key=lambda key: resized[key], default=None)


def regained(right: Sequence[bool], resized: Sequence[bool], mine: Sequence[bool]) -> tuple[int, int]:
    """Samples that resizing gets wrong, and how many of them another way gets right (group A of VTC-Bench, 2510.07143).

    Args:
        right, resized, mine: Whether the unpruned model, the model on smaller pictures, and the other way are right.

    Returns:
        tuple: Number of samples that are right at full size and wrong resized, and of those that are right again.
    """
    lost = [n for n, (whole, small) in enumerate(zip(right, resized, strict=True)) if whole and not small]
    return len(lost), sum(map(bool, (mine[n] for n in lost)))


def resized(
    processor: Any,
    image: Image | Frames,
    prompt: Callable[[Any], Mapping[str, Any]],
    count: Callable[[Mapping[str, Any]], int],
    budget: int,
) -> tuple[Mapping[str, Any], int]:
    """The prompt whose picture has the most visual tokens that are not above a budget, after the processor's rounding.

    The picture is resized once, from the original, with the processor's filter. Where every token stands for a cell of
    the picture, its new sides are whole numbers of cells, so that the processor does not resample it again; the
    processor's lower bound on the number of pixels is lifted meanwhile, and a picture that it would enlarge is enlarged
    less. A picture that is cut into tiles of one size keeps its pixels and is cut into fewer tiles, because their
    number follows from its shape.

    Args:
        processor: Of the model.
        image: The picture, or the frames of a clip.
        prompt: Makes the model inputs of a picture with `processor`.
        count: Reads the number of visual tokens from model inputs.
        budget: Visual tokens that the prompt may have.

    Returns:
        tuple: The model inputs, and the visual tokens that they have.

    Raises:
        MethodError: No size of the picture has so few tokens: the grid is fixed, or one tile has more already.
    """
    made = prompt(image)
    tokens = least = count(made)
    if tokens <= budget:
        return made, tokens
    best: tuple[Mapping[str, Any], int] | None = None
    images, tiles = processor.image_processor, _most_tiles(processor)
    resample = getattr(images, "resample", None)
    resample = resample if isinstance(resample, int) else None  # Pillow's own
    steps: Sequence[Any] = range(1, tiles) if tiles else _sizes(image.size, _cell(images), _bound(processor, image))
    with _restored(processor):
        if not (tiles or _cell(images) or isinstance(image, Frames)):
            steps = _by_tokens(processor, steps)
        low, high = 0, len(steps)
        while low < high:
            tried = (low + high) // 2
            if tiles:
                images.max_patches = steps[tried]
            made = prompt(image if tiles else image.resize(steps[tried], resample))
            tokens = count(made)
            least = min(least, tokens)
            if tokens > budget:
                high = tried
            else:
                low = tried + 1
                if best is None or tokens >= best[1]:  # the larger of two pictures with as many tokens
                    best = made, tokens
    if best is not None:
        return best
    raise MethodError(
        f"resizing cannot reach {budget} visual tokens: {type(processor).__name__} makes at least {least} of a picture "
        "of any size"
    )


def _by_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Sizes in ascending order of the tokens that the processor makes of them, where it tells without a picture.

    A larger picture may have fewer tokens than a smaller one: those of padding are left out, by its rounded shape.
    """
    if not hasattr(processor, COUNT_TOKENS):
        return sizes
    told = getattr(processor, COUNT_TOKENS)(image_sizes=[(height, width) for width, height in sizes])
    return [size for _, size in sorted(zip(told.num_image_tokens, sizes, strict=True), key=lambda pair: pair[0])]


def _cell(images: Any) -> int | None:
    """Sides in pixels of the square that a token stands for; None if the image processor has no such square."""
    patch, merge = getattr(images, "patch_size", None), getattr(images, "merge_size", None)
    return patch * merge if isinstance(patch, int) and isinstance(merge, int) else None


def _bound(processor: Any, image: Image | Frames) -> int:
    """Pixels below which the processor enlarges a picture, or the frames of a clip."""
    clips = getattr(processor, "video_processor", None) if isinstance(image, Frames) else None
    images = processor.image_processor if clips is None else clips
    size = getattr(images, "size", None) or {}
    return size["shortest_edge"] if "longest_edge" in size and "shortest_edge" in size else 0


def _sizes(size: tuple[int, int], cell: int | None, bound: int) -> list[tuple[int, int]]:
    """Sizes of a smaller picture in ascending order: whole cells of about its shape, or any scale.

    Args:
        size: Of the picture.
        cell: Sides of the square that a token stands for; None for any scale.
        bound: Pixels to which the processor enlarges a picture with fewer.
    """
    width, height = size

    def error(grid: tuple[int, int]) -> float:
        ratio = grid[0] * height / (grid[1] * width)
        return max(ratio, 1 / ratio)

    if cell is None:
        scales = (number / SCALES for number in range(1, SCALES))
        sizes = dict.fromkeys((max(1, round(width * s)), max(1, round(height * s))) for s in scales)
        return [it for it in sizes if error(it) <= ASPECT and it != size]
    grown = max(1.0, (bound / (width * height)) ** 0.5)
    across, down = (max(side * grown, cell) for side in size)
    wide, high = int(across // cell), int(down // cell)
    exact = {(columns, max(1, round(height * columns / width))) for columns in range(1, wide + 1)}
    exact |= {(max(1, round(width * rows / height)), rows) for rows in range(1, high + 1)}
    near = {(columns, rows) for columns in range(1, wide + 1) for rows in range(1, high + 1)}
    grids = {it for it in exact if it[0] <= wide and it[1] <= high} | {grid for grid in near if error(grid) <= ASPECT}
    best = {columns * rows: (columns, rows) for columns, rows in sorted(grids, key=error, reverse=True)}
    return [(best[cells][0] * cell, best[cells][1] * cell) for cells in sorted(best)]


def _most_tiles(processor: Any) -> int | None:
    """Most tiles of one size that a picture is cut into; None where the processor cuts none.

    Whether it does may be said by the processor and not by its image processor, so it is not asked.
    """
    images = processor.image_processor
    most = getattr(images, "max_patches", None)
    return most if isinstance(most, int) and hasattr(images, "crop_to_patches") else None


@contextmanager
def _restored(processor: Any) -> Iterator[None]:
    """Without the lower bound on pixels that processors of any resolution have; afterwards as it was."""
    before: list[tuple[Any, str, Any]] = []
    both = (processor.image_processor, getattr(processor, "video_processor", None))
    for images in [it for it in both if it is not None]:
        cell = _cell(images)
        before += [(images, name, getattr(images, name)) for name in FIELDS if hasattr(images, name)]
        if cell is None:
            continue
        size = copy.deepcopy(getattr(images, "size", None))
        if size is not None and "shortest_edge" in size and "longest_edge" in size:
            size["shortest_edge"] = cell**2
            images.size = size
        if getattr(images, "min_pixels", None):
            images.min_pixels = cell**2
    try:
        yield
    finally:
        for images, name, value in before:
            setattr(images, name, value)
