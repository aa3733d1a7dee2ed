# SPDX-License-Identifier: Apache-2.0
"""`vtprune tune`: the search for a strategy of VFlowOpt, its file, and its command."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Image
from support import model_of

import vtprune
from vtprune import methods, refvlm
from vtprune.cli.main import main
from vtprune.core.budget import mean_share
from vtprune.methods import VFlowOpt
from vtprune.study import metrics, tune

BATCHES = [[[3, Image(0), 5], [6, Image(1), 2]], [[4, Image(0), 3]]]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return model_of("llava")


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    return [FAMILIES["llava"].batch(prompts, seed=number) for number, prompts in enumerate(BATCHES)]


def shares(method: VFlowOpt, num_layers: int) -> float:
    stages = method.schedule(num_layers)
    return mean_share(stages, [stage.share for stage in stages], num_layers)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 6, 24, 28, 32, 80])
@pytest.mark.parametrize("mean_ratio", [0.05, 0.25, 0.5, 0.9])
def test_every_point_of_the_space_costs_the_budget(num_layers: int, mean_ratio: float) -> None:
    space, rng = tune.bounds(mean_ratio), random.Random(0)
    corners = [{n: limits[bit] for n, limits in space.items()} for bit in (0, 1)]
    inside = [{n: rng.uniform(*limits) for n, limits in space.items()} for _ in range(20)]
    for params in corners + inside:
        method = tune.strategy(params, mean_ratio, num_layers)
        assert 0 < method.later[1] <= 1 and 0 < method.first < 1
        cost = shares(method, num_layers)
        if method.later[1] < 1:
            assert cost == pytest.approx(mean_ratio)
        else:
            assert cost <= mean_ratio + 1e-9


def test_the_last_ratio_and_the_ranges_are_the_published_ones() -> None:
    assert tune.bounds(0.25) == {
        "threshold": (0, 50),
        "alpha": (-1, 1),
        "grid": (3, 24),
        "first": (0.25, 0.375),
        "second": (pytest.approx(0.2 / 0.375), 1),
    }
    known = VFlowOpt(preset=0.25)
    params = {"threshold": 34.76, "alpha": 0.0, "grid": 15.581, "first": 0.2651, "second": 0.98334}
    found = tune.strategy(params, 0.25, 28)
    assert found.later == pytest.approx((0.98334, (28 * 0.25 - 9 * 0.2651 * 1.98334) / 10 / (0.2651 * 0.98334)))
    assert found.later[1] == pytest.approx(known.later[1], abs=0.02)  # whose mean is 0.251
    assert (found.threshold, found.alpha, found.grid, found.first) == (34.76, 0, 15.581, 0.2651)
    with pytest.raises(vtprune.VTPruneError, match="cost more than mean_ratio"):
        tune.strategy(params | {"first": 0.6}, 0.25, 28)


@torch.no_grad()
def test_values_are_cosines_to_the_unpruned_last_states(model: Any, batches: Any) -> None:
    search = tune.tune(model, batches, 0.4, trials=3)
    assert vtprune.engine.patching.find_patch(model) is None and search.samples == 3 and search.num_layers == 4
    for trial in search.trials:
        method, total = tune.strategy(trial, 0.4, 4), 0.0
        for prompts, number in ((BATCHES[0][:1], 0), (BATCHES[0][1:], 0), (BATCHES[1], 1)):
            one = FAMILIES["llava"].batch(prompts, seed=number)
            want = model(**one, output_hidden_states=True).hidden_states[-1][0, -1]
            with vtprune.patch(model, mean_ratio=0.4, method=method):
                got = model(**one, output_hidden_states=True).hidden_states[-1][0, -1]
            total += float(want @ got / (want.norm() * got.norm()))
        assert trial["value"] == pytest.approx(total, abs=1e-4)
    assert len({trial["value"] for trial in search.trials}) > 1


def test_the_first_trial_is_the_released_strategy(model: Any, batches: Any) -> None:
    known = VFlowOpt(preset=0.25)
    first = tune.tune(model, batches, 0.25, trials=1).trials[0]
    assert (first["threshold"], first["alpha"], first["grid"]) == (known.threshold, known.alpha, known.grid)
    assert (first["first"], first["second"]) == (known.first, known.later[0])
    moved = tune.tune(model, batches, 0.2, trials=1).trials[0]
    assert moved["first"] == pytest.approx(known.first * 0.2 / 0.25)


def test_a_search_is_repeatable_resumable_and_saved(
    model: Any, batches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a made-up objective instead of a model, repeated and resumed searches give the same trials."""
    tops = {"threshold": 20.0, "alpha": 0.5, "grid": 9.0, "first": 0.33, "second": 0.8}
    space = tune.bounds(0.25)

    def objective(params: dict[str, float]) -> float:
        return -sum(((params[n] - tops[n]) / (high - low)) ** 2 for n, (low, high) in space.items())

    def value(method: VFlowOpt, *_: Any) -> float:
        named = {n: getattr(method, n) for n in ("threshold", "alpha", "grid", "first")}
        return objective(named | {"second": method.later[0]})

    monkeypatch.setattr(tune, "_value", value)
    path = tmp_path / "strategy.json"
    whole = tune.tune(model, batches, 0.25, trials=18, seed=3)
    tune.tune(model, batches, 0.25, trials=7, seed=3, path=path)
    resumed = tune.tune(model, batches, 0.25, trials=18, seed=3, path=path, resume=True)
    assert resumed.trials == whole.trials and len(whole.trials) == 18
    assert tune.tune(model, batches, 0.25, trials=3, seed=4).trials[1] != whole.trials[1]

    assert len({trial["threshold"] for trial in whole.trials[:11]}) == 11  # nothing is drawn twice
    # The Gaussian process finds better points than random sampling.
    assert max(t["value"] for t in whole.trials[11:]) > max(t["value"] for t in whole.trials[:11])
    assert whole.best["value"] > -0.1

    assert VFlowOpt.load(path) == resumed.strategy == tune.strategy(whole.best, 0.25, 4)
    saved = json.loads(path.read_text())
    about = saved["about"]
    assert saved["method"] == "vflowopt" and about["mean_ratio"] == 0.25
    assert about["agreement"] == whole.best["value"] / 3
    with pytest.raises(vtprune.VTPruneError, match="mean_ratio=0.25, this one has 0.3"):
        tune.tune(model, batches, 0.3, trials=1, seed=3, path=path, resume=True)

    with pytest.raises(vtprune.VTPruneError, match="exists; pass resume=True .* or force=True to overwrite it"):
        tune.tune(model, batches, 0.25, trials=1, seed=3, path=path)
    moved = [{**about["trials"][0], "grid": 2.0}, *about["trials"][1:]]
    path.write_text(json.dumps(saved | {"about": about | {"trials": moved}}))
    with pytest.raises(vtprune.VTPruneError, match="grid=2 in trial 0"):
        tune.tune(model, batches, 0.25, trials=18, seed=3, path=path, resume=True)
    path.write_text(json.dumps(saved | {"about": about | {"versions": about["versions"] | {"torch": "1.0"}}}))
    with pytest.raises(vtprune.VTPruneError, match='versions.torch is "1.0" there'):
        tune.tune(model, batches, 0.25, trials=18, seed=3, path=path, resume=True)
    assert len(tune.tune(model, batches, 0.25, trials=1, seed=3, path=path, force=True).trials) == 1


