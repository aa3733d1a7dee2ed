# SPDX-License-Identifier: Apache-2.0
"""The command line as a person, a pipe and a script meet it: help, suggestions, JSON, exit codes, hostile files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import hostile_pictures
import pytest

from vtprune import methods, refvlm
from vtprune.cli import answer
from vtprune.cli.main import build_parser, main
from vtprune.study.timing import Side

COMMANDS = build_parser().commands()


def _run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def _process(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vtprune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, timeout=120, **options)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["rnu"], ["fidelity", "--help"], ["completion", "zsh"]]
)
def test_help_does_not_wait_for_pytorch(arguments):
    code = (
        "import sys\nfrom vtprune.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'rich', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_starts_with_an_example_and_says_what_it_does(capsys, command):
    with pytest.raises(SystemExit) as stop:
        _run(command, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(f"examples:\n  vtprune {command}")
    parser = build_parser()._subparsers._group_actions[0].choices[command]  # type: ignore[union-attr]
    assert parser.description and all(action.help for action in parser._actions)
    for example in parser.examples:
        words = example.replace("'", "").split(" >")[0]
        assert words.split()[0] == command
        unknown = [w for w in words.split() if w.startswith("--") and w not in parser._option_string_actions]
        assert not unknown
    assert _run("help", command) == 0 and capsys.readouterr().out == text
    assert "default: [" not in text  # written as on the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--kep", "5"], "did you mean --keep? (see vtprune demo --help)"),
        (["rnu"], "did you mean run?"),
        (["fidelity", "--ratio-s=0.5"], "did you mean --ratios? (see vtprune fidelity --help)"),
        (["demo", "--method", "fastvv"], "did you mean 'fastv'"),
        (["bench", "--clock", "wal"], "did you mean wall?"),
        ([], "expected one of demo, run"),
    ],
)
def test_what_is_misspelled_gets_a_suggestion(capsys, arguments, message):
    assert _run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_debug_stands_anywhere():
    for arguments in (["--debug", "demo", "--method", "none"], ["demo", "--method", "none", "--debug"]):
        with pytest.raises(methods.resolve.__globals__["MethodError"]):
            _run(*arguments)


@pytest.mark.parametrize("command", [["methods"], ["inspect"], ["doctor"], ["demo", "--repeats", "1"]])
def test_json_has_standard_output_to_itself(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert _run(*command, "--json", "-") == 0
    piped = capsys.readouterr()
    data = json.loads(piped.out)
    assert piped.err
    assert _run(*command, "--json", "out.json") == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written.keys() == data.keys() and not list(tmp_path.glob("-*"))
    assert "out.json" in capsys.readouterr().out


def test_compare_writes_json_to_a_pipe_and_reads_a_picture_from_one(tmp_path):
    picture = tmp_path / "scene.png"
    refvlm.scenes.scene(3).image.save(picture)
    question = ["--question", "how many stars are there?", "--methods", "uniform", "--repeats", "1", "--json"]
    run = _process("compare", "--image", "-", *question, input=picture.read_bytes())
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    assert {row["method"] for row in data["rows"]} >= {"uniform", "random"}
    assert _process("compare", "--image", "-", *question, input=b"no picture").returncode == 2


def test_questions_come_from_a_pipe_and_fidelity_answers_as_json(tmp_path):
    rest = ["--limit", "1", "--methods", "uniform", "--ratios", "0.5", "--repeats", "1", "--max-new-tokens", "2"]
    run = _process("fidelity", "--questions", "-", *rest, "--json", "-", input=b"what is it?\n\n", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["questions"] == ["what is it?"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", ["40", "60", "80", "200"])
def test_narrow_terminals_are_readable(capsys, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    assert _run("methods") == 0
    out = capsys.readouterr().out
    assert "scale_over=" in out and "…" not in out
    assert max(map(len, out.splitlines())) <= max(int(width), 60)
    assert _run("demo", "--small", "--repeats", "1", "--output", tmp_path / "narrow.png") == 0
    out = capsys.readouterr().out
    assert "KV cache" in out and "visual tokens" in out and "144" in out
    table = [line for line in out.splitlines() if line[:1] in "│┃"]
    assert all(len(line) <= int(width) for line in table) and "…" not in "".join(table)


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m vtprune methods | head -c 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout.strip() in ("0", "141") and run.stderr == ""
    # And with a pipe that nobody reads at all.
    read, write = os.pipe()
    os.close(read)
    closed = subprocess.run(
        [sys.executable, "-m", "vtprune", "methods"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert closed.returncode == 141 and closed.stderr == b""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_table_whose_reader_goes_away_ends_like_other_output(stream):
    # Of a table, rich would end the process with code 1.
    read, write = os.pipe()
    os.close(read)
    demo = [sys.executable, "-m", "vtprune", "demo", "--small", "--repeats", "1", "--force"]
    demo += ["--output", "/tmp/vtprune-closed.png"]
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write}
    run = subprocess.run([*demo, *(["--json"] if stream == "stderr" else [])], **to, check=False)
    os.close(write)
    assert run.returncode == 141 and not run.stdout and not run.stderr


@pytest.mark.parametrize("command", [["methods"], ["methods", "--json", "-"], ["--help"]])
def test_a_full_disk_is_one_line(command):
    with open("/dev/full", "wb") as full:
        run = subprocess.run(
            [sys.executable, "-m", "vtprune", *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.endswith("vtprune: error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "not enough memory"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "No such file"),
        (RecursionError("too deep"), 1, "not enough stack"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero (use --debug"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_error_is_one_line_and_a_documented_code(capsys, monkeypatch, error, code, message):
    from vtprune.cli import describe

    def broken() -> None:
        raise error

    monkeypatch.setattr(describe, "list_methods", broken)
    assert _run("methods") == code
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == bool(message)
    with pytest.raises(SystemExit):
        _run("--help")
    assert f"  {code:<3}  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("redirect", "code", "message"),
    [
        ("methods >&-", 1, "standard output is closed"),
        ("methods >&- 2>&-", 1, ""),
        ("rnu 2>&-", 2, ""),
        ("rnu 2>/dev/full", 2, ""),
        ("demo --small --image - <&-", 2, "cannot read standard input as a picture: it is closed"),
        ("fidelity --questions - <&-", 2, "cannot read standard input as questions: it is closed"),
        ("methods --json /dev/full", 1, "No space left"),
        (f"methods --json {'a' * 300}", 2, "too long"),
        (f"compare --question x --image {'a' * 300}", 2, "too long"),
        ("methods --json pipe", 2, "cannot write pipe"),
        ("tune --pixels --image pipe.png --out pipe --force", 2, "pipe.png"),
        ("demo --tower 0", 2, "'0' is not a share of patches to keep"),
        ("bench --model tiny --threads 999999999", 2, "at most 1,024"),
        ("run --model embedded --image a.png --question x --dtype float8_e4m3fn", 2, "unknown dtype"),
    ],
)
def test_streams_and_paths_of_every_kind_end_in_one_line(tmp_path, redirect, code, message):
    os.mkfifo(tmp_path / "pipe")
    refvlm.scenes.scene(3).image.save(tmp_path / "a.png")
    command = ["bash", "-c", f"exec {sys.executable} -m vtprune {redirect}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert run.returncode == code and message in run.stderr and "error" not in run.stdout
    assert len(run.stderr.splitlines()) == bool(message)


def test_words_that_the_terminal_cannot_show_are_escaped(capsys):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = _process("methods", "--json", "-", "--debug", env=env)
    assert run.returncode == 0
    bad = _process("rnü", env=env)
    assert bad.returncode == 2 and b"rn\\xfc" in bad.stderr


def test_what_libraries_say_about_a_damaged_picture_is_not_shown(tmp_path):
    path = tmp_path / "fax.tif"
    path.write_bytes(hostile_pictures.broken_fax())
    run = _process("demo", "--small", "--repeats", "1", "--image", path, "--output", tmp_path / "o.png")
    assert len(run.stderr.decode().splitlines()) == (run.returncode != 0)
    assert "Fax" not in run.stderr.decode()


def test_no_selection_is_blamed_where_nothing_was_dropped():
    """Two runs of the same prompt differ in time by chance."""
    args = build_parser().parse_args(["demo", "--small", "--ratio", "1.0"])
    args.model, args.tower, args.keep = "embedded", None, None
    before = Side("5", 144, 155, seconds=0.3, vision=0.1, selection_time=0.0, kv_bytes=1, repeats=5)
    slower = dataclasses.replace(before, seconds=0.4)
    for kept, expected in ((144, "None of the 144 visual tokens"), (14, "selection takes longer than it saves")):
        notes = answer._notes(args, before, dataclasses.replace(slower, visual_tokens=kept), None)
        assert [expected in note for note in notes].count(True) == 1 and expected in notes[-1]


def test_pictures_of_others_are_not_overwritten(capsys, tmp_path):
    path = tmp_path / "a.png"
    assert _run("demo", "--small", "--output", path, "--repeats", 1) == 0
    assert _run("demo", "--small", "--output", path, "--repeats", 1, "--keep", 99999) == 0
    out = capsys.readouterr().out
    assert "None of the 144 visual tokens of the prompt was dropped" in out and "of one run" in out
    refvlm.scenes.scene(1).image.save(path)
    before = path.read_bytes()
    assert _run("demo", "--small", "--output", path) == 2 and path.read_bytes() == before
    assert "--force" in capsys.readouterr().err
    assert _run("demo", "--small", "--output", path, "--repeats", 1, "--force") == 0 and path.read_bytes() != before


def test_no_command_overwrites_a_file_without_force(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "notes.svg"
    notes.write_text("<svg>mine</svg>")
    refvlm.scenes.scene(3).image.save(tmp_path / "a.png")
    short = ["--limit", "1", "--methods", "uniform", "--ratios", "0.5", "--repeats", "1"]
    for command in (
        ["methods", "--json", notes],
        ["inspect", "--json", notes],
        ["doctor", "--json", notes],
        ["compare", "--image", "a.png", "--question", "x", "--json", notes],
        ["demo", "--small", "--json", notes],
        ["certify", "--images", "a.png", "--question", "x", "--out", notes],
        ["tune", "--image", "a.png", "--question", "x", "--out", notes],
        ["bench", "--model", "tiny", "--plot", notes],
        ["fidelity", *short, "--json", "notes.json"],  # its chart would be notes.svg
    ):
        assert _run(*command) == 2, command
        assert "notes.svg exists; use --force" in capsys.readouterr().err, command
        assert notes.read_text() == "<svg>mine</svg>"
    assert _run("methods", "--json", notes, "--force") == 0 and "iwp" in notes.read_text()


@pytest.mark.parametrize(
    "command",
    [
        "fidelity --limit 1 --json out.svg",
        "demo --small --output out.png --json ./out.png",
        "bench --model tiny --json out.svg --plot out.svg",
        "certify --images a.png --question x --out out.json --json out.json",
        "tune --image a.png --question x --out out.json --json out.json",
    ],
)
def test_two_results_in_one_file_are_refused(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    refvlm.scenes.scene(3).image.save(tmp_path / "a.png")
    assert _run(*command.split()) == 2
    assert "two results would be written to" in capsys.readouterr().err


def test_tune_refuses_options_that_its_kind_does_not_use(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refvlm.scenes.scene(3).image.save(tmp_path / "a.png")
    for options, unused in (
        ("--auto --question x --trials 3 --seed 0", "--auto does not use --trials and --seed"),
        ("--pixels --question x", "--pixels does not use --question"),
        ("--question x --min 0.1", "the search of a strategy does not use --min"),
    ):
        assert _run("tune", "--image", "a.png", *options.split()) == 2
        assert unused in capsys.readouterr().err


def test_devices_are_neither_read_nor_replaced(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    base = ["fidelity", "--limit", "1", "--methods", "uniform", "--ratios", "0.5", "--repeats", "1"]
    for path in ("/dev/full", "/dev/zero", tmp_path / "pipe.json", tmp_path / "zero.json"):
        assert _run(*base, "--json", path) == 2
        assert "not a regular file" in capsys.readouterr().err
        assert _run("fidelity", "--limit", "1", "--questions", path) == 2
        assert _run("compare", "--image", path, "--question", "x") == 2
    assert _run(*base, "--json", tmp_path / "zero.json", "--force") == 2
    assert (tmp_path / "zero.json").is_symlink() and (tmp_path / "pipe.json").is_fifo()
    for name in ("zero.json", "pipe.json"):
        assert _run("compare", "--image", "x.png", "--question", "x", "--methods", tmp_path / name) == 2


@pytest.mark.parametrize("name", ["chunks.png", "scans.jpg", "strips.tif", "eps.png", "large.png", "bomb.png"])
def test_hostile_pictures_are_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(hostile_pictures.REFUSED[name][0]())
    run = _process("demo", "--image", path, "--output", tmp_path / "out.png", text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr


@pytest.mark.parametrize("size", [(4000, 1), (1, 3000), (4000, 3000)])
def test_large_and_thin_pictures_are_drawn_small(tmp_path, size):
    from PIL import Image

    path, out = tmp_path / "in.png", tmp_path / "out.png"
    path.write_bytes(hostile_pictures.picture(size))
    assert _run("demo", "--small", "--image", path, "--output", out, "--repeats", 1) == 0
    assert max(Image.open(out).size) < 3 * 2048


def test_a_question_longer_than_the_model_is_refused(capsys, tmp_path):
    for question, message in (("word " * 5000, "the prompt has"), ("x" * 200_000, "at most 100,000")):
        assert _run("demo", "--question", question, "--output", tmp_path / "a.png") == 2
        err = capsys.readouterr().err
        assert message in err and len(err) < 500


STRATEGY = {"method": "vflowopt", "threshold": 1.0, "alpha": 0.0, "grid": 3.0, "first": 0.5}
STRATEGY |= {"later": [0.9, 0.8], "layers": [9, 18], "depth": 28}
WRONG = ["x", [1], {"a": 1}, True, None, float("nan"), float("inf"), 10**400, -5, "[" * 9]


@pytest.mark.parametrize("key", STRATEGY)
def test_strategies_of_wrong_types_are_one_line(capsys, tmp_path, key):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(STRATEGY))
    assert methods.VFlowOpt.load(path).first == 0.5
    for value in WRONG:
        if (key, value) in (("depth", None), ("alpha", -5), ("later", [1]), ("layers", [1])):
            continue
        path.write_text(json.dumps({**STRATEGY, key: value}))
        assert _run("compare", "--image", "none.png", "--question", "x", "--methods", path) == 2
        err = capsys.readouterr().err
        assert "holds no strategy" in err and len(err.splitlines()) == 1, (value, err)
    path.write_text(json.dumps({k: v for k, v in STRATEGY.items() if k != key}))
    assert _run("compare", "--image", "none.png", "--question", "x", "--methods", path) == 2


def test_damaged_results_are_one_line(capsys, tmp_path):
    path = tmp_path / "f.json"
    base = ["fidelity", "--limit", "2", "--methods", "uniform", "--ratios", "0.5", "--repeats", "1", "--json", path]
    assert _run(*base, "--max-new-tokens", "2") == 0
    good = json.loads(path.read_text())
    row = good["rows"][0]
    for damage in (
        {"rows": "abc"},
        {"rows": 3},
        {"rows": None},
        {"rows": [{}]},
        {"rows": [{**row, "kl": "x"}]},
        {"rows": [{**row, "frontier": 3}]},
        {"rows": [row, row]},
        {"rows": [{**row, "kept": 10**400}]},
        {"records": ["{"]},
        {"records": 5},
        {"records": ["{}", "{}", "{}"]},
        {"records": ['{"unpruned": {"seconds": 1}, "uniform 0.5": {}}']},
    ):
        data = {key: value for key, value in good.items() if key != "rows"} | damage
        path.write_text(json.dumps(data))
        capsys.readouterr()
        assert _run(*base, "--max-new-tokens", "2") == 2, damage
        err = capsys.readouterr().err
        assert "is damaged" in err and len(err.splitlines()) == 1, err
    path.write_text("[" * 100_000)
    assert _run(*base) == 2


def test_a_folder_without_the_models_weights_is_refused(capsys, tmp_path, folder):
    import shutil

    import torch
    from safetensors.torch import save_file

    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    save_file({"nothing": torch.zeros(1)}, copy / "model.safetensors", {"format": "pt"})
    rest = ["--image", tmp_path / "a.png", "--question", "x?"]
    refvlm.scenes.scene(1).image.save(tmp_path / "a.png")
    assert _run("run", "--model", copy, *rest, "--output", tmp_path / "b.png") == 2
    assert "are missing" in capsys.readouterr().err
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1_000_000
    (copy / "config.json").write_text(json.dumps(config))
    for command in (["run", *rest], ["inspect"], ["doctor"]):
        assert _run(*command, "--model", copy) == 2
        assert "num_hidden_layers=1,000,000" in capsys.readouterr().err


def test_damaged_results_of_bench_are_one_line(capsys, tmp_path):
    path = tmp_path / "b.json"
    command = ["bench", "--model", "tiny", "--methods", "uniform", "--visual-tokens", "16", "--text-tokens", "4"]
    command += ["--new-tokens", "1", "--rounds", "1", "--json", path]
    assert _run(*command) == 0
    good = json.loads(path.read_text())
    (key,) = good["settings"]
    setting = good["settings"][key]
    (part,) = setting["rounds"]
    run = part["runs"]["uniform ratio=0.1"]

    def with_run(**damage: object) -> dict:
        runs = part["runs"] | {"uniform ratio=0.1": {**run, **damage}}
        return {key: {**setting, "rounds": [{**part, "runs": runs}]}}

    for settings in (
        3,
        {key: []},
        {key: {**setting, "rounds": 1}},
        {key: {**setting, "rounds": [{}]}},
        {key: {**setting, "rounds": [{**part, "runs": {}}]}},
        with_run(prefill="x"),
        with_run(prefill=0),
        with_run(prefill=True),
        with_run(kept=10**400),
        with_run(cpu=[1]),
        with_run(token=[]),
    ):
        path.write_text(json.dumps(good | {"settings": settings}))
        capsys.readouterr()
        assert _run(*command) == 2
        err = capsys.readouterr().err
        assert "is damaged" in err and len(err.splitlines()) == 1


def test_a_model_that_fails_unpruned_is_an_input_error(capsys, tmp_path, folder):
    import shutil

    copy, picture = tmp_path / "model", tmp_path / "a.png"
    refvlm.scenes.scene(1).image.save(picture)
    shutil.copytree(folder, copy)
    good = (copy / "config.json").read_text()
    rest = ["--image", picture, "--question", "x?", "--output", tmp_path / "b.png"]
    for change, message in (
        ({"image_token_id": 5, "image_token_index": 5}, "fails without pruning"),
        ({"text_config": {**json.loads(good)["text_config"], "intermediate_size": 8}}, "other shapes"),
        ({"vision_config": {**json.loads(good)["vision_config"], "image_size": 10**6}}, "image_size=1,000,000"),
    ):
        (copy / "config.json").write_text(json.dumps(json.loads(good) | change))
        assert _run("run", "--model", copy, *rest) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    (copy / "config.json").write_text(json.dumps(json.loads(good) | {"text_config": {"vocab_size": -1}}))
    assert _run("inspect", "--model", copy) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_the_package_is_lazy_and_complete():
    """Nothing heavy on import; every public name is there, and a patch finds its method without another import."""
    code = (
        "import sys, vtprune\nassert 'torch' not in sys.modules\n"
        "assert set(vtprune.__all__) <= set(dir(vtprune))\n"
        "from vtprune import refvlm\nmodel, _ = refvlm.load()\nvtprune.patch(model, ratio=0.5).remove()\n"
        "assert all(hasattr(vtprune, name) for name in vtprune.__all__) and not hasattr(vtprune, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
