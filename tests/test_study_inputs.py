# SPDX-License-Identifier: Apache-2.0
"""The studies refuse what is no list of batches, and counts below 1, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from families import FAMILIES
from support import ONE, model_of

import vtprune
from vtprune.errors import InputError
from vtprune.methods import FastV
from vtprune.methods.debiased.method import Debiased
from vtprune.study.auto import calibrate
from vtprune.study.calibration import fit
from vtprune.study.certify import certify
from vtprune.study.compare import compare
from vtprune.study.fidelity import Prompt, measure_prompt
from vtprune.study.timing import measure_side_by_side

BATCH = FAMILIES["llava"].batch(ONE)
TAKE_BATCHES: dict[str, Callable[[Any, Any], Any]] = {
    "calibrate": lambda model, batches: calibrate(model, batches, ratio=0.3),
    "certify": certify,
    "compare": lambda model, batches: compare(model, batches, mean_ratio=0.5),
    "fit": lambda model, batches: fit(Debiased(host=FastV()), model, batches),
}


@pytest.mark.parametrize("study", TAKE_BATCHES)
@pytest.mark.parametrize("given", [BATCH, [list(BATCH.values())], "prompt"], ids=["one batch", "tensors", "text"])
def test_what_is_no_list_of_batches(study: str, given: Any) -> None:
    with pytest.raises(InputError, match="keyword arguments"):
        TAKE_BATCHES[study](model_of("llava"), given)
    assert vtprune.patch(model_of("llava"), ratio=0.5).remove() is None  # nothing is left on the model


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_counts_below_one(bad: Any) -> None:
    model = model_of("llava")
    calls: dict[str, Callable[[], Any]] = {
        "repeats": lambda: compare(model, [BATCH], mean_ratio=0.5, repeats=bad),
        "max_new_tokens": lambda: certify(model, [BATCH], max_new_tokens=bad),
    }
    for name in ("repeats", "max_new_tokens"):
        prompt = Prompt(BATCH, "picture")
        calls[f"{name} of a prompt"] = lambda name=name, prompt=prompt: measure_prompt(model, prompt, [], **{name: bad})
    for name, call in calls.items():
        with pytest.raises(vtprune.VTPruneError, match=f"{name.split()[0]} is {bad}; expected a whole number"):
            call()
    with vtprune.patch(model, ratio=0.5) as patch, pytest.raises(vtprune.VTPruneError, match="repeats is"):
        measure_side_by_side(model, None, BATCH, patch, repeats=bad)
