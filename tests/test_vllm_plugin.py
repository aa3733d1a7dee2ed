# SPDX-License-Identifier: Apache-2.0
"""The vLLM plug-in without vLLM: settings, shortened prompts, selected features, positions on several axes.

`make test-vllm` tests it in a real vLLM.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import methods
from vtprune.integrations.vllm import hooks, prompts, readers, selection, serving, support
from vtprune.integrations.vllm.mrope import Positions, read_digits, write_digits
from vtprune.integrations.vllm.settings import CLIP_METHODS, QUESTION_FREE, ServingError, parse
from vtprune.methods import Random
from vtprune.models.visual_tokens import grid_places

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
        (None, "expected an object with method, ratio, keep, options, video_method, video_options"),
        ("divprune", "expected an object"),
        ({"ratio": 0.5, "rate": 1}, "unknown field 'rate'; expected method, ratio, keep, options, video_method"),
        ({"mean_ratio": 0.5}, "mean_ratio"),
        ({"certificate": 5}, "certificate is 5; expected the path of a file or its content"),
        ({"ratio": 0.5, "tower": 1.5}, "keep is 1.5; expected a share"),
        ({"ratio": 0.5, "tower": "Change"}, "tower is 'Change'; expected a share"),
        ({"ratio": 0.5, "tower": "0.5"}, 'or an object such as {"method": "Similar", "keep": 0.35}'),
        ({"ratio": 0.5, "tower": {"method": "Attention"}}, "tower method 'Attention'; in vLLM there are Change"),
        ({"ratio": 0.5, "tower": {"method": "Change", "sides": 3}}, "'sides'; it has keep, block"),
        ({"ratio": 0.5, "tower": {"method": "Pixels"}}, "in vLLM give keep"),
        ({}, "ratio and keep"),
        ({"ratio": 0.5, "keep": 3}, "ratio and keep"),
        ({"ratio": 1.5}, "1.5"),
        ({"ratio": 0}, "0"),
        ({"keep": 0}, "0"),
        ({"keep": 2.5}, "2.5"),
        ({"ratio": "a"}, "'a'"),
        ({"ratio": 0.5, "method": "fastv"}, "method fastv is not available in vLLM; there are divprune, iwp"),
        ({"ratio": 0.5, "method": "prumerge"}, "method prumerge is not available in vLLM"),
        ({"ratio": 0.5, "method": "DivPrune"}, "unknown method 'DivPrune'; did you mean 'divprune' or 'resprune'"),
        ({"ratio": 0.5, "method": "none"}, "unknown method 'none'; there are: divprune, iwp, pooling"),
        ({"ratio": 0.5, "method": 3}, "unknown method 3"),
        ({"ratio": 0.5, "options": [1]}, "options is [1]"),
        ({"ratio": 0.5, "options": {"no": 1}}, "method resprune cannot be made with {'layer': 0, 'no': 1}"),
        ({"ratio": 0.5, "method": "iwp", "options": {"layer": 3}}, "in vLLM layer is 0, found 3"),
        ({"ratio": 0.5, "method": "resprune", "options": {"layer": 1}}, "in vLLM layer is 0, found 1; give layer=0"),
        ({"ratio": 0.5, "method": "evs"}, "method evs is made for clips; name it as video_method"),
        ({"ratio": 0.5, "video_method": "holitom"}, "method holitom is not available in vLLM"),
        ({"ratio": 0.5, "video_options": {}}, "video_options and no video_method"),
        ({"ratio": 0.5, "video_method": "vcast", "video_options": 1}, "video_options is 1"),
        ({"ratio": 0.5, "video_method": "vcast", "video_options": {"temperature": 0}}, "temperature is 0"),
        ({"ratio": 0.5, "method": "random", "options": {"layer": 2}}, "method random cannot be made with {'layer': 2}"),
        ({"ratio": 0.5, "method": "random", "options": {"layer": 2}}, "'layer'; it has seed"),
        ({"ratio": 0.5, "method": "uniform", "options": {"layer": 2}}, "'layer'; it has no options"),
    ],
)
def test_bad_configuration_is_one_line(config: Any, words: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse(config)
    line = str(caught.value)
    assert line.startswith("vtprune: ") and "\n" not in line and words in line


def test_a_cut_of_the_tower_alone_keeps_all_tokens() -> None:
    found = parse({"tower": 0.5})
    assert found == parse({"tower": {"keep": 0.5}, "ratio": 1.0}) and found.tower is not None
    assert not found.budget.may_drop


@pytest.mark.parametrize("kind", [str, Path])
def test_a_certificate_is_read_from_a_path_of_either_kind(kind: type, tmp_path: Path) -> None:
    place = tmp_path / "none.json"
    with pytest.raises(ServingError, match="none.json is no certificate .* no such file"):
        parse({"certificate": kind(place)})


def test_a_certificate_of_a_cut_deeper_than_vllms_is_refused() -> None:
    """Certificates of `resprune` with a cut inside the decoder are refused: vLLM cuts before it."""
    numbers = {"risk": 0.1, "confidence": 0.9, "pictures": 9, "questions": 9, "changed": 0.0}
    texts = dict.fromkeys(("model", "config_hash", "weights_hash"), "x")
    for layer, words in (
        (None, "found None; give layer=0, or certify --method resprune:layer=0"),
        (1, "found 1"),
        (0, None),
    ):
        method = methods.ResPrune(layer=layer)
        options = dataclasses.asdict(method)
        found = {
            "ratio": 0.3,
            "method": "resprune",
            "method_repr": repr(method),
            "options": options,
            **texts,
            **numbers,
        }
        if words is None:
            assert parse({"certificate": found}).method == method
            continue
        with pytest.raises(ServingError, match=words):
            parse({"certificate": found})


def _vllm_config(**multimodal: Any) -> Any:
    """What `check_config` reads of a `VllmConfig` of a plain model."""
    parts = SimpleNamespace(get_limit_per_prompt=lambda kind: 1, video_pruning_rate=None, **multimodal)
    model = SimpleNamespace(
        model="m", is_multimodal_model=True, is_encoder_decoder=False, uses_mrope=False, multimodal_config=parts
    )
    return SimpleNamespace(
        model_config=model,
        speculative_config=None,
        lora_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1),
    )


def test_a_certificate_holds_for_tokens_numbered_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM numbers the tokens of a plain model through; a certificate of original positions says nothing of that."""
    monkeypatch.setattr(support, "_check_certificate", lambda *given: None)
    config, compact = _vllm_config(), methods.DivPrune(positions="compact")
    for method, ratio, mrope, words in (
        (compact, 0.3, False, None),
        (methods.DivPrune(), 1.0, False, None),
        (methods.DivPrune(), 0.3, True, None),
        (methods.DivPrune(), 0.3, False, "certify divprune with positions=compact, or give"),
        (methods.Uniform(), 0.3, False, "uniform has no such option: certify divprune or another with"),
    ):
        config.model_config.uses_mrope = mrope
        asked = parse({"method": "divprune", "ratio": ratio})
        asked = dataclasses.replace(asked, method=method, video_method=method, certificate="a certificate")  # type: ignore[arg-type]
        if words is None:
            support.check_config(config, asked)
            continue
        with pytest.raises(ServingError, match=words):
            support.check_config(config, asked)


