# SPDX-License-Identifier: Apache-2.0
"""Heads over all columns: retrieval vectors, classifiers, and the load-balancing loss of experts."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from families import _QWEN_IDS, _QWEN_TEXT, _QWEN_TOWER, FAMILIES, IMAGE, Image

import vtprune


def widened(model: torch.nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    return model.eval()


def colpali() -> tuple[Any, dict]:
    from transformers import ColPaliConfig, ColPaliForRetrieval, PaliGemmaConfig

    text = dict(model_type="gemma", vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    vision = dict(model_type="siglip_vision_model", hidden_size=24, intermediate_size=32, num_hidden_layers=2)
    vision |= dict(num_attention_heads=2, image_size=20, patch_size=4, vision_use_head=False, projection_dim=32)
    vlm = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=32, hidden_size=32
    )
    model = widened(ColPaliForRetrieval(ColPaliConfig(vlm_config=vlm, embedding_dim=16)))
    ids = torch.tensor([[IMAGE] * 25 + [1, 20, 21, 22]])
    pixels = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def colqwen2() -> tuple[Any, dict]:
    """A ColQwen2, whose forward merges the features and passes embeddings to the language model."""
    from transformers import ColQwen2Config, ColQwen2ForRetrieval

    config = ColQwen2Config(vlm_config=FAMILIES["qwen2_vl"].config(), embedding_dim=16)
    batch = FAMILIES["qwen2_vl"].batch([[Image(0), 4]])
    batch.pop("mm_token_type_ids")
    return widened(ColQwen2ForRetrieval(config)), batch | {"pixel_values": batch["pixel_values"][None]}


@pytest.mark.parametrize("method", ["uniform", "iwp", "visionzip", "pyramiddrop"])
@pytest.mark.parametrize("make", [colpali, colqwen2])
@torch.no_grad()
def test_retrieval_vectors(make: Any, method: str) -> None:
    """Dropped columns give zero vectors, also where the head's bias is zero; the others are unit vectors."""
    model, page = make()
    query = torch.tensor([[1, 30, 31]])
    words = {"input_ids": query, "attention_mask": torch.ones_like(query)}
    want = model(**words).embeddings
    with vtprune.patch(model, ratio=0.3, method=method) as patch:
        for bias in (model.embedding_proj_layer.bias.clone(), 0):
            model.embedding_proj_layer.bias.copy_(torch.as_tensor(bias))
            vectors, kept = model(**page).embeddings[0], patch.last.mask[0]
            assert not vectors[~kept].any() and torch.isfinite(vectors).all()
            torch.testing.assert_close(vectors[kept].norm(dim=-1), torch.ones(int(kept.sum())))
            dropped = set(patch.last.visual[0].tolist()) - set(patch.last.kept[0].tolist())
            assert dropped == set((~kept).nonzero()[:, 0].tolist()) and dropped
            model.embedding_proj_layer.bias.copy_(torch.as_tensor(bias))
            if isinstance(bias, torch.Tensor):
                assert torch.equal(model(**words).embeddings, want)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("make", [colpali, colqwen2])
@torch.no_grad()
def test_tuples_hold_the_vectors_of_named_outputs(make: Any, hidden: bool) -> None:
    model, page = make()
    page["output_hidden_states"] = hidden
    with vtprune.patch(model, ratio=0.3, method="uniform") as patch:
        want = model(**page).to_tuple()
        ways: list[dict[str, Any]] = [{"return_dict": False}]
        if make is colpali:  # ColQwen2 does not run with this in its config
            model.config.return_dict = False
            ways += [{}, {"return_dict": None}]
        for way in ways:
            got = model(**page, **way)
            assert type(got) is tuple and len(got) == len(want)
            assert torch.equal(got[0], want[0]) and not got[0][~patch.last.mask].any()
        query = {"input_ids": torch.tensor([[1, 30, 31]])}
        words = model(**query, return_dict=False)
    assert torch.equal(words[0], model(**query, return_dict=False)[0])


