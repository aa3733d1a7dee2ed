# SPDX-License-Identifier: Apache-2.0
"""Invalid model inputs raise a clear error or behave as on the unpatched model."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, IMAGE, LAYERS, Image
from support import ONE, Middle, model_of, pruned

import vtprune
from vtprune import methods
from vtprune.methods import Stage

FEW = ("llava", "llava_next", "qwen2_5_vl", "internvl", "smolvlm")
PAIR = [[3, Image(0), 5], [2, Image(0), 3]]
PIXELS = {"pixel_values", "image_sizes", "image_grid_thw"}
every_family = pytest.mark.parametrize("family", list(FAMILIES))
few_families = pytest.mark.parametrize("family", FEW)
every_method = pytest.mark.parametrize("method", methods.for_pictures())


pytestmark = pytest.mark.usefixtures("no_grad")


def without_pixels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name not in PIXELS}


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite(method: str, bad: float) -> None:
    """Non-finite features raise an error that names the sample, for every method."""
    model, batch = model_of("llava"), FAMILIES["llava"].batch(PAIR)
    batch["pixel_values"] = batch["pixel_values"].clone()
    batch["pixel_values"][1, 0, 0, 0] = bad
    with pruned(model, method, ratio=0.3) as (patch, _):
        with pytest.raises(vtprune.MethodError, match="sample 1 hold NaN or Inf"):
            model(**batch)
        assert patch.last is None
        batch["pixel_values"][1, 0, 0, 0] = 0
        model(**batch)
        assert [len(kept) for kept in patch.last.kept] == [8, 8]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("method", ["iwp", "fastv", "dart"])
def test_words_that_are_not_finite_where_attention_is_read(method: str, layer: int) -> None:
    model, batch = FAMILIES["llava"].build("eager"), FAMILIES["llava"].batch(PAIR)
    batch["input_ids"][0, -2] = 98
    model.get_input_embeddings().weight[98, 0] = float("inf")
    with pruned(model, methods.get(method)(layer=layer)) as (patch, _):
        if method == "fastv" and layer == 0:
            model(**batch)  # selects at random at layer 0
            return
        with pytest.raises(vtprune.MethodError, match=r"sample 0 hold NaN or Inf"):
            model(**batch)
        assert patch.last is None


@every_method
def test_text_that_is_not_finite(method: str) -> None:
    """NaN in the text: methods that read text raise an error, and the others keep the same tokens."""
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch(PAIR)
    word = 98
    batch["input_ids"][1, -2] = word
    model.get_input_embeddings().weight[word] = float("nan")
    with pruned(model, method, ratio=0.3) as (patch, _):
        try:
            model(**batch)
        except vtprune.MethodError as error:
            assert "sample 1" in str(error) and "NaN" in str(error)
            return
        kept = [k.tolist() for k in patch.last.kept]
        batch["input_ids"][1, -2] = word - 1
        model(**batch)
        assert kept == [k.tolist() for k in patch.last.kept], "the selection depends on NaN"


@every_family
def test_placeholders_without_features(family: str) -> None:
    """Placeholder ids without pixels are plain text to the model and to the patch."""
    model, batch = model_of(family), without_pixels(FAMILIES[family].batch(PAIR))
    batch.pop("mm_token_type_ids", None)
    plain = model(**batch).logits
    with pruned(model, "uniform") as (patch, _):
        assert torch.equal(model(**batch).logits, plain)
        assert patch.last is None


@every_family
@pytest.mark.parametrize("change", [-1, 1])
def test_one_placeholder_too_few_or_too_many(family: str, change: int) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(PAIR)
    good = {name: value.clone() for name, value in batch.items()}
    visual = (batch["input_ids"][1] == IMAGE).nonzero()[:, 0]
    batch["input_ids"][1, visual[-1] if change < 0 else visual[-1] + 2] = 11 if change < 0 else IMAGE
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    with pytest.raises(Exception):  # noqa: B017  transformers raises several types
        model(**batch)
    with pruned(model, "uniform") as (patch, _):
        with pytest.raises(Exception):  # noqa: B017
            model(**batch)
        assert patch.last is None
        model(**good)
        assert patch.last is not None


@few_families
def test_pixels_of_no_picture(family: str) -> None:
    """Text with empty pixel tensors behaves as on the unpatched model."""
    model, make = model_of(family), FAMILIES[family]
    batch = make.batch([[9], [4]])
    for name, value in make.batch(ONE).items():
        if name in PIXELS:
            batch[name] = value[:0]
    same_as_unpatched(model, batch, pruned_tokens=None)


@few_families
def test_a_picture_without_tokens(family: str) -> None:
    """With features of two pictures, one of them empty, the other is pruned as if alone."""
    model, make = model_of(family), FAMILIES[family]
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip(f"transformers {transformers.__version__} takes no mm_encoder_outputs")
    batch = make.batch(ONE)
    count = int((batch["input_ids"] == IMAGE).sum())
    features = torch.randn(count, 32, generator=torch.Generator().manual_seed(1))
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    parts = (features[:0], features)
    output = BaseModelOutputWithPooling(last_hidden_state=parts, pooler_output=parts)
    rest = without_pixels(batch) | {name: batch[name] for name in ("image_grid_thw",) if name in batch}
    same_as_unpatched(model, rest | {"mm_encoder_outputs": {"image": output}}, pruned_tokens=count)


def same_as_unpatched(model: torch.nn.Module, batch: dict[str, Any], pruned_tokens: int | None) -> None:
    """Asserts that a call fails as without a patch, or prunes `pruned_tokens` visual tokens (None: there are none)."""
    try:
        plain = model(**batch).logits
    except Exception as error:
        plain, refused = None, type(error)
    with pruned(model, "uniform", ratio=0.3) as (patch, _):
        if plain is None:
            with pytest.raises((refused, vtprune.VTPruneError)):
                model(**batch)
            assert patch.last is None
            return
        logits = model(**batch).logits
        if pruned_tokens is None:
            assert patch.last is None and torch.equal(logits, plain)
        else:
            assert len(patch.last.visual[0]) == pruned_tokens
            assert len(patch.last.kept[0]) == max(1, round(0.3 * pruned_tokens))


class Elsewhere(Middle):
    """Cuts at the stages in `stages`."""

    stages: tuple[Stage, ...] = ()

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return self.stages


@pytest.mark.parametrize("layers", [(LAYERS,), (1, 99), (-1,), (2, 1), (1, 1), (1.5,), ("2",), (None,), ()], ids=str)
def test_schedules_that_no_model_has(layers: tuple) -> None:
    model = model_of("llava")
    method = Elsewhere()
    method.stages = tuple(Stage(layer, 0.5 / (i + 1)) for i, layer in enumerate(layers))
    hooks = len(model.model._forward_pre_hooks)
    with pytest.raises(vtprune.MethodError, match="layer"):
        vtprune.patch(model, ratio=0.3, method=method)
    assert len(model.model._forward_pre_hooks) == hooks


@pytest.mark.parametrize("layer", [LAYERS, 99, -1, 1.5])
@every_method
def test_options_that_name_a_missing_layer(method: str, layer: float) -> None:
    """A missing layer is refused or, where the method documents it, replaced by the last layer."""
    cls = methods.get(method)
    names = {f.name for f in fields(cls)}
    if not names & {"layer", "layers"}:
        pytest.skip("this method has no choice of layers")
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    many = {"layers": (*range(len(getattr(cls, "layers", ())) - 1), layer), "depth": None}
    try:
        patch = vtprune.patch(model, ratio=0.3, method=cls(**({"layer": layer} if "layer" in names else many)))
    except vtprune.MethodError:
        return
    with patch:
        assert layer > 0 and "last" in (cls.__doc__ or ""), "replaced without documentation"
        model(**batch)
        assert patch.last.stages[-1][0] == LAYERS - 1 and len(patch.last.kept[0]) == 8