def test_a_method_for_clips_is_refused_where_clips_stay_whole() -> None:
    config, asked = _vllm_config(), parse({"ratio": 0.3, "video_method": "evs"})
    with pytest.raises(ServingError, match="^vtprune: m: found video_method evs, .*; leave video_method out$"):
        support.check_config(config, asked)
    config.model_config.uses_mrope = True
    support.check_config(config, asked)


def test_pipelines_are_refused_where_later_stages_would_have_other_positions() -> None:
    config = _vllm_config()
    config.parallel_config.pipeline_parallel_size = 2
    support.check_config(config, parse({"ratio": 0.3}))
    config.model_config.uses_mrope = True
    with pytest.raises(ServingError, match="^vtprune: m: .* found pipeline_parallel_size=2, expected 1; use tensor_"):
        support.check_config(config, parse({"ratio": 0.3}))


@pytest.mark.parametrize("first", [True, False])
def test_later_stages_of_a_pipeline_read_and_choose_nothing(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM measures their memory with pictures, though they lack what `iwp` reads."""
    group = SimpleNamespace(get_pp_group=lambda: SimpleNamespace(is_first_rank=first))
    for name in ("vllm", "vllm.distributed"):
        monkeypatch.setitem(sys.modules, name, group)  # type: ignore[arg-type]
    model: Any = torch.nn.Linear(1, 1)
    features = [torch.randn(4, 2)]
    model.embed_multimodal = lambda **given: given or features
    config = _vllm_config()
    config.parallel_config.pipeline_parallel_size = 2
    config.model_config.hf_text_config = SimpleNamespace(hidden_size=2)
    asked = parse({"method": "iwp", "ratio": 0.5})
    if first:
        with pytest.raises(ServingError, match="iwp on Linear"):
            hooks.Pruner(model, config, asked)
        return
    pruner = hooks.Pruner(model, config, asked)
    fields = {prompts.RUNS: torch.tensor([[4]]), prompts.COUNTS: torch.tensor([[2]]), prompts.IDS: [torch.zeros(0)]}
    assert pruner(**fields) is features


def _fake_vllm(monkeypatch: pytest.MonkeyPatch, lacking: str) -> Any:
    """The modules of a vLLM that the plug-in enters, without one of its functions or classes; returns `VllmConfig`."""
    kinds = {
        "vllm.config": ("VllmConfig", "__post_init__"),
        "vllm.model_executor.model_loader.base_loader": ("BaseModelLoader", "load_model"),
        "vllm.model_executor.models.registry": ("_ModelRegistry", "resolve_model_cls"),
        "vllm.multimodal.registry": ("MultiModalRegistry", "create_processor"),
        "vllm.v1.worker.cpu_model_runner": ("CPUModelRunner", "load_model"),
    }
    modules: dict[str, Any] = {
        "vllm": SimpleNamespace(__version__="0.99"),
        "vllm.platforms": SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True)),
    }
    for name, (cls, function) in kinds.items():
        made = type(cls, (), {} if lacking == function else {function: lambda self: "result"})
        modules[name] = SimpleNamespace(**({} if lacking == cls else {cls: made}))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return modules["vllm.config"].VllmConfig


@pytest.mark.parametrize("lacking", ["", "CPUModelRunner", "create_processor", "_ModelRegistry"])
def test_an_unknown_vllm_starts_as_usual_and_refuses_to_prune(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = _fake_vllm(monkeypatch, lacking)
    hooks.install()
    hooks.install()
    config = cls()
    config.model_config, config.speculative_config = SimpleNamespace(), None
    if lacking:
        assert config.__post_init__() == "result"  # older ones have no additional_config
    config.additional_config = {}
    assert config.__post_init__() == "result"
    config.additional_config = {"vtprune": 5}
    words = rf"^vtprune: vLLM 0.99 lacks .*{lacking}.*; expected vLLM 0.32; " if lacking else "the configuration is 5"
    with pytest.raises(ServingError, match=words):
        config.__post_init__()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"vt_prune": {"ratio": 0.5}}, "additional_config has 'vt_prune'; expected 'vtprune'; rename it, or remove it"),
        ({"VTPrune": {"ratio": 0.5}}, "additional_config has 'VTPrune'"),
        ({"other": {}, "vtprun": {"ratio": 0.5}}, "additional_config has 'vtprun'"),
        (
            {"method": "divprune", "ratio": 0.5},
            "has 'method', 'ratio' at its top level; expected them inside 'vtprune'",
        ),
        ({"ratio": 0.5}, "{'vtprune': {'ratio': 0.5}}"),
        ({"other": {"ratio": 0.5}, "prune": True}, None),
        ({"ratio": 7}, None),
        ({}, None),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    extra: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings under a misspelled name, or at the top level; those of other plug-ins are left alone."""
    config = _vllm_config()
    config.additional_config = extra
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    if words is None:
        assert hooks._after_config("made", config) == "made" and hooks.settings_of(config.model_config) is None
        return
    with pytest.raises(ServingError) as caught:
        hooks._after_config("made", config)
    line = str(caught.value)
    assert line.startswith("vtprune: ") and "\n" not in line and words in line


def test_methods_that_read_the_decoder_are_refused_where_it_is_not_loaded() -> None:
    config = _vllm_config(mm_encoder_only=True)
    support.check_config(config, parse({"method": "divprune", "ratio": 0.3}))
    with pytest.raises(ServingError, match="iwp reads keys of the decoder, which mm_encoder_only does not load; use"):
        support.check_config(config, parse({"method": "iwp", "ratio": 0.3}))


def test_every_setting_has_a_fingerprint_of_its_own() -> None:
    configs: list[dict[str, Any]] = [{"method": method, "ratio": 0.25} for method in QUESTION_FREE]
    configs += [{"ratio": 0.5}, {"keep": 1}, {"keep": 2}, {"ratio": 0.2500001}]
    configs += [{"method": "random", "ratio": 0.25, "options": {"seed": seed}} for seed in (1, 2)]
    configs += [{"video_method": method, "ratio": 0.25} for method in CLIP_METHODS]
    configs += [{"video_method": "vcast", "ratio": 0.25, "video_options": {"temperature": 1.0}}]
    marks = [parse(config).fingerprint for config in configs]
    assert len(set(marks)) == len(marks)
    assert marks == [parse(config).fingerprint for config in configs]


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), BUDGETS)
def test_counts_are_exact(runs: list[int], budget: dict[str, Any]) -> None:
    counts, total = parse(budget).counts(runs), sum(runs)
    wanted = budget.get("keep") or max(1, round(budget["ratio"] * total))
    assert sum(counts) == min(wanted, total)
    assert all(0 <= count <= length for count, length in zip(counts, runs, strict=True))


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=60))
def test_runs_are_those_that_a_loop_finds(mask: list[bool]) -> None:
    runs = [len(part) for part in "".join("x" if m else " " for m in mask).split()]
    assert prompts.runs_of(torch.tensor(mask, dtype=torch.bool)) == runs


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_runs_are_shortened_and_nothing_else(mask: list[bool], data: st.DataObject) -> None:
    full = torch.tensor(mask)
    runs = prompts.runs_of(full)
    counts = [data.draw(st.integers(0, length)) for length in runs]
    stays = prompts.shorten(full, counts)
    text = "".join("x" if m else "." for m in mask)
    short = "".join(letter for letter, stay in zip(text, stays.tolist(), strict=True) if stay)
    assert short.count(".") == text.count(".") and short.count("x") == sum(counts)
    # Every run of placeholders has the requested length.
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
    full = [7, 1, 1, 1, 1, 8, 5, 1, 1, 1, 1, 9]
    update = Update(Content(full, lambda tokens: torch.tensor(tokens) == 1))
    short, runs, counts = prompts.prune_update(update, parse({"ratio": 0.5}))
    assert (runs, counts) == ([4, 4], [2, 2]) and short.content.full == [7, 1, 1, 8, 5, 1, 1, 9]
    assert short.content.is_embed(short.content.full).tolist() == [t == 1 for t in short.content.full]
    all_of_it, runs, _ = prompts.prune_update(Update(Content([1] * 8)), parse({"keep": 3}))
    assert runs == [8] and all_of_it.content.full == [1] * 3