def test_not_a_number_counts_nothing(model: Any, batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metrics.last_states

    def broken(model: Any, batch: Any) -> torch.Tensor:
        states = real(model, batch)
        if vtprune.engine.patching.find_patch(model) is not None:
            states[0] = torch.nan
        return states

    monkeypatch.setattr(metrics, "last_states", broken)
    value = tune.tune(model, batches, 0.9, trials=1).trials[0]["value"]
    assert 0.5 < value <= 1  # one of three samples is finite


def test_what_cannot_be_searched_is_refused(
    model: Any, batches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for budget in (1.0, 0.5):
        with pytest.raises(vtprune.VTPruneError, match="expected a share below 1 and at least 1 trial"):
            tune.tune(model, batches, budget, trials=int(budget))
    with pytest.raises(vtprune.BudgetError, match="mean_ratio is 0"):
        tune.tune(model, batches, 0)
    with pytest.raises(vtprune.VTPruneError, match="no prompts"):
        tune.tune(model, [], 0.5)
    with vtprune.patch(model, ratio=0.5), pytest.raises(vtprune.VTPruneError, match="remove the patch"):
        tune.tune(model, batches, 0.5)
    with pytest.raises(vtprune.VTPruneError, match="not a saved search"):
        tune.tune(model, batches, 0.5, path=tmp_path / "none.json", resume=True)
    (tmp_path / "list.json").write_text("[1]")
    for path in (tmp_path / "none.json", tmp_path / "list.json"):
        with pytest.raises(vtprune.MethodError, match="holds no strategy of vflowopt"):
            VFlowOpt.load(path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(vtprune.VTPruneError, match="pip install optuna scipy"):
        tune.tune(model, batches, 0.5)


def test_the_command_writes_a_strategy_and_goes_on_with_it(capfd: Any, tmp_path: Path) -> None:
    refvlm.scenes.scene(3).image.save(tmp_path / "a.png")
    out = tmp_path / "strategy.json"
    arguments = ["tune", "--images", str(tmp_path / "a.png"), "--question", "x?", "--out", str(out)]
    assert main([*arguments, "--mean-ratio", "0.3", "--trials", "1"]) == 0
    assert main([*arguments, "--mean-ratio", "0.3", "--trials", "2", "--resume"]) == 0
    shown = capfd.readouterr().out
    assert "trial 1 of 1" in shown and "trial 2 of 2" in shown and shown.count("trial 1 of") == 1
    strategy = VFlowOpt.load(out)
    assert len(json.loads(out.read_text())["about"]["trials"]) == 2
    assert shares(strategy, 6) <= 0.3 + 1e-9
    assert methods.VFlowOpt.load(out, recycle=False) == VFlowOpt(
        **{n: getattr(strategy, n) for n in ("threshold", "alpha", "grid", "first", "later")}, recycle=False
    )
    assert main([*arguments, "--mean-ratio", "0.2", "--resume"]) == 2
    assert "mean_ratio=0.3" in capfd.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "none" / "a.json")]) == 2
    assert "folder does not exist" in capfd.readouterr().err


def test_an_interrupted_command_says_how_its_search_goes_on(
    capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refvlm.scenes.scene(3).image.save(tmp_path / "a.png")
    arguments = ["tune", "--images", str(tmp_path / "a.png"), "--question", "x?", "--out", str(tmp_path / "s.json")]
    arguments += ["--mean-ratio", "0.3", "--trials", "2"]
    save = tune.Search.save

    def interrupted(search: tune.Search, *given: Any) -> None:
        save(search, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
        patched.setattr(tune.Search, "save", interrupted)
        main(arguments)
    assert "run the same command with --resume" in capfd.readouterr().err
    assert main([*arguments, "--resume"]) == 0


def test_prompts_without_pictures_are_refused(model: torch.nn.Module) -> None:
    with pytest.raises(vtprune.VTPruneError, match="no prompt has a visual token"):
        tune.tune(model, [FAMILIES["llava"].batch([[5, 6]])], 0.5, trials=1)
