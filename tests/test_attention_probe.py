# SPDX-License-Identifier: Apache-2.0
"""Reading a decoder layer: one run for both rotations, and projections that are computed once for all readers."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from families import FAMILIES, Image
from torch import nn

import vtprune
from tests.architectures.checks import fresh
from vtprune.core.tokens import AttentionInputs
from vtprune.methods import ScoreMethod, Stage
from vtprune.models import attention_probe
from vtprune.models.attention_probe import Projections, probe, probe_both, shareable

PROMPT = [[4, Image(0), 6]]


@pytest.fixture(autouse=True)
def reading():
    attention_probe.install()
    yield
    attention_probe.uninstall()


def layer_call(name):
    """A layer of a model, and the arguments that the decoder calls it with."""
    model, calls = FAMILIES[name].build(), []
    layer = vtprune.inspect(model).layers[1]
    handle = layer.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        model(**FAMILIES[name].batch(PROMPT), use_cache=False)
    handle.remove()
    return layer, *calls[0]


def counted(layer, share=True):
    """Counts the runs of a layer's linear maps; with `share`, makes them shareable, as a patch does."""
    runs = Counter()

    def count(name, run):
        def forward(x):
            runs[name] += 1
            return run(x)

        return forward

    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            linear.forward = count(name, linear.forward)
            if share:
                linear.forward = shareable(linear)
    return runs


