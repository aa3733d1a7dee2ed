# SPDX-License-Identifier: Apache-2.0
"""Features that the caller computes and merges are pruned where possible; otherwise an error is raised."""

from __future__ import annotations

import threading

import pytest
import torch
from families import FAMILIES, IMAGE
from support import ONE, model_of, pruned

import vtprune

PIXELS = ("pixel_values", "image_sizes", "image_grid_thw")


pytestmark = pytest.mark.usefixtures("no_grad")


def merged(model: torch.nn.Module, inputs: dict[str, torch.Tensor], scale: float = 1.0) -> torch.Tensor:
    """The prompt's embeddings with features in place of the placeholders, `[B, T, D]`."""
    config = model.config
    extra = {
        name: getattr(config, name)
        for name in ("vision_feature_layer", "vision_feature_select_strategy")
        if hasattr(config, name)
    }
    given = {name: inputs[name] for name in PIXELS if name in inputs}
    features = model.model.get_image_features(**given, **extra, return_dict=True).pooler_output
    features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    where = (inputs["input_ids"] == IMAGE)[..., None]
    return embeds.masked_scatter(where, features.reshape(-1, features.shape[-1]).to(embeds) * scale)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("scale", [1.0, 1.001])
def test_merged_by_hand(family: str, scale: float) -> None:
    """Features of the model's own encoder are recognized, also after a cast; changed features are refused."""
    model, inputs = model_of(family), FAMILIES[family].batch(ONE)
    decoder, ids = vtprune.inspect(model).decoder, inputs["input_ids"]
    with pruned(model, "random") as (patch, _):
        embeds = merged(model, inputs, scale)
        if scale != 1:
            for call in (decoder, model):
                with pytest.raises(vtprune.NothingPrunedError, match=r"patch\.visual"):
                    call(inputs_embeds=embeds)
            with patch.visual(ids):
                decoder(inputs_embeds=embeds)
        else:
            decoder(inputs_embeds=embeds.to(torch.bfloat16).to(embeds))
        assert patch.last.visual[0].tolist() == (ids[0] == IMAGE).nonzero()[:, 0].tolist()
        assert len(patch.last.kept[0]) < len(patch.last.visual[0])
        with patch.visual(ids == IMAGE):
            decoder(inputs_embeds=embeds)
        last = patch.last
        with patch.paused():
            decoder(inputs_embeds=embeds)
        for wrong in ("abc", (ids == IMAGE) * 1.5):
            with pytest.raises(vtprune.VTPruneError, match="expected .*bools or ids"), patch.visual(wrong):
                decoder(inputs_embeds=embeds)
        with pytest.raises(vtprune.VTPruneError, match="for each of them"), patch.visual(ids[:, 1:]):
            decoder(inputs_embeds=embeds)
        assert patch.last is last
    with pruned(model, "random", ratio=1.0):
        decoder(inputs_embeds=merged(model, inputs))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["uniform", "visionzip"])
def test_the_same_embeddings_come_again(family: str, method: str) -> None:
    """Also after other pictures, and after the same ones were encoded again."""
    model, inputs = FAMILIES[family].build(), FAMILIES[family].batch(ONE)
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    with pruned(model, method) as (patch, _):
        for _ in range(2):
            seen, embeds = [], merged(model, inputs)
            for again in (embeds, merged(model, other), embeds):
                call = {"inputs_embeds": again, "attention_mask": inputs["attention_mask"]}
                seen.append(model(**call).logits)
                assert len(patch.last.kept[0]) < len(patch.last.visual[0])
                model.generate(**call, max_new_tokens=1, do_sample=False)
            assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("change", ["data", "size", "version"])
