# SPDX-License-Identifier: Apache-2.0
"""Transfers between host and device at a cut: indices without synchronization, all results in one transfer."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Image
from support import model_of

import vtprune
from vtprune.core.transfer import DeferredChecks, to_device

PAIR = [[3, Image(0), 5], [2, Image(0), 3]]


def refusal(text: str):
    def refuse() -> None:
        raise vtprune.MethodError(text)

    return refuse


def test_answers_on_a_cpu_are_not_copied_from_a_device(monkeypatch):
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(x.numel()) or cpu(x))
    checks = DeferredChecks()
    checks.add(torch.ones(3), refusal("one"))
    checks.add(torch.tensor([1, 2]), refusal("two"))
    keep, scores = torch.tensor([True, False, True]), torch.tensor([0.5, -torch.inf, 3.0], dtype=torch.bfloat16)
    found = checks.raise_if_failed(keep, scores)
    assert copies == []  # on a CPU there is nothing to copy
    assert torch.equal(found[0], keep) and torch.equal(found[1], scores)
    assert [x.dtype for x in found] == [torch.bool, torch.bfloat16]


def test_the_first_broken_flag_speaks_and_is_heard_once():
    checks = DeferredChecks()
    for number in range(3):
        x = torch.tensor([1.0, torch.inf if number else 2.0])
        checks.add(x, refusal(f"flag {number}") if number else lambda: None)  # each function looks at its own tensor
    with pytest.raises(vtprune.MethodError, match="flag 1"):
        checks.raise_if_failed(torch.ones(3))
    assert [x.tolist() for x in checks.raise_if_failed(torch.ones(2, 1))] == [[[1.0], [1.0]]]


def test_only_copies_from_the_host_do_not_wait(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: asked.append(non_blocking))
    to_device(torch.zeros(1), torch.device("cpu"))
    to_device(torch.zeros(1, device="meta"), torch.device("cpu"))
    assert asked == [True, False]


@pytest.mark.parametrize("method, cuts", [("iwp", 1), ("divprune", 1), ("pyramiddrop", 3)])
def test_a_cut_reads_the_device_once(monkeypatch, method, cuts):
    calls, settle = [], DeferredChecks.raise_if_failed
    monkeypatch.setattr(
        DeferredChecks, "raise_if_failed", lambda self, *rest: calls.append(len(self.sums)) or settle(self, *rest)
    )
    model, batch = model_of("llava"), FAMILIES["llava"].batch(PAIR)
    with vtprune.patch(model, ratio=0.3, method=method):
        model(**batch)
    assert len(calls) == cuts and min(calls) >= 1


def test_an_error_of_the_method_gives_way_to_what_broke_it():
    """If the method fails on NaN, the error about NaN is raised instead of its own."""
    model, batch = model_of("llava"), FAMILIES["llava"].batch(PAIR)

    class Fails(vtprune.methods.get("random")):
        def choose(self, tokens):
            raise ZeroDivisionError("its own")

    with vtprune.patch(model, ratio=0.5, method=Fails()):
        with pytest.raises(ZeroDivisionError, match="its own"):
            model(**batch)
        batch["pixel_values"] = batch["pixel_values"].clone().fill_(torch.nan)
        with pytest.raises(vtprune.MethodError, match="sample 0, 1 hold NaN"):
            model(**batch)
