# SPDX-License-Identifier: Apache-2.0
"""`vtprune bench`: content of its result, agreement with the engine, and resuming after an interrupt."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, Image

import vtprune
from benchmarks import latency, peers
from vtprune.bench import layouts, limit, measure, shapes, summary, variants
from vtprune.core import registry
from vtprune.core.budget import Budget
from vtprune.engine.patching import find_patch
from vtprune.study import stopwatch

LAYOUTS = {
    "llava": layouts.Fixed(),
    "llava_next": layouts.AnyRes(),
    "llava_onevision": layouts.AnyRes(),
    "qwen2_5_vl": layouts.Grid(),
    "smolvlm": layouts.Tiles(),
}
METHODS = ["iwp:layer=0", "iwp:layer=2"]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return shapes.get("tiny").build(torch.device("cpu"), torch.float32)


def bench_of(model: Any, methods: list[str] = METHODS, new_tokens: int = 3) -> measure.Bench:
    layout = shapes.get("tiny").layout
    chosen = variants.variants(methods, [Budget(ratio=0.1)])
    return measure.Bench(model, lambda s: layouts.prompt(model, layout, s.batch, s.tokens, 6), chosen, new_tokens)


@pytest.fixture(scope="module")
def result(tiny: Any) -> dict[str, Any]:
    """The result of one round over two settings."""
    bench = bench_of(tiny)
    head = measure.header(bench, "tiny", 6)
    return measure.run(bench, [measure.Setting(1, 288), measure.Setting(2, 144)], 1, head, warm_up=0)


def test_tokens_and_kv_bytes_are_those_of_the_formula(result: dict[str, Any]) -> None:
    rows = summary.rows(result)
    assert len(rows) == 2 * len(result["variants"])
    assert {row["variant"] for row in rows if "refused" in row} == {"resize ratio=0.1"}, "one picture has 144 tokens"
    for row in (row for row in rows if "refused" not in row):
        visual = 288 if row["tokens"] == 288 else 144
        kept = visual if row["variant"] == "unpruned" else round(0.1 * visual)
        assert (row["visual"], row["text"], row["kept"]) == (visual, 7, kept), row["variant"]  # 6 and BOS
        full = 2 if row["variant"].startswith("iwp:layer=2") else 4 if row["variant"] == "unpruned" else 0
        columns = full * (visual + 7) + (4 - full) * (kept + 7)
        # keys and values, 2 heads of 16 numbers of 4 bytes
        assert row["kv_bytes"] == row["kv_bytes_formula"] == row["batch"] * 2 * columns * 2 * 16 * 4, row["variant"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_smaller_pictures_have_no_more_tokens_and_make_the_tower_cheaper(family: str) -> None:
    model = FAMILIES[family].build()
    chosen = variants.variants([], [Budget(ratio=0.5), Budget(ratio=0.4)])
    bench = measure.Bench(model, lambda s: layouts.prompt(model, LAYOUTS[family], s.batch, s.tokens, 0), chosen, 2)
    prompt = bench.prepare(measure.Setting(2, 48))
    runs = bench.round(prompt)
    for share in (0.5, 0.4):
        run, small = runs[f"resize ratio={share}"], prompt.smaller[f"resize ratio={share}"]
        assert run["kept"] == int((small["input_ids"][0] == 3).sum())
        assert 0.5 * share * prompt.tokens < run["kept"] <= round(share * prompt.tokens)
        assert small["pixel_values"].numel() < 0.7 * prompt.inputs["pixel_values"].numel() and run["decision"] == 0
        assert run["kv_bytes"] == run["kv_bytes_formula"]
        assert {runs[f"{other} ratio={share}"]["kept"] for other in ("limit", "random", "pooling")} == {run["kept"]}
    rows = summary.rows(
        {"variants": list(runs), "settings": {"one": {"batch": 2, "tokens": 48, "rounds": [{"runs": runs}]}}}
    )
    assert all(row["speedup_first_token"] > 0 for row in rows)


def test_the_users_own_picture_is_made_smaller() -> None:
    from PIL import Image as Picture

    from vtprune import refvlm
    from vtprune.bench import prompts

    model, processor = refvlm.load(name="qwen2_5_vl")
    picture = Picture.new("RGB", (144, 144))
    whole = prompts.of_processor(model, processor, picture, "what?", measure.Setting(2, None))
    small = prompts.of_processor(model, processor, picture, "what?", measure.Setting(2, 40))
    counts = [(made["input_ids"] == model.config.image_token_id).sum(1).tolist() for made in (whole, small)]
    assert counts == [[144, 144], [36, 36]]
    model, processor = refvlm.load()
    with pytest.raises(vtprune.MethodError, match="resizing cannot reach"):
        prompts.of_processor(model, processor, picture, "what?", measure.Setting(1, 40))


def test_a_run_is_taken_apart(result: dict[str, Any]) -> None:
    for setting in result["settings"].values():
        for key, run in setting["rounds"][0]["runs"].items():
            if key.startswith("resize "):
                continue
            assert run["prefill"] > 0 and run["token"] > 0, key
            assert (run["vision"] == 0) == key.startswith("limit "), key
            assert (run["decision"] == 0) == (key == "unpruned" or key.startswith("limit ")), key
            assert run["decision"] < run["prefill"], key
            assert run["vision"] + run["prefill"] + run["token"] < run["total"], key
            assert run["cpu"]["prefill"] > 0 and run["cpu"]["total"] > run["cpu"]["prefill"]


def test_marks_agree_with_the_engine(tiny: Any) -> None:
    inputs = layouts.prompt(tiny, layouts.Fixed(), 1, 288, 6)
    with vtprune.patch(tiny, ratio=0.1, method="iwp") as patch:
        before = dict(vars(patch.anatomy.composite))
        hooks = [len(layer._forward_hooks) for layer in patch.anatomy.layers]
        cuts = [stage.layer for stage in patch.schedule]
        run = stopwatch.generate(patch.anatomy, inputs, 2, cuts)
        assert patch.last.selection_time <= run.decision < patch.last.selection_time + 0.2 * run.prefill + 0.01
        assert vars(patch.anatomy.composite).keys() == before.keys()
        assert [len(layer._forward_hooks) for layer in patch.anatomy.layers] == hooks


@pytest.mark.parametrize("family", LAYOUTS)
def test_limit_is_the_model_on_the_kept_tokens(family: str) -> None:
    """A pruned model with the limit's tokens has the limit's cache size and, with compact positions, its logits."""
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].batch([[3, Image(0), 4]] * 2)
    parts = vtprune.inspect(model)
    visual = inputs["input_ids"] == parts.placeholders["image"]
    budget = Budget(ratio=0.5)
    short = limit.short_prompt(limit.embedded_prompt(parts, inputs), visual, budget)
    run = stopwatch.generate(parts, short, 2)
    with vtprune.patch(model, ratio=0.5, method="uniform") as patch:
        pruned = stopwatch.generate(parts, inputs, 2, [0])
        kept = len(patch.last.kept[0])
    assert limit.tokens_left(budget, int(visual[0].sum())) == kept
    assert pruned.kv_bytes == run.kv_bytes and not find_patch(model)

    @torch.no_grad()
    def last(**given: Any) -> torch.Tensor:
        return model(**given).logits[:, -1]

    if "qwen" not in family:  # M-RoPE has no compact positions
        want = last(**short)
        with vtprune.patch(model, ratio=0.5, method=_Spaced()):
            torch.testing.assert_close(last(**inputs), want, rtol=0, atol=2e-4)


class _Spaced(vtprune.methods.Method):
    """Keeps the limit's tokens, with compact positions."""

    positions = "compact"

    def choose(self, tokens: Any) -> Any:
        keep = torch.zeros(len(tokens), dtype=torch.bool)
        for start, end, count in zip(tokens.offsets, tokens.offsets[1:], tokens.budgets, strict=False):
            keep[start + torch.arange(count) * (end - start) // count] = True
        return vtprune.methods.Choice(keep)


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_layout_makes_prompts_its_model_takes(family: str, batch: int) -> None:
    model = FAMILIES[family].build()
    inputs = layouts.prompt(model, LAYOUTS[family], batch, 60, 6)
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert len(visual) == batch and visual.unique().numel() == 1
    assert 30 <= int(visual[0]) <= 90
    with vtprune.patch(model, keep=5, method="random") as patch, torch.no_grad():
        model(**inputs)
    assert [len(columns) for columns in patch.last.visual] == visual.tolist()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_clip_is_a_prompt_of_sixteen_frames(family: str) -> None:
    model = FAMILIES[family].build()
    inputs = layouts.prompt(model, layouts.GridClip(), 2, 64, 6)
    assert inputs["video_grid_thw"][:, 0].tolist() == [8, 8] and "pixel_values" not in inputs
    with vtprune.patch(model, ratio=0.5, method="vcast") as patch, torch.no_grad():
        model(**inputs)
    assert [len(kept) for kept in patch.last.kept] == [32, 32] and len(patch.last.visual[0]) == 64


def test_shapes_have_the_published_sizes() -> None:
    from transformers import AutoModelForImageTextToText

    sizes = {"llava-1.5-7b": 7.06, "llava-next-7b": 7.06, "llava-onevision-7b": 8.03, "qwen2.5-vl-7b": 8.29}
    sizes |= {"qwen3-vl-8b": 8.77, "internvl3-8b": 7.94, "smolvlm-500m": 0.507, "small": 0.438}
    for name, billions in sizes.items():
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shapes.get(name).config())
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01), name
    assert sum(p.numel() for p in vtprune.inspect(model).decoder.parameters()) > 3e8
    with pytest.raises(vtprune.VTPruneError, match=r"no shape 'gpt'; expected one of llava-1\.5-7b"):
        shapes.get("gpt")


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b", "internvl3-8b"])
def test_shallow_shapes_keep_the_proportions(name: str) -> None:
    """Shallow shapes keep the width and the ratio of tower blocks to decoder layers, and accept prompts."""
    from transformers import AutoModelForImageTextToText

    from vtprune.towers.structure import find_parts

    counts, widths = [], []
    for shape in (shapes.get(name), shapes.get(f"{name}-shallow")):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shape.config())
        parts = vtprune.inspect(model)
        blocks = find_parts(parts).blocks
        counts.append((len(blocks), parts.num_layers))
        widths.append([sum(p.numel() for p in part.parameters()) for part in (blocks[0], parts.layers[0])])
    assert counts[0][0] * counts[1][1] == counts[1][0] * counts[0][1] and counts[0][0] >= 4 * counts[1][0]
    assert widths[0] == widths[1]
    alone = SimpleNamespace(config=model.config, dtype=torch.float32, device=torch.device("cpu"))
    made = layouts.prompt(alone, shape.layout, 1, 512, 8)
    assert int((made["input_ids"] == model.config.image_token_id).sum()) == 512


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Published methods as plain loops, registered for one test."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    peers.register_all()
    return peers.BOTH


