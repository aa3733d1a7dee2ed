# SPDX-License-Identifier: Apache-2.0
"""Options of methods are checked against their declared types and ranges, in Python and in files."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import vtprune
from vtprune import methods, refvlm, towers
from vtprune.core.options import AboveZero, Share, check_options
from vtprune.core.registry import make
from vtprune.methods.debiased.padding import PaddingRule
from vtprune.methods.debiased.position_curve import Curve

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
# Values that no option accepts.
NONSENSE: list[Any] = [NAN, INF, -INF, HUGE, -HUGE, 1e300, -1e300, object(), b"x", "nonsense", 1j, {}]
NONSENSE += [torch.tensor([1.0, 2.0]), np.array([1, 2]), ["x"], (NAN,), (True,), ((1,),), -(10**9), type, "2", ""]
TOWERS = [cls for cls in vars(towers).values() if isinstance(cls, type) and issubclass(cls, towers.TowerMethod)]
# Options that accept any object and raise where it is used.
FREE = {("cdpruner", "clip"), ("cdpruner", "clip_tokenizer"), ("cdpruner", "tokenizer"), ("debiased", "sizes")}


def fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


@pytest.mark.parametrize("cls", [*map(methods.get, methods.names()), *TOWERS], ids=lambda cls: cls.__name__)
def test_nonsense_is_refused_in_one_short_line(cls: type) -> None:
    typing.get_type_hints(cls)  # a hint that cannot be resolved would switch all checks off
    for name in fields(cls):
        for value in NONSENSE:
            if (getattr(cls, "name", ""), name) in FREE or (name == "keep" and value is HUGE):  # keeps all
                continue
            with pytest.raises(vtprune.VTPruneError) as caught:
                cls(**{name: value})
            assert name in str(caught.value) or "curve" in str(caught.value), caught.value
            assert len(str(caught.value)) < 300


@pytest.mark.parametrize("cls", [*map(methods.get, methods.names()), *TOWERS], ids=lambda cls: cls.__name__)
def test_booleans_are_no_numbers_and_numbers_no_booleans(cls: type) -> None:
    for name, hint in typing.get_type_hints(cls).items():
        if name in fields(cls) and hint in (bool, int, float):
            with pytest.raises(vtprune.VTPruneError, match=name):
                cls(**{name: 1 if hint is bool else True})


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: methods.FastV(layer="2"), r"FastV\.layer is '2'; expected a whole number in \[0, 1e\+06\]"),
        (lambda: methods.FastV(layer=-1), r"FastV\.layer is -1; expected a whole number in"),
        (lambda: methods.FastV(layer=2.0), r"FastV\.layer is 2\.0"),
        (lambda: methods.IWP(duplication=NAN), r"IWP\.duplication is nan; expected a finite number in \[0, 1\]"),
        (lambda: methods.IWP(query="lst"), "IWP.query is 'lst'; expected 'instruction_mean' or 'last' or 'none'"),
        (lambda: methods.SparseVLM(version=True), "version is True; expected 1 or 2"),
        (lambda: methods.PyramidDrop(layers=(8, "16")), "layers is .*; expected a tuple, each item a whole number"),
        (lambda: methods.PyramidDrop(depth=0), r"depth is 0; expected a whole number in \[1, 1e\+06\] or None"),
        (lambda: methods.VCast(temperature=0), r"temperature is 0; expected a finite number in \(0, 1e\+06\]"),
        (lambda: methods.CDPruner(theta=1.0), r"theta is 1\.0; expected .* in \[0, 1\) or 'auto' or 'released'"),
        (lambda: methods.Debiased(host="fastv"), "host is 'fastv'; expected an instance of ScoreMethod"),
        (lambda: methods.Debiased(curve=3), "curve is 3; expected an instance of Curve or a text or None"),
        (lambda: methods.Random(seed=-1), "seed is -1"),
        (lambda: methods.VFlowOpt(preset=[]), "preset is"),
        (lambda: methods.VFlowOpt(depth=0), "depth is 0"),
        (lambda: methods.VFlowOpt(layers=(0,)), r"layers is \(0,\)"),
        (lambda: methods.DART(pivots=1.5), r"pivots is 1\.5"),
        (lambda: methods.VFlowOpt(alpha=1e30), "alpha is 1e"),
        (lambda: methods.VFlowOpt(later=(0.9, 0.9, 0.9)), "at least as many layers as the 3 shares of later"),
        (lambda: Curve("exponential", (NAN,)), "coefficients is"),
        (lambda: Curve("exponential", ("1",)), "coefficients is"),
        (lambda: Curve([], (1.0,)), "form is"),
        (lambda: Curve("exponential", (1.0, 2.0)), "2 coefficients; expected 1"),
        (lambda: PaddingRule(kind="round"), "kind is 'round'"),
        (lambda: PaddingRule(threshold=-0.1), "threshold is"),
        (lambda: towers.Change(neighbors=0), "neighbors is 0"),
        (lambda: make("fastv", {"layr": 2}), "method fastv cannot be made"),
    ],
)
def test_the_message_says_what_was_found_and_expected(make_one: Any, message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        make_one()


def test_numbers_of_other_libraries_are_numbers() -> None:
    assert methods.FastV(layer=np.int64(3)).layer == 3 and methods.IWP(duplication=np.float32(0.25)).duplication == 0.25
    assert methods.PyramidDrop(layers=[2, 4, 6]).layers == [2, 4, 6]


def test_methods_of_users_are_checked_too() -> None:
    @dataclass
    class Own(methods.ScoreMethod):
        share: Share = 0.5
        power: AboveZero = 1.0
        anything: Any = None

    assert Own(share=1, anything=object()).share == 1
    for bad in ({"share": 1.5}, {"power": 0}, {"power": "1"}):
        with pytest.raises(vtprune.MethodError, match=r"Own\."):
            Own(**bad)
    changed = Own()
    changed.share = True  # type: ignore[assignment]
    with pytest.raises(vtprune.MethodError, match="share is True"):
        methods.resolve(changed)

    class NoDataclass(methods.ScoreMethod):
        def __init__(self) -> None:
            self.layer = 0

    check_options(NoDataclass())


@pytest.mark.parametrize("sizes", ["x", [1], [[1, 2, 3]], [[0, 5]], [[1.5, 2.0]], [["a", "b"]], 5, [[-1, 2]]])
def test_sizes_of_pictures_are_checked(sizes: Any) -> None:
    from vtprune.methods.debiased.padding import _pairs

    with pytest.raises(vtprune.MethodError, match="size"):
        _pairs(sizes)
    assert _pairs([(3, 4)]) == _pairs(torch.tensor([[3, 4]])) == [[3, 4]]


@pytest.mark.parametrize("name", ["ratio", "keep", "mean_ratio", "window", "method", "video_method", "tower"])
def test_arguments_of_patch_are_refused_in_one_short_line(name: str) -> None:
    model, _ = refvlm.load()
    for value in (
        10**400,
        10**5000,
        NAN,
        True,
        "0.1",
        b"1",
        [0.1],
        {},
        object(),
        -1,
        0,
        1e300,
        1j,
        np.array([0.1, 0.2]),
    ):
        if name in ("keep", "window") and isinstance(value, int) and value > 1:  # keeps all
            continue
        others = {} if name in ("ratio", "keep", "mean_ratio") else {"ratio": 0.5}
        with pytest.raises(vtprune.VTPruneError) as caught:
            vtprune.patch(model, **{name: value}, **others)
        assert len(str(caught.value)) < 400  # an unknown method: the error lists all names


STRATEGY = {"method": "vflowopt", "threshold": 1.0, "alpha": 0.0, "grid": 3.0, "first": 0.5, "depth": 28}
STRATEGY |= {"later": [0.9, 0.8], "layers": [9, 18]}
READERS = {
    "strategy": (methods.VFlowOpt.load, STRATEGY | {"about": {"anything": 1}}),
    "curve": (Curve.load, {"form": "exponential", "coefficients": [1.0]}),
    "automatic ratio": (vtprune.Auto.load, {"ratio": "auto", "energy": 0.9, "min": 0.02, "max": 0.5, "about": {}}),
}


@pytest.mark.parametrize("kind", READERS)
def test_files_have_the_keys_and_types_of_their_kind_and_no_others(kind: str, tmp_path: Any) -> None:
    load, good = READERS[kind]
    path = tmp_path / "file.json"

    def read(content: Any) -> Any:
        path.write_text(json.dumps(content))
        return load(path)

    read(good)
    bad: list[Any] = [good | {"extra": 1}, good | {"seed": 1}, [good], {}, None]
    needed = [name for name in good if name not in ("about", "ratio")]
    bad += [{name: value for name, value in good.items() if name != gone} for gone in needed]
    for name in good:
        wrong = [True, "x", -1e9, 1e9, [], {"a": 1}, ["x"], [True], 10**300]
        fine = {"about": {"a": 1}, "later": []}
        wrong = [value for value in wrong if value != fine.get(name)]
        bad += [good | {name: value} for value in wrong]
        if name not in ("depth",):
            bad.append(good | {name: None})
    for content in bad:
        with pytest.raises(vtprune.VTPruneError, match=str(path)):
            read(content)


def test_a_strategy_of_another_method_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "strategy.json"
    for name in ("fastv", "VFLOWOPT", "", None, 3):
        path.write_text(json.dumps(STRATEGY | {"method": name}))
        with pytest.raises(vtprune.MethodError, match="method: 'vflowopt' was expected"):
            methods.VFlowOpt.load(path)


def test_options_of_the_command_line_are_those_of_the_class() -> None:
    with pytest.raises(vtprune.MethodError, match=r"a name alone, or an instance with options, FastV\(layer=3\)"):
        methods.resolve("fastv:layer=3")


def test_options_of_a_certificate_must_be_its_methods(tmp_path: Any) -> None:
    text = dict.fromkeys(("method_repr", "model", "config_hash", "weights_hash"), "x")
    good = {"ratio": 0.1, "risk": 0.1, "confidence": 0.9, "pictures": 3, "questions": 3, "changed": 0.0}
    path = tmp_path / "certificate.json"
    for method, options, message in [
        ("fastv", {"layr": 2}, "cannot be made"),
        ("fastv", {"layer": "2"}, "layer is '2'"),
        ("fastvv", {}, "did you mean 'fastv'"),
        ("pyramiddrop", {"layers": 5}, "layers is 5"),
        ("debiased", {"host": {"name": "fastv"}}, "host is"),
    ]:
        path.write_text(json.dumps(good | text | {"method": method, "options": options}))
        with pytest.raises(vtprune.VTPruneError, match=message):
            vtprune.Certificate.load(path).make_method()
    named = good | text | {"method": "pyramiddrop", "options": {}}
    for name, value in [("risk", 0), ("risk", 1), ("confidence", 1), ("pictures", 0), ("questions", 1e300)]:
        path.write_text(json.dumps(named | {name: value}))
        with pytest.raises(vtprune.CertificateError, match=name):
            vtprune.Certificate.load(path)
    path.write_text(json.dumps(good | text | {"method": "pyramiddrop", "options": {"layers": [4, 5, 6]}}))
    assert vtprune.Certificate.load(path).make_method() == methods.PyramidDrop(layers=(4, 5, 6))