def assert_equal(found, expected):
    for name in ("query", "key", "value"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert (found.scaling, found.softcap) == (expected.scaling, expected.softcap)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_run_reads_before_and_after_rotation(name):
    call = layer_call(name)
    before, after = probe_both(*call)
    assert_equal(before, probe(*call, rope=False))
    assert_equal(after, probe(*call, rope=True))
    assert not torch.equal(before.key, after.key)


class Joined(nn.Module):
    """A layer that joins rotated parts of the head with others, so two rotations at once do not fit."""

    def __init__(self, layer):
        super().__init__()
        self.inner, self.runs = layer, 0

    def forward(self, hidden_states, position_embeddings, **kwargs):
        self.runs += 1
        torch.cat([position_embeddings[0], torch.ones(1, hidden_states.shape[1], 2)], -1)
        return self.inner(hidden_states, position_embeddings=position_embeddings, **kwargs)


def test_a_layer_that_takes_no_two_rotations_is_tried_once():
    layer, args, kwargs = layer_call("llava")
    layer = Joined(layer)
    assert probe_both(layer, args, kwargs) is None
    assert probe_both(layer, args, kwargs) is None
    assert layer.runs == 1


def test_running_out_of_memory_is_no_reason_to_try_otherwise():
    layer, args, kwargs = layer_call("llava")

    class Full(nn.Module):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        probe_both(Full(), args, kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_reader_runs_no_projection(name):
    layer, args, kwargs = layer_call(name)
    expected = [probe(layer, args, kwargs, rope) for rope in (False, True)]
    runs, projections = counted(layer), Projections()
    for rope, qkv in zip((False, True), expected, strict=True):
        assert_equal(probe(layer, args, kwargs, rope, projections), qkv)
    assert set(runs.values()) == {1}
    probe(layer, args, kwargs, True)  # without projections to share, they run again
    assert set(runs.values()) == {2}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_cut_runs_the_projections_of_its_layer_once(name, layer):
    """The probe projects the whole prompt; the layer, which runs next on the kept tokens, is handed their rows."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.batch(PROMPT)
    runs = counted(vtprune.inspect(model).layers[layer], share=False)
    with torch.no_grad():
        model(**inputs)
        plain = dict(runs)
        runs.clear()
        with vtprune.patch(model, ratio=0.25, method=vtprune.methods.IWP(layer=layer)):
            model(**inputs)
    assert runs == plain


def test_a_layer_with_other_states_projects_for_itself():
    """What was recorded of one run of a layer is not taken for that of a run on other states."""
    layer, args, kwargs = layer_call("llava")
    runs, projections = counted(layer), Projections()
    probe(layer, args, kwargs, True, projections)
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    projections.give(torch.Size([1, hidden.shape[1] + 1]), lambda rows: rows)
    assert attention_probe.state.share is None
    projections.give(hidden.shape[:2], lambda rows: rows[:, :3])
    assert attention_probe.state.share is not None
    attention_probe.leave()
    assert attention_probe.state.share is None
    assert set(runs.values()) == {1}


def test_projections_are_kept_apart_by_thread():
    layer, args, kwargs = layer_call("llava")
    runs = counted(layer)
    attention_probe.state.share = lambda linear, run, x: pytest.fail("taken by another thread")
    try:
        found = []
        thread = threading.Thread(target=lambda: found.append(layer(*args, **kwargs)))
        thread.start()
        thread.join()
    finally:
        attention_probe.leave()
    assert found and set(runs.values()) == {1}


@dataclass
class Reader(ScoreMethod):
    """Keeps the last tokens; reads layers 0 and 1, before rotation and after it."""

    read: list[AttentionInputs] = field(default_factory=list)

    def schedule(self, num_layers):
        return (Stage(1, 0.3),)

    def required_layer_inputs(self, num_layers):
        return (0,)

    def score(self, tokens):
        wanted = [(layer, rope) for layer in (0, 1) for rope in (False, True)]
        self.read = [tokens.attention_inputs(*which) for which in wanted]
        return tokens.position.float()


@pytest.mark.parametrize("architecture", ["kimi_k25", "mistral_large4", "dots3_note"])
@torch.no_grad()
def test_cached_latents_are_read_as_the_keys_that_are_attended_to(architecture, monkeypatch):
    """Multi-head latent attention: a method reads the same of a prompt in one call, and after a turn of text or with
    a static cache, whose latents the layers expand together with those of the call."""
    from tests.architectures.run import prepare, registered

    if architecture not in registered():
        pytest.skip("not in this version of transformers")
    built, prompts = prepare(architecture, registered()[architecture])
    model, batch = built.model, prompts.batch([[9, "image", 6]])
    shape = batch["input_ids"].shape
    later = {name: x[:, 4:] if isinstance(x, torch.Tensor) and x.shape == shape else x for name, x in batch.items()}
    reader = Reader()
    settings = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    with vtprune.patch(model, ratio=0.3, method=reader) as patch:
        model(**fresh(batch))
        whole, kept = reader.read, patch.last.kept[0].tolist()
        model.generate(**fresh(batch), **settings)
        static = reader.read
        cache = model(input_ids=batch["input_ids"][:, :4], use_cache=True).past_key_values
        model(**fresh(later) | {"attention_mask": None}, past_key_values=cache)
        assert patch.last.kept[0].tolist() == kept
    assert len(whole) == 4 and whole[1].keys.shape[0] == shape[1]
    for found, place in ((static, shape[1]), (reader.read, shape[1] - 4)):
        for index, (got, want) in enumerate(zip(found, whole, strict=True)):
            count = place if index in (0, 2) else shape[1]  # cached keys are rotated, and left out of unrotated ones
            torch.testing.assert_close(got.queries, want.queries)
            torch.testing.assert_close(got.keys, want.keys[-count:])
            torch.testing.assert_close(got.values, want.values[-count:])
    monkeypatch.setattr(attention_probe, "EXPAND_LATENTS", "no such method")
    with vtprune.patch(model, ratio=0.3, method=reader):
        cache = model(input_ids=batch["input_ids"][:, :4], use_cache=True).past_key_values
        with pytest.raises(vtprune.MethodError, match="has no no such method.*'divprune'"):
            model(**fresh(later) | {"attention_mask": None}, past_key_values=cache)


@pytest.mark.parametrize("outer", [False, True])
def test_hooks_work_again_after_a_run_without_them_that_failed(outer):
    def failing():
        assert attention_probe.is_probing()
        raise RuntimeError

    def run():
        with pytest.raises(RuntimeError):
            attention_probe.without_hooks(failing)
        return attention_probe.is_probing()

    assert (attention_probe.without_hooks(run) if outer else run()) is outer
