# SPDX-License-Identifier: Apache-2.0
"""Unknown models are supported by structure or refused with a reason; they are never silently unpruned."""

from __future__ import annotations

import pytest
import torch
from invented import batch, build
from reference import Drops, masked

import vtprune

METHODS = ("random", "fastv", "divprune")


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_model_works_by_structure(method: str) -> None:
    """Drop is mask, decoding and the budget hold for a model with unfamiliar names."""
    model, inputs = build(), batch()
    plain = model(**inputs).logits
    with vtprune.patch(model, ratio=0.25, method=method) as patch:
        assert {type(patch.anatomy.composite).__name__, type(patch.anatomy.decoder).__name__} == {
            "MarulkWhole",
            "MarulkMind",
        }
        got, last = model(**inputs).logits, patch.last
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert [len(k) for k in patch.last.kept] == [len(k) for k in last.kept] == [4, 4]
    with masked(model.whole.mind.notions, [Drops.of(last)], inputs["attention_mask"]):
        want = model(**inputs).logits
        again = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    text = (inputs["input_ids"] != 3) & inputs["attention_mask"].bool()
    torch.testing.assert_close(got[text], want[text], rtol=1e-4, atol=1e-4)
    assert tokens.tolist() == again.tolist()
    assert not torch.allclose(got[text], plain[text], atol=1e-2)
    assert torch.equal(model(**inputs).logits, plain)


def test_a_method_says_what_it_cannot_read() -> None:
    """IWP reads keys before rotation, and raises where the rotation has an unknown name."""
    model, inputs = build(), batch()
    with vtprune.patch(model, ratio=0.25, method="iwp"), pytest.raises(vtprune.MethodError, match="rotated keys"):
        model(**inputs)


def test_its_text_passes_untouched() -> None:
    model, inputs = build(), batch()
    text = {"input_ids": inputs["input_ids"][:, -4:]}
    plain = model(**text).logits
    with vtprune.patch(model, ratio=0.25) as patch:
        assert torch.equal(model(**text).logits, plain)
        assert patch.last is None
        with patch.paused():
            model(**inputs)
        assert patch.last is None


def test_no_placeholder_is_refused_at_once() -> None:
    with pytest.raises(vtprune.UnsupportedModelError, match="no placeholder token ids"):
        vtprune.patch(build("no placeholder"), ratio=0.25)


@pytest.mark.parametrize(
    ("variant", "placeholders", "reason"),
    [
        ("lengthens", 1, "changes the length of its prompt"),  # one placeholder becomes sixteen columns
        ("layers not called", 16, "without calling"),  # hooks would never run
        ("sideways", 1, "rounds to all"),  # pictures are mixed into every column
        ("fused", 16, "vision tower ran while the decoder did"),  # with an unknown argument name
    ],
)
def test_what_cannot_be_pruned_is_said_at_the_first_picture(variant: str, placeholders: int, reason: str) -> None:
    model, inputs = build(variant), batch(placeholders)
    plain = model(**inputs).logits
    with vtprune.patch(model, ratio=0.25, method="random") as patch:
        for call in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=2)):
            with pytest.raises(vtprune.VTPruneError, match=reason):
                call()
        with patch.paused():
            assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, plain)


def test_pictures_without_placeholders_are_an_error() -> None:
    model, inputs = build(), batch(16)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, 9)
    with vtprune.patch(model, ratio=0.25, method="random"), pytest.raises(vtprune.NothingPrunedError, match="without"):
        model(**inputs)


def test_tensors_without_values_are_refused() -> None:
    from vtprune.models import unsupported

    with pytest.raises(vtprune.UnsupportedModelError, match="depends on values"):
        unsupported.refuse_tracing({"input_ids": torch.ones(1, 3, dtype=torch.long, device="meta")})
    unsupported.refuse_tracing({"input_ids": torch.ones(1, 3, dtype=torch.long), "inputs_embeds": None})