def test_plain_loops_choose_what_the_kernels_choose(tiny: Any, plain: list[str]) -> None:
    inputs = layouts.prompt(tiny, layouts.Fixed(), 2, 288, 6)
    for name in peers.PLAIN:
        found = []
        for method in (variants.method_of(name), variants.method_of(f"plain-{name}")):
            with vtprune.patch(tiny, ratio=0.1, method=method) as patch, torch.no_grad():
                logits = tiny(**inputs).logits
                found.append((patch.last.kept, logits))
        for mine, plain in zip(*(kept for kept, _ in found), strict=True):
            assert torch.equal(mine, plain), name
        torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-4)


def _made(prefill: dict[str, list[float]], decision: float = 0.0) -> dict[str, Any]:
    """A result with made-up times."""
    facts = {"visual": 10, "text": 2, "kept": 1, "mean_ratio": 0.1, "kv_bytes": 1, "kv_bytes_formula": 1}
    facts |= {"vision": 1.0, "decision": decision, "token": 0.1, "flops_share": 0.1, "peak_bytes": None}

    def run(variant: str, seconds: float) -> dict[str, Any]:
        own = {"vision": 0.0} if variant.startswith("limit") else {"flops_share": 1.0} if variant == "unpruned" else {}
        return {**facts, "prefill": seconds, "total": seconds + 1.5 - variant.startswith("limit"), **own}

    rounds = [{"runs": {variant: run(variant, times[i]) for variant, times in prefill.items()}} for i in range(3)]
    setting = {"batch": 1, "tokens": 10, "rounds": rounds}
    return {"model": "made", "variants": list(prefill), "settings": {"one": setting}}


