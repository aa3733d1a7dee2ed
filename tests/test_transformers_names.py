# SPDX-License-Identifier: Apache-2.0
"""Names of transformers that vtprune relies on, and recognition of caches."""

from __future__ import annotations

import inspect

import pytest
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    Qwen2_5_VLForConditionalGeneration,
    generation,
)

from vtprune.models import transformers_names


def test_no_name_is_gone() -> None:
    assert transformers_names.missing() == []


def test_a_name_that_is_gone_is_reported_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(generation.GenerationMixin, transformers_names.MAKE_CANDIDATES)
    [line] = transformers_names.missing()
    assert "GenerationMixin._get_candidate_generator" in line and "assisted" in line


@pytest.mark.parametrize("name", [transformers_names.VARIES, transformers_names.OF_LAYERS])
def test_names_of_configs_that_are_gone_are_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = next(cls for cls in PreTrainedConfig.__mro__ if name in vars(cls))
    monkeypatch.delattr(owner, name)
    [line] = transformers_names.missing()
    assert f"PreTrainedConfig.{name}" in line and "settings" in line


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