def test_words_of_a_table_that_changed_are_no_features(change: str) -> None:
    """Also where the version of the weights does not tell: adapters and averages write to `weight.data`."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch(ONE)
    table, words = model.get_input_embeddings(), FAMILIES["llava"].batch([[9]])["input_ids"]
    with pruned(model, "random") as (patch, _):
        model(inputs_embeds=table(words))
        if change == "size":
            model.resize_token_embeddings(110)
            words = words.clone().fill_(105)
        else:
            (table.weight.data if change == "data" else table.weight).mul_(1.5)
        model(inputs_embeds=table(words))
        assert patch.last is None
        model(inputs_embeds=merged(model, inputs))
        assert len(patch.last.kept[0]) < len(patch.last.visual[0])
        with pytest.raises(vtprune.NothingPrunedError, match="embeddings that are no token's"):
            model(inputs_embeds=table(words) * 2)


def test_encoded_in_another_thread() -> None:
    model, inputs = model_of("llava"), FAMILIES["llava"].batch(ONE)
    with pruned(model, "random") as (patch, _):
        made: list[torch.Tensor] = []

        def encode() -> None:
            with torch.no_grad():
                made.append(merged(model, inputs))

        thread = threading.Thread(target=encode)
        thread.start()
        thread.join()
        model(inputs_embeds=made[0])
        assert len(patch.last.kept[0]) < len(patch.last.visual[0])


def test_padding_may_hold_anything() -> None:
    """Embeddings that the mask hides, such as zeros, are not taken for features."""
    model, inputs = model_of("llava"), FAMILIES["llava"].batch(ONE)
    words = model.get_input_embeddings()(inputs["input_ids"][:, -4:])
    with pruned(model, "random") as (patch, _):
        for embeds, dropped in ((words, 0), (merged(model, inputs), 1)):
            padded = torch.nn.functional.pad(embeds, (0, 0, 2, 0))
            mask = torch.ones(padded.shape[:2], dtype=torch.long)
            with pytest.raises(vtprune.NothingPrunedError, match="2 embeddings"):
                model(inputs_embeds=padded, attention_mask=mask)
            mask[:, :2] = 0
            model(inputs_embeds=padded, attention_mask=mask)
            assert (patch.last is not None) == bool(dropped)


def test_tower_and_projector_by_hand() -> None:
    """Features of tower and projector, called by hand, are pruned (Gemma 3 projects with a bare matrix)."""
    from tests.architectures.run import prepare

    built, prompts = prepare("gemma3", "Gemma3ForConditionalGeneration")
    model, inputs = built.model, prompts.batch([[3, "image", 5]])
    where = (inputs["input_ids"] == prompts.placeholder)[..., None]
    with pruned(model, "random") as (patch, _):
        features = model.model.multi_modal_projector(model.model.vision_tower(inputs["pixel_values"]).last_hidden_state)
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(where, features))
        assert 0 < len(patch.last.kept[0]) < len(patch.last.visual[0])


def test_visual_words_merged_by_hand() -> None:
    """Features that are rows of the embedding table (Chameleon) are recognized; a part of a picture is refused."""
    from tests.architectures.run import prepare, registered

    built, prompts = prepare("chameleon", registered()["chameleon"])
    model, inputs = built.model, prompts.batch([[3, "image", 5]])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    visual, words = ids == prompts.placeholder, model.get_input_embeddings()(ids[:, -4:])
    with pruned(model, "uniform") as (patch, _):
        features = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        embeds = model.get_input_embeddings()(ids).masked_scatter(visual[..., None], torch.cat(tuple(features)))
        for call in (model, vtprune.inspect(model).decoder):
            cache = call(inputs_embeds=embeds, use_cache=True).past_key_values
            assert patch.last.visual[0].tolist() == visual[0].nonzero()[:, 0].tolist()
            assert cache.layers[0].keys.shape[2] == ids.shape[1] - len(patch.last.visual[0]) + len(patch.last.kept[0])
        last = patch.last
        embeds[0, last.visual[0][0]] = words[0, 0]
        with pytest.raises(vtprune.NothingPrunedError, match="hold 48 embeddings .* have 49"):
            model(inputs_embeds=embeds)
        model(inputs_embeds=words)
        assert patch.last is last


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_not_merged_passes(family: str) -> None:
    """Text, as ids or embeddings, passes unpruned through model and decoder after an encoding by hand."""
    model, inputs = model_of(family), FAMILIES[family].batch(ONE)
    decoder, ids = vtprune.inspect(model).decoder, inputs["input_ids"][:, -4:]
    words = model.get_input_embeddings()(ids)
    with pruned(model, "random") as (patch, _):
        merged(model, inputs)
        out = decoder(inputs_embeds=words, use_cache=True)
        decoder(inputs_embeds=words[:, :1], past_key_values=out.past_key_values)
        decoder(input_ids=ids)
        model(input_ids=ids)
        model(inputs_embeds=words)
        assert patch.last is None
        model(**inputs)
        assert len(patch.last.kept[0]) < len(patch.last.visual[0])
