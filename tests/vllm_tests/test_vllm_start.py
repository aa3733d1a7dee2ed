# SPDX-License-Identifier: Apache-2.0
"""Tests of the plug-in before a model runs: one-line refusals, and cache keys of images."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vllm_tests import models, odd_models, plans, vision_models  # noqa: E402
from vllm_tests.families import QWEN, QWEN_CLIP  # noqa: E402

from vtprune.integrations.vllm.hooks import settings_of  # noqa: E402
from vtprune.integrations.vllm.settings import ServingError  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Folders of tiny models by name, built on first use."""
    place = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (place / name).exists():
            {
                **models.MODELS,
                **odd_models.MODELS,
                **{f.__name__: f for f in (vision_models.llava, vision_models.qwen3_vl, vision_models.mistral3)},
            }[name](place / name)
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

    made = engine_config(folder, config, **options)  # the first config loads the plug-in, which wraps later ones
    return MULTIMODAL_REGISTRY.create_processor(made.model_config)


def hashes(folder: Path, config: Any, names: list[str] | None = None) -> list[str]:
    """Cache keys of two images."""
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
    {"ratio": 0.25, "tower": 0.5},
    {"tower": 0.5},
]


@pytest.mark.parametrize("names", [None, ["mine", "yours"]], ids=["by content", "named by the client"])
def test_different_settings_never_share_a_cache(folders: Any, names: list[str] | None) -> None:
    found = [hashes(folders("idefics3"), config, names) for config in CONFIGS]
    every = [name for pair in found for name in pair]
    assert len(every) == 2 * len(CONFIGS) == len(set(every))
    assert found == [hashes(folders("idefics3"), config, names) for config in CONFIGS]  # and equal settings share them
    if names is not None:
        assert found[0] == names


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("idefics3", {"ratio": 0.5, "rate": 2}, "unknown field 'rate'"),
        ("idefics3", {"ratio": 1.5}, "1.5"),
        ("idefics3", {"ratio": 0.5, "keep": 2}, "ratio and keep"),
        ("idefics3", {"ratio": 0.5, "method": "fastv"}, "method fastv is not available in vLLM"),
        ("idefics3", {"ratio": 0.5, "method": "divprun"}, "divprune"),
        ("llama", {"ratio": 0.5}, "takes no images: there is nothing to prune"),
        ("whisper", {"ratio": 0.5}, "is an encoder-decoder"),
        (
            "idefics3",
            {"method": "zoo_prune", "ratio": 0.5, "options": {"estimator": "jvp"}},
            "found estimator='jvp', expected 'difference' or 'auto'",
        ),
        ("qwen2_vl", {"method": "zoo_prune", "ratio": 0.5}, "cannot read vision towers of the Qwen-VL kind"),
        (
            "qwen2_vl",
            {"method": "divprune", "ratio": 0.5, "options": {"positions": "compact"}},
            "found positions='compact', expected 'original'",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_configuration(folders: Any, name: str, config: Any, words: str) -> None:
    with pytest.raises(ServingError) as caught:
        engine_config(folders(name), config)
    line = str(caught.value)
    assert line.startswith("vtprune: ") and words in line and "\n" not in line


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"method": "visionzip", "ratio": 0.5}, {"limit_mm_per_prompt": {"image": 0}}),
        ({"ratio": 0.5, "tower": 0.5}, {"language_model_only": True}),
        ({"ratio": 0.5, "tower": 0.5}, {"limit_mm_per_prompt": {"image": 0}, "enable_mm_embeds": True}),
        ({"method": "divprune", "ratio": 0.5}, {"limit_mm_per_prompt": {"image": 0}}),
    ],
)
def test_a_model_that_is_given_no_images_is_refused_with_that_reason(folders: Any, config: Any, options: Any) -> None:
    with pytest.raises(ServingError, match=r"takes no images here \(limit_mm_per_prompt.*leave 'vtprune' out$"):
        engine_config(folders("idefics3"), config, **options)
    embeddings = {"limit_mm_per_prompt": {"image": 0}, "enable_mm_embeds": True}  # need no encoder
    engine_config(folders("idefics3"), {"method": "divprune", "ratio": 0.5}, **embeddings)


def test_a_class_without_the_interface_for_pruned_media_is_refused_by_name(folders: Any) -> None:
    pytest.importorskip("torchvision", reason="vLLM's class of this model imports torchvision")
    processor(folders("qwen2_vl"), None)  # can be served unpruned
    with pytest.raises(ServingError) as caught:
        processor(folders("qwen2_vl"), {"ratio": 0.5})
    line = str(caught.value)
    assert line.startswith("vtprune: Qwen2VLForConditionalGeneration places tokens on several axes (M-RoPE)")
    assert "\n" not in line


