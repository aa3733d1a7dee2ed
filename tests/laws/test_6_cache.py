# SPDX-License-Identifier: Apache-2.0
"""Law 6: KV cache length and bytes of each layer equal those that `patch.last` reports."""

import copy

import pytest
import torch
from families import FAMILIES
from support import LAYOUTS, MIXED, ONE, model_of, pruned

import vtprune


def size(cache: object) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_lengths_and_bytes(family: str, method: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    unpruned = model(**batch, use_cache=True).past_key_values
    with pruned(model, method) as (patch, _):
        cache = model(**batch, use_cache=True).past_key_values
        last = patch.last
    length = batch["input_ids"].shape[1]
    dropped = [length - len(last.visual[0]) + n for n in last.per_layer(0)]
    assert [layer.keys.shape[-2] for layer in cache.layers] == dropped == last.slots
    assert [cache.get_seq_length(i) for i in range(len(dropped))] == dropped
    assert cache.get_seq_length() == length  # callers see the length of the whole conversation
    assert (size(unpruned), size(cache)) == last.kv_bytes
    assert size(cache) < size(unpruned)


def test_decoding_adds_one_slot_a_step(family: str, layout: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (patch, _):
        cache = model.generate(**batch, max_new_tokens=5, return_dict_in_generate=True).past_key_values
        assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 4 for n in patch.last.slots]
        assert cache.get_seq_length() == batch["input_ids"].shape[1] + 4


def test_static_cache_holds_less(family: str, layout: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (patch, _):
        out = model.generate(**batch, max_new_tokens=3, cache_implementation="static", return_dict_in_generate=True)
        held = [int(layer.get_seq_length()) for layer in out.past_key_values.layers]
        assert held == [n + 2 for n in patch.last.slots]


def step(model: torch.nn.Module, cache: object, token: int = 20) -> torch.Tensor:
    return model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits


def test_copy_crop_and_reset(family: str, layout: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    length = batch["input_ids"].shape[1]
    with pruned(model, LAYOUTS[layout], ratio=0.3):
        cache = model(**batch, use_cache=True).past_key_values
        prefix = copy.deepcopy(cache)
        want = step(model, cache)
        step(model, cache, 21)
        assert cache.get_seq_length() == length + 2 and prefix.get_seq_length() == length
        assert torch.equal(step(model, prefix), want)
        prefix.crop(-1)
        assert prefix.get_seq_length() == length
        torch.testing.assert_close(step(model, prefix), want)
        cache.reset()  # an ordinary cache again: empty, or, before transformers 5.23, of zeros
        assert cache.get_seq_length() == cache.layers[0].get_seq_length()


def test_crop_into_the_picture(family: str) -> None:
    """A cache cropped to before the picture can be continued by an unpatched model."""
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    text = batch["input_ids"][:, :4]
    with pruned(model, LAYOUTS["steps"], ratio=0.3):
        cache = model(**batch, use_cache=True).past_key_values
        cache.crop(4 - cache.get_seq_length())
        assert [layer.keys.shape[-2] for layer in cache.layers] == [4] * len(cache.layers)
        positions = torch.tensor([[4]])
        got = model(input_ids=torch.tensor([[20]]), position_ids=positions, past_key_values=cache).logits[:, -1]
    ids = torch.cat([text, torch.tensor([[20]])], 1)
    want = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(5)[None]).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_crop_between_kept_tokens() -> None:
    """A cache cropped between kept tokens has the requested length and can be continued."""
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    with pruned(model, LAYOUTS["input"], ratio=0.3) as (patch, _):
        whole = model(**batch, use_cache=True).past_key_values
        visual, kept = (columns[0].tolist() for columns in (patch.last.visual, patch.last.kept))
        for end in range(visual[0], visual[-1] + 1):
            cache = copy.deepcopy(whole)
            cache.crop(end - cache.get_seq_length())
            assert cache.get_seq_length() == end
            assert cache.layers[-1].keys.shape[-2] == visual[0] + sum(column < end for column in kept)
            step(model, cache)
            assert cache.get_seq_length() == end + 1


def test_crop_of_a_ragged_batch_is_refused() -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch(MIXED)
    with pruned(model, LAYOUTS["input"], ratio=0.3):
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(vtprune.VTPruneError, match="different numbers of tokens"):
            cache.crop(-20)
