# SPDX-License-Identifier: Apache-2.0
"""Methods of one's own: a mistake in one is said in a sentence, before a result, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from families import FAMILIES, Image

import vtprune
from vtprune import towers
from vtprune.core.options import fits
from vtprune.core.ragged import settle_ties, top_k
from vtprune.methods import Choice, Method, ScoreMethod, Stage, Tap, Tokens

ONE = [[3, Image(0), 5]]


@pytest.fixture(scope="module")
def llava() -> Any:
    return FAMILIES["llava"].build()


@pytest.fixture(scope="module")
def batch() -> Any:
    return FAMILIES["llava"].batch(ONE)


@dataclass
class Scored(ScoreMethod):
    """Scores by a function; cuts before a layer."""

    function: Callable[[Tokens], Any]
    layer: int = 1

    def score(self, tokens: Tokens) -> Any:
        return self.function(tokens)


class Chosen(Scored):
    """Chooses by a function."""

    def choose(self, tokens: Tokens) -> Any:
        return self.function(tokens)


def norms(tokens: Tokens) -> torch.Tensor:
    return tokens.hidden.norm(dim=-1)


def best(tokens: Tokens) -> torch.Tensor:
    return top_k(norms(tokens), tokens.offsets, tokens.budgets)


def asked(tokens: Tokens, **options: Any) -> torch.Tensor:
    tokens.attention_inputs(**options)
    return norms(tokens)


def changed(tokens: Tokens, change: Callable[[Tokens], Any]) -> torch.Tensor:
    change(tokens)
    return norms(tokens)


NAN, NANS = float("nan"), torch.full((25,), torch.nan)
WRONG: list[tuple[Method, str]] = [
    (Scored(lambda t: None), "returned a NoneType; expected a tensor of real numbers"),
    (Scored(lambda t: norms(t).tolist()), "returned a list; expected a tensor of real numbers"),
    (Scored(lambda t: norms(t).numpy()), "returned a ndarray"),
    (Scored(lambda t: norms(t).to(torch.complex64)), "returned torch.complex64"),
    (Scored(lambda t: norms(t).to("meta")), "on meta"),
    (Scored(lambda t: norms(t)[None]), r"returned shape \(1, 25\); expected \(25,\)"),
    (Scored(lambda t: NANS), "scored tokens NaN"),
    (Scored(lambda t: asked(t, queries="all")), "queries='all'; expected 'text' or 'last'"),
    (Scored(lambda t: changed(t, lambda t: t.grid_row.mul_(0))), "changed tokens.grid_row in place"),
    (Scored(lambda t: changed(t, lambda t: t.position.sub_(1))), "changed tokens.position in place"),
    (Scored(lambda t: changed(t, lambda t: t.prompt.visual.sub_(1))), "changed tokens.prompt.visual in place"),
    (
        Scored(lambda t: changed(t, lambda t: t.attention_inputs().values.div_(2))),
        "changed the layer's values in place",
    ),
    (ScoreMethod(), "ScoreMethod defines neither score nor choose"),
    (Method(), "Method defines no choose"),
    (Chosen(lambda t: None), "returned a NoneType; expected a vtprune.methods.Choice"),
    (Chosen(best), "returned a Tensor; expected a vtprune.methods.Choice"),
    (Chosen(lambda t: Choice(best(t).tolist())), "returned a list as `keep`"),
    (Chosen(lambda t: Choice(best(t).nonzero()[:, 0])), r"shape \(8,\) as `keep`; expected a tensor of shape \(25,\)"),
    (Chosen(lambda t: Choice(best(t).float())), "torch.float32 as `keep`; expected torch.bool"),
    (Chosen(lambda t: Choice(best(t), hidden=t.hidden[:, :1])), r"shape \(25, 1\) as `hidden`"),
    (Chosen(lambda t: Choice(best(t), hidden=t.hidden * NAN)), "merged tokens to states with NaN or Inf"),
    (Chosen(lambda t: Choice(best(t), scores=norms(t)[1:])), r"shape \(24,\) as `scores`"),
]


@pytest.mark.parametrize(("method", "message"), WRONG)
def test_what_a_method_returns_or_changes_is_checked(llava: Any, batch: Any, method: Method, message: str) -> None:
    with vtprune.patch(llava, ratio=0.3, method=method) as patch:
        with pytest.raises(vtprune.MethodError, match=message):
            llava(**batch)
        with patch.paused():
            llava(**batch)
    with vtprune.patch(llava, ratio=0.3, method=Scored(norms)) as patch:  # no tensor of the layout is left changed
        llava(**batch)
        assert len(patch.last.kept[0]) == 8


def test_states_of_dropped_tokens_may_be_anything(llava: Any, batch: Any) -> None:
    hidden = Chosen(lambda t: Choice(best(t), hidden=t.hidden.masked_fill(~best(t)[:, None], torch.nan)))
    with vtprune.patch(llava, ratio=0.3, method=hidden):
        assert llava(**batch).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("group", "frame", "group is 'frame'; expected 'sample' or 'image'"),
        ("group", None, "group is None"),
        ("schedule", lambda self, n: None, "schedule returned None; expected a list of Stage"),
        ("schedule", lambda self, n: Stage(1), "expected a list of Stage"),
        ("schedule", lambda self, n: [(1, 0.5)], "expected a list of Stage"),
        ("schedule", lambda self, n: [Stage(1, "half")], "falling shares between 0 and 1"),
        ("required_layer_inputs", lambda self, n: None, "required_layer_inputs returned None; expected a list of int"),
        ("required_layer_inputs", lambda self, n: [99], "reads layer 99; expected a layer from 0 to"),
        ("taps", lambda self, anatomy: None, "taps returned None; expected a list of Tap"),
        ("taps", lambda self, anatomy: [Tap("x", None, print)], "expected a module of the model and a function"),
    ],
)
def test_a_contract_that_cannot_be_kept_is_refused_by_patch(
    llava: Any, batch: Any, name: str, value: Any, message: str
) -> None:
    bad = type("Bad", (Scored,), {name: value})(norms)
    with vtprune.patch(llava, ratio=0.3, method="uniform") as patch:
        with pytest.raises(vtprune.MethodError, match=message):
            vtprune.patch(llava, ratio=0.3, method=bad)
        llava(**batch)
        assert not patch.removed and len(patch.last.kept[0]) == 8


def test_an_error_while_attaching_leaves_the_old_patch_in_place(llava: Any, batch: Any, monkeypatch: Any) -> None:
    from vtprune.engine import session

    whole, left = session.attention_probe.shareable, [True]

    def once(linear: Any) -> Any:
        return whole(linear) if not left else 1 / (left.pop() - 1)

    with vtprune.patch(llava, ratio=0.3, method="uniform") as patch:
        monkeypatch.setattr(session.attention_probe, "shareable", once)
        with pytest.raises(ZeroDivisionError):
            vtprune.patch(llava, ratio=0.3, method="iwp")
        llava(**batch)
        assert len(patch.last.kept[0]) == 8
    assert not any(module._forward_pre_hooks for module in llava.modules())
    vtprune.patch(llava, ratio=0.3, method="iwp").remove()


@pytest.mark.parametrize("part", ["", "model", "model.language_model"])
def test_a_method_cannot_call_the_model_that_waits_for_it(llava: Any, batch: Any, part: str) -> None:
    def score(tokens: Tokens) -> torch.Tensor:
        llava.get_submodule(part)(input_ids=torch.tensor([[1, 20, 21]]))
        return norms(tokens)

    last = len(llava.model.language_model.layers) - 1
    with vtprune.patch(llava, ratio=0.3, method=Scored(score, layer=last)) as patch:
        with pytest.raises(vtprune.MethodError, match="while it selects tokens"):
            llava(**batch)
        with patch.using(method=Scored(norms, layer=last)):
            assert llava(**batch).logits.shape[1] == batch["input_ids"].shape[1]


def test_using_takes_the_method_that_is_given(llava: Any, batch: Any) -> None:
    """A class that was edited and another tensor are other methods, although they look alike."""

    @dataclass(repr=False)
    class Weighted(ScoreMethod):
        weight: Any = field(default=None, repr=False)

        def score(self, tokens: Tokens) -> torch.Tensor:
            return norms(tokens) * self.weight

        def __repr__(self) -> str:
            return "Weighted()"

    plain = Weighted(torch.ones(25))
    with vtprune.patch(llava, ratio=0.3, method=plain) as patch:
        llava(**batch)
        first = patch.last.kept[0].tolist()
        with patch.using(method=Weighted(-torch.ones(25))):
            llava(**batch)
            assert patch.last.kept[0].tolist() != first
        edited = type("Weighted", (Weighted,), {"score": lambda self, tokens: -norms(tokens)})
        with patch.using(method=edited(plain.weight)):
            llava(**batch)
            assert patch.last.kept[0].tolist() != first
        with patch.using(method=plain):
            llava(**batch)
            assert patch.last.kept[0].tolist() == first


def test_a_subclass_is_reported_under_its_own_name(llava: Any, batch: Any) -> None:
    class Mine(vtprune.methods.FastV):
        pass

    with vtprune.patch(llava, ratio=0.3, method=Mine()) as patch:
        llava(**batch)
        assert "Mine" in patch.last.report() and "fastv" not in patch.last.report()


@pytest.mark.parametrize("name", [5, None, "", " x", Scored])
def test_names_are_names(name: Any) -> None:
    before = vtprune.methods.names()
    with pytest.raises(vtprune.MethodError, match="expected a name of letters, digits, _, - and .,"):
        vtprune.methods.register(name)
    assert vtprune.methods.names() == before


def test_options_of_every_annotation_are_checked_or_left_alone() -> None:
    class Sized(Protocol):
        size: int

    for hint, good, bad in (
        (list[int], [1], 5),
        (dict[str, int], {}, 5),
        (tuple[int, int], (1, 2), 5),
        (Callable[[int], int], abs, 5),
    ):
        assert fits(good, hint) and not fits(bad, hint)
    assert fits(5, Sized)

    @dataclass(slots=True)
    class Slots(ScoreMethod):
        layer: int = 0

    with pytest.raises(vtprune.MethodError, match="Slots.layer is 'a'"):
        Slots("a")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [np.float32, np.float16, np.float64])
def test_numbers_of_numpy_are_budgets(llava: Any, batch: Any, number: type) -> None:
    with vtprune.patch(llava, ratio=number(0.3)) as patch:
        llava(**batch)
        assert len(patch.last.kept[0]) == 8
        with patch.using(ratio=number(0.2)):
            llava(**batch)
            assert len(patch.last.kept[0]) == 5
    for method in (vtprune.methods.Random(seed=np.int64(3)), vtprune.methods.Random(seed=3)):  # type: ignore[arg-type]
        with vtprune.patch(llava, keep=np.int64(5), method=method, tower=towers.Random(keep=number(0.5))):  # type: ignore[arg-type]
            llava(**batch)


def test_infinite_scores_win_and_ties_stay_narrow() -> None:
    one, rows = torch.tensor([0, 6]), torch.tensor([1.0, 2.0, torch.inf, 3.0, -torch.inf, torch.inf])
    for budget, want in ((1, [2]), (2, [2, 5]), (3, [2, 3, 5])):
        assert top_k(rows, one, torch.tensor([budget])).nonzero()[:, 0].tolist() == want
    both = torch.cat((rows, rows))
    assert top_k(both, torch.tensor([0, 6, 12]), torch.tensor([1, 3])).nonzero()[:, 0].tolist() == [2, 8, 9, 11]
    # Neighbors differ by less than a tie; the first and the last do not tie.
    close = torch.linspace(0.999, 1.0, 3000, dtype=torch.float64)
    kept = top_k(close, torch.tensor([0, 3000]), torch.tensor([300])).nonzero()[:, 0]
    assert int(kept.min()) >= 2695
    assert float((settle_ties(close) - close).max()) < 1e-6
    numbers = torch.arange(10) + 10**9
    assert top_k(numbers, torch.tensor([0, 10]), torch.tensor([2])).nonzero()[:, 0].tolist() == [8, 9]


@dataclass
class Tower(towers.TowerMethod):
    """A tower method that chooses by a function."""

    function: Callable[[towers.Patches], Any] = None  # type: ignore[assignment]

    def choose(self, patches: towers.Patches) -> Any:
        return self.function(patches)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p: None, "expected a vtprune.towers.TowerChoice"),
        (lambda p: p.largest(p.states.norm(dim=-1)), "expected a vtprune.towers.TowerChoice"),
        (lambda p: towers.TowerChoice(p.largest(None)), "returned a NoneType; expected a tensor of real numbers"),
        (lambda p: towers.TowerChoice(p.largest(p.states)), "returned shape"),
        (lambda p: towers.TowerChoice(p.largest(p.states[:, 0] * NAN)), "returned NaN"),
        (
            lambda p: towers.TowerChoice(p.largest(p.states.sub_(p.states.mean(0)).norm(dim=-1))),
            "changed patches.states in place",
        ),
    ],
)
def test_what_a_tower_method_returns_or_changes_is_checked(
    llava: Any, batch: Any, function: Callable, message: str
) -> None:
    with (
        vtprune.patch(llava, tower=Tower(keep=0.5, function=function)),
        pytest.raises(vtprune.MethodError, match=message),
    ):
        llava(**batch)
