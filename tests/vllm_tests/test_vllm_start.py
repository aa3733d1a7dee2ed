# SPDX-License-Identifier: Apache-2.0
"""What the plug-in decides before a model runs: refusals, each in one line, and the identity of images in caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

from vllm_tests import models, odd_models, plans, vision_models  # noqa: E402

from vtprune.integrations.vllm.settings import ServingError  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Folders of tiny models by name, built when asked for."""
    place = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (place / name).exists():
            {**models.MODELS, **odd_models.MODELS, "qwen3_vl": vision_models.qwen3_vl}[name](place / name)
        return place / name

    yield folder


def engine_config(folder: Path, config: Any, **options: Any) -> Any:
    """A `VllmConfig`, as `vllm serve` and `LLM` make it."""
    from vllm.engine.arg_utils import EngineArgs

    extra = {} if config is None else {"additional_config": {"vtprune": config}}
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, **extra, **options}
    return EngineArgs(model=str(folder), **options).create_engine_config()


def processor(folder: Path, config: Any, **options: Any) -> Any:
    """The processor of a model, as the front end makes it."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(engine_config(folder, config, **options).model_config)


def hashes(folder: Path, config: Any, names: list[str] | None = None) -> list[str]:
    """By which caches know two images."""
    made = processor(folder, config)
    items = made.info.parse_mm_data({"image": [plans.picture(0, 64, 64), plans.picture(1, 96, 64)]})
    out = made("word1 <image> word2 <image>", items, None if names is None else {"image": names})
    return out["mm_hashes"]["image"]


CONFIGS: list[dict[str, Any] | None] = [
    None,
    {"ratio": 0.25},
    {"ratio": 0.5},
    {"keep": 4},
    {"method": "uniform", "ratio": 0.25},
    {"method": "random", "ratio": 0.25},
    {"method": "random", "ratio": 0.25, "options": {"seed": 1}},
]


@pytest.mark.parametrize("names", [None, ["mine", "yours"]], ids=["by content", "named by the client"])
def test_different_settings_never_share_a_cache(folders: Any, names: list[str] | None) -> None:
    found = [hashes(folders("idefics3"), config, names) for config in CONFIGS]
    every = [name for pair in found for name in pair]
    assert len(every) == 2 * len(CONFIGS) == len(set(every))
    assert found == [hashes(folders("idefics3"), config, names) for config in CONFIGS]  # and the same ones do
    if names is not None:
        assert found[0] == names


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("idefics3", {"ratio": 0.5, "rate": 2}, "unknown field 'rate'"),
        ("idefics3", {"ratio": 1.5}, "1.5"),
        ("idefics3", {"ratio": 0.5, "keep": 2}, "ratio and keep"),
        ("idefics3", {"ratio": 0.5, "method": "fastv"}, "method fastv needs more than the image"),
        ("idefics3", {"ratio": 0.5, "method": "divprun"}, "divprune"),
        ("llama", {"ratio": 0.5}, "takes no images: there is nothing to prune"),
        ("whisper", {"ratio": 0.5}, "is an encoder-decoder"),
        ("qwen2_vl", {"method": "zoo_prune", "ratio": 0.5}, "cannot read vision towers of the Qwen-VL kind"),
    ],
)
def test_what_cannot_be_is_refused_by_its_configuration(folders: Any, name: str, config: Any, words: str) -> None:
    with pytest.raises(ServingError) as caught:
        engine_config(folders(name), config)
    line = str(caught.value)
    assert line.startswith("vtprune: ") and words in line and "\n" not in line


def test_a_class_without_the_interface_for_pruned_media_is_refused_by_name(folders: Any) -> None:
    pytest.importorskip("torchvision", reason="vLLM's class of this model imports torchvision")
    processor(folders("qwen2_vl"), None)  # served unpruned
    with pytest.raises(ServingError) as caught:
        processor(folders("qwen2_vl"), {"ratio": 0.5})
    line = str(caught.value)
    assert line.startswith("vtprune: Qwen2VLForConditionalGeneration places tokens on several axes (M-RoPE)")
    assert "\n" not in line


def test_videos_that_vllm_would_misplace_are_refused_before_a_client_sends_one(folders: Any) -> None:
    pytest.importorskip("torchvision", reason="vLLM's class of this model imports torchvision")
    with pytest.raises(ServingError, match="Qwen3VLForConditionalGeneration writes times between the frames"):
        processor(folders("qwen3_vl"), {"ratio": 0.5})
    assert processor(folders("qwen3_vl"), {"ratio": 0.5}, limit_mm_per_prompt={"video": 0}).vtprune


def test_adapters_of_the_vision_encoder_are_refused(folders: Any) -> None:
    with pytest.raises(ServingError, match="enable_tower_connector_lora"):
        engine_config(folders("idefics3"), {"ratio": 0.5}, enable_lora=True, enable_tower_connector_lora=True)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("idefics3", {"ratio": 1.5}, "1.5"),
        ("qwen2_vl", {"ratio": 0.5}, "vtprune: Qwen2VLForConditionalGeneration places tokens on several axes"),
    ],
)
def test_a_program_ends_with_that_one_line(folders: Any, name: str, config: Any, words: str) -> None:
    if name == "qwen2_vl":
        pytest.importorskip("torchvision", reason="vLLM's class of this model imports torchvision")
    program = (
        f"from vllm import LLM\nLLM(model={str(folders(name))!r}, enforce_eager=True, max_model_len=256, "
        f"additional_config={json.dumps({'vtprune': config})})"
    )
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("vtprune: ") and words in lines[-1], done.stderr[-3000:]
    assert "Traceback" not in done.stderr