def test_shares_of_the_possible_gain() -> None:
    data = _made({"unpruned": [10, 20, 10], "limit ratio=0.1": [2, 4, 2], "random ratio=0.1": [4, 8, 3]})
    row = summary.rows(data)[2]
    assert row["speedup"] == 2.5 and row["over_limit"] == 1.0 and row["gain"] == 0.75
    assert row["gain_end_to_end"] == 0.75  # includes the vision time, also for the limit, whose run has none
    assert row["flops_bound"] == 1.0 and row["flops_gain"] == pytest.approx(0.6 / 0.9)
    assert row["prefill"] == {"median": 4, "low": 3, "high": 8} and row["verdict"] == ""


@pytest.mark.parametrize(
    ("unpruned", "pruned", "verdict"),
    [
        (2.05, 2.2, "nothing to gain: even without selection the prefill would be only 50.0 ms shorter"),
        (3.0, 3.5, "does not pay: selection takes 1500.0 ms, and the limit saves 1000.0 ms"),
        (3.0, 2.5, ""),
    ],
)
def test_the_table_says_where_pruning_does_not_pay(unpruned: float, pruned: float, verdict: str) -> None:
    from rich.console import Console

    from vtprune.bench import table

    data = _made({"unpruned": [unpruned] * 3, "limit keep=1": [2.0] * 3, "iwp keep=1": [pruned] * 3}, 1.5)
    assert summary.rows(data)[2]["verdict"] == verdict
    screen = io.StringIO()
    table.show(data | {"dtype": "float32", "attention": "sdpa", "device": "cpu"}, Console(file=screen, width=220))
    assert verdict in screen.getvalue() and ("(no)" in screen.getvalue()) == verdict.startswith("does")
    # On a narrow terminal no cell is cut off: every row is a block of lines.
    narrow = io.StringIO()
    table.show(data | {"dtype": "float32", "attention": "sdpa", "device": "cpu"}, Console(file=narrow, width=80))
    assert "…" not in narrow.getvalue() and "\niwp keep=1\n  kept: 1\n" in narrow.getvalue()


