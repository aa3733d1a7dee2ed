# SPDX-License-Identifier: Apache-2.0
"""Programs and command-line options shown in docs/serving.md work with the installed vLLM."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

import doc_blocks  # noqa: E402
from vllm_tests import models, pictures  # noqa: E402

from vtprune.integrations.vllm.settings import parse  # noqa: E402

BLOCKS = doc_blocks.blocks((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
COMMANDS = [line for block in BLOCKS for line in block.code.splitlines() if line.startswith("vllm serve")]


@pytest.mark.slow
def test_the_python_program_runs(tmp_path):
    models.MODELS["idefics3"](tmp_path / "model")
    pictures.noise(0, 96, 64).save(tmp_path / "photo.png")
    code = next(block.code for block in BLOCKS if "from vllm" in block.code)
    engine = "additional_config=CONFIG, dtype='float32', enforce_eager=True, max_model_len=1024"
    code = doc_blocks.offline(code, tmp_path / "model").replace("additional_config=CONFIG", engine)
    (tmp_path / "offline.py").write_text(code, encoding="utf-8")
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = os.pathsep.join([str(ROOT), *map(os.path.abspath, given)])  # the program runs in another folder
    done = subprocess.run(
        [sys.executable, "offline.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lengths = [int(number) for number in re.findall(r"^(\d+) tokens: ", done.stdout, re.M)]
    assert lengths == [_pruned_length(tmp_path / "model", tmp_path / "photo.png")], done.stdout[-3000:]


def _pruned_length(model: Path, photo: Path) -> int:
    """Length of the page's prompt by the processor of transformers and the plug-in's settings."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    ids = processor(images=[Image.open(photo)], text=text)["input_ids"][0]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    runs = [len(run) for run in "".join("x" if token == image else " " for token in ids).split()]
    return len(ids) - sum(runs) + sum(parse({"method": "divprune", "ratio": 0.25}).counts(runs))


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_shown_commands_are_options_of_vllm(command):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    config = next(re.search(r"CONFIG='(.*)'", block.code)[1] for block in BLOCKS if "CONFIG='" in block.code)
    words = shlex.split(command.replace("$CONFIG", config.replace('"', '\\"')))
    given = parser.parse_args(["--model", *words[2:]])
    shown = given.additional_config["vtprune"]
    settings = parse(shown)
    assert settings.method.name == shown.get("method", "resprune")
    assert settings.budget.ratio == json.loads(config)["vtprune"]["ratio"]
