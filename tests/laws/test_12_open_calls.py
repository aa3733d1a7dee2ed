# SPDX-License-Identifier: Apache-2.0
"""Law 12: every way of calling a model gives the result of the masked, unpatched model, or an error with a remedy.

Each call variant is a function of a family and a method. Its reference is the unpatched model with the tokens that
`patch.last` reports as dropped masked out (`reference`). Running this file prints the matrix:

    python tests/laws/test_12_open_calls.py [family ...]
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, Image
from support import MIXED, ONE, Spy, model_of, patched, reference
from torch import Tensor
from transformers import DynamicCache

import vtprune

ENDS_IN_PICTURE = [[3, 6, Image(0)], [2, Image(1)]]
Method = str | vtprune.methods.Method
WAYS: dict[str, Callable[[str, Method], None]] = {}


def way(function: Callable[[str, Method], None]) -> Callable[[str, Method], None]:
    """Registers a call variant."""
    WAYS[function.__name__] = function
    return function


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * max(1.0, float(want.abs().max())))


def text(batch: dict) -> dict:
    """The last four tokens of a batch, as a text prompt."""
    return {"input_ids": batch["input_ids"][:, -4:]}


def bare(batch: dict) -> dict:
    """A batch without the arguments that M-RoPE models do not accept together with manual decoding steps."""
    return {k: v for k, v in batch.items() if k != "attention_mask"}


class Case:
    """A model, its patch, and the comparison of pruned calls with their masked reference."""

    def __init__(self, family: str, method: Method, prompts: Any = ONE, attention: str = "sdpa", **budget: Any) -> None:
        self.make, self.model = FAMILIES[family], model_of(family, attention)
        self.batch = self.make.batch(prompts, "right" if prompts is ENDS_IN_PICTURE else "left")
        self.method, self.budget = method, budget or {"ratio": 0.3}

    def __enter__(self) -> Case:
        self.patch = patched(self.model, self.method, **self.budget)
        self.spy = Spy(self.patch)
        return self

    def __exit__(self, *_: object) -> None:
        self.spy.close()
        self.patch.remove()

    @property
    def kept(self) -> list[list[int]]:
        assert self.patch.last is not None
        return [k.tolist() for k in self.patch.last.kept]

    def against_masked(self, call: Callable[[], Any]) -> Any:
        """Runs `call` pruned and masked, and returns both results."""
        got, drops = call(), self.spy.drops()
        self.patch.remove()
        with reference(self.model, [drops], self.batch):
            want = call()
        self.patch.__enter__()
        self.patch._open.clear()
        return got, want


@way
def flags_with_text(family: str, method: Method) -> None:
    """With a text prompt every output flag gives the unpatched model's result."""
    with Case(family, method) as case:
        plain = text(case.batch)
        for flags in (
            {"output_hidden_states": True},
            {"output_hidden_states": False},
            {"output_hidden_states": [0]},
            {"use_cache": False},
            {"logits_to_keep": 2},
            {"return_dict": False},
        ):
            got = case.model(**plain, **flags)
            with case.patch.paused():
                want = case.model(**plain, **flags)
            assert torch.equal(got[0], want[0])
        assert case.patch.last is None


@way
def hidden_states(family: str, method: Method) -> None:
    """Hidden states have the prompt's length, and the masked model's values at the kept columns."""
    with Case(family, method, MIXED) as case:
        got, want = case.against_masked(lambda: case.model(**case.batch, output_hidden_states=True))
        kept = case.patch.last.mask
        assert len(got.hidden_states) == len(want.hidden_states)
        for mine, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
            assert mine.shape == theirs.shape
            if mine is not got.hidden_states[0]:  # merging methods write into the first layer's input
                close(mine[kept], theirs[kept])