def test_placeholders_that_a_tokenizer_wrote_are_shortened_too(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixtral's prompts come with them, and its processor only looks where they stand."""
    from vllm.model_executor.models.idefics3 import Idefics3MultiModalProcessor
    from vllm.multimodal.processing import PromptReplacement

    pictures, folder = {"image": [plans.picture(0, 64, 64), plans.picture(1, 96, 64)]}, folders("idefics3")
    text = "word1 <image> word2 <image>"
    expected = {}
    for name, config in (("all", None), ("few", {"ratio": 0.25})):
        made = processor(folder, config)
        expected[name] = made(text, made.info.parse_mm_data(pictures), None)
    updates = Idefics3MultiModalProcessor._get_prompt_updates

    def without_target(self: Any, *args: Any, **named: Any) -> Any:
        found = updates(self, *args, **named)
        return [PromptReplacement(u.modality, target=[], replacement=u.replacement) for u in found]

    def look(self: Any, mm_items: Any, mm_res: Any) -> Any:  # as Pixtral's
        found = self._find_mm_placeholders(mm_res.prompt_ids, mm_res.prompt_updates)
        self._validate_mm_placeholders(found, mm_items.get_all_counts())
        return mm_res.prompt_ids, found

    monkeypatch.setattr(Idefics3MultiModalProcessor, "_get_prompt_updates", without_target)
    monkeypatch.setattr(Idefics3MultiModalProcessor, "_maybe_apply_prompt_updates", look, raising=False)
    written = expected["all"]["prompt_token_ids"]
    for name, config in (("all", None), ("few", {"ratio": 0.25})):
        made = processor(folder, config)
        for _ in range(2):
            got = made(written, made.info.parse_mm_data(pictures), None)
            assert got["prompt_token_ids"] == expected[name]["prompt_token_ids"]
            places = [[(p.offset, p.length) for p in out["mm_placeholders"]["image"]] for out in (got, expected[name])]
            assert places[0] == places[1]


def clips(folder: Path, config: Any, **options: Any) -> dict[str, Any]:
    """The front end's inputs of a prompt with a clip and a picture."""
    made = processor(folder, config, **options)
    request = plans.Request("", ((0, 64, 64),), ((1, 8, 64, 48),))
    return made(f"word1 {QWEN_CLIP} word2 {QWEN} word3", made.info.parse_mm_data(request.data()), None)


def test_clips_have_their_count_before_a_model_runs_and_caches_of_their_own(folders: Any) -> None:
    pytest.importorskip("torchvision", reason="vLLM's class of this model imports torchvision")
    folder = folders("qwen3_vl")
    configs = [None, {"ratio": 0.3}, {"ratio": 0.3, "video_method": "vcast"}, {"keep": 11}]
    found = [clips(folder, config) for config in configs]
    hashes = [value for made in found for values in made["mm_hashes"].values() for value in values]
    assert len(set(hashes)) == len(hashes)
    video, image = (found[1]["prompt_token_ids"].count(token) for token in (5, 4))
    grid = found[1]["mm_kwargs"]["video"][0]["video_grid_thw"].data
    assert grid[0] == 4 and (video, image) == (round(0.3 * (int(grid.prod()) // 4)), round(0.3 * 8 * 8))
    assert [found[3]["prompt_token_ids"].count(token) for token in (5, 4)] == [11, 11]
    whole, short = found[0]["prompt_token_ids"], found[1]["prompt_token_ids"]
    assert [t for t in whole if t not in (4, 5)] == [t for t in short if t not in (4, 5)]  # text and timestamps


def test_a_ratio_by_pixels_is_counted_before_a_model_runs(folders: Any) -> None:
    made = processor(folders("idefics3"), {"ratio": {"mean": 0.4, "min": 0.1}})
    flat = Image.new("RGB", (32, 32), "white")
    items = made.info.parse_mm_data({"image": [flat, plans.picture(0, 32, 32)]})
    ids = made("<image> word1 <image>", items, None)
    shares = []
    for item in ids["mm_kwargs"]["image"]:
        runs, counts = (item[f"vtprune_{name}"].data.sum() for name in ("runs", "counts"))
        shares.append(float(counts / runs))
    assert shares == pytest.approx([0.1, 1.0])  # a uniform picture, and noise
    token = made.info.get_hf_config().image_token_id
    assert ids["prompt_token_ids"].count(token) == sum(
        int(item["vtprune_counts"].data.sum()) for item in ids["mm_kwargs"]["image"]
    )


def test_features_are_refused_where_the_method_reads_the_encoder(folders: Any) -> None:
    """The client gets the refusal: with the model running, such a request would end the server."""
    import torch

    pytest.importorskip("torchvision", reason="vLLM's class of this model imports torchvision")
    for method in ("divprune", "visionzip"):
        made = processor(folders("llava"), {"method": method, "ratio": 0.25}, enable_mm_embeds=True)
        items = made.info.parse_mm_data({"image": torch.zeros(1, 64, 64)})
        if method == "divprune":
            ids = made("word1 <image>", items, None)["prompt_token_ids"]
            assert ids.count(made.info.get_hf_config().image_token_id) == 16
        else:
            with pytest.raises(ValueError, match="^vtprune: visionzip reads the vision encoder.*send pixels"):
                made("word1 <image>", items, None)


def certificate(folder: Path, positions: str = "compact") -> dict[str, Any]:
    """A certificate of a model in a folder, as `vtprune certify` writes it."""
    from transformers import AutoModelForImageTextToText

    from vtprune.core.certificate import Certificate
    from vtprune.methods import DivPrune
    from vtprune.models.identity import files_hash

    model = AutoModelForImageTextToText.from_pretrained(folder)
    numbers = {"risk": 0.1, "confidence": 0.9, "pictures": 100, "questions": 100, "changed": 0.0}
    about = {"dtype": "float32", "files_hash": files_hash(folder)}
    made = Certificate.of(model, DivPrune(positions=positions), 0.4, **numbers, about=about)  # type: ignore[arg-type]
    return dataclasses.asdict(made)


def test_a_certificate_is_taken_by_its_model_and_refused_for_others(folders: Any, tmp_path: Path) -> None:
    good, path = certificate(folders("idefics3")), tmp_path / "certificate.json"
    path.write_text(json.dumps(good))
    for given in (str(path), good):
        config = engine_config(folders("idefics3"), {"certificate": given}).model_config
        found = settings_of(config)
        assert found is not None and found.counts([100]) == [40] and found.method.name == "divprune"
    path.unlink()  # other processes, possibly on other machines, do not need the file
    assert settings_of(config) == found
    other = tmp_path / "other"
    shutil.copytree(folders("idefics3"), other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    for folder, given, words in (
        (folders("smolvlm"), good, "is for a Idefics3ForConditionalGeneration of another configuration"),
        (other, good, "with other weights"),
        (folders("idefics3"), {**good, "method_repr": "DivPrune(layer=1)"}, "is for the method DivPrune(layer=1)"),
        (folders("idefics3"), certificate(folders("idefics3"), "original"), "certify divprune with positions=compact"),
        (folders("idefics3"), {**good, "method": "fastv"}, "method fastv is not available in vLLM"),
        (folders("idefics3"), {**good, "about": {"dtype": "bfloat16"}}, "is for bfloat16"),
        (folders("idefics3"), {**good, "auto": {"energy": 0.9, "min": 0.1, "max": 0.5}}, "automatic ratio by features"),
        (folders("idefics3"), {"ratio": 0.5}, "no certificate written by vtprune certify"),
        (folders("idefics3"), str(path), "no certificate written by vtprune certify"),
    ):
        with pytest.raises(ServingError, match=re.escape(words)):
            engine_config(folder, {"certificate": given})
    with pytest.raises(ServingError, match="found ratio beside it"):
        engine_config(folders("idefics3"), {"certificate": good, "ratio": 0.5})


def test_a_draft_model_takes_no_part(folders: Any, tmp_path: Path) -> None:
    """vLLM gives a draft model a copy of the configuration with its own model in it."""
    from vllm.config.utils import replace

    shutil.copytree(folders("llama"), tmp_path / "draft")
    words = json.loads((folders("idefics3") / "config.json").read_text())["text_config"]["vocab_size"]
    same = {**json.loads((tmp_path / "draft" / "config.json").read_text()), "vocab_size": words}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(same))
    drafts = {
        "draft": {"method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 2},
        "none": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},  # vLLM names the model itself
    }
    for name, speculative in drafts.items():
        config = engine_config(folders("idefics3"), {"ratio": 0.25}, speculative_config=speculative)
        assert settings_of(config.model_config) is not None
        again = replace(config, model_config=config.speculative_config.draft_model_config)
        assert (settings_of(again.model_config) is None) == (name == "draft")


def test_vllm_and_vtprune_do_not_both_prune_videos(folders: Any) -> None:
    with pytest.raises(ServingError, match=r"video_pruning_rate=0\.5 asks vLLM to prune"):
        engine_config(folders("qwen3_vl"), {"ratio": 0.5}, video_pruning_rate=0.5)


ANSWER = """
import json, sys
from vllm import LLM, SamplingParams
from vllm_tests import families, plans

if __name__ == "__main__":
    request = plans.Request("word5 % word8 @", ((25, 40, 64),), ((26, 4, 64, 64),))
    text = request.text.replace("@", families.QWEN).replace("%", families.QWEN_CLIP)
    options = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512}
    llm = LLM(sys.argv[1], additional_config=json.loads(sys.argv[2]), **options)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (answer,) = llm.generate([{"prompt": text, "multi_modal_data": request.data()}], sampling)
    print(json.dumps([list(answer.prompt_token_ids), list(answer.outputs[0].token_ids)]))
"""


ROWS = """
import json, sys
from vllm import LLM, SamplingParams
from vllm_tests import plans

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512, max_num_batched_tokens=32,
        additional_config={"vtprune": {"method": "divprune", "ratio": 0.25}},
    )
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": plans.picture(*picture)}}
        for text, picture in json.loads(sys.argv[2])
    ]
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in found]))
"""


def test_a_picture_written_in_rows_is_pruned_as_one(folders: Any) -> None:
    """Mistral 3 answers as vtprune.patch with compact positions: the same tokens, and row ends where they stood."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import vtprune

    folder = folders("mistral3")
    asked = [("word1 [IMG] word2", (3, 96, 64)), ("word5 word7 [IMG] word3", (5, 64, 96)), ("[IMG] word4", (4, 40, 8))]
    reader = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    with vtprune.patch(model, method=vtprune.methods.DivPrune(positions="compact"), ratio=0.25):
        for text, picture in asked:
            inputs = reader(images=plans.picture(*picture), text=text, return_tensors="pt")
            written = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
            expected.append(written[0, inputs["input_ids"].shape[1] :].tolist())
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", ROWS, str(folder), json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)


EMBED = """
import json, sys
from vllm import LLM
from vllm_tests import plans

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=512,
        additional_config={"vtprune": {"method": "random", "keep": 9}},
    )
    prompt = {"prompt": "word1 <image> word2", "multi_modal_data": {"image": plans.picture(5, 32, 32)}}
    (answer,) = llm.embed([prompt])
    prunes = llm.apply_model(lambda model: "vtprune" in model.__dict__)
    print(json.dumps([prunes[0], list(answer.prompt_token_ids)]))
"""


def test_a_pooling_model_chooses_the_tokens_of_its_short_prompts(folders: Any) -> None:
    """vLLM serves embeddings with a subclass of the class that it resolves."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", EMBED, str(folders("smolvlm"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    prunes, prompt = json.loads(done.stdout.strip().splitlines()[-1])
    token = json.loads((folders("smolvlm") / "config.json").read_text())["image_token_id"]
    assert prunes is True and prompt.count(token) == 9


def test_a_qwen3_5_starts_and_prunes_pictures_and_clips(tmp_path: Path) -> None:
    """Qwen3.5, with linear attention layers, starts and prunes; vLLM's own video pruning fails on it (0.32)."""
    pytest.importorskip("torchvision", reason="vLLM's class of this model imports torchvision")
    vision_models.qwen3_5(tmp_path / "model")
    config = json.dumps({"vtprune": {"ratio": 0.5, "video_method": "evs"}})
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", ANSWER, str(tmp_path / "model"), config]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    prompt, answer = json.loads(done.stdout.strip().splitlines()[-1])
    known = json.loads((tmp_path / "model" / "config.json").read_text())
    counts = [prompt.count(known[f"{kind}_token_id"]) for kind in ("image", "video")]
    assert counts == [20, 36], "expected half of 5 x 8, and half of two time steps of 6 x 6"
    assert len(answer) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compilation_config": {"compile_mm_encoder": True}}, "which compile_mm_encoder compiles whole"),
        ({"tensor_parallel_size": 2}, "not tried with a vision encoder on several ranks"),
    ],
)
def test_set_ups_in_which_a_tower_cannot_be_cut_are_refused_by_name(folders: Any, options: Any, words: str) -> None:
    folder = folders("idefics3")
    engine_config(folder, {"ratio": 0.5, "tower": 0.5})
    with pytest.raises(ServingError, match=words) as caught:
        engine_config(folder, {"ratio": 0.5, "tower": 0.5}, **options)
    assert str(folder) in str(caught.value)


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
