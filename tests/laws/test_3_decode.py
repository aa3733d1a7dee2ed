# SPDX-License-Identifier: Apache-2.0
"""Law 3: every generated token equals that of the masked, unpatched model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Image
from support import CLIP, LAYOUTS, MIXED, ONE, model_of, pruned, reference
from transformers import DynamicCache

import vtprune

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 30},
    "beams": {"num_beams": 3, "do_sample": False},
    "returned": {"num_return_sequences": 2, "do_sample": True, "top_k": 30},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "no_cache": {"do_sample": False, "use_cache": False},
}
NEW = {"max_new_tokens": 6}


def check(model: torch.nn.Module, method: Any, batch: dict, mode: dict[str, Any], **budget: Any) -> None:
    torch.manual_seed(7)
    with pruned(model, method, **budget) as (_, spy):
        got = model.generate(**batch, **mode, **NEW)
        drops = [spy.drops()]
    # The reference runs without a static cache, which does not change its result.
    mode = {k: v for k, v in mode.items() if k not in ("cache_implementation", "use_cache")}
    torch.manual_seed(7)
    with reference(model, drops, batch):
        want = model.generate(**batch, **mode, **NEW)
    assert got[:, -NEW["max_new_tokens"] :].tolist() == want[:, -NEW["max_new_tokens"] :].tolist()


def test_methods(family: str, method: str) -> None:
    check(model_of(family), method, FAMILIES[family].batch(MIXED), MODES["greedy"])


@pytest.mark.parametrize("mode", list(MODES))
def test_modes(family: str, layout: str, mode: str) -> None:
    if mode == "no_cache" and layout == "merging":
        prompts = ONE  # the reference replaces states in the prefill only, which without a cache is every step
        pytest.skip(f"no reference for merged states without a cache ({len(prompts)} prompt)")
    check(model_of(family), LAYOUTS[layout], FAMILIES[family].batch(MIXED), MODES[mode], ratio=0.3)


def test_right_padding_and_eager(family: str, layout: str) -> None:
    check(
        model_of(family, "eager"), LAYOUTS[layout], FAMILIES[family].batch(MIXED, "right"), MODES["greedy"], ratio=0.3
    )


def test_video(family: str, layout: str) -> None:
    if FAMILIES[family].video is None:
        pytest.skip("this family takes no video")
    check(model_of(family), LAYOUTS[layout], FAMILIES[family].batch(CLIP), MODES["beams"], ratio=0.3)


def test_methods_on_video(family: str, method: str) -> None:
    """`generate`, which encodes pictures before it calls the model, keeps the same tokens as a forward call."""
    if FAMILIES[family].video is None:
        pytest.skip("this family takes no video")
    model, batch = model_of(family), FAMILIES[family].batch(CLIP)
    check(model, method, batch, MODES["greedy"])
    with pruned(model, method) as (patch, _):
        model(**batch)
        kept = [k.tolist() for k in patch.last.kept]
        model.generate(**batch, do_sample=False, **NEW)
        assert [k.tolist() for k in patch.last.kept] == kept


def test_cache_and_no_cache_agree(family: str, method: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    with pruned(model, method):
        with_cache = model.generate(**batch, do_sample=False, **NEW)
        without = model.generate(**batch, do_sample=False, use_cache=False, **NEW)
    assert with_cache.tolist() == without.tolist()


def test_inputs_embeds(family: str, layout: str) -> None:
    """A prompt given as `inputs_embeds` that include the placeholders' embeddings, with and without `input_ids`."""
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    others = {k: v for k, v in batch.items() if k != "input_ids"}
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (patch, _):
        want = model.generate(**batch, do_sample=False, **NEW)[:, -6:]
        kept = [k.tolist() for k in patch.last.kept]
        got = model.generate(**batch, inputs_embeds=embeds, do_sample=False, **NEW)[:, -6:]
        assert [k.tolist() for k in patch.last.kept] == kept
        if not FAMILIES[family].needs_types:  # M-RoPE positions are made from input_ids
            alone = model.generate(**others, inputs_embeds=embeds, do_sample=False, **NEW)[:, -6:]
            assert alone.tolist() == want.tolist()
            assert [k.tolist() for k in patch.last.kept] == kept
    assert got.tolist() == want.tolist()


def steps(model: torch.nn.Module, out: Any, mask: torch.Tensor | None, count: int = 6) -> list[list[int]]:
    """Manual greedy decoding after a prefill, with position ids only where transformers requires them.

    M-RoPE families derive positions from the cache length or take them from the caller: with a 2-D mask and no position
    ids the unpatched models fail.
    """
    tokens = []
    for _ in range(count):
        token = out.logits[:, -1:].argmax(-1)
        tokens.append(token)
        extra: dict[str, Any] = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            extra["attention_mask"] = mask
            deltas = getattr(model.model, "rope_deltas", None)
            if deltas is not None:
                extra["position_ids"] = ((mask.sum(1, keepdim=True) - 1) + deltas).expand(3, -1, -1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, **extra)
    return torch.cat(tokens, 1).tolist()