@way
def generate_flags(family: str, method: Method) -> None:
    """`generate` returns every requested output; attention maps have the columns of the whole conversation."""
    with Case(family, method, attention="eager") as case:
        flags = dict(
            return_dict_in_generate=True, output_hidden_states=True, output_attentions=True, output_scores=True
        )
        settings = dict(max_new_tokens=3, do_sample=False, **flags)
        got, want = case.against_masked(lambda: case.model.generate(**case.batch, **settings))
        assert torch.equal(got.sequences, want.sequences)
        for step, (mine, theirs) in enumerate(zip(got.attentions, want.attentions, strict=True)):
            for a, b in zip(mine, theirs, strict=True):
                assert a.shape == b.shape
                if step:
                    close(a, b)
        kept = case.patch.last.mask[0]
        for a, b in zip(got.attentions[0], want.attentions[0], strict=True):
            close(a[:, :, kept], b[:, :, kept])


@way
def gradients_of_hidden_states(family: str, method: Method) -> None:
    """Gradients flow through returned hidden states."""
    with Case(family, method) as case, torch.enable_grad():
        out = case.model(**case.batch, output_hidden_states=True)
        if not out.hidden_states[0].requires_grad:
            raise AssertionError("the model's weights need no gradients")
        for state in out.hidden_states:
            state.retain_grad()
        out.logits[0, -1].max().backward()
        case.model.zero_grad()
        assert all(state.grad is not None and state.grad.any() for state in out.hidden_states)


@way
def prompt_ends_in_a_picture(family: str, method: Method) -> None:
    with Case(family, method, [ENDS_IN_PICTURE[0]]) as case:
        ids, mask = case.batch["input_ids"], case.batch["attention_mask"]
        end = int((ids[0] == IMAGE).nonzero()[-1]) + 1  # without the tag that closes a picture
        case.batch = {k: v[:, :end] if v.shape == ids.shape else v for k, v in case.batch.items()}
        settings = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
        got, want = case.against_masked(lambda: case.model.generate(**case.batch, **settings))
        assert mask.all() and end - 1 in case.kept[0]
        close(torch.stack(got.logits), torch.stack(want.logits))


@way
def right_padded_rows_end_in_pictures(family: str, method: Method) -> None:
    """The last unpadded column of each row is kept, alone and in a batch."""
    with Case(family, method, ENDS_IN_PICTURE) as case:
        ids, pad = case.batch["input_ids"], case.batch["attention_mask"]
        after = (
            torch.arange(ids.shape[1]) > torch.where(ids == IMAGE, torch.arange(ids.shape[1]), -1).amax(1, True)
        ) & (pad > 0)
        case.batch |= {"attention_mask": pad * ~after}
        got, want = case.against_masked(lambda: case.model(**case.batch).logits)
        last = [int(row.nonzero()[-1]) for row in case.batch["attention_mask"]]
        for row, column in enumerate(last):
            assert column in case.kept[row]
            close(got[row, column], want[row, column])


@way
def labels_read_columns(family: str, method: Method) -> None:
    """The column that predicts the first word after a picture is kept, so the loss equals the masked model's."""
    with Case(family, method) as case:
        labels = case.batch["input_ids"].masked_fill(case.batch["input_ids"] == IMAGE, -100)
        got, want = case.against_masked(lambda: case.model(**case.batch, labels=labels).loss)
        close(got, want)


@way
def logits_to_keep(family: str, method: Method) -> None:
    with Case(family, method) as case:
        ids = case.batch["input_ids"]
        visual = (ids[0] == IMAGE).nonzero()[:, 0]
        for wanted in (3, torch.stack([visual[0], visual[4]]), ids.shape[1] - int(visual[-2])):
            got, want = case.against_masked(
                lambda wanted=wanted: case.model(**case.batch, logits_to_keep=wanted).logits
            )
            close(got, want)