def test_rows_with_one_token_between_them_are_one_group() -> None:
    """A picture of Pixtral: the text between its rows is filled with features as well, what ends it is not."""
    full = [7, *[1] * 3, 8, *[1] * 3, 8, *[1] * 3, 9]
    update = Update(Content(full, lambda tokens: torch.tensor(tokens) == 1))
    short, runs, counts = prompts.prune_update(update, parse({"keep": 4}))
    assert (runs, counts) == ([9], [4]) and short.content.full == [7, 1, 1, 1, 8, 1, 8, 9]
    assert short.content.is_embed(short.content.full).tolist() == [t in (1, 8) for t in short.content.full]
    ids = torch.tensor(prompts._ids_of_rows(update))
    assert ids.tolist() == [-1, -1, -1, 8, -1, -1, -1, 8, -1, -1, -1]
    assert serving._grid_of_rows(ids == prompts.VISUAL) == [1, 3, 3]
    model = SimpleNamespace(
        get_language_model=lambda: SimpleNamespace(embed_input_ids=lambda ids: -ids[:, None].expand(-1, 2).float())
    )
    kept = torch.tensor([1, 6, 7, 8])
    states = kept[:, None].expand(-1, 2).float()
    states, places = selection.with_text(states, kept, ids, ids == prompts.VISUAL, model, 2)
    assert states[:, 0].tolist() == [1, -8, -8, 6, 7, 8] and places.tolist() == [1, 3, 7, 8, 9, 10]
    missing = SimpleNamespace(embed_input_ids=lambda ids: torch.empty(len(ids), 2, device="meta"))
    with pytest.raises(ServingError, match="text inside a picture or clip, whose embeddings mm_encoder_only does not"):
        model = SimpleNamespace(get_language_model=lambda: missing)
        selection.with_text(states[:4], kept, ids, ids == prompts.VISUAL, model, 2)


