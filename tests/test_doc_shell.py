# SPDX-License-Identifier: Apache-2.0
"""How shell blocks of documents are run: what does not work is noticed, and what is not run is listed."""

from __future__ import annotations

import importlib.util
import io
import re

import doc_blocks
import doc_checks
import doc_shell
import pytest

from vtprune import refvlm


@pytest.fixture
def shell(programs, folder, tmp_path):
    with doc_shell.Shell(programs, tmp_path, folder) as shell:
        yield shell


@pytest.mark.parametrize("key", doc_checks.ONLY_CHECKED)
def test_what_is_only_checked(key):
    """All that is not run here, for all to see: `pytest -rs` shows why, and what runs it."""
    if not doc_checks.runs_here(key):
        pytest.skip(f"{key}: {doc_checks.ONLY_CHECKED[key]}")


def test_nothing_else_is_only_checked(shell):
    assert shell.run("vllm serve MODEL --port 8000 && curl localhost:8000/v1/models")[0]["only_checked"] == "vllm"
    assert [call.get("only_checked") for call in shell.calls()] == ["vllm", "curl"]
    if importlib.util.find_spec("vllm") is None:
        assert shell.run("pytest tests/vllm_tests")[0]["only_checked"] == "pytest"
    with pytest.raises(AssertionError, match="not on the list"):
        doc_checks.Checked("frobnicate")


@pytest.mark.parametrize(
    "line",
    [
        "vtprune demo --ration 0.1",
        "vtprune compare --image nothing.png --question x",
        "make coffee",
        "make lint && frobnicate",
        "python -m benchmarks.nothing",
        "python -m benchmarks.kinds --nothing",
        "python -m nothing",
        "python scripts/nothing.py",
        "python examples/02_compare_methods.py --nothing",
        "python examples/05_batch_pipeline.py --port 8000 --serve --nothing",
        "pytest tests/nothing.py",
        "pytest tests/test_readme.py -k nothing",
        "pip install 'vtprune[nothing]'",
        "pip install './nothing'",
        "pip install -r requirements/nothing.txt",
        "pip install 'transformers[nothing]'",
        "pip install --nothing torch",
        "transformers nothing",
        "git clone <this repository> a/b --nothing",
        "curl -s localhost:8000",
        "vllm serve MODEL && curl -s localhost:8000 -d '{'",
        "vllm serve MODEL && echo '{' > body.json && curl -s localhost:8000 -d @body.json",
        "frobnicate",
        "cd nothing",
        "lmms-eval --model vtprune --tasks gqa --model_args method=nothing,ratio=0.1",
        "lmms-eval --model vtprune --tasks gqa --model_args method=iwp,layer=2",
        "accelerate launch --num_processes 1 -m lmms_eval --model vtprune --tasks gqa --model_args ratio=0.1,nothing=1",
        """vllm serve MODEL --additional-config '{"vtprune": {"ration": 0.1}}'""",
        """vllm serve MODEL --additional-config '{"vtprune": '""",
        "for x in a b; do",
    ],
)
def test_blocks_that_do_not_work_are_noticed(line, shell):
    with pytest.raises(AssertionError, match=re.escape(re.sub("<.*>", "", line)[:8])):
        shell.run(line)


def test_blocks_run_in_one_shell_that_is_alone_in_its_folder(shell, tmp_path):
    first = 'NAME="a b"\nshow() { python -c "$TOUCH" "$1.txt"; }  # twice\npip install \\\n  torch'
    shell.run("TOUCH='import sys; open(sys.argv[1], mode=chr(119))'")
    assert [call["shown"] for call in shell.run(first)] == [["pip", "install", "torch"]]
    calls = shell.run("for name in $NAME; do show $name; done; mkdir new && cd new\nSEEN=$(vtprune --version)")
    assert [call["shown"][-1] for call in calls] == ["a.txt", "b.txt", "--version"]
    assert (tmp_path / "a.txt").exists() and (tmp_path / "b.txt").exists()
    shell.run('[ "$PWD" = "$OLDPWD/new" ] && [ "${SEEN%% *}" = vtprune ] && vtprune methods')
    assert shell.calls()[-1]["shown"] == ["vtprune", "methods"]


def test_a_server_of_a_page_is_asked_where_it_really_is(shell):
    """Port 8000 may be taken; the page's own client is led to the port that was free."""
    shell.run("python examples/05_batch_pipeline.py --port 8000 --serve")
    ask = """curl -s localhost:8000 -d '{"question": "what digit?", "image": "'$(base64 -w0 photo.png)'"}'"""
    (shell.session / "photo.png").write_bytes(_png())
    assert [call["status"] for call in shell.run(ask)] == [0]
    with pytest.raises(AssertionError, match="curl"):
        shell.run("curl -s localhost:8000 -d '{}'")


def _png() -> bytes:
    file = io.BytesIO()
    refvlm.scenes.scene(1).image.save(file, "PNG")
    return file.getvalue()


def test_a_block_becomes_the_file_that_its_page_says(tmp_path):
    text = "Save this as\n`a.py`:\n\n```python\nA = 1\n```\n\nThen:\n\n```python\nB = 1\n```\n"
    blocks = doc_blocks.blocks(text)
    doc_blocks.save_as(blocks[:1], text, tmp_path)
    doc_blocks.save_as(blocks, text, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["A = 1\n"]
