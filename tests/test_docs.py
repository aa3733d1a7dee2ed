# SPDX-License-Identifier: Apache-2.0
"""Documentation: Python blocks run, commands exist, and generated pages are complete."""

from __future__ import annotations

import importlib
import json
import posixpath
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).resolve().parent.parent
import doc_blocks  # noqa: E402
import doc_commands  # noqa: E402

import vtprune  # noqa: E402
from scripts.docs import methods, pages, tables  # noqa: E402
from scripts.docs import results as pages_results  # noqa: E402
from vtprune import refvlm  # noqa: E402

# Documents of the repository that are no pages of the site.
OTHERS = ("CODE_OF_CONDUCT.md", "SECURITY.md", "examples/space/README.md")
PAGES = pages.everything() | {place: (ROOT / place).read_text(encoding="utf-8") for place in OTHERS}
# Examples are run by their own test.
TO_RUN = [place for place in sorted(PAGES) if not re.match(r"examples/\d", place) and doc_blocks.blocks(PAGES[place])]


@pytest.fixture(scope="module")
def embedded():
    model, processor = refvlm.load()
    scene = refvlm.scenes.scene(7)
    inputs = processor(images=scene.image, text=refvlm.prompt(scene.questions[0].text), return_tensors="pt")
    return {"vtprune": vtprune, "model": model, "processor": processor, "inputs": inputs}


@pytest.fixture
def session(embedded, tmp_path, monkeypatch):
    """A reader's session: see the rules in docs/extend/docs.md."""
    registry = importlib.import_module("vtprune.core.registry")
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(("photo.png", "photos/a.png", "photos/b.png", "photos/c.png")):
        refvlm.scenes.scene(number).image.save(tmp_path / name)
    manager = importlib.import_module("transformers.cli.serving.model_manager").ModelManager
    monkeypatch.setattr(manager, "_load_model", manager._load_model)  # restored after the page on serving
    monkeypatch.setitem(sys.modules, "page", ModuleType("page"))  # dataclasses look their module up
    yield dict(embedded, __name__="page")
    vtprune.unpatch(embedded["model"])


@pytest.mark.parametrize("place", TO_RUN)
def test_python_blocks_run(place, session, folder, tmp_path):
    """The Python blocks of a page run in order and in one namespace."""
    page = tmp_path / Path(place).name
    page.write_text(doc_blocks.offline(PAGES[place], folder), encoding="utf-8")
    document = Sybil([PythonCodeBlockParser()]).parse(page)
    document.namespace.update(session)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("place", TO_RUN)
def test_commands_exist(place):
    blocks = doc_blocks.blocks(PAGES[place])
    for words in doc_commands.calls("\n".join(block.code for block in blocks if block.language == "bash")):
        doc_commands.check(words, PAGES[place])
    for block in blocks:
        where = f"{place}, line {block.line}"
        assert block.language in ("bash", "json", "python", "text", "yaml"), f"{where}: a block without a language"
        if block.language == "json":
            json.loads(block.code)


@pytest.mark.parametrize(
    "line, message",
    [
        ("vtprune demo --ration 0.1", "unrecognized arguments: --ration"),
        ("vtprune coffee", "invalid choice: 'coffee'"),
        ("make coffee", "no target coffee"),
        ("make lint && frobnicate", "frobnicate: documents use only"),
        ("python -m benchmarks.nothing", "there is no benchmarks/nothing"),
        ("for o in nothing; do python -m benchmarks.kinds --$o; done", "no option --nothing"),
        ("python scripts/nothing.py", "there is no scripts/nothing.py"),
        ("pytest tests/nothing.py", "there is no tests/nothing.py"),
        ("pip install 'vtprune[nothing]'", "no extra nothing"),
        ("pip install -r requirements/nothing.txt", "there is no requirements/nothing.txt"),
        ("lmms-eval --model vtprune --tasks gqa --model_args method=nothing,ratio=0.1", "nothing"),
        ("accelerate launch -m lmms_eval --model vtprune --tasks gqa --model_args ratio=0.1,nothing=1", "nothing"),
        ("""vllm serve MODEL --additional-config '{"vtprune": {"ration": 0.1}}'""", "ration"),
        ("vllm serve", "expected `serve MODEL`"),
        ("for x in a b; do", "bash: "),
    ],
)
def test_wrong_commands_are_noticed(line, message):
    with pytest.raises((doc_commands.WrongCommand, vtprune.VTPruneError), match=re.escape(message)):
        for words in doc_commands.calls(line):
            doc_commands.check(words)


def test_commands_are_recorded_as_bash_expands_them():
    script = (
        'NAME="a b"\nshow() { make "$1" X="a b"; }  # twice\nfor n in $NAME; do show $n; done; pip install \\\n  torch'
    )
    assert doc_commands.calls(script) == [["make", "a", "X=a b"], ["make", "b", "X=a b"], ["pip", "install", "torch"]]