def gemma3_classifier() -> Any:
    """A classifier that finds the last token of a row by its ids."""
    from transformers import Gemma3Config, Gemma3ForSequenceClassification

    text = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, head_dim=8, pad_token_id=0)
    vision = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(image_size=16, patch_size=4, vision_use_head=False)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_id=IMAGE)
    return widened(Gemma3ForSequenceClassification(config))


@pytest.mark.parametrize("method", ["uniform", "iwp"])
@pytest.mark.parametrize("mask", [False, True])
@torch.no_grad()
def test_the_column_that_a_classifier_finds_by_ids_stays(method: str, mask: bool) -> None:
    """Also behind a prompt with the same pictures that ends in text, and where a mask says that padding is text."""
    model, end = gemma3_classifier(), 3 + 15
    ids = torch.tensor([[10, 11, 12] + [IMAGE] * 16 + [20, 21, 22], [10, 11, 12] + [IMAGE] * 16 + [0, 0, 0]])
    page = {"token_type_ids": (ids == IMAGE).long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    page |= {"attention_mask": torch.ones_like(ids)} if mask else {}
    with vtprune.patch(model, ratio=0.1, method=method) as patch:
        model(input_ids=ids.masked_fill(ids == 0, 20), **page)
        assert method != "uniform" or not patch.last.mask[1, end]
        logits = model(input_ids=ids, **page).logits
        kept = patch.last.mask
        assert kept[1, end]
    if method == "uniform":  # cuts before the first layer
        want = model(input_ids=ids, **page | {"attention_mask": kept.long()}).logits
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert logits.any(1).all()


def averaging_classifier(pooling: str = "mean") -> Any:
    """A classifier of the mean of all columns that the attention mask shows, or of the first column ("cls")."""
    from transformers import ModernVBertConfig, ModernVBertForSequenceClassification

    text = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    text |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    vision = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(image_size=16, patch_size=4, vision_use_head=False)
    config = ModernVBertConfig(
        text_config=text | {"model_type": "modernbert"},
        vision_config=vision | {"model_type": "siglip_vision_model"},
        image_token_id=IMAGE,
        pixel_shuffle_factor=1,
        classifier_pooling=pooling,
    )
    return widened(ModernVBertForSequenceClassification(config))


@pytest.mark.parametrize("given", ["mask", "no mask", "embeddings"])
def test_what_a_head_averages_leaves_dropped_columns_out(given: str) -> None:
    model = averaging_classifier()
    ids = torch.tensor([[10, 11, 12] + [IMAGE] * 16 + [20, 21], [0, 0, 0] + [IMAGE] * 16 + [20, 21]])
    mask = torch.ones_like(ids) if given == "no mask" else (ids != 0).long()
    page: dict[str, Any] = {"pixel_values": torch.randn(2, 1, 3, 16, 16), "input_ids": ids}
    page |= {} if given == "no mask" else {"attention_mask": mask}
    if given == "embeddings":
        page["inputs_embeds"] = model.get_input_embeddings()(page.pop("input_ids"))
        page["attention_mask"] = mask = mask.bool()
    before = mask.clone()
    with vtprune.patch(model, ratio=0.3, method="uniform") as patch:
        got = model(**page, labels=torch.tensor([0, 1]))
        got.loss.backward()
        kept = patch.last.mask
    assert torch.equal(mask, before) and int(kept.sum()) < int(mask.sum())
    want = model(**page | {"attention_mask": kept.to(mask.dtype)}).logits
    torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["ModernVBertForTokenClassification", "ModernVBertForMaskedLM"])
