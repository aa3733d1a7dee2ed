# SPDX-License-Identifier: Apache-2.0
"""The vLLM plug-in where vLLM is not needed: settings, shorter prompts, chosen features, positions on several axes.

`make test-vllm` tests it in a real vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.integrations.vllm import choosing, hooks, prompts, readers
from vtprune.integrations.vllm.mrope import Positions
from vtprune.integrations.vllm.settings import QUESTION_FREE, ServingError, parse
from vtprune.methods import Random

BUDGETS = st.one_of(
    st.fixed_dictionaries({"ratio": st.floats(0.01, 1)}), st.fixed_dictionaries({"keep": st.integers(1, 40)})
)


@pytest.mark.parametrize("method", QUESTION_FREE)
def test_methods_that_need_no_question_are_taken(method: str) -> None:
    found = parse({"method": method, "ratio": 0.25})
    assert found.method.name == method and found.counts([16]) == [4]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "expected an object with method, ratio, keep, options"),
        ("divprune", "expected an object"),
        ({"ratio": 0.5, "rate": 1}, "unknown field 'rate'; expected method, ratio, keep, options"),
        ({"mean_ratio": 0.5}, "mean_ratio"),
        ({}, "ratio and keep"),
        ({"ratio": 0.5, "keep": 3}, "ratio and keep"),
        ({"ratio": 1.5}, "1.5"),
        ({"ratio": 0}, "0"),
        ({"keep": 0}, "0"),
        ({"keep": 2.5}, "2.5"),
        ({"ratio": "a"}, "'a'"),
        ({"ratio": 0.5, "method": "fastv"}, "method fastv needs more than the image"),
        ({"ratio": 0.5, "method": "divprun"}, "divprune"),
        ({"ratio": 0.5, "method": 3}, "3"),
        ({"ratio": 0.5, "options": [1]}, "options is [1]"),
        ({"ratio": 0.5, "options": {"no": 1}}, "method divprune cannot be made with {'no': 1}"),
        ({"ratio": 0.5, "method": "iwp", "options": {"layer": 3}}, "in vLLM layer is 0, found 3"),
        ({"ratio": 0.5, "method": "random", "options": {"layer": 2}}, "method random cannot be made with {'layer': 2}"),
    ],
)
def test_bad_configuration_is_one_line(config: Any, words: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse(config)
    line = str(caught.value)
    assert line.startswith("vtprune: ") and "\n" not in line and words in line


def test_every_setting_has_a_fingerprint_of_its_own() -> None:
    configs: list[dict[str, Any]] = [{"method": method, "ratio": 0.25} for method in QUESTION_FREE]
    configs += [{"ratio": 0.5}, {"keep": 1}, {"keep": 2}, {"ratio": 0.2500001}]
    configs += [{"method": "random", "ratio": 0.25, "options": {"seed": seed}} for seed in (1, 2)]
    marks = [parse(config).fingerprint for config in configs]
    assert len(set(marks)) == len(marks)
    assert marks == [parse(config).fingerprint for config in configs]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), BUDGETS)
def test_counts_are_exact(runs: list[int], budget: dict[str, Any]) -> None:
    counts, total = parse(budget).counts(runs), sum(runs)
    wanted = budget.get("keep") or max(1, round(budget["ratio"] * total))
    assert sum(counts) == min(wanted, total)
    assert all(0 <= count <= length for count, length in zip(counts, runs, strict=True))


@given(st.lists(st.booleans(), max_size=60))
def test_runs_are_those_that_a_loop_finds(mask: list[bool]) -> None:
    runs = [len(part) for part in "".join("x" if m else " " for m in mask).split()]
    assert prompts.runs_of(torch.tensor(mask, dtype=torch.bool)) == runs


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_runs_are_shortened_and_nothing_else(mask: list[bool], data: st.DataObject) -> None:
    full = torch.tensor(mask)
    runs = prompts.runs_of(full)
    counts = [data.draw(st.integers(0, length)) for length in runs]
    stays = prompts.shorten(full, counts)
    text = "".join("x" if m else "." for m in mask)
    short = "".join(letter for letter, stay in zip(text, stays.tolist(), strict=True) if stay)
    assert short.count(".") == text.count(".") and short.count("x") == sum(counts)
    # What lies between two other tokens is a run, and is as long as was asked.
    lengths = iter(counts)
    wanted = "".join(c if c == "." else "" for c in text) if not runs else None
    if wanted is None:
        wanted, inside = "", False
        for letter in text:
            if letter == "x" and not inside:
                wanted += "x" * next(lengths)
            elif letter == ".":
                wanted += "."
            inside = letter == "x"
    assert short == wanted


@dataclass(frozen=True)
class Content:
    full: list[int]
    is_embed: Any = None


@dataclass(frozen=True)
class Update:
    content: Content


def test_an_update_says_which_of_its_tokens_are_placeholders() -> None:
    full = [7, 1, 1, 1, 1, 8, 1, 1, 1, 1, 9]
    update = Update(Content(full, lambda tokens: torch.tensor(tokens) == 1))
    short, runs = prompts.prune_update(update, parse({"ratio": 0.5}))
    assert runs == [4, 4] and short.content.full == [7, 1, 1, 8, 1, 1, 9]
    assert short.content.is_embed(short.content.full).tolist() == [t == 1 for t in short.content.full]
    all_of_it, runs = prompts.prune_update(Update(Content([1] * 8)), parse({"keep": 3}))
    assert runs == [8] and all_of_it.content.full == [1] * 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=3),
    BUDGETS,
    st.sampled_from(["divprune", "uniform", "random", "resprune", "pooling"]),
)
def test_as_many_features_stay_as_placeholders_in_their_order(
    runs: list[list[int]], budget: dict[str, Any], method: str
) -> None:
    torch.manual_seed(0)
    config = parse({"method": method, **budget})
    features = [torch.cat([torch.randn(sum(r), 4), torch.arange(sum(r))[:, None]], 1) for r in runs]
    for feature, left, lengths in zip(features, choosing.prune(features, runs, config, 4), runs, strict=True):
        counts = config.counts(lengths)
        assert len(left) == sum(counts)
        numbers = left[:, 4].long()
        assert bool((numbers.diff() > 0).all())
        if method != "pooling":
            assert torch.equal(left, feature[numbers])
        run = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        assert torch.bincount(run[numbers], minlength=len(lengths)).tolist() == counts


def test_features_that_do_not_fill_placeholders_are_refused() -> None:
    with pytest.raises(ServingError, match="image 1 has 5 features and 4 placeholders"):
        choosing.prune([torch.randn(4, 2), torch.randn(5, 2)], [[4], [4]], parse({"ratio": 0.5}), 2)


IMAGE, VIDEO = 90, 91


@dataclass(frozen=True)
class Place:
    offset: int
    length: int
    is_embed: Any = None


@dataclass(frozen=True)
class Feature:
    mm_position: Place
    data: dict[str, Any] = field(default_factory=dict)


class Model:
    """Rows and columns as Qwen-VL counts them; features carry theirs in four further channels."""

    config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)

    def get_mrope_input_positions(self, tokens: list[int], features: list[Feature]) -> tuple[torch.Tensor, int]:
        out, at, start = [], 0, 0
        for feature in features:
            h, w = feature.data["grid"]
            text = feature.mm_position.offset - at
            assert all(token == IMAGE for token in tokens[at + text : at + text + h * w])
            out += [torch.arange(text).expand(3, -1) + start, inside(h, w).T + start + text]
            at, start = at + text + h * w, start + text + max(h, w)
        out.append(torch.arange(len(tokens) - at).expand(3, -1) + start)
        positions = torch.cat(out, 1)
        return positions, int(positions.max()) + 1 - len(tokens)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: torch.Tensor, num_computed_tokens: int
    ) -> tuple[Any, torch.Tensor, int]:
        assert num_computed_tokens == len(input_ids)
        return [feature[:, :-4] for feature in multimodal_embeddings], mrope_positions, 0


def inside(h: int, w: int) -> torch.Tensor:
    """`[h * w, 3]` positions inside an image."""
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros(h * w, dtype=torch.long), row.flatten(), col.flatten()], 1)


GRIDS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(0, 3), BUDGETS, st.lists(st.integers(1, 30), min_size=1, max_size=12), st.randoms())
def test_kept_tokens_and_text_stand_where_they_stood(
    grids: list[tuple[int, int, int]], tail: int, budget: dict[str, Any], steps: list[int], draw: Any
) -> None:
    config, model = parse(budget), Model()
    # The whole prompt, and the same with some columns of each image.
    tokens, whole, stays, short, rows = [], [], [], [], []
    for h, w, text in grids:
        size, keep = h * w, config.counts([h * w])[0]
        tokens += [1] * text
        stays += range(len(tokens) - text, len(tokens))
        whole.append(Feature(Place(len(tokens), size), {"grid": (h, w)}))
        short.append(Feature(Place(len(stays), keep), {"grid": (h, w), prompts.RUNS: field_of([size])}))
        kept = sorted(draw.sample(range(size), keep))
        rows += [torch.cat([torch.zeros(keep, 2), inside(h, w)[kept], torch.full((keep, 1), w)], 1)]
        stays += [len(tokens) + k for k in kept]
        tokens += [IMAGE] * size
    tokens += [1] * (tail + 1)
    stays += range(len(tokens) - tail - 1, len(tokens))
    wanted = model.get_mrope_input_positions(tokens, whole)[0][:, stays]
    ids = [tokens[i] for i in stays]

    places = Positions(model, config)
    positions, delta = places(ids, short)
    end = int(wanted.max()) + 1 - len(ids)
    assert positions.shape == wanted.shape and delta == end
    text = torch.tensor(ids) == 1
    assert torch.equal(positions[:, text], wanted[:, text])
    at = 0
    for step in [*steps, len(ids)]:  # chunk after chunk
        chunk = []
        for feature, row in zip(short, rows, strict=True):
            first, last = feature.mm_position.offset, feature.mm_position.offset + len(row)
            if first < at + step and at < last:
                chunk.append(row[max(at - first, 0) : at + step - first])
        left, positions, delta = places.recompute(ids, chunk, positions, at) if chunk else ([], positions, end)
        assert all(feature.shape[1] == 2 for feature in left) and delta == end
        at += step
        if at >= len(ids):
            break
    assert torch.equal(positions, wanted)
    again = places.recompute(ids, rows, positions, 0)[1]  # a request that starts over
    assert torch.equal(again, wanted)


def field_of(runs: list[int]) -> Any:
    return SimpleNamespace(data=torch.tensor(runs))


def test_prompts_with_videos_are_left_to_the_model() -> None:
    class Own(Model):
        def recompute_mrope_positions(self, *given: Any, **named: Any) -> Any:
            return given or named

    places = Positions(Own(), parse({"ratio": 0.5}))
    given_ids = [1, VIDEO, IMAGE]
    assert places.recompute(given_ids, [torch.zeros(1, 6)], torch.zeros(3, 3), 0)[3] == 0


def test_a_class_that_inherits_its_init_from_a_wrapped_one_prunes_too(monkeypatch):
    attached = []
    monkeypatch.setattr(hooks.Pruner, "attach", lambda model, config, settings: attached.append(type(model)))

    class Base:
        def __init__(self, *, vllm_config, prefix=""):
            pass

    class Derived(Base):
        pass

    for cls in (Base, Derived, Base, Derived):
        hooks._wrap_init(cls)
    pruned = SimpleNamespace(model_config=SimpleNamespace(**{hooks._ATTRIBUTE: {"ratio": 0.5}}))
    plain = SimpleNamespace(model_config=SimpleNamespace())
    for cls in (Base, Derived):
        cls(vllm_config=plain)
        assert attached == []
        cls(vllm_config=pruned)
        assert attached == [cls]
        attached.clear()


@pytest.mark.parametrize("method", ["iwp", "scope", "visionzip", "zoo_prune"])
def test_a_model_that_cannot_be_read_is_refused_with_its_name_and_a_way_out(method):
    with pytest.raises(ServingError, match=rf"^vtprune: {method} on Linear: .*get_mm_mapping.*; use divprune$"):
        readers.make(torch.nn.Linear(1, 1), False, parse({"method": method, "ratio": 0.5}).method)


def test_coverage_without_saliency_reads_no_tower():
    plain = parse({"method": "scope", "ratio": 0.5, "options": {"alpha": 0}})
    assert type(readers.make(torch.nn.Linear(1, 1), True, plain.method)) is readers.Reader


def test_records_reach_the_tokens():
    """What a reader has seen is handed to the method under the names of `Tokens`."""
    reader = object.__new__(readers.VisionReader)
    reader.anatomy = SimpleNamespace()
    seen = []

    class Spy(Random):
        def choose(self, tokens):
            seen.append(tokens)
            return super().choose(tokens)

    config = replace(parse({"method": "random", "ratio": 0.5}), method=Spy())
    choosing.prune([torch.randn(4, 2)], [[4]], config, 2, extra=reader.extra({"vision.layer": [1]}))
    assert seen[0].recorded == {"vision.layer": [1]} and seen[0].anatomy is reader.anatomy