@way
def answers_do_not_choose(family: str, method: Method) -> None:
    """Two answers to one prompt give the same kept set, with labels and with `patch.question`."""
    with Case(family, method) as case:
        ids, seen = case.batch["input_ids"], []
        for answer in ([20, 21, 22, 23], [70, 71], []):
            row = torch.cat([ids, torch.tensor([answer], dtype=torch.long)], 1)
            call = {k: v for k, v in case.batch.items() if v.shape != ids.shape}
            call |= {"input_ids": row, "attention_mask": torch.ones_like(row)}
            if case.make.needs_types:
                call["mm_token_type_ids"] = (row == IMAGE).long()
            labels = torch.cat([torch.full_like(ids, -100), row[:, ids.shape[1] :]], 1)
            case.model(**call, labels=labels if answer else None)
            seen.append(case.kept)
            with case.patch.question(end=ids.shape[1]):
                case.model(**call)
            seen.append(case.kept)
        assert all(kept == seen[0] for kept in seen)


@way
def features_merged_by_hand(family: str, method: Method) -> None:
    """Features that the caller merges are pruned like the model's own or refused; scaled ones are refused."""
    with Case(family, method) as case:
        ids, model = case.batch["input_ids"], case.model
        pixels = {k: v for k, v in case.batch.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
        found = model.model.get_image_features(**pixels, return_dict=True).pooler_output
        found = torch.cat(list(found)) if isinstance(found, (list, tuple)) else found
        embeds = model.get_input_embeddings()(ids)
        where = (ids == IMAGE)[..., None]
        embeds = embeds.masked_scatter(where, found.reshape(-1, found.shape[-1]))
        with pytest.raises(vtprune.NothingPrunedError, match=r"patch\.visual"):
            model(inputs_embeds=embeds.where(~where, embeds * 1.01))
        try:
            got, want = case.against_masked(lambda: model(inputs_embeds=embeds).logits)
        except vtprune.MethodError as refused:
            assert str(refused)
            return
        close(got[:, -1], want[:, -1])


def from_layers(layers: list[Any]) -> DynamicCache:
    """A new cache that holds `layers`."""
    made = DynamicCache()
    made.layers = layers
    return made


def stored(cache: Any) -> dict[str, Any]:
    """Copies of a cache by every method of copying and serialization, by name."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    tensors = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
    return {
        "deepcopy": copy.deepcopy(cache),
        "torch.save": torch.load(file, weights_only=False),
        "pickle": pickle.loads(pickle.dumps(cache)),
        "layers": from_layers(copy.deepcopy(cache.layers)),
        "layers copied one by one": from_layers([copy.copy(layer) for layer in cache.layers]),
        "layers stored one by one": from_layers([pickle.loads(pickle.dumps(layer)) for layer in cache.layers]),
        "tensors": tensors,
        "copy": copy.copy(copy.deepcopy(cache)),
    }


@way
def stored_caches(family: str, method: Method) -> None:
    """Decoding from a copied, stored or rebuilt pruned cache gives the same results."""
    with Case(family, method) as case:
        token = torch.tensor([[20]])
        cache = case.model(**bare(case.batch), use_cache=True).past_key_values
        copies = stored(cache)
        length, want = cache.get_seq_length(), case.model(input_ids=token, past_key_values=cache).logits
        for name, again in copies.items():
            got = case.model(input_ids=token, past_key_values=again).logits
            assert again.get_seq_length() == length + 1, name
            close(got, want)


@way
def changed_caches(family: str, method: Method) -> None:
    """Layers of a pruned cache work in a new cache that is cropped or whose rows are selected."""
    with Case(family, method, MIXED) as case:
        cache = case.model(**bare(case.batch), use_cache=True).past_key_values
        rows, token = torch.tensor([1, 1, 0]), torch.tensor([[20]])
        case.model(input_ids=token.expand(len(case.batch["input_ids"]), -1), past_key_values=cache)
        for change in (
            lambda changed: changed.crop(-1),
            lambda changed: changed.reorder_cache(rows),
            lambda changed: changed.batch_select_indices(rows),
            lambda changed: changed.batch_repeat_interleave(2),
        ):
            own, other = copy.deepcopy(cache), from_layers(copy.deepcopy(cache.layers))
            change(own)
            change(other)
            tokens = token.expand(own.layers[-1].keys.shape[0], -1)
            want = case.model(input_ids=tokens, past_key_values=own).logits
            assert torch.equal(case.model(input_ids=tokens, past_key_values=other).logits, want)
            assert own.get_seq_length() == other.get_seq_length()


@way
def cache_after_remove(family: str, method: Method) -> None:
    """An unpatched model raises on a pruned cache, its copies, and its layers in a new cache."""
    with Case(family, method) as case:
        cache = case.model(**bare(case.batch), use_cache=True).past_key_values
        case.patch.remove()
        copies = {name: again for name, again in stored(cache).items() if name != "tensors"}
        for again in (cache, *copies.values()):
            with pytest.raises(vtprune.VTPruneError, match="patch the model"):
                case.model(input_ids=torch.tensor([[20, 21]]), past_key_values=again)


@way
def chunked_prefill(family: str, method: Method) -> None:
    with Case(family, method) as case:
        with pytest.raises(vtprune.VTPruneError, match="prefill_chunk_size"):
            case.model.generate(**case.batch, max_new_tokens=2, prefill_chunk_size=8)
        plain = case.make.batch([[20]])
        with case.patch.paused():
            want = case.model.generate(**plain, max_new_tokens=2, do_sample=False, prefill_chunk_size=8)
        got = case.model.generate(**plain, max_new_tokens=2, do_sample=False, prefill_chunk_size=8)
        assert torch.equal(got, want)


def flex(mask: Tensor) -> Any:
    """The `BlockMask` of a dense mask `[1, 1, T, T]`."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: mask[0, 0, q, k], 1, None, *mask.shape[2:], device="cpu")


@way
def packed_row(family: str, method: Method) -> None:
    """Several samples packed in one row are refused, however their boundaries are given."""
    with Case(family, method) as case:
        call = bare(case.batch)
        ids = call["input_ids"]
        half = ids.shape[1] - 3
        positions = torch.cat([torch.arange(half), torch.arange(3)])[None]
        positions = positions.expand(3, -1, -1) if case.make.needs_types else positions
        whole = torch.arange(half + 3).expand(3, 1, -1) if case.make.needs_types else None
        block = torch.block_diag(torch.ones(half, half), torch.ones(3, 3)).tril().bool()[None, None]
        for extra in (
            {"position_ids": positions},
            {"attention_mask": block, "position_ids": whole},
            {"attention_mask": flex(block), "position_ids": whole},
            {"cu_seq_lens_q": torch.tensor([0, half, half + 3], dtype=torch.int32)},
        ):
            with pytest.raises(vtprune.VTPruneError, match="one sample a row"):
                case.model(**call, **extra, use_cache=False)


@way
def hidden_pictures(family: str, method: Method) -> None:
    """Visual tokens that the attention mask hides do not count against the budget, alone and in a batch."""
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        pytest.skip("transformers counts M-RoPE grids against the columns that the mask shows")
    with Case(family, method, [[3, Image(0), 5], [3, Image(0), 5]]) as case:
        visual = (case.batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
        hidden = visual[: len(visual) // 2]
        case.batch["attention_mask"][0, hidden] = 0
        got, want = case.against_masked(lambda: case.model(**case.batch).logits[:, -1])
        close(got, want)
        assert not set(case.kept[0]) & set(hidden.tolist())
        assert len(case.kept[0]) == max(1, round(0.3 * (len(visual) - len(hidden))))


@way
def small_picture(family: str, method: Method) -> None:
    """A picture so small that the budget keeps all its tokens raises no error."""
    with Case(family, method, ratio=0.999) as case:
        got = case.model.generate(**case.batch, max_new_tokens=2, do_sample=False)
        assert case.kept == [v.tolist() for v in case.patch.last.visual]
        with case.patch.paused():
            assert torch.equal(case.model.generate(**case.batch, max_new_tokens=2, do_sample=False), got)


@way
def threads_and_tasks(family: str, method: Method) -> None:
    """`paused` and `using` apply in the threads and tasks of their own request only."""
    with Case(family, method) as case:
        case.spy.close()
        total = int((case.batch["input_ids"] == IMAGE).sum())

        def kept() -> int:
            with torch.no_grad():
                cache = case.model(**bare(case.batch), use_cache=True).past_key_values
            return total - (case.batch["input_ids"].shape[1] - cache.layers[-1].keys.shape[-2])

        def in_thread(function: Callable[[], int]) -> int:
            got: list[int] = []
            thread = threading.Thread(target=lambda: got.append(function()))
            thread.start()
            thread.join()
            return got[0]

        usual, half = max(1, round(0.3 * total)), max(1, round(0.5 * total))
        with ThreadPoolExecutor(1) as pool:
            with case.patch.paused():
                assert kept() == total
                assert in_thread(kept) == total
                assert pool.submit(kept).result() == usual  # a worker outlives the request
                assert pool.submit(contextvars.copy_context().run, kept).result() == total
                assert asyncio.run(asyncio.to_thread(kept) if False else _task(kept)) == total
                with case.patch.using(ratio=0.5):
                    assert kept() == total
            with case.patch.using(ratio=0.5):
                assert kept() == half
                assert in_thread(kept) == half
                with case.patch.using(keep=2):
                    assert kept() == 2
                assert kept() == half
            assert kept() == usual and in_thread(kept) == usual and pool.submit(kept).result() == usual
        assert threading.Thread.start.__module__ == "threading"


async def _task(function: Callable[[], int]) -> int:
    return await asyncio.create_task(asyncio.to_thread(function))


@way
def entered_again(family: str, method: Method) -> None:
    with Case(family, method) as case:
        seen = []
        for _ in range(2):
            with case.patch, case.patch:
                case.model(**case.batch)
            assert case.patch.removed
            seen.append(case.kept)
        assert seen[0] == seen[1] and len(seen[0][0]) < len(case.patch.last.visual[0])


@way
def autocast(family: str, method: Method) -> None:
    with Case(family, method, MIXED) as case:
        case.model(**case.batch)
        counts = [len(k) for k in case.kept]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            case.model.generate(**case.batch, max_new_tokens=2)
        assert [len(k) for k in case.kept] == counts


@pytest.mark.parametrize("how", list(WAYS))
def test_open_call(family: str, method: str, how: str) -> None:
    WAYS[how](family, method)


def test_questions_of_rows_for_beams() -> None:
    """Beam search repeats the questions of `patch.question` along with the rows of the batch."""
    with Case("llava", "iwp", MIXED) as case:
        length, seen = case.batch["input_ids"].shape[1], []
        ends = [length - 2 + row % 3 for row in range(len(case.batch["input_ids"]))]
        for beams in (1, 2):
            with case.patch.question(end=ends):
                case.model.generate(**case.batch, max_new_tokens=2, num_beams=beams, do_sample=False)
            seen.append(case.kept)
        assert seen[1] == [kept for kept in seen[0] for _ in range(2)]
        with case.patch.question(end=ends[:2]), pytest.raises(vtprune.VTPruneError, match="does not fit a batch of 3"):
            case.model(**case.batch)


def main(families: list[str]) -> None:
    """Prints the matrix."""
    for family in families or FAMILIES:
        for how, call in WAYS.items():
            row = {}
            for method in vtprune.methods.names():
                try:
                    with torch.no_grad():
                        call(family, method)
                    row[method] = "equal"
                except pytest.skip.Exception:
                    row[method] = "-"
                except vtprune.VTPruneError:
                    row[method] = "refused"
                except Exception as error:
                    row[method] = f"FAULT {type(error).__name__}"
            kinds = {kind: [m for m, k in row.items() if k == kind] for kind in dict.fromkeys(row.values())}
            cells = "; ".join(f"{k}: {len(m) if k == 'equal' else ', '.join(m)}" for k, m in kinds.items())
            print(f"{family:17}{how:36}{cells}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
