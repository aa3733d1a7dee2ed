# SPDX-License-Identifier: Apache-2.0
"""Checks of cuts inside vision towers: identity, hidden rows, whole merge groups, batch, no trace.

A tower is called with its model's own inputs where synthetic pictures can be fed to the model, otherwise directly, with
inputs that follow from the names of its forward's arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from vtprune.models import attention_probe
from vtprune.towers import Change, Pixels, Random
from vtprune.towers.cut import TowerCut
from vtprune.towers.method import Patches, TowerChoice
from vtprune.towers.run import RunningTower

from .prompts import ONE, TWO, Prompts

NAME = "tests_hiding_rows"
TOLERANCE = 2e-4
KEEP = 0.4


class Failed(AssertionError):
    """A failed check."""


class NotFed(Exception):
    """The tower accepts none of the pixel formats."""


Inputs = tuple[tuple, dict[str, Any]]


def examine(model: nn.Module, fed: Prompts) -> str:
    """Returns "passes", "refused: ..." or "not fed: ..."; raises `Failed` where a check fails."""
    anatomy = vtprune.inspect(model)
    cuts: list[TowerCut] = []
    for method in (Change(keep=KEEP, block=1), Random(keep=KEEP, block=0)):
        try:
            cuts.append(TowerCut(anatomy, method, lambda: True))
        except vtprune.UnsupportedModelError as error:
            return f"refused: {error}"
    try:
        one, several = _from_model(model, anatomy.vision_tower, fed) or _by_itself(cuts[0])
    except NotFed as error:
        return f"not fed: {error}"
    tower = anatomy.vision_tower
    for cut in cuts:
        try:
            _identity(anatomy, cut.method, one)
            _hidden_rows(tower, cut, several)
            _batch(tower, cut, one, several)
            _no_trace(tower, cut, one)
        except vtprune.UnsupportedModelError as error:
            return f"refused: {error}"
    _early(anatomy, several)
    if fed.feed.name.startswith("pixels"):
        _groups(model, cuts[1], fed)
    return "passes"


def _from_model(model: nn.Module, tower: nn.Module, fed: Prompts) -> tuple[Inputs, Inputs] | None:
    """The inputs that the model passes to its tower for one picture and for three."""
    found: list[Inputs] = []
    handle = tower.register_forward_pre_hook(lambda m, a, k: found.append((a, dict(k))), with_kwargs=True)
    try:
        with torch.no_grad():
            for prompt in (ONE, TWO):
                before = len(found)
                model(**fed.batch(prompt))
                if len(found) != before + 1:
                    return None
    finally:
        handle.remove()
    return found[0], found[1]


def _by_itself(cut: TowerCut) -> tuple[Inputs, Inputs]:
    """The first format of random pixels that the tower accepts, for one picture and for three."""
    failure: Exception | None = None
    for form in _forms(cut):
        try:
            for count in (1, 3):
                _states(cut.parts.tower, cut.parts.blocks, ((), form(count)))
            return ((), form(1)), ((), form(3))
        except Exception as error:  # a forward may raise anything
            failure = failure or error
    raise NotFed(f"{type(failure).__name__}: {failure}" if failure else "its arguments are not known here")


def _forms(cut: TowerCut) -> Iterator[Callable[[int], dict[str, Any]]]:
    tower, config, patch = cut.parts.tower, cut.parts.config, cut.parts.patch[0]
    known = set(inspect.signature(tower.forward).parameters)
    size = getattr(config, "image_size", None)
    size = size[0] if isinstance(size, (list, tuple)) else size or 8 * patch
    grids = [(1, 6, 6), (1, 6, 6), (1, 6, 12)]
    deep = [n for n in ("temporal_patch_size", "patch_temporal", "video_temporal_patch_size") if hasattr(config, n)]
    depths = [1, *(getattr(config, n) for n in deep)]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + shape[0]))

    def pictures(count: int, *shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(n)) for n in range(count)])

    def only(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in known or name == "pixel_values"}

    def squares(count: int) -> dict[str, Any]:
        sizes = torch.tensor([[size, size]] * count)
        return only({"pixel_values": pictures(count, 3, size, size), "image_sizes": sizes})

    def patches(count: int) -> dict[str, Any]:
        side = 6 if known & {"spatial_shapes", "pixel_position_ids"} else size // patch
        n, mask = side**2, torch.ones(count, side**2, dtype=torch.long)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)
        return only(
            {
                "pixel_values": pictures(count, n, 3 * patch * patch),
                "pixel_attention_mask": mask,
                "spatial_shapes": torch.tensor([[6, 6]] * count),
                "pixel_position_ids": places.expand(count, -1, -1),
            }
        )

    def rows(depth: int, square: bool) -> Callable[[int], dict[str, Any]]:
        def make(count: int) -> dict[str, Any]:
            shape = (3, patch, patch) if square else (3 * depth * patch * patch,)
            flat = [
                torch.randn(t * h * w, *shape, generator=torch.Generator().manual_seed(n))
                for n, (t, h, w) in enumerate(grids[:count])
            ]
            grid = torch.tensor(grids[:count])
            extra = {"grid_thw": grid, "image_grid_hw": grid[:, 1:], "merge_sizes": torch.ones(count, dtype=torch.long)}
            return only({"pixel_values": torch.cat(flat), **extra})

        return make

    def strips(count: int) -> dict[str, Any]:
        flat = [noise(1, 3, patch, patch * t * h * w) for t, h, w in grids[:count]]
        return only({"pixel_values": torch.cat(flat, 3), "target_sizes": torch.tensor(grids[:count])[:, 1:]})

    if "target_sizes" in known:
        yield strips
    if known & {"spatial_shapes", "pixel_position_ids"}:
        yield patches
    if known & {"grid_thw", "image_grid_hw"}:
        for depth in depths:
            yield rows(depth, False)
            yield rows(depth, True)
    yield squares
    yield patches


@torch.no_grad()
def _states(tower: nn.Module, blocks: nn.ModuleList, inputs: Inputs) -> Tensor:
    """The states after the last block; raises `NotFed` if no block ran."""
    seen: list[Tensor] = []
    hook = blocks[-1].register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
    try:
        tower(*inputs[0], **inputs[1])
    except (RuntimeError, ValueError):  # the merger's sizes do not fit the small config, but the blocks ran
        if not seen:
            raise
    finally:
        hook.remove()
    if not seen:
        raise NotFed("its blocks never ran")
    return seen[-1]


@contextmanager
def _attached(cut: TowerCut) -> Iterator[None]:
    def wrap(function: Callable) -> Callable:
        return lambda *args: None if attention_probe.is_probing() else function(*args)

    attention_probe.install()
    handles = cut.attach(wrap)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        attention_probe.uninstall()
        cut._take()


def _identity(anatomy: vtprune.Anatomy, method: Any, inputs: Inputs) -> None:
    whole = type(method)(keep=1.0, block=method.block)
    cut = TowerCut(anatomy, whole, lambda: True)
    plain = _states(anatomy.vision_tower, cut.parts.blocks, inputs)
    with _attached(cut):
        if not torch.equal(_states(anatomy.vision_tower, cut.parts.blocks, inputs), plain):
            raise Failed("identity: states differ with keep=1.0")


def _hidden_rows(tower: nn.Module, cut: TowerCut, inputs: Inputs) -> None:
    """Kept rows have the states of the uncut tower with the other rows masked from the cut on."""
    running: list[RunningTower] = []
    begin = cut._begin

    def kept() -> RunningTower:
        running.append(begin())
        return running[-1]

    cut._begin = kept  # type: ignore[method-assign]
    try:
        with _attached(cut):
            got = _states(tower, cut.parts.blocks, inputs)
    finally:
        del cut._begin
    run = running[-1].state.cut
    if not run.groups:
        raise Failed("nothing was dropped")
    ran = torch.zeros(run.layout.batch, run.layout.length, dtype=torch.bool)
    for rows in run.groups:
        ran[rows.entries[:, None], rows.index] = True
    if int(ran.sum()) != sum(map(len, run.kept)) + int(run.layout.fixed.sum()):
        raise Failed("other rows ran than the record says")
    with hiding(tower, cut.parts.blocks, cut.at, ~ran) as asked:
        want = _states(tower, cut.parts.blocks, inputs)
    if not asked:
        raise Failed("hidden rows: the blocks attend by functions of their own, so there is no reference")
    got, want, plain = (x.reshape(*ran.shape, -1)[ran] for x in (got, want, _states(tower, cut.parts.blocks, inputs)))
    off = float((got - want).abs().max() / want.abs().max())
    if not off < TOLERANCE:
        raise Failed(f"hidden rows: off by {off:.1e} of the largest state")
    if not float((got - plain).abs().max() / want.abs().max()) > 20 * max(off, 1e-7):
        raise Failed("hidden rows: the cut changed nothing, so the check says nothing")


@contextmanager
def hiding(tower: nn.Module, blocks: nn.ModuleList, at: int, hide: Tensor) -> Iterator[list[int]]:
    """Masks the rows `hide` `[B, L]` in blocks from `at` on; yields the calls of their attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    asked: list[int] = []
    cursor: list[int | None] = [None]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling")
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attention_mask is not None:
            if attention_mask.dtype == torch.bool:
                attention_mask = torch.zeros(attention_mask.shape).masked_fill(~attention_mask, -torch.inf)
            logits = logits + attention_mask
        if cursor[0] is not None:
            asked.append(1)
            end = cursor[0] + query.shape[0] * query.shape[2]
            gone = hide.flatten()[cursor[0] : end].reshape(query.shape[0], -1)
            cursor[0] = end
            gone = gone & ~gone.all(1, keepdim=True)
            logits = logits.masked_fill(gone[:, None, None], -torch.inf)
        return logits.softmax(-1).nan_to_num().matmul(value).transpose(1, 2).contiguous(), None

    modules = list(tower.modules())
    configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}.values()
    old = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    registry.register(NAME, attend)
    for config, _ in old:
        config._attn_implementation = NAME

    def enter(number: int) -> Callable:
        return lambda module, args: cursor.__setitem__(0, 0 if number >= at else None)

    handles = [block.register_forward_pre_hook(enter(number)) for number, block in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(lambda module, args, output: cursor.__setitem__(0, None)))
    try:
        yield asked
    finally:
        for handle in handles:
            handle.remove()
        for config, name in old:
            config._attn_implementation = name
        registry._global_mapping.pop(NAME, None)


