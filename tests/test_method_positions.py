# SPDX-License-Identifier: Apache-2.0
"""`positions="compact"`, which renumbers kept tokens as official code does, for every method that has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from families import FAMILIES
from support import ONE, model_of, pruned

import vtprune
from vtprune import methods

RENUMBERING = [n for n in methods.names() if "positions" in {f.name for f in dataclasses.fields(methods.get(n))}]
# With one cut before the decoder, compact positions equal a prompt without the dropped tokens.
AT_INPUT: dict[str, dict[str, Any]] = {
    "cdpruner": {},
    "divprune": {},
    "prumerge": {},
    "resprune": {},
    "scope": {},
    "vflowopt": {"later": ()},
    "visionzip": {},
    "vispruner": {},
    "zoo_prune": {},
}
every = pytest.mark.parametrize("name", RENUMBERING)


def test_all_methods_whose_release_renumbers_have_the_switch() -> None:
    assert set(RENUMBERING) == {*AT_INPUT, "pyramiddrop", "transprune", "sparsevlm"}
    assert all(methods.get(name)().positions == "original" for name in RENUMBERING)


@pytest.mark.parametrize("name", list(AT_INPUT))
@torch.no_grad()
def test_compact_is_a_prompt_that_never_had_the_dropped_tokens(name: str) -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    decoder = vtprune.inspect(model).decoder
    given: list[torch.Tensor] = []
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    method = methods.get(name)(positions="compact", **AT_INPUT[name])
    with pruned(model, method, ratio=0.3) as (patch, spy):
        got = model(**batch).logits[:, -1]
        (tokens, choice), last = spy.choices[0], patch.last
    handle.remove()
    states = given[0].clone()
    if choice.hidden is not None:
        states[0, tokens.position[choice.keep]] = choice.hidden[choice.keep]
    stays = torch.ones(states.shape[1], dtype=torch.bool)
    stays[last.visual[0]] = False
    stays[last.kept[0]] = True
    assert len(last.kept[0]) == 8
    short = decoder(inputs_embeds=states[:, stays]).last_hidden_state[:, -1]
    torch.testing.assert_close(got, model.lm_head(short), rtol=1e-4, atol=1e-5)
    with pruned(model, methods.get(name)(**AT_INPUT[name]), ratio=0.3) as (patch, _):
        kept_in_place = model(**batch).logits[:, -1]
        assert torch.equal(patch.last.kept[0], last.kept[0])
    assert (kept_in_place - got).abs().max() > 1e-3


@every
@torch.no_grad()
def test_compact_generates_and_changes_what_is_computed(name: str) -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    logits = {}
    for positions in ("original", "compact"):
        with vtprune.patch(model, ratio=0.2, method=methods.get(name)(positions=positions)) as patch:
            out = model.generate(**batch, max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
            assert len(patch.last.kept[0]) == 5
        logits[positions] = torch.stack(out.logits)
    assert torch.isfinite(logits["compact"]).all()
    assert (logits["compact"] - logits["original"]).abs().max() > 1e-3


@every
def test_compact_is_refused_where_positions_have_several_axes(name: str) -> None:
    with pytest.raises(vtprune.MethodError, match="one axis"):
        vtprune.patch(model_of("qwen2_vl"), ratio=0.3, method=methods.get(name)(positions="compact"))


@every
def test_other_values_are_refused(name: str) -> None:
    with pytest.raises(vtprune.MethodError, match="positions is 'new'; expected 'original' or 'compact'"):
        methods.get(name)(positions="new")


def test_debiased_does_what_its_host_does() -> None:
    host = methods.PyramidDrop(positions="compact")
    assert methods.Debiased().positions == "original" and methods.Debiased(host).positions == "compact"
    with vtprune.patch(model_of("llava"), ratio=0.3, method=methods.Debiased(host)) as patch:
        assert patch.spec.renumbers
