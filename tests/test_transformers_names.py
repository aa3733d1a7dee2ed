# SPDX-License-Identifier: Apache-2.0
"""Names of transformers that vtprune relies on, and recognition of caches."""

from __future__ import annotations

import inspect

import pytest
from transformers import AutoModelForImageTextToText, DynamicCache, Qwen2_5_VLForConditionalGeneration, generation

from vtprune.models import transformers_names


def test_no_name_is_gone() -> None:
    assert transformers_names.missing() == []


def test_a_name_that_is_gone_is_reported_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(generation.GenerationMixin, transformers_names.MAKE_CANDIDATES)
    [line] = transformers_names.missing()
    assert "GenerationMixin._get_candidate_generator" in line and "assisted" in line


def test_caches_are_found_by_what_they_can_do() -> None:
    cache = DynamicCache()
    assert transformers_names.cache_of({"a": 1, "by_any_name": cache, "mask": None}) is cache
    assert transformers_names.cache_of([None, "cache"]) is None


def test_forwards_that_take_a_cache_are_told_by_their_arguments() -> None:
    assert transformers_names.takes_cache(Qwen2_5_VLForConditionalGeneration.forward)
    assert not transformers_names.takes_cache(AutoModelForImageTextToText.from_pretrained)
    assert transformers_names.ENCODER_OUTPUTS in inspect.getsource(
        inspect.getmodule(Qwen2_5_VLForConditionalGeneration)
    )