def test_no_document_is_left_out():
    folders = ("benchmarks", "docs", "examples", "kernels", "scripts", "tests", "vtprune")
    found = [*ROOT.glob("*.md"), *(path for name in folders for path in (ROOT / name).rglob("*.md"))]
    known = {*pages.written(), *pages.places(), *OTHERS}
    assert {path.relative_to(ROOT).as_posix() for path in found} <= known


def test_the_pruned_server_of_the_page_on_serving_prunes(session, folder):
    """A model that `transformers serve` loads after the page's Python block is pruned."""
    manager = importlib.import_module("transformers.cli.serving.model_manager").ModelManager
    block = next(b for b in doc_blocks.blocks(PAGES["serving.md"]) if "ModelManager" in b.code)
    exec(doc_blocks.offline(block.code, folder), {"__name__": "serve_pruned"})
    server = manager(device="cpu")
    try:
        model, processor = server.load_model_and_processor(f"{folder}@main")
        inputs = processor(images=refvlm.scenes.scene(1).image, text=refvlm.prompt("what?"), return_tensors="pt")
        model.generate(**inputs, max_new_tokens=2)
        patch = importlib.import_module("vtprune.engine.patching").find_patch(model)
        assert patch.last.tokens == (144, 14)
    finally:
        server.shutdown()  # otherwise Python waits at exit until the model has been idle for five minutes


def test_names_on_the_hub_become_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    code = 'load("owner/model-1.5"), open("photos/a.png"), kind("image/png"), path("a/b/c")'
    swapped = doc_blocks.offline(code, Path("/here"))
    assert swapped == 'load(\'/here\'), open("photos/a.png"), kind("image/png"), path("a/b/c")'


def test_every_method_has_a_page_by_existing(monkeypatch):
    registry = importlib.import_module("vtprune.core.registry")
    own = [name for name in vtprune.methods.names() if vtprune.methods.get(name).__module__.startswith("vtprune.")]
    assert {f"methods/{name}.md" for name in own} <= set(PAGES)  # other tests register methods, too
    new = type("New", (vtprune.methods.get("uniform"),), {"__doc__": "Keeps new tokens. arXiv 2401.00001."})
    new.__module__ = "vtprune.methods.new"
    monkeypatch.setattr(registry, "_METHODS", registry._METHODS | {"new": new})
    text = pages.made()["methods/new.md"]
    assert "Keeps new tokens." in text and "arxiv.org/abs/2401.00001" in text and ":::" in text
    groups = {title: entries for group in pages.navigation()["Methods"] for title, entries in group.items()}
    assert {"new": "methods/new.md"} in groups["Question-free"]
    assert "(new.md)" in pages.made()["methods/index.md"]


def test_pages_have_no_open_ends():
    for place, text in PAGES.items():
        assert not re.search(r"<!-- (fill|include):", re.sub(r"`[^`\n]*`", "", text)), place
        assert tables.MISSING not in text or place.startswith("methods/"), place
        assert " object at 0x" not in text, place  # the repr of something that has no text


_RESULTS = {
    "accuracy.json": {
        "questions": "200 questions",
        "unpruned": {"right": 190, "total": 200, "visual_tokens": 144, "interval": [0.9, 0.97]},
        "rows": [
            {"method": "a", "ratio": 0.5, "kept": 72, "mean_tokens": 72, "right": 188, "total": 200},
            {"method": "a", "ratio": 0.1, "kept": 14, "mean_tokens": 14, "right": 150, "total": 200},
            {"method": "b", "ratio": 0.5, "kept": 72, "mean_tokens": 100, "right": 187, "total": 200},
            {"method": "b", "ratio": 0.1, "kept": 14, "mean_tokens": 80, "right": 189, "total": 200},
            {"method": "b", "mean_ratio": 0.1, "refused": "no"},
            {"method": "oracle", "ratio": 0.1, "kept": 14, "mean_tokens": 14, "right": 200, "total": 200},
        ],
        "versions": {"torch": "2"},
        "machine": "one",
    },
    "kinds.json": {
        "questions": "20 questions",
        "rows": [
            {
                "kinds": {
                    "all": {"accuracy": 0.9, "total": 20, "majority": 0.3},
                    "color": {"accuracy": 1.0, "total": 10, "majority": 0.2},
                    "count": {"accuracy": 0.8, "total": 10, "majority": 0.4},
                }
            },
            {
                "method": "a",
                "ratio": 0.1,
                "kinds": {
                    "all": {"accuracy": 0.7, "total": 20},
                    "color": {"accuracy": 0.95, "total": 10},
                    "count": {"accuracy": 0.45, "total": 10},
                },
            },
        ],
        "versions": {"torch": "2"},
        "machine": "one",
    },
}

_RESULTS["needle.json"] = {
    "64": {
        "unpruned": {"method": "unpruned", "outcomes": "1" * 20, "right": 20, "total": 20},
        "fact always kept 0.1": {"method": "fact always kept", "ratio": 0.1, "outcomes": "1", "right": 1, "total": 1},
        "a 0.3": {"method": "a", "mean_ratio": 0.31, "outcomes": "0110", "right": 2, "total": 4},
        "a 0.15": {"method": "a", "mean_ratio": 0.15, "refused": "too little"},
        "b 0.3": {"method": "b", "mean_ratio": 0.3, "outcomes": "11", "right": 2, "total": 2},
        "b 0.15": {"method": "b", "mean_ratio": 0.15, "outcomes": "11", "right": 2, "total": 2},
        "c 0.3": {"method": "c", "mean_ratio": 0.3, "outcomes": "00", "right": 0, "total": 2},
    },
    "versions": {"torch": "2"},
}


