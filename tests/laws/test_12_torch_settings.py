# SPDX-License-Identifier: Apache-2.0
"""Law 12: torch's default dtype and device, and its deterministic algorithms, change nothing about a pruned call."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Image, Video
from support import model_of
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import vtprune
import vtprune_kernels
from vtprune import methods, towers

FOLDERS = tuple(f"{Path(package.__file__).parent}{os.sep}" for package in (vtprune, vtprune_kernels))


class _Elsewhere(TorchFunctionMode):
    """A default device for this package only, without numbers; a model needs its own device to be the default one."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        here = sys._getframe(1).f_code.co_filename.startswith(FOLDERS)
        if here and func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms, memory filled with NaN where it is not initialized, and warnings as errors."""
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable] = {
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "device": _Elsewhere,
    "deterministic": _deterministic,
}
PICTURES = [[3, Image(0), 5], [2, Image(1), 4, Image(2), 7]]
CLIPS = [[4, Video(3), 3]]


def _answer(family: str, batch: dict, options: dict[str, Any]) -> tuple[torch.Tensor, list, str]:
    """Logits, kept tokens and report (without times) of one prefill, with a patch of its own."""
    model = model_of(family)
    with vtprune.patch(model, ratio=0.4, **options) as patch:
        logits = model(**batch).logits
        kept = [kept.tolist() for kept in patch.last.kept]
        return logits, kept, re.sub(r"[\d.]+ ms", "", str(patch.last.report()))


def _check(family: str, prompts: list, make: Callable[[], dict[str, Any]]) -> None:
    """Asserts equal answers under all settings; `make` creates the options, under the setting as well."""
    batch = FAMILIES[family].batch(prompts)
    try:
        logits, kept, report = _answer(family, batch, make())
    except vtprune.VTPruneError as error:
        pytest.skip(f"refused: {error}")
    for name, setting in SETTINGS.items():
        with setting():
            again, others, written = _answer(family, batch, make())
        assert others == kept, name
        assert torch.equal(again, logits), f"{name}: logits differ by up to {float((again - logits).abs().max()):g}"
        assert written == report, name


@pytest.mark.parametrize("name", methods.names())
def test_settings_of_torch(family: str, name: str) -> None:
    for_clips = name not in methods.for_pictures()
    if for_clips and FAMILIES[family].video is None:
        pytest.skip("the method is for clips, which the model does not take")
    _check(family, CLIPS if for_clips else PICTURES, lambda: {"method": methods.get(name)()})


@pytest.mark.parametrize("name", ["Attention", "Change", "Pixels", "Random", "Similar", "Uniform"])
def test_settings_of_torch_with_a_cut_tower(family: str, name: str) -> None:
    _check(family, PICTURES, lambda: {"method": "visionzip", "tower": getattr(towers, name)(keep=0.5)})


@pytest.mark.parametrize("name", ["iwp", "pyramiddrop"])
def test_settings_of_torch_in_generation(family: str, name: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(PICTURES)
    modes = ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False})

    def answers() -> list[torch.Tensor]:
        with vtprune.patch(model, ratio=0.4, method=name):
            return [model.generate(**batch, do_sample=False, max_new_tokens=3, **mode) for mode in modes]

    want = answers()
    for changed, setting in SETTINGS.items():
        with setting():
            got = answers()
        assert all(map(torch.equal, got, want)), changed