@pytest.mark.parametrize("full", [[1, 1, 1], [1, 1, 8, 1], [1, 8, 1, 9, 1], [1, 1, 8, 8, 1, 1], [7, 9]], ids=repr)
def test_other_layouts_are_no_rows(full: list[int]) -> None:
    assert prompts.rows_of(full, torch.tensor(full) == 1) is None


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
    chosen = selection.prune(features, runs, [config.counts(r) for r in runs], config.method, 4)
    for feature, (left, kept), lengths in zip(features, chosen, runs, strict=True):
        counts = config.counts(lengths)
        assert len(left) == sum(counts)
        numbers = left[:, 4].long()
        assert torch.equal(numbers, kept)
        assert bool((numbers.diff() > 0).all())
        if method != "pooling":
            assert torch.equal(left, feature[numbers])
        run = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        assert torch.bincount(run[numbers], minlength=len(lengths)).tolist() == counts


def test_features_that_do_not_fill_placeholders_are_refused() -> None:
    with pytest.raises(ServingError, match="image 1 has 5 features and 4 placeholders"):
        selection.prune([torch.randn(4, 2), torch.randn(5, 2)], [[4], [4]], [[2], [2]], Random(), 2)


# --- positions on several axes

IMAGE, VIDEO, OPEN, CLOSE, TIME, WORD = 90, 91, 92, 93, 94, 1