def test_variants_are_read(plain: list[str]) -> None:
    methods = ["iwp:layer=0,relevance=log", "random", *plain]
    found = variants.variants(methods, [Budget(ratio=0.1), Budget(keep=7)])
    keys = [variant.key for variant in found]
    first = ["unpruned", "limit", "resize", "random", "pooling", "iwp:layer=0,relevance=log"]
    assert keys[:6] == [first[0], *(f"{label} ratio=0.1" for label in first[1:])]
    assert "plain-visionzip keep=7" in keys and len(keys) == len(set(keys))
    assert (found[5].method.layer, found[5].method.relevance) == (0, "log")
    for text, words in {
        "iwp:layer": "cannot parse 'layer'",
        "iwp:depth=3": "has no such options: 'depth=3'",
        "iwpp": "did you mean 'iwp'",
    }.items():
        with pytest.raises(vtprune.VTPruneError, match=words):
            variants.method_of(text)


def test_what_a_method_cannot_do_is_a_row_with_the_reason(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise vtprune.MethodError("not on this model")

    bench = bench_of(tiny, ["uniform"], new_tokens=1)
    bench.variants = variants.variants([], [Budget(ratio=0.5)])
    monkeypatch.setattr(vtprune.methods.Random, "choose", refuse)
    runs = bench.round(bench.prepare(measure.Setting(1, 144)))
    assert runs["random ratio=0.5"]["refused"] == "not on this model"
    assert runs["unpruned"]["token"] is None  # no token after the first
    assert find_patch(tiny) is None


def test_targets_are_judged(result: dict[str, Any]) -> None:
    data: dict[str, Any] = {"rows": [row for row in summary.rows(result) if row["batch"] == 1]}
    judged = latency.targets(data, "cpu")
    assert [target["what"].split(",")[0] for target in judged] == [
        "random ratio=0.1",
        "random ratio=0.1",
        "iwp:layer=0 ratio=0.1",
        "iwp:layer=0 ratio=0.1",
        "variants whose KV bytes differ from the formula",
    ]
    row = next(row for row in data["rows"] if row["variant"].startswith("random "))
    row |= {"over_limit": 0.06, "speedup": 5.1, "kv_bytes": 0}
    assert [target["met"] for target in latency.targets(data, "cpu")][::2][::2] == [False, False]
    assert latency.targets(data, "cpu")[1]["met"]
    gpu = SimpleNamespace(**latency.CUDA)
    assert (gpu.model, gpu.keep, gpu.batch) == ("llava-next-7b", [160], [1, 8])