@torch.no_grad()
def test_labels_of_tokens_keep_the_tokens_themselves(head: str) -> None:
    """Such a head compares a token with its own label, not with that of the next one; no label begins an answer."""
    import transformers

    like = averaging_classifier()
    model = widened(getattr(transformers, head)(like.config))
    page = {
        "input_ids": torch.tensor([[10] + [IMAGE] * 16 + [20, 21, 22]]),
        "pixel_values": torch.randn(1, 1, 3, 16, 16),
    }
    labels = torch.full_like(page["input_ids"], -100)
    labels[0, [7, 18]] = 1
    with vtprune.patch(model, ratio=0.2, method="uniform") as patch:
        got, mask = model(**page, labels=labels), patch.last.mask
    assert mask[0, 7] and not mask[0, 6]
    want = model(**page, attention_mask=mask.long(), labels=labels)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)
    with vtprune.patch(model, ratio=0.2, method="iwp") as patch:
        model(**page)
        plain = patch.last.kept[0]
        labels[0, 7] = -100
        model(**page, labels=labels)
        assert torch.equal(patch.last.kept[0], plain)


@torch.no_grad()
def test_the_first_column_that_a_classifier_reads_stays() -> None:
    model = averaging_classifier("cls")
    page = {"input_ids": torch.tensor([[IMAGE] * 16 + [20, 21]]), "pixel_values": torch.randn(1, 1, 3, 16, 16)}
    with vtprune.patch(model, keep=1, method="uniform") as patch:
        got, mask = model(**page).logits, patch.last.mask
    assert mask[0].nonzero()[:, 0].tolist() == [0, 16, 17]
    torch.testing.assert_close(got, model(**page, attention_mask=mask.long()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["uniform", "fastv"])
@torch.no_grad()
def test_rows_of_an_encoder_that_keep_different_numbers_still_see_later_columns(method: str, attention: str) -> None:
    """The encoder passes no mask for rows without padding, and no mask means attention both ways."""
    model = averaging_classifier()
    model.set_attn_implementation(attention)
    ids = torch.tensor([[10] + [IMAGE] * 16 + list(range(20, 37)), [10] + [IMAGE] * 32 + [36]])
    pixels = torch.randn(2, 2, 3, 16, 16)
    pixels[0, 1] = 0  # padding of the pictures
    with vtprune.patch(model, ratio=0.3, method=method) as patch:
        both, mask = model(input_ids=ids, pixel_values=pixels).logits, patch.last.mask
        alone = [model(input_ids=ids[i : i + 1], pixel_values=pixels[i : i + 1, : i + 1]).logits for i in range(2)]
    assert int(mask[0].sum()) != int(mask[1].sum())
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_experts_are_balanced_over_the_columns_that_are_left(method: str) -> None:
    from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

    text = _QWEN_TEXT | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    tower = _QWEN_TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(vision_config=tower, text_config=text | {"decoder_sparse_step": 1}, **_QWEN_IDS)
    model = widened(AutoModelForImageTextToText.from_config(config))
    balance = sys.modules[type(model).__module__].load_balancing_loss_func
    batch = FAMILIES["qwen3_vl"].batch([[3, Image(0), 5], [2, Image(1), 4]])
    ids = batch["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | (batch["attention_mask"] == 0), -100)
    with vtprune.patch(model, ratio=0.3, method=method) as patch:
        out = model(**batch, labels=labels, output_router_logits=True)
        out.loss.backward()
        kept = patch.last.mask
    assert all(logits.shape == (ids.numel(), 4) for logits in out.router_logits)
    want = balance(tuple(logits.view(*ids.shape, 4)[kept] for logits in out.router_logits), 4, 2, None)
    torch.testing.assert_close(out.aux_loss, want)


@torch.no_grad()
def test_scatter_puts_late_states_back() -> None:
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch([[3, Image(0), 5]])
    seen: list[torch.Tensor] = []
    with vtprune.patch(model, ratio=0.3, method="fastv") as patch:
        handle = patch.anatomy.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
        hidden = model(**batch, output_hidden_states=True).hidden_states
        handle.remove()
        late = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        full = patch.last.scatter(late)
        norm = patch.anatomy.decoder.norm
        torch.testing.assert_close(norm(full)[patch.last.mask], hidden[-1][patch.last.mask])
        assert not full[~patch.last.mask].any()
        with pytest.raises(vtprune.VTPruneError, match="one row per kept token"):
            patch.last.scatter(hidden[0])
