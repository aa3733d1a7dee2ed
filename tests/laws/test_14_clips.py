# SPDX-License-Identifier: Apache-2.0
"""Laws 1 to 6 for methods that compare frames, on longer clips than in the other laws."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Image, Video
from support import model_of, pruned, reference, survivors

import vtprune
from vtprune import methods
from vtprune.core.clips import ClipMethod

FOR_CLIPS = [name for name in methods.names() if issubclass(methods.get(name), ClipMethod)]
LATE = [
    pytest.param(method, id=f"{method.name}-late") for method in (methods.HoliTom(layer=1), methods.FlashVID(layer=1))
]
WITH_VIDEO = [name for name, family in FAMILIES.items() if family.video is not None]
LONG = [[3, Video(2), 5], [4, Video(3), 3, Video(2), 4], [9]]
RATIO = 0.6
GREEDY = {"do_sample": False, "max_new_tokens": 5}

pytestmark = [
    pytest.mark.parametrize("name", [*FOR_CLIPS, *LATE]),
    pytest.mark.parametrize("kind", WITH_VIDEO, scope="session"),
]


def test_whole_budget_changes_nothing(kind: str, name: str) -> None:
    model, batch = model_of(kind), FAMILIES[kind].batch(LONG)
    want = model(**batch).logits
    with pruned(model, name, ratio=1.0):
        assert torch.equal(model(**batch).logits, want)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_drop_is_mask(kind: str, name: str, padding: str) -> None:
    model, batch = model_of(kind), FAMILIES[kind].batch(LONG, padding)
    with pruned(model, name, ratio=RATIO) as (_, spy):
        got = model(**batch).logits
        drops = [spy.drops()]
    with reference(model, drops, batch):
        want = model(**batch).logits
    alive = survivors(drops, batch)
    torch.testing.assert_close(got[alive], want[alive], rtol=1e-5, atol=1e-5 * want.abs().max())


def test_generated_tokens(kind: str, name: str) -> None:
    model, batch = model_of(kind), FAMILIES[kind].batch(LONG)
    with pruned(model, name, ratio=RATIO) as (_, spy):
        got = model.generate(**batch, **GREEDY)
        drops = [spy.drops()]
    with reference(model, drops, batch):
        want = model.generate(**batch, **GREEDY)
    assert got.tolist() == want.tolist()


def test_a_clip_in_a_batch_is_a_clip_alone(kind: str, name: str) -> None:
    model, make = model_of(kind), FAMILIES[kind]
    batch = make.batch(LONG)
    with pruned(model, name, ratio=RATIO) as (patch, _):
        model(**batch)
        together = patch.last
        for row, prompt in enumerate(LONG[:2]):
            model(**make.batch([prompt]))
            offset = int(batch["attention_mask"][row].argmax())
            assert patch.last.kept[0].tolist() == (together.kept[row] - offset).tolist()


@pytest.mark.parametrize("ratio", [0.45, 0.6, 0.97])
def test_every_clip_has_its_own_budget(kind: str, name: str, ratio: float) -> None:
    model, batch = model_of(kind), FAMILIES[kind].batch(LONG)
    with pruned(model, name, ratio=ratio) as (patch, _):
        state = torch.random.get_rng_state()
        model(**batch)
        last = patch.last
        assert torch.equal(torch.random.get_rng_state(), state)
        images = last.places.image.split(last.places.counts)
        for visual, kept, image in zip(last.visual, last.kept, images, strict=True):
            stays = torch.isin(visual, kept)
            for clip in image.unique():
                size = int((image == clip).sum())
                assert int(stays[image == clip].sum()) == round(ratio * size)
        model(**batch)
        assert [k.tolist() for k in patch.last.kept] == [k.tolist() for k in last.kept]


def test_pictures(kind: str, name: str) -> None:
    """A method prunes pictures by its rule for one frame, or raises an error that names `video_method`."""
    model, batch = model_of(kind), FAMILIES[kind].batch([[3, Image(0), 5]])
    with pruned(model, name, ratio=RATIO) as (patch, _):
        if type(methods.resolve(name)).needs_frames:
            with pytest.raises(vtprune.MethodError, match=rf"{name} compares the frames.*video_method='{name}'"):
                model(**batch)
        else:
            model(**batch)
            assert len(patch.last.kept[0]) == round(RATIO * len(patch.last.visual[0]))