def _batch(tower: nn.Module, cut: TowerCut, one: Inputs, several: Inputs) -> None:
    """The first picture keeps the same patches alone and in a batch."""
    with _attached(cut):
        _states(tower, cut.parts.blocks, one)
        alone = cut._take()[0].kept
        _states(tower, cut.parts.blocks, several)
        together = cut._take()[0].kept
    if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=False)):
        raise Failed("batch: a picture keeps other patches among others than alone")


class _Late(Pixels):
    """`Pixels` declared as a method that reads states, so that all patches are embedded."""

    def choose(self, patches: Patches) -> TowerChoice:
        return super().choose(patches)


def _early(anatomy: vtprune.Anatomy, inputs: Inputs) -> None:
    """A cut by pixels gives the same states before and after the patch embedding."""
    found = []
    for method in (Pixels(keep=KEEP), _Late(keep=KEEP)):
        cut = TowerCut(anatomy, method, lambda: True)
        try:
            with _attached(cut):
                found.append(_states(anatomy.vision_tower, cut.parts.blocks, inputs))
        except vtprune.UnsupportedModelError:  # the tower's arguments do not define the neighbors of a patch
            return
    early, late = found
    off = float((early - late).abs().max() / late.abs().max())
    if not off < TOLERANCE:
        raise Failed(f"patch embedding of kept patches only: off by {off:.1e} of the largest state")


