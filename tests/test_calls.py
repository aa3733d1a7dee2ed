# SPDX-License-Identifier: Apache-2.0
"""Full forward calls on a patched model: labels, `logits_to_keep`, hidden states, gradients, tuples, positions."""

from __future__ import annotations

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, IMAGE, Image
from reference import masked
from support import LAYOUTS, MIXED, ONE, model_of, pruned, reference, survivors

import vtprune
from vtprune.study.stopwatch import cache_bytes

every_family = pytest.mark.parametrize("family", list(FAMILIES))
every_layout = pytest.mark.parametrize("layout", list(LAYOUTS))


@every_family
@every_layout
@torch.no_grad()
def test_logits_have_the_callers_length(family: str, layout: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    length = batch["input_ids"].shape[1]
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (_, spy):
        out = model(**batch, output_hidden_states=True)
        assert out.logits.shape[1] == length
        assert all(h.shape[1] == length for h in out.hidden_states)
        drops = [spy.drops()]
        for keep in (1, 3):
            torch.testing.assert_close(model(**batch, logits_to_keep=keep).logits, out.logits[:, -keep:])
    dropped = ~survivors(drops, batch) & batch["attention_mask"].bool()
    assert not out.hidden_states[-1][dropped].any()


def labels_of(batch: dict) -> torch.Tensor:
    """Labels of text only, without the first word after a picture: the column that predicts it may be dropped."""
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    labels[0, int((labels[0] == -100).nonzero()[-1]) + 1] = -100
    return labels


@every_family
@every_layout
@torch.no_grad()
def test_labels_mean_the_same(family: str, layout: str) -> None:
    """The loss over text equals that of the masked model."""
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    labels = labels_of(batch)
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (_, spy):
        loss = model(**batch, labels=labels).loss
        drops = [spy.drops()]
    with reference(model, drops, batch):
        want = model(**batch, labels=labels).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


@every_family
@every_layout
def test_gradients_flow_through_the_kept_tokens(family: str, layout: str) -> None:
    model = FAMILIES[family].build().train()
    batch = FAMILIES[family].batch(ONE) | {"use_cache": False}
    labels = labels_of(batch)

    def grads() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with pruned(model, LAYOUTS[layout], ratio=0.3) as (_, spy):
        got = grads()
        drops = [spy.drops()]
    if layout == "merging":  # the reference inserts constants
        assert all(torch.isfinite(g).all() for g in got) and any(g.any() for g in got)
        return
    with reference(model, drops, batch):
        want = grads()
    scale = max(float(w.abs().max()) for w in want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5 * scale)


@every_family
@torch.no_grad()
def test_tuple_output_and_positional_arguments(family: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    with pruned(model, LAYOUTS["steps"], ratio=0.3) as (patch, _):
        want = model(**batch).logits
        assert torch.equal(model(**batch, return_dict=False)[0], want)
        ids = batch.pop("input_ids")
        assert torch.equal(model(ids, **batch).logits, want)
        assert patch.last is not None


@every_family
@torch.no_grad()
def test_precomputed_features(family: str) -> None:
    """Features that the caller computed with the model's own encoder are pruned like pixels."""
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        ignored_features(model, batch)
        pytest.skip(f"transformers {transformers.__version__} takes no mm_encoder_outputs")
    with pruned(model, "uniform") as (patch, _):
        want = model(**batch).logits
        kept = patch.last.kept
        names = {"pixel_values", "image_sizes", "image_grid_thw"}
        features = model.model.get_image_features(
            **{k: v for k, v in batch.items() if k in names}, **_strategy(model), return_dict=True
        )
        # M-RoPE positions still need the grid.
        rest = {k: v for k, v in batch.items() if k not in names - {"image_grid_thw"}}
        got = model(**rest, mm_encoder_outputs={"image": features}).logits
        assert [k.tolist() for k in patch.last.kept] == [k.tolist() for k in kept]
    torch.testing.assert_close(got, want)


def ignored_features(model: torch.nn.Module, batch: dict) -> None:
    """Asserts that the unpatched model ignores features under an unknown name, and that a patched one raises."""
    rest = {k: v for k, v in batch.items() if not k.startswith("pixel")}
    given = {"image": torch.randn(4, 32)}
    assert torch.equal(model(**rest, mm_encoder_outputs=given).logits, model(**rest).logits)
    with pruned(model, "uniform") as (patch, _):
        with pytest.raises(vtprune.NothingPrunedError, match="would ignore"):
            model(**rest, mm_encoder_outputs=given)
        with patch.paused():
            model(**rest, mm_encoder_outputs=given)
        model(**batch)
        assert patch.last is not None


def _strategy(model: torch.nn.Module) -> dict:
    config = model.config
    return {
        name: getattr(config, name)
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")
        if hasattr(config, name)
    }


@pytest.mark.parametrize("family", [f for f in FAMILIES if not FAMILIES[f].needs_types])
@every_layout
@torch.no_grad()
def test_compact_positions(family: str, layout: str) -> None:
    """Every layer rotates its remaining tokens by positions 0, 1, 2, ..., in the prompt and while decoding."""
    method = LAYOUTS[layout]
    model = model_of(family)
    decoder = vtprune.inspect(model).decoder
    for prompts in (ONE, MIXED):
        batch = FAMILIES[family].batch(prompts)
        method.positions = "compact"  # type: ignore[attr-defined]
        try:
            with pruned(model, method, ratio=0.3) as (_, spy):
                out = model.generate(**batch, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
                got = torch.stack(out.logits)
                drops = [spy.drops()]
        finally:
            del method.positions  # type: ignore[attr-defined]

        def renumber(number: int, batch: dict = batch, drops: list = drops):
            def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                hidden = args[0]
                past = next(v for v in kwargs.values() if hasattr(v, "get_mask_sizes")).get_seq_length(number)
                rows, total = hidden.shape[0], past + hidden.shape[1]
                real = torch.ones(rows, total, dtype=torch.bool)
                real[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"].bool()[:, :total]
                real &= ~drops[0].mask(number, rows, total)
                ids = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
                return args, kwargs | {"position_embeddings": decoder.rotary_emb(hidden, ids)}

            return hook

        handles = [
            layer.register_forward_pre_hook(renumber(i), with_kwargs=True) for i, layer in enumerate(decoder.layers)
        ]
        with masked(decoder.layers, drops, batch["attention_mask"]):
            want = model.generate(**batch, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(got, torch.stack(want.logits), rtol=1e-4, atol=1e-4 * float(got.abs().max()))


def test_compact_positions_need_one_axis() -> None:
    method = LAYOUTS["input"]
    method.positions = "compact"  # type: ignore[attr-defined]
    try:
        with pytest.raises(vtprune.MethodError, match="one axis"):
            vtprune.patch(model_of("qwen2_vl"), ratio=0.3, method=method)
    finally:
        del method.positions  # type: ignore[attr-defined]


@torch.no_grad()
def test_report() -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch([[3, Image(0), 5]])
    with vtprune.patch(model, ratio=0.2, method=LAYOUTS["middle"]) as patch:
        assert patch.last is None
        model(**batch)
        last = patch.last
        text = last.report()
        assert "25 -> 5 (20.0 %): 5 before layer 2" in text
        assert last.mean_ratio == pytest.approx((2 * 25 + 2 * 5) / (4 * 25))
        full, after = last.flops
        assert full == 4 * (4 * 25 * 32**2 + 2 * 25**2 * 32 + 3 * 25 * 32 * 48)
        assert after == full / 2 + 2 * (4 * 5 * 32**2 + 2 * 5**2 * 32 + 3 * 5 * 32 * 48)
        assert last.to_dict()["stages"] == [[2, [5]]]
        assert patch.mean_ratio == pytest.approx(last.mean_ratio)


@every_family
@torch.no_grad()
def test_offloaded_weights(family: str) -> None:
    """Results are the same with weights offloaded by accelerate, which replaces `forward` of every module."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(MIXED)
    results = []
    for offload in (False, True):
        if offload:
            accelerate.cpu_offload(model, execution_device="cpu")
            try:
                model.generate(**batch, max_new_tokens=1)
            except NotImplementedError:
                pytest.skip("transformers cannot generate with this model's own newline parameter offloaded")
        with pruned(model, "iwp") as (patch, _):
            tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
            results.append((tokens.tolist(), [k.tolist() for k in patch.last.kept]))
    assert results[0] == results[1]


@pytest.mark.parametrize("budget", [{"ratio": 0.3}, {"keep": 8}], ids=str)
@pytest.mark.parametrize("method", ["uniform", "vcast"])
@torch.no_grad()
def test_labels_of_placeholders_are_named(caplog: pytest.LogCaptureFixture, method: str, budget: dict) -> None:
    """`labels=input_ids` keeps every visual token for the loss, and warns once; labels of -100 do neither."""
    from vtprune.core.log import warn_once

    warn_once.cache_clear()
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    with pruned(model, method, **budget) as (patch, _):
        model(**batch, labels=labels_of(batch))
        assert not caplog.records and len(patch.last.kept[0]) == 8
        for _ in range(2):
            model(**batch, labels=batch["input_ids"])
        assert len(patch.last.kept[0]) == 25
    assert [("-100" in record.message) for record in caplog.records] == [True]


@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm"])
@torch.no_grad()
def test_a_chat_goes_on_after_an_answer_of_one_token(family: str) -> None:
    """After `generate`, even of one token, a new picture has its own budget. After a plain forward call, which may be
    one part of a prompt, new pictures are refused."""
    model, make = model_of(family), FAMILIES[family]
    batch, turn = make.batch(ONE), make.batch([[2, Image(1), 4]])
    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        for beams in (1, 2):
            settings = {"do_sample": False, "return_dict_in_generate": True, "num_beams": beams}
            first = model.generate(**batch, max_new_tokens=1, **settings)
            ids = torch.cat([first.sequences, turn["input_ids"]], 1)
            call = turn | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if beams == 1:
                model.generate(**call, past_key_values=first.past_key_values, max_new_tokens=2, do_sample=False)
                assert len(patch.last.kept[0]) == max(1, round(0.3 * len(patch.last.visual[0])))
                assert int(patch.last.visual[0][0]) >= first.sequences.shape[1]
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(vtprune.UnsupportedModelError, match="several calls"):
            model(**turn | {"attention_mask": None}, past_key_values=cache)


@pytest.mark.parametrize("family", ["llava", "smolvlm", "internvl"])
@torch.no_grad()
def test_adjacent_pictures_that_were_encoded_before(family: str) -> None:
    """Adjacent pictures are told apart in precomputed features as in pixels."""
    model, batch = model_of(family), FAMILIES[family].batch([[3, Image(0), Image(0), 5]])
    pixels = {name: batch.pop(name) for name in list(batch) if name.startswith(("pixel", "image_"))}
    seen = []
    for given in (
        pixels,
        {"mm_encoder_outputs": {"image": model.model.get_image_features(**pixels, return_dict=True)}},
    ):
        with pruned(model, "uniform", ratio=0.3) as (patch, _):
            model(**batch, **given)
            seen.append((patch.last.places.image.tolist(), patch.last.kept[0].tolist()))
    assert len(set(seen[0][0])) == 2 and seen[0] == seen[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_an_interrupted_call_leaves_the_cache_guarded(error: type[BaseException]) -> None:
    model, batch, token = model_of("llava"), FAMILIES["llava"].batch(ONE), torch.tensor([[20]])

    def stop(*_: object) -> None:
        raise error

    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        cache = model(**batch, use_cache=True).past_key_values
        handle = patch.anatomy.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(error):
            model(input_ids=token, past_key_values=cache)
        handle.remove()
    with pytest.raises(vtprune.VTPruneError, match="patch the model"):
        model(input_ids=token, past_key_values=cache)


@pytest.mark.parametrize("between", ["refused", "another prompt"])
@torch.no_grad()
def test_what_comes_between_leaves_the_cache_guarded(between: str) -> None:
    """The cache stays guarded after a refused decoder call, and after an interrupted call followed by another."""
    model, batch, token = model_of("llava"), FAMILIES["llava"].batch(ONE), torch.tensor([[20]])
    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        cache = model(**batch, use_cache=True).past_key_values
        if between == "refused":
            with pytest.raises(vtprune.UnsupportedModelError, match="without input_ids"):
                patch.anatomy.decoder(past_key_values=cache)
        else:
            handle = patch.anatomy.layers[2].register_forward_pre_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=token, past_key_values=cache)
            handle.remove()
            model(**batch, use_cache=True)
    with pytest.raises(vtprune.VTPruneError, match="patch the model"):
        model(input_ids=token, past_key_values=cache)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@torch.no_grad()
def test_threads_go_on_from_shallow_copies_of_the_same_layers() -> None:
    """A thread that finishes first does not guard layers that another thread still uses."""
    model, batch, token = model_of("llava"), FAMILIES["llava"].batch(ONE), torch.tensor([[20]])
    started, ended = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            started.set()
            assert ended.wait(60)

    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        cache = model(**batch, use_cache=True).past_key_values
        want = model(input_ids=token, past_key_values=copy.deepcopy(cache)).logits

        @torch.no_grad()
        def go_on() -> torch.Tensor:
            mine = transformers.DynamicCache()
            mine.layers = [copy.copy(layer) for layer in cache.layers]
            return model(input_ids=token, past_key_values=mine).logits

        handle = patch.anatomy.layers[2].register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(go_on)
            assert started.wait(60)
            quick = go_on()
            ended.set()
            torch.testing.assert_close(slow.result(), want)
        handle.remove()
        torch.testing.assert_close(quick, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_tensors_of_a_cache_are_known_after_a_cast(dtype: torch.dtype) -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    token = torch.tensor([[20]])
    with pruned(model, "uniform", ratio=0.3):
        cache = model(**batch, use_cache=True).past_key_values
        tensors = [(layer.keys.to(dtype).float(), layer.values.to(dtype).float()) for layer in cache.layers]
        again = transformers.DynamicCache(tensors)
        length, want = cache.get_seq_length(), model(input_ids=token, past_key_values=cache).logits
        got = model(input_ids=token, past_key_values=again).logits
    assert again.get_seq_length() == length + 1
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.abs().max()))


@pytest.mark.parametrize("patched", [True, False])
@torch.no_grad()
def test_a_cache_without_layers_is_empty(patched: bool) -> None:
    """Programs empty a cache by its list of layers, too."""
    model, words = model_of("llava"), torch.tensor([[20, 21, 22]])
    want = model(input_ids=words, use_cache=True).logits
    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        cache = transformers.DynamicCache()
        model(**FAMILIES["llava"].batch(ONE), past_key_values=cache)
        cache.layers.clear()
        if not patched:
            patch.remove()
        assert torch.equal(model(input_ids=words, past_key_values=cache).logits, want)
    assert type(cache) is transformers.DynamicCache and cache.get_seq_length() == 3


@pytest.mark.parametrize(
    "method",
    ["pooling", "prumerge", "visionzip", "sparsevlm", "vflowopt", "fastvid", "holitom", "flashvid", "sink_aware"],
)
def test_gradients_pass_through_merged_states(method: str) -> None:
    """The gradient of a bias before the merge equals the finite difference."""
    model = FAMILIES["llava"].build(dtype=torch.float64)
    batch = FAMILIES["llava"].batch(ONE)
    batch["pixel_values"] = batch["pixel_values"].double()
    bias = model.model.multi_modal_projector.linear_2.bias
    with pruned(model, method, ratio=0.3) as (patch, _):
        model(**batch).logits[0, -1].square().sum().backward()
        kept, values = patch.last.kept[0].tolist(), []
        with torch.no_grad():
            for step in (2e-3, -4e-3):
                bias[3] += step
                values.append(float(model(**batch).logits[0, -1].square().sum()))
                assert patch.last.kept[0].tolist() == kept
    assert float(bias.grad[3]) == pytest.approx((values[0] - values[1]) / 4e-3, rel=0.02, abs=0.01)


def test_merged_states_without_gradients_are_named(caplog: pytest.LogCaptureFixture) -> None:
    from vtprune.core.log import warn_once

    warn_once.cache_clear()
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch(ONE)
    for method, warnings in (("divprune", 0), ("pooling", 0), (LAYOUTS["merging"], 1)):
        with pruned(model, method, ratio=0.3):
            model(**batch).logits.sum().backward()
        assert sum("merges tokens" in record.message for record in caplog.records) == warnings
    with pruned(model, LAYOUTS["merging"], ratio=0.3), torch.no_grad():
        warn_once.cache_clear()
        caplog.clear()
        model(**batch)
    assert not caplog.records


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
@torch.no_grad()
def test_an_argument_that_the_model_does_not_know_is_no_picture(family: str) -> None:
    """Unknown arguments such as `image_flags`, which other models' collators add, are ignored."""
    model, text = model_of(family), FAMILIES[family].batch([[9]])
    strange = {"image_flags": torch.ones(1, 1), "visual_weights": torch.ones(1, 40), "video_frames_seen": True}
    want = model(**text, **strange).logits
    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        assert torch.equal(model(**text, **strange).logits, want)
        assert patch.last is None
        model(**FAMILIES[family].batch(ONE), **strange)
        assert len(patch.last.kept[0]) < len(patch.last.visual[0])


def test_places_that_begin_again_in_a_picture_are_no_packed_row() -> None:
    """Position ids that restart in a picture (HunYuan-VL) are accepted, those of packed rows are refused."""
    from vtprune.models import unsupported

    real = torch.ones(1, 10, dtype=torch.bool)
    one, two = ([0, 1, 2, 0, 1, 0, 1, 7, 8, 9], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6])
    unsupported.refuse_packed_rows({"position_ids": torch.tensor([[one]] * 3)}, real, 0)
    with pytest.raises(vtprune.UnsupportedModelError, match="position_ids restart"):
        unsupported.refuse_packed_rows({"position_ids": torch.tensor([[two]] * 3)}, real, 0)


@pytest.mark.parametrize("kind", ["CLIP", "CLIPVision", "SiglipVision", "Dinov2"])
def test_models_without_input_embeddings_are_named(kind: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**small, "image_size": 8, "patch_size": 2}
    parts = {"text_config": {**small, "vocab_size": 99}, "vision_config": vision} if kind == "CLIP" else vision
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**parts))
    for call in (vtprune.inspect, lambda wrong: vtprune.patch(wrong, ratio=0.5)):
        with pytest.raises(vtprune.UnsupportedModelError, match=f"{kind}Model"):
            call(model)


def test_a_model_without_a_decoder_is_named() -> None:
    """Perceiver's `get_decoder` returns None."""
    sizes = {name: 1 for name in ("num_blocks", "num_self_attends_per_block")}
    heads = {name: 2 for name in ("num_self_attention_heads", "num_cross_attention_heads")}
    config = transformers.PerceiverConfig(num_latents=4, d_latents=16, d_model=16, **sizes, **heads)
    model = transformers.PerceiverModel(config)
    for call in (vtprune.inspect, lambda wrong: vtprune.patch(wrong, ratio=0.5)):
        with pytest.raises(vtprune.UnsupportedModelError, match="no decoder found in PerceiverModel"):
            call(model)


def test_a_model_that_embeds_patches_in_its_decoder_is_no_text_model() -> None:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if "neomme" not in MODEL_MAPPING_NAMES:
        pytest.skip("this transformers has no NeoMME")
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 2}
    model = transformers.NeoMMEModel(transformers.NeoMMEConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(vtprune.UnsupportedModelError, match="embeds patches inside its decoder; models with") as error:
        vtprune.patch(model, ratio=0.5)
    assert "text-only" not in str(error.value)


def test_a_model_that_holds_the_one_to_patch_names_it() -> None:
    """Qwen2.5-Omni has no embeddings of its own, and its `generate` calls that of its thinker."""
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniForConditionalGeneration(transformers.Qwen2_5OmniConfig())
    with pytest.raises(vtprune.UnsupportedModelError, match="patch model.thinker instead"):
        vtprune.patch(model, ratio=0.5)


def test_parts_of_sound_are_no_projector() -> None:
    """The audio encoder of Qwen2.5-Omni ends in the decoder's width, too."""
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniForConditionalGeneration(transformers.Qwen2_5OmniConfig()).thinker
    towers = [module for name, module in model.named_modules() if name.endswith("visual")]  # its place has moved
    assert [vtprune.inspect(model).projector] == [tower.merger for tower in towers]


@pytest.mark.parametrize("model", ["llava", None])
def test_what_is_no_model_is_named(model: Any) -> None:
    for call in (vtprune.inspect, vtprune.unpatch, lambda wrong: vtprune.patch(wrong, ratio=0.5)):
        with pytest.raises(vtprune.UnsupportedModelError, match=f"model is a {type(model).__name__}"):
            call(model)


def small_model(architecture: str) -> tuple[Any, dict[str, Any]]:
    """A small model of an architecture of `tests.architectures`, and a prompt; skips where transformers lacks it."""
    from tests.architectures.run import prepare, registered

    if architecture not in registered():
        pytest.skip("not in this version of transformers")
    built, prompts = prepare(architecture, registered()[architecture])
    return built.model, prompts.batch([[3, "image", 5]])


@pytest.mark.parametrize(
    ("architecture", "part", "differs"),
    [("gemma4", "text_config", "head_dim"), ("dots3_note", "vision_config", "num_local_experts")],
)
@torch.no_grad()
def test_settings_that_differ_between_layers(architecture: str, part: str, differs: str) -> None:
    """Costs are those of each layer where heads (Gemma 4) or experts (dots.note) differ between layers."""
    built, batch = small_model(architecture)
    config = built.config
    own = getattr(config, part)
    changed = {i: {differs: 2 * getattr(layer, differs)} for i, layer in enumerate(own.per_layer_config) if i % 2}
    own.per_layer_config = changed
    model = type(built)(config).eval()
    whole = cache_bytes(model(**batch, use_cache=True).past_key_values)
    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        left = cache_bytes(model(**batch, use_cache=True).past_key_values)
        assert patch.last.report()
        assert patch.last.kv_bytes == (whole, left)


@pytest.mark.parametrize("architecture", ["kimi_k25", "dots3_note", "gemma3", "lfm3_vl"])
@torch.no_grad()
def test_reported_bytes_are_those_of_the_cache(architecture: str) -> None:
    """Latents (Kimi, dots.note), layers with a sliding window (dots.note, Gemma 3) or without attention (LFM3)."""
    model, batch = small_model(architecture)
    whole = cache_bytes(model(**batch, use_cache=True).past_key_values)
    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        left = cache_bytes(model(**batch, use_cache=True).past_key_values)
        assert patch.last.kv_bytes == (whole, left)


@torch.no_grad()
def test_streams_of_hyper_connections_and_an_indexer_with_a_static_cache() -> None:
    """GLM-5 Next: hidden states `[B, T, S, D]` are zero at dropped tokens, and a static cache changes no answer."""
    model, batch = small_model("glm5_next")
    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        states = model(**batch, output_hidden_states=True).hidden_states
        dropped = ~patch.last.mask[0]
        assert all(h.shape[:2] == batch["input_ids"].shape for h in states)
        assert all(h[0, ~dropped].any() and not h[0, dropped].any() for h in states[1:])
        settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        static = model.generate(**batch, **settings, cache_implementation="static")
        assert torch.equal(static, model.generate(**batch, **settings))


@pytest.mark.parametrize("architecture", ["glm5_next", "qwen4_exp"])  # streams `[B, T, S, D]`, and `[B, T, S * D]`
@torch.no_grad()
def test_methods_get_one_state_a_token_of_hyper_connections(architecture: str) -> None:
    """Every method prunes, or says what the model lacks; merged states are copied to all streams before layer 0."""
    model, batch = small_model(architecture)
    width = vtprune.inspect(model).decoder.config.hidden_size
    worked = []
    for method in vtprune.methods.names():
        with pruned(model, method, ratio=0.3) as (patch, spy):
            try:
                model(**batch)
            except vtprune.MethodError as error:
                assert "no attention function" in str(error) or "frames of a clip" in str(error)
                continue
            (tokens, _), *_ = spy.choices
            assert tokens.hidden.shape == (len(patch.last.visual[0]), width)
            assert len(patch.last.kept[0]) == round(0.3 * len(tokens.hidden))
            worked.append(method)
    assert {"resprune", "divprune", "dart", "visionzip", "pooling", "cdpruner", "vflowopt"} <= set(worked)
    entered: list[torch.Tensor] = []
    with pruned(model, "pooling", ratio=0.3) as (patch, spy):
        layer = patch.anatomy.layers[0]
        handle = layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        model(**batch)
        handle.remove()
        tokens, choice = spy.choices[0]
        is_visual = torch.isin(patch.last.mask[0].nonzero()[:, 0], patch.last.kept[0])
        visual = entered[0].unflatten(-1, (-1, width)).flatten(2, -2)[0, is_visual]  # [5, S, D]
        assert visual.shape[1] > 1 and torch.equal(visual, choice.hidden[choice.keep][:, None].expand_as(visual))
        assert not torch.equal(choice.hidden[choice.keep], tokens.hidden[choice.keep])
    with (
        pruned(model, LAYOUTS["merging"], ratio=0.3),
        pytest.raises(vtprune.MethodError, match=r"Merging merges tokens before layer 1.*'divprune'"),
    ):
        model(**batch)


@torch.no_grad()
def test_a_sliding_window_is_no_packed_row() -> None:
    """A mask that hides the first tokens, as `generate` makes for a window and a static cache, is accepted."""
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    length = batch["input_ids"].shape[1]
    window = torch.ones(length, length, dtype=torch.bool).tril().triu(-9)[None, None]
    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        model(**batch | {"attention_mask": window}, use_cache=False)
        assert len(patch.last.kept[0]) < len(patch.last.visual[0])
