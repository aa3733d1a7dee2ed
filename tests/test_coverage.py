# SPDX-License-Identifier: Apache-2.0
"""A few architectures of `python -m tests.architectures` that differ in structure, on every test run.

Bidirectional attention within pictures under a sliding window (Gemma 3) and within the prompt (PaliGemma), patch
merging (Mistral 3), token splitting (Idefics 3), three axes of positions (GLM-4V), early fusion (Fuyu), layers with
recurrent state (Qwen 3.5), and models that must be refused with their reason.
"""

from __future__ import annotations

import contextlib
import inspect

import pytest
import transformers
from packaging.version import Version

import vtprune
from tests.architectures import build, checks, prompts, run, towers

NAMES = run.registered()


@pytest.mark.parametrize("architecture", ["gemma3", "paligemma", "mistral3", "idefics3", "glm4v", "fuyu", "qwen3_5"])
def test_architecture_passes(architecture: str) -> None:
    entry = run.examine(architecture, NAMES[architecture])
    if entry["status"] == "not fed" and Version(transformers.__version__) < Version("5.23"):
        # Random models of these versions accept these pictures only as precomputed features.
        model = build.build(architecture, NAMES[architecture]).model
        assert "mm_encoder_outputs" not in inspect.signature(model.forward).parameters
        pytest.skip(f"transformers {transformers.__version__} takes no mm_encoder_outputs")
    assert entry["status"] == "passes", entry
    assert entry["default method"] == "ok"
    rows = {name: row for name, row in entry["checks"].items() if not name.endswith("video")}
    assert len(rows) == 2
    for row in rows.values():
        assert set(row) == set(checks.CHECKS)
        assert {row[name] for name in ("identity", "drop is mask", "decode", "no trace")} == {"ok"}, entry
        assert all(text == "ok" or text.startswith("not applicable") for text in row.values()), entry
    for row in (entry["checks"][name] for name in set(entry["checks"]) - set(rows)):
        assert row == dict.fromkeys(checks.CLIP_CHECKS, "ok")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("t5gemma2", "encoder-decoder"),
        ("mllama", "cross-attention"),
        ("instructblip", "generate calls its language model directly"),
        ("mistral4", "no vision tower"),
        ("git", "no placeholder token ids"),
        ("pi0", "second decoder"),
    ],
)
def test_architecture_is_refused_with_its_reason(architecture: str, reason: str) -> None:
    entry = run.examine(architecture, NAMES[architecture])
    assert entry["status"] == "refused"
    assert reason in entry["reason"]


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_5"])
def test_checks_notice_what_is_not_hidden(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build.build(architecture, NAMES[architecture]).model
    subject = checks.Subject(model, prompts.prompts_for(model, vtprune.inspect(model).placeholders))
    monkeypatch.setattr(subject, "reference", lambda last: contextlib.nullcontext())
    for check in (checks.drop_is_mask, checks.decode):
        with pytest.raises(checks.Failed, match="of the largest logit"):
            check(subject, "random")


def test_checks_notice_a_default_method_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(method: object, tokens: vtprune.methods.Tokens) -> None:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(vtprune.methods.ResPrune, "choose", choose)
    entry = run.examine("llava", NAMES["llava"])
    assert (entry["status"], entry["reason"]) == ("fails", "budget: ValueError: not enough values to unpack")


def test_checks_notice_what_is_left_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build.build("llava", NAMES["llava"]).model
    subject = checks.Subject(model, prompts.prompts_for(model, vtprune.inspect(model).placeholders))
    monkeypatch.setattr(vtprune.Patch, "remove", lambda patch: None)
    with pytest.raises(checks.Failed, match="are left"):
        checks.no_trace(subject, "random")
    monkeypatch.undo()
    vtprune.unpatch(model)
    checks.no_trace(subject, "random")


@pytest.mark.parametrize(
    ("architecture", "outcome"),
    [
        ("qwen2_5_omni_thinker", "passes"),  # windows
        ("gemma3", "passes"),  # pooled patches
        ("llama4", "passes"),  # a class token at the end, one rotation for all tiles
        ("mistral3", "passes"),  # pictures of a packed sequence separated by the mask
        ("lfm2_vl", "passes"),  # padded patches
        ("gemma4", "passes"),  # patches with position ids
        ("hunyuan_vl", "passes"),  # packed in raster order, merged by a convolution
        ("paddleocr_vl", "passes"),  # packed in raster order
        ("video_llava", "second vision tower"),
        ("got_ocr2", "use relative positions"),
        ("lfm3_vl", "have no attention"),
        ("chameleon", "convolution"),
        ("fuyu", "list of blocks"),
        ("deepseek_ocr2", "consists of 2 towers"),
    ],
)
def test_towers_pass_or_are_refused_with_their_reason(architecture: str, outcome: str) -> None:
    if architecture not in NAMES:
        pytest.skip(f"this transformers has no {architecture}")
    entry = run.examine(architecture, NAMES[architecture], only_tower=True)
    if entry.get("status") == "not fed":
        pytest.skip(f"the unpatched model fails: {entry['reason']}")
    assert outcome in entry["tower"]
    assert outcome == "passes" or entry["tower"].startswith("refused: ")


def test_tower_checks_notice_what_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build.build("qwen3_vl", NAMES["qwen3_vl"]).model
    fed = prompts.prompts_for(model, vtprune.inspect(model).placeholders)
    with monkeypatch.context() as patched:
        patched.setattr(towers.torch.Tensor, "masked_fill", lambda self, mask, value: self)
        with pytest.raises(towers.Failed, match="of the largest state"):
            towers.examine(model, fed)
    assert towers.examine(model, fed) == "passes"
