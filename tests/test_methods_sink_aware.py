# SPDX-License-Identifier: Apache-2.0
"""`SinkAware`: attention sinks of clips."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Image, Video
from support import model_of, pruned

from vtprune import methods
from vtprune.errors import MethodError
from vtprune.methods.sink_aware import without_sinks

FRAMES, PLACES = 4, 9


def clip_attention(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention `[M]` of a clip whose place 5 is a sink, with clip and place numbers."""
    attention = torch.rand(FRAMES, PLACES, generator=torch.Generator().manual_seed(seed))
    attention[:, 5] += 6
    clip = torch.zeros(FRAMES * PLACES, dtype=torch.int64)
    return attention.flatten(), clip, torch.arange(PLACES).repeat(FRAMES)


def test_it_is_the_published_formula() -> None:
    attention, clip, place = clip_attention()
    mean = attention.reshape(FRAMES, PLACES).mean(0) ** 1.1
    sink = (mean - mean.min()) / (mean.max() - mean.min())
    expected = attention - 0.5 * attention.mean() * sink.repeat(FRAMES)
    torch.testing.assert_close(without_sinks(attention, clip, place, 0.5, 1.1), expected)
    assert torch.equal(without_sinks(attention, clip, place, 0.0, 1.1), attention)


def test_scale_does_not_matter_and_the_sink_goes() -> None:
    attention, clip, place = clip_attention()
    got = without_sinks(attention, clip, place, 8.0, 1.1)
    torch.testing.assert_close(without_sinks(attention * 1e-3, clip, place, 8.0, 1.1), got * 1e-3)
    assert set((got.topk(FRAMES).indices % PLACES).tolist()) != {5}
    assert set((attention.topk(FRAMES).indices % PLACES).tolist()) == {5}


def test_pictures_and_still_clips_keep_their_attention() -> None:
    attention, clip, place = clip_attention()
    one = attention[:PLACES]
    assert torch.equal(without_sinks(one, clip[:PLACES], place[:PLACES], 22.0, 1.1), one)
    still = one.repeat(FRAMES) * (1 + 1e-5 * torch.randn(FRAMES * PLACES, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(without_sinks(still, clip, place, 22.0, 1.1), still)


def test_clips_are_judged_apart_and_tokens_without_a_place_are_left() -> None:
    a, b = clip_attention(0), clip_attention(1)
    b = (b[0] * 50, b[1] + 1, b[2])
    together = without_sinks(*(torch.cat(pair) for pair in zip(a, b, strict=True)), 4.0, 1.1)
    torch.testing.assert_close(together, torch.cat([without_sinks(*x, 4.0, 1.1) for x in (a, b)]))
    attention, clip, place = clip_attention()
    place[3], attention[4] = -1, torch.nan
    got = without_sinks(attention, clip, place, 4.0, 1.1)
    assert got[3] == attention[3] and got[4].isnan() and torch.isfinite(got[5:]).all()


@pytest.mark.parametrize(
    "host",
    [methods.VisionZip(), methods.VisPruner(), methods.Scope(), methods.FastV(), methods.PyramidDrop(),
     methods.FastVID(), methods.FlashVID(), methods.HoliTom()],
    ids=lambda host: type(host).__name__,
)  # fmt: skip
@torch.no_grad()
def test_every_host_ranks_clips_by_what_is_left(host, monkeypatch) -> None:
    model, family = model_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"]
    clip, picture = family.batch([[3, Video(0), 5]]), family.batch([[3, Image(0), 5]])
    seen = []
    real = methods.SinkAware.corrected
    monkeypatch.setattr(
        methods.SinkAware, "corrected", lambda self, a, tokens: seen.append((a, real(self, a, tokens))) or seen[-1][1]
    )
    kept = {}
    for name, method in (("host", host), ("off", methods.SinkAware(host, strength=0)), ("on", methods.SinkAware(host))):
        with pruned(model, method, ratio=0.4) as (patch, _):
            model(**clip)
            kept[name] = patch.last.kept[0].tolist()
            if not host.needs_frames:
                model(**picture)
                kept[name + " picture"] = patch.last.kept[0].tolist()
    assert kept["off"] == kept["host"]
    assert len(kept["on"]) == len(kept["host"])
    assert any(not torch.equal(a, b) for a, b in seen)
    if not host.needs_frames:
        assert kept["on picture"] == kept["host picture"]


@torch.no_grad()
def test_a_host_without_attention_is_refused_when_a_clip_comes() -> None:
    model, family = model_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"]
    with pruned(model, methods.SinkAware(methods.DivPrune()), ratio=0.4) as (patch, _):
        model(**family.batch([[3, Image(0), 5]]))
        assert patch.last is not None
        with pytest.raises(MethodError, match="DivPrune ranked a clip without reading any"):
            model(**family.batch([[3, Video(0), 5]]))


def test_what_it_is_given_is_checked() -> None:
    for options, words in (({"host": "fastv"}, "'fastv'"), ({"strength": -1}, "-1"), ({"power": 0}, "power is 0")):
        with pytest.raises(MethodError, match=words):
            methods.SinkAware(**options)
    compact = methods.SinkAware(methods.VisionZip(positions="compact"))
    assert compact.positions == "compact" and compact.group == "sample"