def _no_trace(tower: nn.Module, cut: TowerCut, inputs: Inputs) -> None:
    def inventory() -> list[Any]:
        return [
            (n, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in tower.named_modules()
        ]

    before, plain = inventory(), _states(tower, cut.parts.blocks, inputs)
    with _attached(cut):
        _states(tower, cut.parts.blocks, inputs)
    if inventory() != before or not torch.equal(_states(tower, cut.parts.blocks, inputs), plain):
        raise Failed("no trace: hooks, attributes or states differ after remove")


@torch.no_grad()
def _groups(model: nn.Module, cut: TowerCut, fed: Prompts) -> None:
    """A change of one unit's patches after the last block changes exactly one visual token."""
    with _attached(cut):
        model(**fed.batch(ONE))
        run = cut._take()
        if run is None:
            raise Failed("groups: the tower did not run")
    inputs = _from_model(model, cut.parts.tower, fed)
    if inputs is None:
        return
    layouts: list[RunningTower] = []
    begin = cut._begin
    cut._begin = lambda: layouts.append(begin()) or layouts[-1]  # type: ignore[method-assign,func-returns-value]
    try:
        with _attached(cut):
            model(**fed.batch(ONE))
    finally:
        del cut._begin
    layout = layouts[-1].state.cut.layout
    members = (layout.unit == 1).nonzero()[:, 0]
    rows = layout.rows[members]
    embeds: list[Tensor] = []
    decoder = vtprune.inspect(model).decoder

    def change(module: nn.Module, args: tuple, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        flat = states.view(-1, states.shape[-1])
        flat[rows] += torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(1))
        return (states, *output[1:]) if isinstance(output, tuple) else states

    grab = decoder.register_forward_pre_hook(
        lambda m, a, k: embeds.append(k["inputs_embeds"]) if k.get("inputs_embeds") is not None else None,
        with_kwargs=True,
    )
    try:
        model(**fed.batch(ONE))
        handle = cut.parts.blocks[-1].register_forward_hook(change)
        try:
            model(**fed.batch(ONE))
        finally:
            handle.remove()
    finally:
        grab.remove()
    if len(embeds) != 2 or embeds[0].shape != embeds[1].shape:
        return
    # Not checkable where no token changes (the projector reads an earlier block), where all do (resamplers), or where a
    # convolution merges overlapping squares.
    changed = int((embeds[0] != embeds[1]).any(-1).sum())
    tokens = int((fed.batch(ONE)["input_ids"] == fed.placeholder).sum())
    if changed > 1 and changed < tokens and (len(members) > 1 or tokens == len(layout.rows)):
        raise Failed(f"groups: a unit of {len(members)} patches reaches {changed} of {tokens} visual tokens")
    if changed == 1 and len(members) * tokens < len(layout.rows):
        raise Failed(f"groups: a unit has {len(members)} patches; {len(layout.rows)} make {tokens} visual tokens")