@pytest.fixture
def results(tmp_path):
    for row in (*_RESULTS["accuracy.json"]["rows"], *_RESULTS["needle.json"]["64"].values()):
        row.setdefault("interval", [0.1, 0.9])
    for name, data in _RESULTS.items():
        (tmp_path / name).write_text(json.dumps(data))
    return tmp_path


def test_tables_hold_the_numbers_of_the_results(results):
    front = tables.front(results).splitlines()[4:]
    # the Pareto front up to the unpruned model, without the oracle; b at 0.5 is dominated
    assert [line.split(" | ")[3] for line in front] == ["`a`", "`a`", "`b`", "unpruned"]
    assert front[0].startswith("| 14 (10%) | 14 | 75.0% (10.0% to 90.0%) | `a` | `ratio=0.1`")
    floor = tables.floor(results)
    assert "| `a` | 0.5 | 0.5 | 0.5 | 0.5 |" in floor and "| `b` | none tried | 0.1 | 0.1 | 0.1 |" in floor
    kinds = tables.kinds(results)
    assert "| count (10) | color (10) | all (20) |" in kinds and "| `a`, ratio 0.1 | 45.0% | 95.0% | 70.0% |" in kinds
    own = tables.of_method("a", results)
    assert "| `ratio=0.1` | 14 | 14 | 75.0% (10.0% to 90.0%) |" in own and "Unpruned: 95.0%" in own
    assert "not possible" in tables.of_method("b", results)
    needles = tables.needles(results).splitlines()
    assert "64 visual places, 2 to 4 texts for each number; unpruned 100.0%" in needles[0]
    assert [line.split(" | ")[0] for line in needles[4:]] == ["| `b`", "| `a`", "| `c`"]
    assert "| `a` | 50.0% (10.0% to 90.0%) | not possible |" in needles[5]
    assert "| `c` | 0.0% (10.0% to 90.0%) | not tried |" in needles[6]


def test_what_was_not_measured_is_said(tmp_path):
    for fill in (tables.front, tables.floor, tables.kinds, tables.needles):
        assert fill(tmp_path) == tables.MISSING
    assert tables.of_method("a", tmp_path) == tables.MISSING


def test_the_reference_has_every_public_name():
    described = set(re.findall(r"^::: vtprune\.(\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.M))
    wanted = {name for name in vtprune.__all__ if name not in ("methods", "towers")}
    wanted |= {f"towers.{name}" for name in vtprune.towers.__all__}
    # Every registered method has a page of its own.
    wanted |= {f"methods.{name}" for name in vtprune.methods.__all__ if name not in _method_classes()}
    assert not wanted - described


def _method_classes() -> set[str]:
    return {type(vtprune.methods.get(name)()).__name__ for name in vtprune.methods.names()}


def test_includes_and_links():
    text = "<!-- include: CONTRIBUTING.md#Add a kernel -->"
    assert pages.complete(text, "docs/extend/kernel.md") == pages.section("CONTRIBUTING.md", "Add a kernel")
    links = "[a](../README.md) [b](../LICENSE) [c](https://x.y/z) [d](models.md#x) [e](nothing.md) `[f](g)`"
    assert pages.complete(links, "docs/serving.md") == (
        "[a](index.md) `b` [c](https://x.y/z) [d](models.md#x) [e](nothing.md) `[f](g)`"
    )
    assert pages.complete("[m](/methods/iwp.md)", "docs/extend/method.md") == "[m](../methods/iwp.md)"
    for wrong in ("<!-- fill: nothing -->", "<!-- include: CONTRIBUTING.md#Nothing -->"):
        with pytest.raises(ValueError, match="othing"):
            pages.complete(wrong, "docs/serving.md")


def test_links_of_pages_lead_to_pages_and_files():
    """Also those around charts, which MkDocs does not check."""
    for place, text in PAGES.items():
        if place in OTHERS:
            continue
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", pages_results.linked(text), flags=re.S)
        for target in re.findall(r"\]\(([^)\s#]+)", prose):
            if not re.match(r"[a-z]+:", target):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
                assert path in PAGES or (ROOT / "docs" / path).is_file(), (place, target)


def test_documents_type_no_numbers_of_results():
    """Hand-written pages in docs/ contain no percentages; those come from result files."""
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if path.name not in ("models.md", "support.md", "layouts.md", "results.md"):
            found = re.findall(r"\d+(?:\.\d+)? ?%", re.sub(r"```.*?```", "", path.read_text(), flags=re.S))
            assert not found, (path, found)


def test_summaries_are_first_sentences():
    assert methods.summary("random") == "Keeps a uniformly drawn subset of each group, before the decoder"
    assert methods.paper("divprune") == "2503.02175" and methods.paper("random") is None