@dataclass(frozen=True)
class Place:
    offset: int
    length: int
    is_embed: Any = None


@dataclass(frozen=True)
class Feature:
    mm_position: Place
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A picture or a clip: `[frames, rows, columns]`, with or without time stamps between frames."""

    grid: tuple[int, int, int]
    timed: bool

    @property
    def ids(self) -> list[int]:
        t, h, w = self.grid
        token = IMAGE if t == 1 and not self.timed else VIDEO
        return ([TIME, TIME, OPEN, *[token] * (h * w), CLOSE] * t) if self.timed else [token] * (t * h * w)


class Model:
    """Positions as in Qwen-VL; every frame of a clip with time stamps starts anew, as in Qwen3-VL."""

    config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)

    def get_mrope_input_positions(self, tokens: list[int], features: list[Any]) -> tuple[torch.Tensor, int]:
        out: list[torch.Tensor] = []
        at = 0

        def start() -> int:
            return int(out[-1].max()) + 1 if out else 0

        def text(end: int) -> None:
            if end > at:
                out.append(torch.arange(end - at).expand(3, -1) + start())

        for feature in features:
            t, h, w = torch.as_tensor(feature.data["grid"].data).tolist()
            begin = feature.mm_position.offset
            for _ in range(t if OPEN in tokens[begin : begin + 3] else 1):
                size = (1 if OPEN in tokens[begin : begin + 3] else t) * h * w
                begin = next(i for i in range(begin, len(tokens)) if tokens[i] in (IMAGE, VIDEO))
                text(begin)
                out.append(grid_places(size // (h * w), h, w)[:, [0, 2, 3]].T + start())
                assert all(token in (IMAGE, VIDEO) for token in tokens[begin : begin + size])
                at = begin = begin + size
                begin += 1  # what closes the frame
        text(len(tokens))
        positions = torch.cat(out, 1)
        assert positions.shape[1] == len(tokens)
        return positions, int(positions.max()) + 1 - len(tokens)

    def recompute_mrope_positions(self, *given: Any) -> Any:
        raise AssertionError("positions are not left to the model")

    def get_language_model(self) -> Any:
        return SimpleNamespace(embed_input_ids=lambda ids: torch.stack([-ids, ids], 1).float())


ITEMS = st.lists(
    st.tuples(st.tuples(*[st.integers(1, 4)] * 3), st.booleans(), st.integers(1, 5)), min_size=1, max_size=3
)


@settings(max_examples=80, deadline=None)
@given(ITEMS, st.integers(0, 3), BUDGETS, st.lists(st.integers(1, 30), min_size=1, max_size=12), st.randoms())
def test_kept_tokens_and_text_stand_where_they_stood(
    items: list[Any], tail: int, budget: dict[str, Any], steps: list[int], draw: Any
) -> None:
    """Kept tokens and text have their original positions, for pictures and clips in chunks of any size."""
    config, places = parse(budget), Positions(Model())
    # The whole prompt, and the prompt with some columns of each item.
    tokens: list[int] = []
    ids: list[int] = []
    stays: list[int] = []
    whole, short, rows = [], [], []
    for grid, timed, text in items:
        item = Item(grid, timed)
        size = grid[0] * grid[1] * grid[2]
        keep = config.counts([size])[0]
        kept = torch.tensor(sorted(draw.sample(range(size), keep)))
        tokens += [WORD] * text
        stays += range(len(tokens) - text, len(tokens))
        ids += [WORD] * text
        data = {"grid": SimpleNamespace(data=torch.tensor(grid))}
        lumped = [TIME, TIME, OPEN, *[VIDEO] * keep, CLOSE, *[TIME, TIME, OPEN, CLOSE] * (grid[0] - 1)]
        lumped = lumped if timed else item.ids[:keep]
        whole.append(Feature(Place(len(tokens), len(item.ids)), data))
        short.append(Feature(Place(len(ids), len(lumped)), {**data, prompts.IDS: field_of(item.ids)}))
        about = {"grid": torch.tensor(grid)}
        visual = torch.isin(torch.tensor(item.ids), torch.tensor([IMAGE, VIDEO])).nonzero()[:, 0]
        features = torch.cat([kept[:, None], kept[:, None] + 1000, torch.full((keep, 2), 7)], 1).bfloat16()
        carried = places.carry(features, kept, torch.tensor(item.ids), "video", about, 2)
        assert carried.dtype == torch.bfloat16 and len(carried) == len(lumped)
        rows.append(carried)
        left = sorted({*range(len(item.ids))} - {*visual.tolist()} | {*visual[kept].tolist()})
        stays += [len(tokens) + i for i in left]
        tokens += item.ids
        ids += lumped
    tokens += [WORD] * tail
    ids += [WORD] * tail
    stays += range(len(tokens) - tail, len(tokens))
    full = Model().get_mrope_input_positions(tokens, whole)[0]
    wanted = full[:, stays]

    positions, delta = places(ids, short)
    end = int(full.max()) + 1 - len(ids)
    assert positions.shape == wanted.shape and delta == end
    text = torch.tensor(ids) == WORD
    assert torch.equal(positions[:, text], wanted[:, text])
    at = 0
    for step in [*steps, len(ids)]:  # chunk after chunk
        chunk = []
        for feature, row in zip(short, rows, strict=True):
            first, last = feature.mm_position.offset, feature.mm_position.offset + len(row)
            if first < at + step and at < last:
                chunk.append(row[max(at - first, 0) : at + step - first])
        if chunk:
            left, positions, delta = places.recompute(ids, chunk, positions, at)
            assert all(feature.shape[1] == 4 for feature in left)
        at += step
        if at >= len(ids):
            break
    assert torch.equal(positions, wanted) and delta == end
    again = places.recompute(ids, rows, positions, 0)  # a request that starts over
    assert torch.equal(again[1], wanted) and again[2] == end


def test_text_between_frames_is_embedded_and_kept_tokens_are_untouched() -> None:
    item, kept = Item((2, 1, 2), True), torch.tensor([0, 3])
    feature = torch.tensor([[0.5, 1.5, 7, 7], [2.5, 3.5, 7, 7]])
    about = {"grid": torch.tensor([2, 1, 2])}
    places = Positions(Model())
    carried = places.carry(feature, kept, torch.tensor(item.ids), "video", about, 2)
    ids = [WORD, TIME, TIME, OPEN, VIDEO, VIDEO, CLOSE, TIME, TIME, OPEN, CLOSE]
    out = places.recompute(ids, [carried], torch.arange(11).expand(3, -1), 0)[0][0]
    words = [TIME, TIME, OPEN, None, CLOSE, TIME, TIME, OPEN, None, CLOSE]
    assert [row[1] if row[2] == 0 else None for row in out.tolist()] == words
    assert torch.equal(out[[3, 8]], feature)


@pytest.mark.parametrize("between", [[WORD, IMAGE, WORD], [WORD, IMAGE, IMAGE], [IMAGE]], ids=str)
def test_placeholders_of_the_other_kind_in_a_text_are_no_items(between: list[int]) -> None:
    """Features of a clip go to its own columns, whatever a client writes before it."""
    item, kept, places = Item((2, 1, 2), False), torch.tensor([0, 3]), Positions(Model())
    about = {"grid": torch.tensor(item.grid)}
    carried = places.carry(torch.zeros(2, 2), kept, torch.tensor(item.ids), "video", about, 2)
    ids = [WORD, *between, VIDEO, VIDEO, WORD]
    before = torch.arange(len(ids)).expand(3, -1)
    found = places.recompute(ids, [carried], before, 0)[1]
    at = len(ids) - 3
    assert torch.equal(found[:, :at], before[:, :at])
    assert found[:, at : at + 2].T.tolist() == [[at] * 3, [at + 1, at, at + 1]]


def test_steps_without_features_leave_positions_alone() -> None:
    positions = torch.tensor([[0, 1, 1, 5], [0, 1, 2, 5], [0, 1, 3, 5]])
    places = Positions(Model())
    places._visual = None  # type: ignore[method-assign,assignment]  # the prompt is not looked at
    assert places.recompute([WORD, IMAGE, IMAGE, WORD], [], positions, 4) == ([], positions, 2)


def test_answers_to_a_prompt_that_ends_in_a_picture_begin_after_its_dropped_tokens() -> None:
    item, places = Item((1, 2, 3), False), Positions(Model())
    carried = places.carry(
        torch.zeros(1, 2), torch.tensor([0]), torch.tensor(item.ids), "image", {"grid": torch.tensor(item.grid)}, 2
    )
    ids, positions = [WORD, IMAGE], torch.tensor([[0, 1]] * 3)
    _, found, grown = places.recompute(ids, [carried], positions, 0)
    assert found.tolist() == [[0, 1]] * 3 and grown == 1 + 3 - 2  # the last column of the grid is at 1 + 2
    assert places.recompute(ids, [], positions, 2)[2] == grown


@settings(deadline=None)
@given(st.lists(st.integers(-(2**23), 2**23 - 1), min_size=1, max_size=8))
def test_digits_are_exact_in_every_type(numbers: list[int]) -> None:
    wanted = torch.tensor(numbers)[:, None]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(read_digits(write_digits(wanted, dtype)), wanted)


def test_features_with_channels_of_the_model_are_refused() -> None:
    with pytest.raises(ServingError, match="5 channels, and the decoder 2"):
        Positions(Model()).carry(torch.zeros(1, 5), torch.tensor([0]), torch.tensor([IMAGE]), "image", {}, 2)


def field_of(numbers: list[int]) -> Any:
    return SimpleNamespace(data=torch.tensor(numbers))


# --- clips


def test_a_clip_is_laid_out_frame_by_frame_before_pruning() -> None:
    lumped = [TIME, OPEN, VIDEO, VIDEO, VIDEO, VIDEO, CLOSE, TIME, OPEN, CLOSE]
    assert prompts.spread_over_frames(lumped, VIDEO, 2) == [TIME, OPEN, VIDEO, VIDEO, CLOSE] * 2
    assert prompts.spread_over_frames([VIDEO] * 4, VIDEO, 2) == [VIDEO] * 4
    with pytest.raises(ServingError, match="laid out in a way that is not known"):
        prompts.spread_over_frames([OPEN, VIDEO, VIDEO, CLOSE], VIDEO, 2)


@pytest.mark.parametrize(("method", "share", "frames"), [("evs", 0.2, 4), ("dycoke", 0.2, 4), ("evs", 0.5, 1)])
def test_a_clip_that_its_method_cannot_prune_so_far_falls_to_the_method_for_images(method, share, frames, caplog):
    config, count = parse({"ratio": share, "video_method": method}), round(share * 9 * frames)
    assert config.method_for("video", [9] * frames, count).name == "resprune"
    assert f"resprune in place of {method} for a clip: {method}" in caplog.text
    assert "patch(" not in caplog.text
    assert config.method_for("video", [9] * 4, 36).name == method
    assert config.method_for("image", [36], 36).name == "resprune"
    assert parse({"ratio": share, "video_method": "vcast"}).method_for("video", [9] * frames, count).name == "vcast"


@pytest.fixture
def attached(monkeypatch):
    """Classes of the models that got a pruner, in order."""
    found = []
    monkeypatch.setattr(hooks.Pruner, "attach", lambda model, config, settings: found.append(type(model)))
    return found


def test_a_class_that_inherits_its_init_from_a_wrapped_one_prunes_too(attached):
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


def test_a_pooling_model_that_inherits_from_the_resolved_class_prunes_once(attached):
    class Resolved:
        def __init__(self, *, vllm_config, prefix=""):
            pass

    class Pooling(Resolved):
        def __init__(self, **given):
            super().__init__(**given)

    hooks._wrap_init(Resolved)
    Pooling(vllm_config=SimpleNamespace(model_config=SimpleNamespace(**{hooks._ATTRIBUTE: {"ratio": 0.5}})))
    assert attached == [Pooling]


def test_a_loaded_model_without_a_pruner_is_refused():
    pruned, plain = SimpleNamespace(**{hooks._ATTRIBUTE: {"ratio": 0.5}}), SimpleNamespace()
    model, pruner = SimpleNamespace(supports_multimodal=True), object.__new__(hooks.Pruner)
    text, ready = SimpleNamespace(), SimpleNamespace(supports_multimodal=True, vtprune=pruner)
    for loaded, config in ((model, plain), (text, pruned), (ready, pruned)):
        assert hooks._after_weights(loaded, None, None, config) is loaded
    with pytest.raises(ServingError, match="^vtprune: SimpleNamespace was made .*leave 'vtprune' out$"):
        hooks._after_weights(model, None, None, pruned)


@pytest.mark.parametrize(("mrope", "expected"), [(False, "image"), (True, "image or video")])
def test_a_processor_that_takes_nothing_that_is_pruned_is_refused_with_its_modalities(mrope, expected):
    config = SimpleNamespace(image_token_id=1, video_token_id=2)
    info = SimpleNamespace(get_hf_config=lambda: config, supported_mm_limits={"vision_chunk": None, "audio": 1})
    with pytest.raises(ServingError, match=f"^vtprune: SimpleNamespace takes vision_chunk, audio; expected {expected}"):
        prompts.prune_processor(SimpleNamespace(info=info), parse({"ratio": 0.5}), mrope)


def test_features_in_place_of_pictures_get_the_mean_ratio():
    automatic = parse({"ratio": {"mean": 0.3}})
    for features in (torch.zeros(4, 8), {"image_embeds": torch.zeros(4, 8), "image_grid_thw": torch.ones(1, 3)}):
        assert automatic.share_of(features) == 0.3


def test_features_in_place_of_pictures_are_refused_where_the_method_reads_the_encoder():
    features = torch.zeros(4, 8)
    for chosen in (parse({"ratio": 0.5}), parse({"ratio": 0.5, "method": "scope", "options": {"alpha": 0}})):
        chosen.check_item(features)
    reading = parse({"ratio": 0.5, "method": "visionzip"})
    reading.check_item(torch.zeros(3, 4, 8))
    with pytest.raises(ValueError, match="^vtprune: visionzip reads the vision encoder.*; send pixels, or serve with"):
        reading.check_item(features)


@pytest.mark.parametrize("method", ["iwp", "scope", "visionzip", "zoo_prune"])
def test_a_model_that_cannot_be_read_is_refused_with_its_name_and_a_way_out(method):
    with pytest.raises(ServingError, match=rf"^vtprune: {method} on Linear: .*get_mm_mapping.*; use divprune$"):
        readers.make(torch.nn.Linear(1, 1), False, parse({"method": method, "ratio": 0.5}).method)


def test_coverage_without_saliency_reads_no_tower():
    plain = parse({"method": "scope", "ratio": 0.5, "options": {"alpha": 0}})
    assert type(readers.make(torch.nn.Linear(1, 1), True, plain.method)) is readers.Reader


def test_records_reach_the_tokens():
    """Records of a reader reach the method as fields of `Tokens`."""
    reader = object.__new__(readers.VisionReader)
    reader.anatomy = SimpleNamespace()
    seen = []

    class Spy(Random):
        def choose(self, tokens):
            seen.append(tokens)
            return super().choose(tokens)

    selection.prune([torch.randn(4, 2)], [[4]], [[2]], Spy(), 2, extra=reader.extra({"vision.layer": [1]}))
    assert seen[0].recorded == {"vision.layer": [1]} and seen[0].anatomy is reader.anatomy


def test_a_tower_that_cannot_be_cut_is_refused_with_the_models_name() -> None:
    from vtprune.integrations.vllm import towers as vllm_towers
    from vtprune.towers import Random

    class Swinging(torch.nn.Module):
        """A vLLM model whose tower has stages."""

        config = SimpleNamespace()

        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
            self.language = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})

        def get_mm_mapping(self) -> SimpleNamespace:
            return SimpleNamespace(language_model=["language."], tower_model=["visual."], connector=[])

    with pytest.raises(
        ServingError, match="tower on Swinging: the vision tower Sequential cannot be cut.*leave tower out"
    ):
        vllm_towers.cut(Swinging(), Random(keep=0.5))


def test_forward_is_wrapped_as_hooks_would_be_and_packed_states_keep_their_form() -> None:
    from vtprune.integrations.vllm import towers as vllm_towers

    seen: list[tuple] = []

    def before(module, args, kwargs):
        seen.append(tuple(args[0].shape))
        return (args[0][:2], *args[1:]), kwargs

    def after(module, args, kwargs, output):
        seen.append(None if output is None else tuple(output.shape))
        return None if output is None else torch.cat([output, output])

    block = torch.nn.Linear(4, 4)
    vllm_towers._wrap(block, before, after)
    assert block(torch.ones(3, 1, 4)).shape == (4, 1, 4) and seen == [(3, 4), (2, 4)]
    assert block(torch.ones(3, 2, 4)).shape == (4, 2, 4)
    with pytest.raises(RuntimeError):
        block(torch.ones(3, 1, 5))
    assert seen[-1] is None, "`after` also runs when the call fails"
