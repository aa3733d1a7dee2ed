# SPDX-License-Identifier: Apache-2.0
"""Law 13: cuts inside the vision tower obey T1 to T5 (T6, cheap, is in `test_13_towers_cheap.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, Image, Video
from support import CLIP, MIXED, ONE, in_threads, model_of
from test_7_no_trace import trace
from tower_reference import Shown, blocks_of, copies, follows_neighbors, hiding, prefix_of

import vtprune
from vtprune import methods, towers
from vtprune.towers.run import RunningTower
from vtprune.vision import attention as vision_attention

KEEP = 0.4


@dataclass
class Norm(towers.TowerMethod):
    """A user-defined method, as in the documentation."""

    def score(self, patches: towers.Patches) -> torch.Tensor:
        return patches.states.norm(dim=-1)


def made(name: str, keep: float | int = KEEP, **options: Any) -> towers.TowerMethod:
    return (Norm if name == "Norm" else getattr(towers, name))(keep=keep, **options)


NAMES = ["Attention", "Change", "Norm", "Pixels", "Random", "Similar", "Uniform"]
every_method = pytest.mark.parametrize("name", NAMES)


@contextmanager
def last_states(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the states after the tower's last block, as the rest of the model receives them."""
    seen: list[torch.Tensor] = []

    def look(module: torch.nn.Module, args: tuple, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handle = blocks_of(vtprune.inspect(model).vision_tower)[-1].register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def reference_rebuild(name: str, runs: list[Any], choices: list[towers.TowerChoice]) -> Callable | None:
    """Plain version of a method's rebuild of dropped patches; copies take the sources that the method returned."""
    if name == "Change":
        return follows_neighbors
    if name not in ("Similar", "Pixels"):
        return None
    source = choices[0].rebuild
    assert source is not None
    starts = torch.tensor([0, *runs[0].patches]).cumsum(0)
    place = torch.arange(int(starts[-1]))
    place[source.dropped] = source.sources[:, 0]

    def sources(picture: int, was: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return place[starts[picture] : starts[picture + 1]] - starts[picture]

    return copies(sources)


def spied(method: towers.TowerMethod) -> list[towers.TowerChoice]:
    choices: list[towers.TowerChoice] = []
    choose = method.choose

    def record(patches: towers.Patches) -> towers.TowerChoice:
        choices.append(choose(patches))
        return choices[-1]

    method.choose = record  # type: ignore[method-assign]
    return choices


@every_method
def test_all_patches_kept_changes_no_bit(family: str, name: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    want = model(**batch).logits
    tokens = model.generate(**FAMILIES[family].batch(ONE), max_new_tokens=3, do_sample=False)
    with vtprune.patch(model, tower=made(name, 1.0)) as patch:
        assert torch.equal(model(**batch).logits, want)
        tower = patch.last.tower
        assert [len(kept) for kept in tower.kept] == tower.patches and tower.flops[0] == tower.flops[1]
        again = model.generate(**FAMILIES[family].batch(ONE), max_new_tokens=3, do_sample=False)
    assert torch.equal(again, tokens)


def test_a_share_of_one_changes_no_bit(family: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    want = model(**batch).logits
    with vtprune.patch(model, tower=1.0):
        assert torch.equal(model(**batch).logits, want)


@every_method
def test_kept_rows_are_those_of_the_tower_that_hides_the_others(family: str, name: str, attention: str) -> None:
    model, batch = model_of(family, attention), FAMILIES[family].batch(MIXED)
    method = made(name)
    choices = spied(method)
    with last_states(model) as seen, vtprune.patch(model, tower=method) as patch:
        logits = model(**batch).logits
        runs = patch.last.tower_runs
        got = list(seen)
    assert all(len(kept) < count for run in runs for kept, count in zip(run.kept, run.patches, strict=True))
    shown = [Shown(run.block, run.kept, run.patches, reference_rebuild(name, runs, choices)) for run in runs]
    tower = vtprune.inspect(model).vision_tower
    with last_states(model) as seen, hiding(tower, shown):
        want_logits = model(**batch).logits
    assert len(got) == len(seen) == len(runs)
    for ours, theirs in zip(got, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, want_logits, rtol=1e-4, atol=2e-5)
    plain = model(**batch).logits
    assert float((logits - plain).abs().max()) > 1e-3, "the cut changed no logit, so the comparison is vacuous"


@pytest.mark.parametrize("block", [0, 1, -1])
def test_at_every_block(family: str, block: int) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    tower = vtprune.inspect(model).vision_tower
    block %= len(blocks_of(tower))
    with last_states(model) as seen, vtprune.patch(model, tower=towers.Uniform(keep=KEEP, block=block)) as patch:
        model(**batch)
        runs, got = patch.last.tower_runs, list(seen)
    with last_states(model) as seen, hiding(tower, [Shown(r.block, r.kept, r.patches) for r in runs]):
        model(**batch)
    for ours, theirs in zip(got, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_clips() -> None:
    for family in (name for name, f in FAMILIES.items() if f.video is not None):
        model, batch = model_of(family), FAMILIES[family].batch(CLIP)
        tower = vtprune.inspect(model).vision_tower
        for name in ("Change", "Uniform", "Pixels"):
            method = made(name)
            choices = spied(method)
            with last_states(model) as seen, vtprune.patch(model, tower=method) as patch:
                model(**batch)
                runs, got = patch.last.tower_runs, list(seen)
            assert len(runs) == 2, "pictures and clips are encoded in separate calls"
            shown = [
                Shown(run.block, run.kept, run.patches, reference_rebuild(name, [run], [choice]))
                for run, choice in zip(runs, choices, strict=True)
            ]
            with last_states(model) as seen, hiding(tower, shown):
                model(**batch)
            for ours, theirs in zip(got, seen, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frame", [0, 1])
def test_a_change_in_one_frame_of_a_patch_is_seen(frame: int) -> None:
    """A patch that changes in either of its two frames (Qwen's towers) is not dropped as a copy of its neighbor."""
    model, batch = model_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch(CLIP)
    pixels = batch["pixel_values_videos"].fill_(0.5)
    kept = []
    with vtprune.patch(model, tower=towers.Pixels()) as patch:
        for value in (0.5, 1.0):
            pixels.reshape(len(pixels), 3, 2, -1)[9, :, frame] = value
            model(**batch)
            kept.append(len(torch.cat(patch.last.tower_runs[-1].kept)))
    assert kept[0] < kept[1] < len(pixels)


@every_method
def test_a_picture_alone_is_as_in_a_batch(family: str, name: str) -> None:
    model, maker = model_of(family), FAMILIES[family]
    alone, together = maker.batch(ONE), maker.batch(MIXED)
    with vtprune.patch(model, tower=made(name)) as patch:
        want = model(**alone).logits[0, -len(ONE) - 4 :]
        kept = patch.last.tower.kept
        got = model(**together).logits[0]
        for mine, theirs in zip(kept, patch.last.tower.kept, strict=False):
            assert torch.equal(mine, theirs)
    torch.testing.assert_close(got[-want.shape[0] :], want, rtol=1e-4, atol=1e-4)


def test_pictures_that_decide_for_themselves(family: str) -> None:
    """Without a budget, pictures of one batch keep different numbers of patches."""
    model, maker = model_of(family), FAMILIES[family]
    batch = maker.batch([[3, Image(0), 5], [3, Image(0), 5]])
    pixels = batch["pixel_values"]
    half = len(pixels) // 2
    pixels[:half] = pixels[:half].sign() * (pixels[:half].flatten(1).abs().cumsum(1) % 7 < 2).reshape(
        pixels[:half].shape
    )
    if pixels.dim() >= 4:
        pixels[:half, ..., : pixels.shape[-1] // 2] = 0.5
    else:
        pixels[: half // 2] = 0.5
    first = {k: (v[:1] if v.shape[0] == 2 else v[:half]) for k, v in batch.items()}
    tower = vtprune.inspect(model).vision_tower
    method = towers.Pixels()
    choices = spied(method)
    with last_states(model) as seen, vtprune.patch(model, tower=method) as patch:
        logits = model(**batch).logits
        runs, got = patch.last.tower_runs, list(seen)
        counts = [len(kept) for kept in runs[0].kept]
        assert min(counts) < max(counts), "the test needs pictures with different counts"
        choices_together = list(choices)
        alone = model(**first).logits
        for mine, theirs in zip(patch.last.tower.kept, runs[0].kept, strict=False):
            assert torch.equal(mine, theirs)
    torch.testing.assert_close(logits[:1], alone, rtol=1e-4, atol=1e-4)
    shown = [Shown(0, runs[0].kept, runs[0].patches, reference_rebuild("Pixels", runs, choices_together))]
    with last_states(model) as seen, hiding(tower, shown):
        model(**batch)
    torch.testing.assert_close(got[0], seen[0], rtol=1e-5, atol=1e-5)


@every_method
def test_counts_are_exact_and_groups_whole(family: str, name: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    merge = {"qwen2_vl": 2, "qwen2_5_vl": 2, "qwen3_vl": 2, "internvl": 2, "smolvlm": 2}.get(family, 1)
    for keep in (0.3, 0.75, 2):
        with vtprune.patch(model, tower=made(name, keep)) as patch:
            model(**batch)
            tower = patch.last.tower
        for kept, count in zip(tower.kept, tower.patches, strict=True):
            groups = count // merge**2
            wanted = max(1, round(keep * groups)) if isinstance(keep, float) else min(keep, groups)
            assert len(kept) == wanted * merge**2
            assert torch.equal(kept, kept.unique())
    with vtprune.patch(model, tower=made(name, 0.3, group=False)) as patch:
        model(**batch)
        tower = patch.last.tower
    assert [len(kept) for kept in tower.kept] == [max(1, round(0.3 * count)) for count in tower.patches]


def test_units_are_what_the_projector_merges(family: str) -> None:
    """A change to one unit's patches after the last block changes one visual token (and those that blend tiles)."""
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    parts = vtprune.inspect(model)
    units: list[tuple[torch.Tensor, int]] = []

    @dataclass
    class Look(towers.Uniform):
        def choose(self, patches: towers.Patches) -> towers.TowerChoice:
            units.append((patches.unit.clone(), len(patches)))
            return super().choose(patches)

    with vtprune.patch(model, tower=Look(keep=0.5)):
        model(**batch)
    unit, count = units[0]
    embeds: list[torch.Tensor] = []
    grab = parts.decoder.register_forward_pre_hook(
        lambda m, a, k: embeds.append(k["inputs_embeds"].clone()), with_kwargs=True
    )
    prefix = prefix_of(parts.vision_tower)
    model(**batch)
    tokens = int((batch["input_ids"] == 3).sum())
    for number in (0, 1, int(unit.max()) // 2):
        rows = (unit == number).nonzero()[:, 0]

        def change(module: torch.nn.Module, args: tuple, output: Any, rows: torch.Tensor = rows) -> Any:
            states = (output[0] if isinstance(output, tuple) else output).clone()
            flat = states if states.dim() == 2 else states[0]
            flat[rows % (flat.shape[0] - prefix) + prefix] += 1.0 + torch.arange(flat.shape[1]) / 7
            return (states, *output[1:]) if isinstance(output, tuple) else states

        layer = getattr(model.config, "vision_feature_layer", -1)
        read = blocks_of(parts.vision_tower)[layer if isinstance(layer, int) and layer < 0 else -1]
        handle = read.register_forward_hook(change)
        model(**batch)
        handle.remove()
        changed = int((embeds[-1] - embeds[0]).abs().amax(-1).gt(1e-6).sum())
        if family in ("llava", "llava_next", "llava_onevision"):
            assert len(rows) == 1  # nothing is merged there
        else:
            assert changed == 1 and len(rows) * tokens == count
    grab.remove()


def test_ties_go_to_the_smaller_number(family: str) -> None:
    @dataclass
    class Same(towers.TowerMethod):
        def score(self, patches: towers.Patches) -> torch.Tensor:
            return torch.zeros(len(patches))

    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    with vtprune.patch(model, tower=Same(keep=0.5)) as patch:
        model(**batch)
        raster = family in ("internvl", "smolvlm")  # a merge group of theirs lies in several rows of the picture
        for kept, count in zip(patch.last.tower.kept, patch.last.tower.patches, strict=True):
            assert raster or torch.equal(kept, torch.arange(len(kept)))
            assert not raster or torch.equal(kept, torch.arange(count // 2))


def test_large_pictures_are_read_at_some_query_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    received: list[torch.Tensor] = []

    @dataclass
    class Reads(towers.TowerMethod):
        def score(self, patches: towers.Patches) -> torch.Tensor:
            received.append(patches.received())
            return received[-1]

    found = []
    for large, sample in ((10**6, 2), (2, 10**6), (2, 2)):
        monkeypatch.setattr(vision_attention, "LARGE", large)
        monkeypatch.setattr(vision_attention, "SAMPLE", sample)
        with vtprune.patch(model, tower=Reads(keep=KEEP)):
            model(**batch)
        found.append(torch.cat(received))
        received.clear()
    exact, every_row, some_rows = found
    torch.testing.assert_close(every_row, exact)
    assert not torch.allclose(some_rows, exact)


@every_method
def test_two_runs_keep_the_same(family: str, name: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    before = torch.random.get_rng_state()
    with vtprune.patch(model, tower=made(name)) as patch:
        model(**batch)
        first = patch.last.tower.kept
        model(**batch)
        assert all(map(torch.equal, first, patch.last.tower.kept))
    assert torch.equal(torch.random.get_rng_state(), before)


@every_method
def test_remove_leaves_no_trace(family: str, name: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    logits = model(**batch, output_hidden_states=True).logits
    before = trace(model)
    patch = vtprune.patch(model, ratio=0.5, method="random", tower=made(name))
    model(**batch)
    assert trace(model) != before
    patch.remove()
    assert trace(model) == before
    assert torch.equal(model(**batch).logits, logits)


def test_every_decoder_method_follows(family: str, method: str) -> None:
    """With a cut tower, a decoder method selects and answers as on the features of the masked tower."""
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    cut = towers.Random(keep=0.5)
    try:
        with vtprune.patch(model, ratio=0.4, method=method, tower=cut) as patch:
            got = model(**batch).logits
            runs, kept = patch.last.tower_runs, patch.last.kept
    except vtprune.MethodError as error:
        pytest.skip(f"refused: {error}")
    tower = vtprune.inspect(model).vision_tower
    reads_tower = method in ("visionzip", "vispruner", "prumerge", "vflowopt", "zoo_prune", "scope", "cdpruner")
    if reads_tower:  # they read the tower itself, which differs in the reference
        assert torch.isfinite(got).all() and len(kept[0]) == len(patch.last.kept[0])
        return
    with (
        vtprune.patch(model, ratio=0.4, method=method) as alone,
        hiding(tower, [Shown(r.block, r.kept, r.patches) for r in runs]),
    ):
        want = model(**batch).logits
    assert torch.equal(alone.last.kept[0], kept[0])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_decoder_methods_see_what_the_merger_was_spared(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merger that is handed one of several equal merge groups changes nothing for methods that read its input."""
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    answers = []
    for spared in (True, False):
        if not spared:
            monkeypatch.setattr(RunningTower, "before_merger", lambda *_: None)
        try:
            with vtprune.patch(model, ratio=0.4, method=method, tower=made("Similar", 0.5)) as patch:
                answers.append((model(**batch).logits, patch.last.kept))
        except vtprune.MethodError as error:
            pytest.skip(f"refused: {error}")
    (got, kept), (want, wanted) = answers
    assert all(map(torch.equal, kept, wanted))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_pause_and_generation(family: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    plain, text = model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)
    with vtprune.patch(model, ratio=0.5, tower=KEEP) as patch:
        cut = model(**batch).logits
        assert not torch.equal(cut, plain)
        with patch.paused():
            assert torch.equal(model(**batch).logits, plain)
            assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), text)
        kept = patch.last.tower.kept
        model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert all(map(torch.equal, patch.last.tower.kept, kept)), "generate encodes pictures outside the model's call"
        for mode in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
            model.generate(**batch, max_new_tokens=2, **mode)
            assert all(map(torch.equal, patch.last.tower.kept, kept))


def test_encoders_called_by_hand(family: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    names = set(vtprune.inspect(model).composite.get_image_features.__code__.co_varnames)
    inputs = {k: v for k, v in batch.items() if k in names or k in ("pixel_values", "image_grid_thw", "image_sizes")}
    plain = model.get_image_features(**inputs)
    with vtprune.patch(model, tower=KEEP):
        cut = model.get_image_features(**inputs)
    first = plain.pooler_output if hasattr(plain, "pooler_output") else plain
    second = cut.pooler_output if hasattr(cut, "pooler_output") else cut
    pairs = zip(first, second, strict=True) if isinstance(first, (list, tuple)) else [(first, second)]
    for before, after in pairs:
        assert before.shape == after.shape and not torch.equal(before, after)


def test_threads_do_not_disturb_each_other(family: str) -> None:
    model, maker = model_of(family), FAMILIES[family]
    batches = [maker.batch(prompt, seed=seed) for seed, prompt in enumerate([ONE, [[3, Image(1), 5]], MIXED])]
    with vtprune.patch(model, ratio=0.5, method="random", tower=KEEP) as patch, torch.no_grad():
        want = []
        for batch in batches:
            want.append((model(**batch).logits, patch.last.tower.kept))
        failures: list[str] = []

        def work(number: int) -> None:
            with torch.no_grad():
                for _ in range(4):
                    logits, kept = model(**batches[number]).logits, patch.last.tower.kept
                    if not torch.equal(logits, want[number][0]) or not all(map(torch.equal, kept, want[number][1])):
                        failures.append(f"thread {number}")

        in_threads(work, 3)
    assert not failures


@pytest.mark.parametrize("name", ["Change", "Similar", "Uniform"])
def test_gradients_are_those_of_the_masked_tower(family: str, name: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    parts = vtprune.inspect(model)
    weight = next(p for n, p in blocks_of(parts.vision_tower)[-2].named_parameters() if p.dim() == 2)
    method = made(name)
    choices = spied(method)
    with torch.enable_grad():
        with vtprune.patch(model, tower=method) as patch:
            model(**batch).logits[0, -1].square().sum().backward()
            runs = patch.last.tower_runs
        got, weight.grad = weight.grad.clone(), None
        shown = [Shown(r.block, r.kept, r.patches, reference_rebuild(name, runs, choices)) for r in runs]
        with hiding(parts.vision_tower, shown):
            model(**batch).logits[0, -1].square().sum().backward()
        want, weight.grad = weight.grad.clone(), None
    model.zero_grad()
    assert float(want.abs().max()) > 0
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_gradient_checkpointing(family: str) -> None:
    model, batch = FAMILIES[family].build().train(), FAMILIES[family].batch(ONE)
    weight = next(p for n, p in blocks_of(vtprune.inspect(model).vision_tower)[0].named_parameters() if p.dim() == 2)
    grads = []
    with torch.enable_grad():
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            with vtprune.patch(model, tower=KEEP):
                try:
                    model(**batch, use_cache=False).logits.square().sum().backward()
                except vtprune.UnsupportedModelError as error:
                    pytest.skip(f"refused: {error}")
            grads.append(weight.grad.clone())
            model.zero_grad()
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_method
def test_half_precision(family: str, name: str, dtype: torch.dtype) -> None:
    model, batch = model_of(family, dtype=dtype), FAMILIES[family].batch(ONE, dtype=dtype)
    with vtprune.patch(model, ratio=0.5, method="random", tower=made(name)) as patch:
        logits = model(**batch).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    assert all(len(k) < n for k, n in zip(patch.last.tower.kept, patch.last.tower.patches, strict=True))


def test_autocast(family: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    with torch.autocast("cpu", torch.bfloat16), vtprune.patch(model, ratio=0.5, method="random", tower=KEEP) as patch:
        assert torch.isfinite(model(**batch).logits).all()
    assert patch.last.tower.kept


@pytest.mark.parametrize("installed_before", [True, False])
def test_captured_hidden_states_have_all_rows(family: str, installed_before: bool) -> None:
    """Captured hidden states have all rows, whether transformers' hooks or the patch's were installed first."""
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(ONE)
    tower = vtprune.inspect(model).vision_tower
    calls: list[tuple[tuple, dict]] = []
    handle = tower.register_forward_pre_hook(lambda m, a, k: calls.append((a, dict(k))), with_kwargs=True)
    model(**batch)
    handle.remove()
    args, kwargs = calls[0]
    kwargs["output_hidden_states"] = True
    if installed_before:
        tower(*args, **kwargs)
    for block in (0, 1):
        with vtprune.patch(model, tower=towers.Uniform(keep=KEEP, block=block)) as patch:
            model(**batch)
            runs = patch.last.tower_runs
            got = tower(*args, **kwargs)
        with hiding(tower, [Shown(r.block, r.kept, r.patches) for r in runs[:1]]):
            want = tower(*args, **kwargs)
        assert len(got.hidden_states) == len(want.hidden_states) == len(blocks_of(tower)) + 1
        for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_feature_layers_see_full_rows() -> None:
    """A projector that reads several layers (LLaVA) gets all rows from those before and after the cut."""
    config = FAMILIES["llava"].config()
    config.vision_feature_layer = [1, 2, -1]
    model = type(FAMILIES["llava"].build())(config).eval()
    batch = FAMILIES["llava"].batch(ONE)
    tower = vtprune.inspect(model).vision_tower
    with vtprune.patch(model, tower=towers.Uniform(keep=KEEP, block=1)) as patch:
        got, runs = model(**batch).logits, patch.last.tower_runs
    with hiding(tower, [Shown(r.block, r.kept, r.patches) for r in runs]):
        want = model(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_torch_compile(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(ONE)
    with vtprune.patch(model, ratio=0.5, method="random", tower=KEEP) as patch:
        want, kept = model(**batch).logits, patch.last.tower.kept
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        got = compiled(**batch).logits
        assert all(map(torch.equal, patch.last.tower.kept, kept))
    torch._dynamo.reset()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_replacing_and_repr(family: str) -> None:
    model = model_of(family)
    before = trace(model)
    with vtprune.patch(model, tower=0.5) as first:
        second = vtprune.patch(model, ratio=0.5, tower=towers.Random(keep=0.5))
        assert first.removed and "tower=" in repr(second)
        with pytest.raises(vtprune.BudgetError):
            vtprune.patch(model, ratio=0.5, tower=towers.Random(keep=0.5, block=99))
        assert not second.removed
        second.remove()
    assert trace(model) == before


@pytest.mark.parametrize("keep", [0.0, 1.5, -1, 0, True, "half"])
def test_shares_out_of_range(keep: Any) -> None:
    with pytest.raises((vtprune.BudgetError, vtprune.MethodError), match="expected"):  # a number, or of the right type
        towers.Change(keep=keep)


def test_what_tower_may_be() -> None:
    assert towers.resolve(0.35) == towers.Similar(keep=0.35)
    assert isinstance(towers.resolve(towers.Random), towers.Random)
    with pytest.raises(vtprune.MethodError, match=r"0\.35"):
        towers.resolve("change")  # type: ignore[arg-type]


def test_blocks_that_do_not_exist() -> None:
    model = model_of("qwen2_vl")
    with pytest.raises(vtprune.BudgetError, match="from 1 to 1"):
        vtprune.patch(model, tower=towers.Change(keep=0.5, block=0))
    with pytest.raises(vtprune.BudgetError, match="2 blocks"):
        vtprune.patch(model, tower=towers.Random(keep=0.5, block=2))


def test_a_share_that_rounds_to_all_is_an_error() -> None:
    model, batch = model_of("qwen2_vl"), FAMILIES["qwen2_vl"].batch([[3, Image(3), 5]])
    with (
        vtprune.patch(model, tower=0.95),
        pytest.raises(vtprune.NothingPrunedError, match="rounds to all"),
    ):
        model(**batch)


def test_answers_of_a_method_are_checked() -> None:
    model, batch = model_of("qwen2_vl"), FAMILIES["qwen2_vl"].batch(ONE)

    def answering(keep: Callable[[towers.Patches], torch.Tensor]) -> towers.TowerMethod:
        @dataclass
        class Bad(towers.TowerMethod):
            def choose(self, patches: towers.Patches) -> towers.TowerChoice:
                return towers.TowerChoice(keep(patches))

        return Bad(keep=0.5)

    for keep, message in (
        (lambda p: torch.ones(3, dtype=torch.bool), "expected bool of"),
        (lambda p: torch.arange(len(p)) < len(p) // 2 + 1, "part of a merge group"),
        (lambda p: torch.arange(len(p)) < 4, "the budget is"),
    ):
        with vtprune.patch(model, tower=answering(keep)), pytest.raises(vtprune.MethodError, match=message):
            model(**batch)


def test_no_method_is_without_a_test() -> None:
    known = {
        n for n in towers.__all__ if isinstance(v := getattr(towers, n), type) and issubclass(v, towers.TowerMethod)
    }
    assert known - {"TowerMethod"} == set(NAMES) - {"Norm"}
    assert methods.names()
    assert Video  # used in CLIP
