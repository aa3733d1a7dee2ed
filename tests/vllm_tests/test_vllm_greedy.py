# SPDX-License-Identifier: Apache-2.0
"""Tiny models served by vLLM on the CPU give the greedy tokens of transformers with the same cut."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

from vllm_tests import families, plans  # noqa: E402

pytestmark = pytest.mark.slow
CASES = [(name, run.name) for name, family in families.FAMILIES.items() for run in family.runs()]
PRUNED = [case for case in CASES if case[1] != "unpruned"]


def start(module: str, *arguments: object, **environment: str) -> None:
    """Runs a module in a separate process."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Record of a model served in a separate process: `served(name)`."""
    place = tmp_path_factory.mktemp("vllm")

    @functools.cache
    def serve(name: str) -> dict[str, Any]:
        if families.FAMILIES[name].torchvision:
            pytest.importorskip("torchvision", reason="vLLM's class of this model imports torchvision")
        result = place / f"{name}.json"
        start("vllm_tests.worker", name, place / name, result)
        return json.loads(result.read_text())

    return serve


@pytest.mark.parametrize(("name", "run"), CASES)
@pytest.mark.parametrize("mode", ["alone", "again", "batch"])
def test_same_tokens_as_transformers(served: Any, name: str, run: str, mode: str) -> None:
    record = served(name)[run]
    wanted = record["expected"][: len(record[mode])]
    assert len(record[mode]) == (16 if mode == "batch" else len(record["alone"])) == len(wanted)
    assert [(r["length"], r["tokens"]) for r in record[mode]] == [(w["length"], w["tokens"]) for w in wanted]


@pytest.mark.parametrize(("name", "run"), CASES)
def test_placeholders_are_exact(served: Any, name: str, run: str) -> None:
    record = served(name)[run]
    for found, wanted in zip(record["batch"], record["expected"], strict=True):
        counts = [n for image in wanted["images"] for n in image]
        if families.FAMILIES[name].clip and run == "unpruned":  # each frame may have its own run
            assert sum(found["placeholders"]) == sum(counts)
        else:
            assert found["placeholders"] == counts


@pytest.mark.parametrize(("name", "run"), PRUNED)
def test_prompts_and_cache_blocks_shrink(served: Any, name: str, run: str) -> None:
    full, short = served(name)["unpruned"], served(name)[run]
    for before, after in zip(full["batch"], short["batch"], strict=True):
        removed = sum(before["placeholders"]) - sum(after["placeholders"])
        assert after["length"] == before["length"] - removed
        assert (removed > 0) == bool(before["placeholders"])
        assert after["blocks"] == -(-(after["length"] + plans.TOKENS - 1) // plans.BLOCK)  # all but the last
        assert after["blocks"] <= before["blocks"]
    assert sum(r["blocks"] for r in short["batch"]) < 0.75 * sum(r["blocks"] for r in full["batch"])


@pytest.mark.parametrize(("name", "run"), PRUNED)
def test_encoder_budget_falls(served: Any, name: str, run: str) -> None:
    full, short = served(name)["unpruned"]["budget"], served(name)[run]["budget"]
    config = next(r.config for r in families.FAMILIES[name].runs() if r.name == run)
    largest = config.get("keep") or round(config["ratio"] * full["image"])
    if families.FAMILIES[name].clip:  # determined by the largest clip, including the text between frames
        if "chunked" in run:  # compare with the chunked unpruned engine; otherwise a step is longer than any clip
            assert short["compute"] < full["compute"] and short["cache"] < full["cache"]
        return
    if "model_impl" in families.FAMILIES[name].engine:  # it counts the tags of an unpruned image too
        assert 0 < short["image"] <= largest
    else:
        assert short["image"] == largest
    if "chunked" in run:  # the largest image exceeds the tokens of a step
        step = plans.STEP
        assert (full["compute"], short["compute"]) == (max(step, full["image"]), max(step, short["image"]))
        assert short["compute"] < full["compute"] and short["cache"] < full["cache"]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_prefix_cache_answers_the_same_image_and_a_common_text(served: Any, name: str) -> None:
    for run, record in served(name).items():
        if run.endswith("plain"):
            assert not any(r["cached"] for r in record["alone"] + record["again"] + record["batch"])
            continue
        for first, again in zip(record["alone"], record["again"], strict=True):
            # All whole blocks except that of the last token, which is always computed.
            assert again["cached"] == (first["length"] - 1) // plans.BLOCK * plans.BLOCK
        second = record["alone"][3]  # same text as in the previous request, another image
        if families.FAMILIES[name].image:  # the text precedes the images
            assert second["cached"] == plans.BLOCK
        else:
            assert second["cached"] == 0


def test_nothing_happens_until_it_is_configured(served: Any, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    start("vllm_tests.worker", "idefics3", tmp_path / "model", result, "unpruned", VLLM_PLUGINS="")
    without, installed = json.loads(result.read_text())["unpruned"], served("idefics3")["unpruned"]
    assert (without.pop("plugin"), installed["plugin"]) == (False, True)
    assert without == {name: value for name, value in installed.items() if name != "plugin"}


def test_an_adapter_of_the_language_model_answers_as_the_merged_model(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft makes the adapter")
    result = tmp_path / "result.json"
    start("vllm_tests.worker_lora", tmp_path, result)
    record = json.loads(result.read_text())
    assert record["base"] == record["expected"]["base"]
    assert record["lora"] == record["expected"]["lora"]
    assert all(base[1] != lora[1] for base, lora in zip(record["base"], record["lora"], strict=True))


@pytest.mark.parametrize("name", [name for name, family in families.FAMILIES.items() if family.tower])
def test_a_cut_tower_gives_other_features(served: Any, name: str) -> None:
    """With a cut tower the same method and ratio give other features."""
    whole, cut = (served(name)[run]["batch"] for run in ("divprune-plain", "tower-chunked"))
    assert [r["length"] for r in whole] == [r["length"] for r in cut]
    assert [r["tokens"] for r in whole] != [r["tokens"] for r in cut]
