# SPDX-License-Identifier: Apache-2.0
"""Calls that a stranger's program makes: arguments by position, interrupts, replaced parts, other threads."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import gc
import threading
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, Image
from reference import Drops, masked
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vtprune
from vtprune.engine import hooks

ONE = [[3, Image(0), 5]]
BATCH = FAMILIES["llava"].batch(ONE)
IDS, PIXELS, MASK = (BATCH[name] for name in ("input_ids", "pixel_values", "attention_mask"))
LABELS = IDS.masked_fill(IDS == IMAGE, -100)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def llava() -> Any:
    return FAMILIES["llava"].build()


def kept(patch: vtprune.Patch) -> list[list[int]]:
    assert patch.last is not None
    return [columns.tolist() for columns in patch.last.kept]


def total(patch: vtprune.Patch) -> int:
    """Number of visual tokens of one more prompt that are not dropped."""
    with torch.no_grad():
        cache = patch.model(**BATCH, use_cache=True).past_key_values
    return int((IDS == IMAGE).sum()) - (IDS.shape[1] - cache.layers[-1].keys.shape[-2])


def test_blocks_end_in_any_order(llava: Any) -> None:
    """Each takes its own settings away and no others: of generators that take turns, and in other contexts."""
    patch = vtprune.patch(llava, ratio=0.2, method="uniform")

    def stream(**settings: Any) -> Any:
        with patch.using(**settings) if settings else patch.paused():
            yield total(patch)
            yield total(patch)

    first, second = stream(ratio=0.4), stream(ratio=0.8)
    assert (next(first), next(second), next(first), next(first, None)) == (10, 20, 20, None)
    assert (next(second), next(second, None), total(patch)) == (20, None, 5)
    paused = stream()
    assert next(paused) == 25
    with patch.using(ratio=0.8):
        paused.close()
        assert total(patch) == 20
        with patch.using(method="random"), patch.using(keep=3):
            assert total(patch) == 3
        assert total(patch) == 20
    by_method, by_budget = stream(method="random"), stream(keep=3)
    assert (next(by_method), next(by_budget)) == (5, 3) and patch.last.method == "random"
    by_method.close()
    assert next(by_budget) == 3 and patch.last.method == "uniform"
    by_budget.close()
    assert total(patch) == 5
    by_budget = stream(keep=3)
    assert contextvars.copy_context().run(next, by_budget) == 3
    with patch.using(ratio=0.8):
        by_budget.close()
        assert total(patch) == 20
    assert total(patch) == 5


def by_position(model: Any, **given: Any) -> Any:
    """Calls LLaVA with all arguments by position, up to `logits_to_keep`."""
    names = ("position_ids", "past_key_values", "inputs_embeds", "vision_feature_layer", "strategy")
    return model(IDS, PIXELS, MASK, *(None for _ in names), given.get("labels"), given.get("logits_to_keep", 0))


@pytest.mark.parametrize("end", [1.5, "a", [1, 2], object()])
def test_the_end_of_a_question_is_a_number(llava: Any, end: Any) -> None:
    words = "does not fit a batch of 1; expected one whole number"
    patch = vtprune.patch(llava, ratio=0.2, method="uniform")
    with patch.question(end=end), pytest.raises(vtprune.VTPruneError, match=words):
        total(patch)


def test_arguments_by_position_are_those_by_name(llava: Any) -> None:
    columns = (IDS[0] == IMAGE).nonzero()[:2, 0]
    with vtprune.patch(llava, ratio=0.1), torch.no_grad():
        for given in ({"labels": LABELS}, {"logits_to_keep": columns}):
            named, placed = llava(**BATCH, **given), by_position(llava, **given)
            assert torch.equal(named.logits, placed.logits) and (named.logits != 0).any(-1).all() == (
                "labels" not in given
            )
            assert named.loss is None or torch.equal(named.loss, placed.loss)
        cache = llava(**BATCH, use_cache=True).past_key_values
        token = torch.tensor([[20]])
        want = llava.model.language_model(token, past_key_values=copy.deepcopy(cache)).last_hidden_state
        assert torch.equal(llava.model.language_model(token, None, None, cache).last_hidden_state, want)


@pytest.mark.parametrize(
    "wanted",
    [torch.tensor([5, 8, 9]), [5, 8, 9], slice(5, 10), torch.tensor(12), slice(-20, None), -10, 8],
    ids=str,
)
def test_whatever_logits_are_asked_for_are_those_of_the_masked_model(llava: Any, wanted: Any) -> None:
    with torch.no_grad():
        with vtprune.patch(llava, ratio=0.1) as patch:
            got = llava(**BATCH, logits_to_keep=wanted).logits
            drops = Drops.of(patch.last)
        with masked(vtprune.inspect(llava).layers, [drops], MASK):
            want = llava(**BATCH, logits_to_keep=wanted).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["fastv", "cdpruner", "pyramiddrop"])
def test_generation_without_a_cache_keeps_its_first_selection(llava: Any, method: str) -> None:
    """With beams in any order, and with another prompt between two steps."""
    other = FAMILIES["llava"].batch([[2, Image(1), 7]], seed=3)

    def between(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        llava(**other)
        return scores

    with vtprune.patch(llava, ratio=0.2, method=method):
        for options in ({"num_beams": 2, "num_return_sequences": 2}, {"logits_processor": [between]}):
            want = llava.generate(**BATCH, **GREEDY, **{k: v for k, v in options.items() if k != "logits_processor"})
            got = llava.generate(**BATCH, **GREEDY, **options, use_cache=False)
            assert got.tolist() == want.tolist()


@pytest.mark.parametrize("part", ["pixels", "ids", "both"])
@pytest.mark.parametrize("features", [False, True])
def test_other_prompts_written_into_the_same_memory_are_selected_anew(llava: Any, part: str, features: bool) -> None:
    """Without a cache, a prompt of one more token and the same tensors looks like the next step of a generation."""
    other = FAMILIES["llava"].batch(ONE, seed=7)
    ids, given = torch.cat([IDS, IDS[:, -1:]], 1), PIXELS.clone()
    if features:
        given, new = (
            llava.model.get_image_features(x).pooler_output[0].detach().clone() for x in (given, other["pixel_values"])
        )
    else:
        new = other["pixel_values"]

    def call(ids: torch.Tensor, given: torch.Tensor) -> list[list[int]]:
        encoded = BaseModelOutputWithPooling(pooler_output=[given])
        pictures = {"mm_encoder_outputs": {"image": encoded}} if features else {"pixel_values": given}
        llava(input_ids=ids, **pictures, use_cache=False)
        return kept(patch)

    with vtprune.patch(llava, ratio=0.2, method="iwp") as patch, torch.no_grad():
        call(ids[:, :-1], given)
        if part != "ids":
            given.copy_(new)
        if part != "pixels":
            ids[:, :-1] = other["input_ids"]
            ids[:, 0] = 20
        got = call(ids, given)
        assert got == call(ids.clone(), given.clone())


@pytest.mark.parametrize("length", [34, 7])
@pytest.mark.parametrize("where", ["lm_head", "model.language_model.layers.1"])
def test_an_interrupt_leaves_nothing_of_its_call(llava: Any, where: str, length: int) -> None:
    """torch calls no hook after a KeyboardInterrupt; what is called next may be any part of the model."""
    decoder, words = llava.model.language_model, torch.arange(1, 35)[None]
    embeds = llava.get_input_embeddings()
    features = llava.model.get_image_features(PIXELS, return_dict=True).pooler_output[0].detach()
    want = decoder(input_ids=words[:, :length]).last_hidden_state

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with vtprune.patch(llava, ratio=0.1, method="uniform") as patch:
        base = llava.model(**BATCH).last_hidden_state
        chosen = kept(patch)
        handle = llava.get_submodule(where).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llava(**BATCH, labels=IDS)
        handle.remove()
        assert torch.equal(decoder(input_ids=words[:, :length]).last_hidden_state, want)
        assert torch.equal(llava.model(**BATCH).last_hidden_state, base) and kept(patch) == chosen
        llava.model.get_image_features(PIXELS, return_dict=True)
        merged = embeds(IDS).masked_scatter((IDS == IMAGE)[..., None], features)
        decoder(inputs_embeds=merged)
        assert len(kept(patch)[0]) == 2


def test_parts_that_were_replaced_are_noticed(llava: Any) -> None:
    def build() -> Any:
        return FAMILIES["llava"].build()

    for part, error, message in (
        ("model", vtprune.NothingPrunedError, "the composite that was patched did not run"),
        ("model.language_model", vtprune.NothingPrunedError, "the decoder that was patched did not run"),
        ("model.language_model.layers.2", vtprune.UnsupportedModelError, "a layer of the decoder was replaced"),
        ("model.language_model.layers.4", vtprune.UnsupportedModelError, "a layer of the decoder was replaced"),
    ):
        model = build()
        with vtprune.patch(model, ratio=0.1):
            owner, _, name = part.rpartition(".")
            new = build().get_submodule(part.replace("4", "3"))  # four layers: the last case adds one
            model.get_submodule(owner).add_module(name, new)
            with pytest.raises(error, match=message):
                model(**BATCH)
            model(input_ids=torch.tensor([[1, 20, 21]]))  # text passes


def test_a_later_turn_of_text_may_come_in_chunks(llava: Any) -> None:
    def answer(size: int | None) -> list[int]:
        first = llava.generate(**BATCH, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[20, 21, 22, 23, 24, 25]])], 1)
        options = GREEDY | {"past_key_values": first.past_key_values, "prefill_chunk_size": size}
        return llava.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, -5:].tolist()

    with vtprune.patch(llava, ratio=0.3, method="uniform"):
        whole, in_chunks = answer(None), answer(3)
        with pytest.raises(vtprune.UnsupportedModelError, match="prefill_chunk_size=3"):
            llava.generate(**BATCH, **GREEDY, prefill_chunk_size=3)
    if answer(None) != answer(3):
        pytest.skip("this version of transformers answers later turns in chunks otherwise, without a patch as well")
    assert whole == in_chunks


@pytest.mark.parametrize("patched_first", [True, False])
def test_wrapped_methods_leave_nothing_behind(llava: Any, patched_first: bool) -> None:
    hooks_of = pytest.importorskip("accelerate.hooks")

    def offload() -> None:
        hooks_of.add_hook_to_module(llava, hooks_of.ModelHook(), append=True)
        for module in llava.modules():
            hooks_of.add_hook_to_module(module, hooks_of.ModelHook())

    before = [set(vars(module)) for module in llava.modules()]
    if not patched_first:
        offload()
    patch = vtprune.patch(llava, ratio=0.3)
    if patched_first:
        offload()
        patch.remove()
        hooks_of.remove_hook_from_module(llava, recurse=True)
    else:
        hooks_of.remove_hook_from_module(llava, recurse=True)
        patch.remove()
    left = [set(vars(module)) - old for module, old in zip(llava.modules(), before, strict=True)]
    assert not set().union(*left) - {"forward"}  # which accelerate itself leaves
    assert all(getattr(module.forward, "__func__", None) is type(module).forward for module in llava.modules())
    copy.deepcopy(llava)
    assert llava(**BATCH).logits.shape[1] == IDS.shape[1]


def test_transforms_of_torch_func_are_refused_or_exact(llava: Any) -> None:
    weights = dict(llava.named_parameters())

    def loss(some: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(llava, weights | some, (), dict(BATCH)).logits.square().sum()

    one = {"lm_head.weight": weights["lm_head.weight"].detach()}
    want = torch.func.grad(loss)(one)
    with vtprune.patch(llava, ratio=1.0):
        assert torch.equal(torch.func.grad(loss)(one)["lm_head.weight"], want["lm_head.weight"])
    with vtprune.patch(llava, ratio=0.3), pytest.raises(vtprune.UnsupportedModelError, match="torch.func"):
        torch.func.grad(loss)(one)


@pytest.mark.parametrize("part", ["", "model", "model.language_model"])
@pytest.mark.parametrize("paused", [False, True])
def test_a_hook_that_calls_the_model_is_refused(llava: Any, part: str, paused: bool) -> None:
    def again(*_: Any) -> None:
        handle.remove()
        with patch.paused() if paused else contextlib.nullcontext(), contextlib.suppress(vtprune.VTPruneError):
            llava.get_submodule(part)(input_ids=torch.tensor([[1, 20, 21]]))
            raise AssertionError("not refused")

    for layer in range(3):
        with vtprune.patch(llava, ratio=0.3, method="fastv") as patch:
            want = llava(**BATCH).logits
            handle = llava.model.language_model.layers[layer].register_forward_hook(again)
            assert torch.equal(llava(**BATCH).logits, want)  # the call goes on as if nothing had been tried


@pytest.mark.parametrize("method", ["uniform", "visionzip", "cdpruner"])
@pytest.mark.parametrize("part", ["model", "composite"])
def test_compiled_calls_are_those_of_the_model_as_it_is(llava: Any, method: str, part: str) -> None:
    torch._dynamo.reset()  # many models in one process would reach dynamo's limit of recompilations
    columns = (IDS[0] == IMAGE).nonzero()[:3, 0]
    given: list[dict[str, Any]] = [{}, {"labels": LABELS}, {"labels": IDS}, {"logits_to_keep": columns}]
    with vtprune.patch(llava, ratio=0.1, method=method) as patch, torch.no_grad():
        want = [(llava(**BATCH, **options), kept(patch)) for options in given]
        if part == "composite":
            llava.model.compile(backend="eager")
        compiled = torch.compile(llava, backend="eager") if part == "model" else llava
        for (plain, columns_kept), options in zip(want, given, strict=True):
            for _ in range(2):
                got = compiled(**BATCH, **options)
                assert kept(patch) == columns_kept
                torch.testing.assert_close(got.logits, plain.logits)
                assert plain.loss is None or torch.isclose(got.loss, plain.loss)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_patch_is_removed_after_calls_of_other_threads(llava: Any, wrapped: bool) -> None:
    if wrapped:  # as accelerate wraps it: its forward cannot be seen on the stack
        forward = llava.model.forward
        llava.model.forward = functools.update_wrapper(lambda *args, **kwargs: forward(*args, **kwargs), forward)
    with vtprune.patch(llava, ratio=0.1, method="uniform") as patch:
        want = llava(**BATCH).logits
        inside, outcome = threading.Event(), []

        def slow(*_: Any) -> None:
            inside.set()
            threading.Event().wait(0.3)

        handle = llava.model.language_model.layers[1].register_forward_hook(slow)
        thread = threading.Thread(target=lambda: outcome.append(llava(**BATCH).logits.detach()))
        thread.start()
        assert inside.wait(60)
        patch.remove()
        assert patch.removed
        thread.join()
        handle.remove()
    assert torch.equal(outcome[0], want)
    if wrapped:
        return
    with vtprune.patch(llava, ratio=0.1) as patch:
        handle = llava.model.language_model.layers[1].register_forward_hook(lambda *_: patch.remove())
        with pytest.raises(vtprune.VTPruneError, match="inside a call of the model"):
            llava(**BATCH)
        handle.remove()


def test_a_model_dropped_with_its_patch_leaves_the_registry_as_it_was() -> None:
    from vtprune.models import attention_probe

    gc.collect()
    users = attention_probe._users
    model = FAMILIES["llava"].build()
    vtprune.patch(model, ratio=0.3)
    assert attention_probe._users == users + 1
    del model
    gc.collect()
    assert attention_probe._users == users


def test_a_running_forward_is_seen(llava: Any) -> None:
    seen: list[bool | None] = []
    handle = llava.model.language_model.register_forward_hook(lambda *_: seen.append(hooks.is_running(llava.model)))
    llava(**BATCH)
    handle.remove()
    assert seen == [True] and hooks.is_running(llava.model) is False


@torch.no_grad()
def test_a_model_that_gets_the_pixels_of_its_prompt_in_every_step() -> None:
    """Phi-4 names its placeholder in the config of its tower, which is inside the decoder, and `generate` passes the
    pixels in every step, where the model ignores them."""
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    vision = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16)
    vision |= dict(crop_size=16, patch_size=2, image_token_id=10)
    audio = dict(hidden_size=24, intermediate_size=32, num_blocks=1, num_attention_heads=2, ext_pw_out_channel=24)
    text = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=None)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    config = Phi4MultimodalConfig(
        **text, rope_parameters=rope, vision_config=vision, audio_config=audio | {"audio_token_id": 11}
    )
    torch.manual_seed(0)
    model = Phi4MultimodalForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[1, 20, 21] + [10] * (4 * 9 + 1 + 4 * 5) + [22, 23]])
    picture = {"image_pixel_values": torch.randn(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]])}
    picture["image_attention_mask"] = torch.ones(1, 3, 8, 8, dtype=torch.long)
    how = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    how["suppress_tokens"] = list(range(12))
    with vtprune.patch(model, ratio=0.3, method="uniform") as patch:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **picture, **how)
        mask = torch.nn.functional.pad(patch.last.mask.long(), (0, 3), value=1)
        with pytest.raises(vtprune.NothingPrunedError, match="without the placeholder"):
            model(input_ids=ids[:, :3], **picture)
    assert len(patch.last.kept[0]) == round(0.3 * 57)
    whole = out.sequences[:, :-1]
    places = torch.arange(whole.shape[1])[None]
    want = model(input_ids=whole, attention_mask=mask, position_ids=places, **picture).logits[:, -4:]
    torch.testing.assert_close(torch.stack(out.logits, 1), want, rtol=1e-4, atol=1e-4)