@pytest.mark.parametrize("with_mask", [True, False])
def test_hand_written_loop(family: str, layout: str, with_mask: bool) -> None:
    model = model_of(family)
    batch = FAMILIES[family].batch(MIXED if with_mask else ONE)
    mask = batch["attention_mask"] if with_mask else None
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (_, spy):
        got = steps(model, model(**batch, use_cache=True), mask)
        drops = [spy.drops()]
    with reference(model, drops, batch):
        want = steps(model, model(**batch, use_cache=True), mask)
    assert got == want


def test_continued_chat_with_a_second_image(family: str, layout: str) -> None:
    """Two turns on one cache, each with a picture; the second turn is cut as well."""
    model, make = model_of(family), FAMILIES[family]
    first, second = make.batch([[3, Image(0), 5]]), make.batch([[3, Image(1), 6]])
    length = first["input_ids"].shape[1]

    def talk(spy: Any = None) -> tuple[list, list]:
        drops = []
        out = model.generate(
            **first, past_key_values=DynamicCache(), do_sample=False, return_dict_in_generate=True, **NEW
        )
        drops += [spy.drops()] if spy is not None else []
        # The second turn follows the answer, whose last token is not in the cache yet.
        ids = torch.cat([out.sequences, second["input_ids"]], 1)
        if make.needs_types:
            again = steps(model, turn_by_hand(model, out, second), None)
        else:
            turn = second | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            again = model.generate(**turn, past_key_values=out.past_key_values, do_sample=False, **NEW)[
                :, ids.shape[1] :
            ]
            again = again.tolist()
        drops += [spy.drops()] if spy is not None else []
        return [out.sequences[:, length:].tolist(), again], drops

    with pruned(model, LAYOUTS[layout], ratio=0.3) as (patch, spy):
        got, drops = talk(spy)
        assert patch.last.visual[0].min() > length  # columns count from the start of the conversation
    with masked_without_padding(model, drops):
        want, _ = talk()
    assert got == want


def turn_by_hand(model: torch.nn.Module, out: Any, second: dict) -> Any:
    """A second turn with explicit M-RoPE positions: `generate` cannot place a new picture on an existing cache."""
    last = out.sequences[:, -1:]
    ids = torch.cat([last, second["input_ids"]], 1)
    types = torch.cat([torch.zeros_like(last), second["mm_token_type_ids"]], 1)
    positions, deltas = model.model.get_rope_index(
        ids, image_grid_thw=second["image_grid_thw"], mm_token_type_ids=types, attention_mask=torch.ones_like(ids)
    )
    start = out.past_key_values.get_seq_length() + model.model.rope_deltas
    result = model(
        **{k: v for k, v in second.items() if k not in ("attention_mask", "input_ids", "mm_token_type_ids")},
        input_ids=ids,
        mm_token_type_ids=types,
        position_ids=positions + start,
        past_key_values=out.past_key_values,
        use_cache=True,
    )
    model.model.rope_deltas = model.model.rope_deltas + deltas
    return result


def masked_without_padding(model: torch.nn.Module, drops: list) -> Any:
    from reference import masked

    return masked(vtprune.inspect(model).layers, drops)


def test_continued_chat_with_text_only(family: str, layout: str) -> None:
    """A second question about the same pictures, in a padded batch, is answered from the pruned cache."""
    model, make = model_of(family), FAMILIES[family]
    first = make.batch(MIXED)

    def talk() -> list:
        cache = DynamicCache()
        out = model.generate(**first, past_key_values=cache, do_sample=False, return_dict_in_generate=True, **NEW)
        ids = torch.cat([out.sequences, torch.tensor([[20, 21, 22, 23]]).expand(len(MIXED), -1)], 1)
        mask = torch.cat([first["attention_mask"], torch.ones_like(ids[:, first["input_ids"].shape[1] :])], 1)
        again = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=out.past_key_values,
            do_sample=False,
            **NEW,
        )
        return again.tolist()

    with pruned(model, LAYOUTS[layout], ratio=0.3) as (_, spy):
        got = talk()
        drops = [spy.drops()]
    with reference(model, drops, first):
        want = talk()
    assert got == want


def test_paused_goes_on_with_a_pruned_cache(family: str, layout: str) -> None:
    """`paused` disables new cuts; decoding on an already pruned cache is unchanged."""
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (patch, _):
        want = steps(model, model(**batch, use_cache=True), batch["attention_mask"])
        out = model(**batch, use_cache=True)
        with patch.paused():
            assert steps(model, out, batch["attention_mask"]) == want
