# SPDX-License-Identifier: Apache-2.0
"""`vtprune compare`: all methods at equal cost against the unpruned model, in the library and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, Image, Video
from support import model_of

import vtprune
from vtprune import methods, refvlm
from vtprune.cli.main import main
from vtprune.study import metrics
from vtprune.study.compare import Row, common_ratio, compare

PROMPTS = [[3, Image(0), 5], [2, Image(1), 4, Image(2), 7]]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return model_of("llava")


def batches(padding: str = "left") -> list[dict[str, torch.Tensor]]:
    family = FAMILIES["llava"]
    return [family.batch(PROMPTS, padding=padding), family.batch([[4, Image(0), 6]], seed=1)]


@torch.no_grad()
def last_logits(model: torch.nn.Module) -> torch.Tensor:
    """`[3, V]`, every prompt without padding."""
    single = [FAMILIES["llava"].batch([prompt]) for prompt in PROMPTS] + batches()[1:]
    return torch.cat([model(**one).logits[:, -1] for one in single])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_numbers_are_those_of_the_prompts_one_by_one(model: torch.nn.Module, padding: str) -> None:
    rows = {r.method: r for r in compare(model, batches(padding), 0.7, ["fastv", "divprune"], repeats=1)}
    assert set(rows) == {"fastv", "divprune", "random", "uniform"}
    want = last_logits(model).softmax(-1)
    for name, row in rows.items():
        with vtprune.patch(model, mean_ratio=0.7, method=name) as patch:
            got = last_logits(model).softmax(-1)
        assert row.kl == pytest.approx(float((want * (want / got).log()).sum(-1).mean()), rel=1e-3)
        assert row.top1 == pytest.approx(float((want.argmax(-1) == got.argmax(-1)).float().mean()))
        # 25, 50 and 25 visual tokens: 0.7 of them if cut before the decoder, else 0.4 after two of four layers
        first = methods.get(name)().schedule(LAYERS)[0].layer
        kept = [18, 35, 18] if first == 0 else [10, 20, 10]
        assert row.visual == pytest.approx(100 / 3) and row.kept == pytest.approx(sum(kept) / 3)
        assert row.mean_ratio == pytest.approx((first * 100 + (LAYERS - first) * sum(kept)) / (LAYERS * 100))
        assert row.reason is None and row.seconds > 0
        assert patch.removed


def test_all_methods_run_and_those_that_keep_all_agree_fully(model: torch.nn.Module) -> None:
    rows = compare(model, batches(), 1.0, repeats=1)
    assert {row.method for row in rows} == set(methods.names())
    for row in rows:
        if methods.get(row.method).needs_frames:
            assert "takes pictures only" in row.reason
        else:
            assert (row.kl, row.top1, row.mean_ratio) == (0.0, 1.0, 1.0)


def test_costs_are_equal_and_rows_sorted(model: torch.nn.Module) -> None:
    rows = compare(model, batches(), 0.8, repeats=1)
    ran = [row for row in rows if row.reason is None]
    assert {"random", "uniform", "fastv", "pyramiddrop", "vflowopt"} <= {row.method for row in ran}
    assert all(abs(row.mean_ratio - 0.8) < 0.03 for row in ran)
    assert [row.kl for row in ran] == sorted(row.kl for row in ran) and max(row.kl for row in ran) > 1e-4
    assert rows[: len(ran)] == ran


def test_what_cannot_be_met_is_a_row_with_the_reason(model: torch.nn.Module) -> None:
    late = methods.IWP(layer=3)
    rows = compare(model, batches(), 0.5, {"late": late, "early": methods.FastV(layer=1)}, repeats=1)
    assert [row.method for row in rows][-1] == "late" and {row.method for row in rows} == {
        "late",
        "early",
        "random",
        "uniform",
    }
    assert rows[-1] == Row("late", reason=rows[-1].reason) and "before layer 3 of 4" in rows[-1].reason
    lines: list[str] = []
    qwen = compare(model_of("qwen2_vl"), [FAMILIES["qwen2_vl"].batch(PROMPTS)], 0.5,
                   {"there": methods.DivPrune(positions="compact")}, repeats=1, log=lines.append)  # fmt: skip
    assert "one axis" in qwen[-1].reason and len(lines) == 3 and lines[-1].startswith("there: positions=")


def test_resize_is_the_unpruned_model_on_another_prompt(model: torch.nn.Module) -> None:
    prompts = [FAMILIES["llava"].batch([[4, Image(0), 6]], seed=seed) for seed in (1, 2)]
    asked: list[tuple[int, int]] = []

    def same_picture(number: int, tokens: int) -> Any:
        asked.append((number, tokens))
        return prompts[number], tokens - 2

    rows = compare(model, prompts, 0.5, ["uniform"], repeats=1, smaller=same_picture)
    row = next(row for row in rows if row.method == "resize")
    other = next(row for row in rows if row.method == "uniform")
    assert [number for number, _ in asked] == [0, 1] and asked[0][1] == asked[1][1] > 0
    assert row.kl == pytest.approx(0.0, abs=1e-6) and row.top1 == 1.0
    assert asked[0][1] == int(0.5 * row.visual) and row.kept == asked[0][1] - 2
    assert other.kept == row.kept, "methods keep as many tokens as the smaller picture has"
    deep = compare(model, prompts, 0.55, ["fastv"], repeats=1, smaller=same_picture)
    assert next(row for row in deep if row.method == "fastv").mean_ratio > 0.5, "a late cut cannot keep so few"

    def fixed_grid(number: int, tokens: int) -> Any:
        raise vtprune.MethodError("resizing cannot")

    rows = compare(model, prompts, 0.5, ["uniform"], repeats=1, smaller=fixed_grid)
    assert next(row for row in rows if row.method == "resize").reason == "resizing cannot"


def test_operations_of_tower_and_decoder_stand_apart(model: torch.nn.Module) -> None:
    batch = FAMILIES["qwen2_5_vl"].batch([[4, Image(2), 6]])
    small = FAMILIES["qwen2_5_vl"].batch([[4, Image(0), 6]])
    qwen = model_of("qwen2_5_vl")
    tokens = int((small["input_ids"] == 3).sum())
    rows = {
        r.method: r
        for r in compare(qwen, [batch], 0.9, ["uniform"], repeats=1, smaller=lambda n, most: (small, tokens))
    }
    with vtprune.patch(qwen, keep=tokens, method="uniform") as patch, torch.no_grad():
        qwen(**batch)
        tower = patch.last.tower
    assert rows["uniform"].tower == pytest.approx(tower.share[0])
    assert rows["uniform"].tower + rows["uniform"].decoder == pytest.approx(tower.first_token[1] / tower.first_token[0])
    assert rows["resize"].tower < rows["uniform"].tower, "only a smaller picture makes the tower cheaper"


def test_common_ratio_is_the_least_tenth_above_the_latest_first_cut() -> None:
    assert common_ratio(["random", "uniform"], 32) == 0.1
    assert common_ratio(["fastv", "uniform"], 6) == 0.4  # before layer 2 of 6
    assert common_ratio(["pyramiddrop"], 32) == 0.3
    assert common_ratio([methods.FastV(layer=5)], 10) == 0.6 and common_ratio([methods.FastV(layer=9)], 10) == 0.95


def test_what_cannot_be_compared_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(vtprune.MethodError, match="did you mean 'fastv'"):
        compare(model, batches(), 0.5, "fastvv")
    with pytest.raises(vtprune.BudgetError, match="mean_ratio is 2"):
        compare(model, batches(), 2, ["fastv"])
    with pytest.raises(vtprune.VTPruneError, match="no prompts"):
        compare(model, [], 0.5, ["fastv"])
    with pytest.raises(vtprune.VTPruneError, match="has no visual token"):
        compare(model, [FAMILIES["llava"].batch([[5]])], 0.5, ["fastv"])
    with pytest.raises(vtprune.VTPruneError, match="has no visual token"):  # nor is it counted as the prompt before it
        compare(model, [*batches(), FAMILIES["llava"].batch([[5]])], 0.5, ["fastv"])
    with vtprune.patch(model, ratio=0.5) as patch, pytest.raises(vtprune.VTPruneError, match="remove the patch"):
        compare(model, batches(), 0.5, ["fastv"])
    assert patch.removed and vtprune.engine.patching.find_patch(model) is None


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_last_states_are_those_after_the_final_norm(model: torch.nn.Module, padding: str) -> None:
    batch = batches(padding)[0]
    for patched in (False, True):
        with vtprune.patch(model, ratio=0.3 if patched else 1.0, method="uniform"):
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
            columns = batch["attention_mask"].cumsum(1).argmax(1)
            torch.testing.assert_close(metrics.last_states(model, batch), states[torch.arange(2), columns])
    assert metrics.cosine(torch.ones(2, 3), torch.tensor([[1.0, 1, 1], [torch.nan, 1, 1]])).tolist() == [
        pytest.approx(1),
        0,
    ]


def test_the_command_shows_all_methods_on_the_embedded_model(capfd: Any, tmp_path: Path) -> None:
    refvlm.scenes.scene(3).image.save(tmp_path / "a.png")
    arguments = ["compare", "--image", str(tmp_path), "--question", "how many stars?", "--repeats", "1"]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    out = capfd.readouterr().out
    assert all(f"│ {name} " in out for name in methods.for_pictures()) and "1 picture" in out and "of 144" in out
    data = json.loads((tmp_path / "out.json").read_text())
    assert {row["method"] for row in data["rows"]} == {*methods.for_pictures(), "resize"} and data["pictures"] == 1
    resize = data["rows"].pop(next(i for i, row in enumerate(data["rows"]) if row["method"] == "resize"))
    assert "resizing cannot reach" in resize["reason"]  # its grid is fixed
    assert all(row["reason"] is None and abs(row["mean_ratio"] - data["mean_ratio"]) < 0.01 for row in data["rows"])


def test_the_command_takes_a_folder_a_budget_methods_and_strategies(capfd: Any, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        refvlm.scenes.scene(number).image.save(pictures / f"{number}.png")
    (pictures / "notes.txt").write_text("no picture")
    methods.VFlowOpt(first=0.5, later=(1.0,)).save(tmp_path / "mine.json")
    arguments = ["compare", "--image", str(pictures), "--question", "x?", "--repeats", "1", "--mean-ratio", "0.2"]
    assert main([*arguments, "--methods", "fastv", str(tmp_path / "mine.json")]) == 0
    out = capfd.readouterr().out
    shown = {line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")}
    assert shown == {"fastv", "mine.json", "random", "uniform", "resize"} and "2 pictures, mean ratio 0.2" in out
    assert "fastv: mean_ratio=0.2 cannot be met" in out


def test_the_command_refuses_in_one_line(capfd: Any, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    refvlm.scenes.scene(3).image.save(picture)
    for arguments, message in (
        (["--image", str(tmp_path / "none")], "expected a file"),
        (["--image", str(tmp_path / "empty")], "no picture in the folder"),
        (["--image", str(picture), "--methods", "fastvv"], "did you mean 'fastv'"),
        (["--image", str(picture), "--methods", str(tmp_path / "none.json")], "holds no strategy"),
        (["--image", str(picture), "--json", str(tmp_path / "none" / "a.json")], "folder does not exist"),
        (["--image", str(picture), "--mean-ratio", "0"], "(0, 1]"),
        (["--image", str(picture), "--model", str(tmp_path)], "config.json"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(["compare", *arguments, "--question", "x?"]) == 2
        out, err = capfd.readouterr()
        assert out == "" and len(err.strip().splitlines()) == 1 and message in err


def test_clips(tmp_path: Path) -> None:
    """Methods for clips are compared; one that cannot meet the cost is a row with the reason."""
    family = FAMILIES["qwen2_5_vl"]
    clips = [family.batch([[3, Video(2), 5]]), family.batch([[2, Video(3), 3, Video(2), 4]], seed=1)]
    chosen = ["evs", "dycoke", "vcast", "flashvid"]
    rows = {row.method: row for row in compare(model_of("qwen2_5_vl"), clips, 0.5, chosen, repeats=1)}
    assert set(rows) == {*chosen, "random", "uniform"} and all(row.reason is None for row in rows.values())
    assert all(row.mean_ratio == pytest.approx(0.5, abs=0.02) and row.kl > 0 for row in rows.values())
    rows = {row.method: row for row in compare(model_of("qwen2_5_vl"), clips, 0.1, chosen, repeats=1)}
    assert "first frame whole" in rows["evs"].reason and rows["vcast"].reason is None


def test_the_command_on_a_clip(capfd: Any, tmp_path: Path) -> None:
    for number in range(4):
        refvlm.scenes.scene(number).small.save(tmp_path / f"{number}.png")
    arguments = ["compare", "--image", str(tmp_path), "--question", "how many stars?", "--repeats", "1", "--clip"]
    few = ["--methods", "evs", "vcast", "--mean-ratio", "0.5"]
    assert main([*arguments, *few, "--model", "embedded-qwen2_5_vl"]) == 0
    out = capfd.readouterr().out
    assert "a clip" in out and "│ evs" in out and "of 288" in out
    assert main([*arguments, *few]) != 0
    assert "takes no clips" in capfd.readouterr().err
