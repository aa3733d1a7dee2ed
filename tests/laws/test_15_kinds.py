# SPDX-License-Identifier: Apache-2.0
"""One method for pictures and one for clips: in a mixed prompt each prunes its modality as it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Image, Video
from support import LAYOUTS, Spy, model_of, reference, survivors

import vtprune
from vtprune import methods

WITH_VIDEO = [name for name, family in FAMILIES.items() if family.video is not None]
BOTH = [[3, Image(0), 4, Video(2), 5], [4, Video(2), 2, Image(1), 3, Image(2), 4], [9], [2, Image(3), 3]]
PAIRS = [("iwp", "vcast"), ("divprune", "evs"), ("visionzip", "flashvid"), ("pyramiddrop", "dycoke")]
PAIRS += [("sparsevlm", "fastv"), ("uniform", "sparsevlm"), ("cdpruner", "holitom")]
RATIO = 0.5

every_pair = pytest.mark.parametrize(("pictures", "clips"), PAIRS, ids="+".join)
every_kind = pytest.mark.parametrize("kind", WITH_VIDEO, scope="session")


def spied(patch: vtprune.Patch) -> list[Spy]:
    """One `Spy` for `patch.method` and one for `patch.video_method`."""

    class Clips:
        method, last = patch.video_method, property(lambda self: patch.last)

    return [Spy(patch), Spy(Clips())]  # type: ignore[arg-type]


@every_kind
@every_pair
def test_drop_is_mask(kind: str, pictures: str, clips: str) -> None:
    model, batch = model_of(kind), FAMILIES[kind].batch(BOTH)
    with vtprune.patch(model, ratio=RATIO, method=pictures, video_method=clips) as patch:
        spies = spied(patch)
        got = model(**batch).logits
        drop, other = (spy.drops() for spy in spies)
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=4)
        for layer, (rows, columns, states) in other.merged.items():
            if layer in drop.merged:
                mine = drop.merged[layer]
                rows, columns, states = (torch.cat(pair) for pair in zip(mine, (rows, columns, states), strict=True))
            drop.merged[layer] = rows, columns, states
    with reference(model, [drop], batch):
        want = model(**batch).logits
        expected = model.generate(**batch, do_sample=False, max_new_tokens=4)
    alive = survivors([drop], batch)
    torch.testing.assert_close(got[alive], want[alive], rtol=1e-5, atol=1e-5 * want.abs().max())
    assert tokens.tolist() == expected.tolist()


@every_kind
@every_pair
def test_each_kind_has_its_budget(kind: str, pictures: str, clips: str) -> None:
    """Each modality of a sample keeps its share, or each image does where a method counts by image."""
    model, batch = model_of(kind), FAMILIES[kind].batch(BOTH)
    with vtprune.patch(model, ratio=RATIO, method=pictures, video_method=clips) as patch:
        model(**batch)
        last, places = patch.last, patch.last.places
    kept = torch.zeros(len(places), dtype=torch.bool)
    kept[last.kept_flat[-1]] = True
    number = list(patch.anatomy.placeholders).index("video")
    for use, mine in ((patch.method, places.kind != number), (patch.video_method, places.kind == number)):
        group = places.sample if use.group == "sample" else places.image
        for value in group[mine].unique():
            here = mine & (group == value)
            assert int(kept[here].sum()) == max(1, round(RATIO * int(here.sum())))


@every_kind
@pytest.mark.parametrize(("pictures", "clips"), [("divprune", "evs"), ("iwp", "uniform")])
def test_a_kind_is_pruned_as_in_a_prompt_of_its_own(kind: str, pictures: str, clips: str) -> None:
    model, make = model_of(kind), FAMILIES[kind]
    clip, picture = [3, Video(2), 5], [3, Image(0), 5]
    with vtprune.patch(model, ratio=RATIO, method={"image": pictures, "video": clips}) as patch:
        kept = []
        for prompts in ([clip], [picture], [clip, picture]):
            batch = make.batch(prompts, "right")
            model(**batch)
            kept.append([k.tolist() for k in patch.last.kept])
        assert kept[0] + kept[1] == kept[2]
    for prompt, method, want in ((clip, clips, kept[0]), (picture, pictures, kept[1])):
        with vtprune.patch(model, ratio=RATIO, method=method) as patch:
            model(**make.batch([prompt], "right"))
            assert [k.tolist() for k in patch.last.kept] == want


@pytest.mark.parametrize("name", methods.names())
def test_every_method_prunes_its_kind_alike_wherever_the_other_stands(name: str) -> None:
    """In both orders, in a batch and alone, and whatever other samples show."""
    model, make = model_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"]
    prompts = [[3, Image(0), 2, Video(2), 5], [4, Video(2), 2, Image(0), 3], [2, Image(1), 3]]
    uses = [{"image": "uniform", "video": name}]
    uses += [{"image": name, "video": "uniform"}] if name in methods.for_pictures() else []
    for use in uses:
        with vtprune.patch(model, ratio=RATIO, method=use) as patch:
            alone = []
            for prompt in prompts:
                model(**make.batch([prompt], "right"))
                alone += [k.tolist() for k in patch.last.kept]
            model(**make.batch(prompts, "right"))
            assert [k.tolist() for k in patch.last.kept] == alone


@every_kind
def test_a_count_is_shared_over_both_kinds(kind: str) -> None:
    model, batch = model_of(kind), FAMILIES[kind].batch(BOTH)
    for keep in (1, 7, 30):
        with vtprune.patch(model, keep=keep, method="iwp", video_method="vcast") as patch:
            model(**batch)
            for visual, kept in zip(patch.last.visual, patch.last.kept, strict=True):
                assert len(kept) == min(keep, len(visual))


@every_kind
def test_reports_and_explanations(kind: str) -> None:
    model, batch = model_of(kind), FAMILIES[kind].batch(BOTH[:1])
    with vtprune.patch(model, ratio=RATIO, method="iwp", video_method="evs") as patch:
        model(**batch)
        assert "iwp, evs" in patch.last.report() and "EVS" in repr(patch) and "IWP" in repr(patch)
        sizes = {len(scores) for scores in patch.last.scores if scores is not None}
        assert len(patch.last.places) in sizes
        state = patch.last.show()
        assert len(state.panels()) > 8


def test_what_cannot_be_is_said() -> None:
    """Unsupported combinations of methods and modalities raise errors that name the reason."""
    qwen, llava = model_of("qwen2_5_vl"), model_of("llava")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (llava, {"video_method": "vcast"}, "no placeholder for clips.*; leave it out"),
        (llava, {"method": "evs"}, "takes pictures only"),
        (qwen, {"method": {"image": "iwp"}}, "one method for 'image' and one for 'video'"),
        (qwen, {"method": {"image": "iwp", "video": "evs"}, "video_method": "evs"}, "no video_method"),
        (qwen, {"video_method": "evz"}, "did you mean 'evs'"),
    ]
    for model, options, message in cases:
        with pytest.raises(vtprune.MethodError, match=message):
            vtprune.patch(model, ratio=0.5, **options)
        assert vtprune.patch(model, ratio=0.5).remove() is None
    with pytest.raises(vtprune.VTPruneError, match="depends on the prompt"):
        _ = vtprune.patch(qwen, ratio=0.5, method=LAYOUTS["middle"], video_method="evs").mean_ratio
    vtprune.unpatch(qwen)
    assert vtprune.patch(qwen, ratio=0.5, method="uniform", video_method="evs").mean_ratio == 0.5
    vtprune.unpatch(qwen)
    assert "evs" in methods.names() and "evs" not in methods.for_pictures()
