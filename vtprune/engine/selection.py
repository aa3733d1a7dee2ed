# SPDX-License-Identifier: Apache-2.0
"""One cut: methods select from the visual tokens that are left, and what they return is checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.lent import Lent
from ..core.log import warn_once
from ..core.method import Choice, Method, ScoreMethod, check_choice, name_of
from ..core.tokens import Tokens
from ..core.transfer import DeferredChecks, to_device
from ..errors import MethodError
from ..report import explain
from . import checkpointing, token_view
from .call import CallState, MethodPlan, Selection, Snapshot


def select(call: CallState, number: int, live: Tensor, snapshot: Snapshot) -> Selection:
    """Lets the methods select from the `live` visual tokens `[M]` before layer `number`.

    Raises:
        MethodError: A method returned something else than a choice of its budget, or changed tensors that are not its
            own.
    """
    if call.memo is not None:
        return call.memo[len(call.stages)]
    methods = call.cuts[number]
    if len(call.spec.uses) == 1:
        return _select_own(call, methods[0], number, live, snapshot)
    members = [plan.members[live] for plan in methods]
    selections = [_select_own(call, m, number, live[own], snapshot) for m, own in zip(methods, members, strict=True)]
    return _combine(live, list(zip(members, selections, strict=True)))


def _select_own(call: CallState, plan: MethodPlan, number: int, flat: Tensor, snapshot: Snapshot) -> Selection:
    """Lets one method select from the live tokens `flat` `[M]` that it prunes."""
    method, groups, counts = plan.use.method, plan.groups, plan.counts[number]
    if groups.count(flat) == counts:
        return Selection(flat)
    name = name_of(method)
    # A layer whose hooks run again, in checkpointing, gets its merged states as constants.
    trains = snapshot.hidden.requires_grad
    differentiable = trains and method.differentiable and not checkpointing.runs_hooks_again(snapshot.layer)
    checks = DeferredChecks()
    with torch.set_grad_enabled(differentiable):
        tokens, choice = _ask(call, plan, number, flat, snapshot, checks)
    given = [] if choice.scores is None else [choice.scores.detach().to(torch.float32, copy=True)]
    chosen, *found = checks.raise_if_failed(choice.keep, *given)
    scores = found[0] if found else None
    keep, kept, merged = chosen, flat[chosen], None
    got = groups.count(kept)
    if got != counts:
        raise MethodError(f"{name} kept {got} tokens of its groups before layer {number}; the budget is {counts}")
    if call.required is not None:
        keep = _with_required(chosen, call.required[flat], groups.of_token[flat], scores)
        kept = flat[keep]
    if choice.hidden is not None:
        # A group that loses no token is not merged, as for its sample alone, which would not be pruned.
        some = groups.shrinking(flat, kept)
        some &= chosen | ~keep  # tokens that stay only because they are required keep their states
        merged = flat[some], choice.hidden[to_device(some, choice.hidden.device)]
        if trains and not differentiable:
            warn_once(
                f"{name} merges tokens, and merged states are constants "
                f"{'under gradient checkpointing' if method.differentiable else 'in training'}: no gradient "
                "reaches the vision tower through them; to train it, choose a method that merges nothing, such as "
                "'iwp' or 'divprune'"
            )
    states = tokens.hidden.detach().float().cpu() if explain.wanted() else None
    return Selection(kept, merged, scores, states)


def _ask(
    call: CallState, plan: MethodPlan, number: int, flat: Tensor, snapshot: Snapshot, checks: DeferredChecks
) -> tuple[Tokens, Choice]:
    """What a method sees before layer `number`, and its choice."""
    method, lent = plan.use.method, Lent()
    name = name_of(method)
    try:
        tokens = token_view.tokens(call, plan, number, flat, snapshot, checks, lent)
        call.selects = True
        choice = method.choose(tokens)
    except Exception:
        checks.raise_if_failed()  # NaN in its inputs is the likelier cause of the method's error
        raise
    finally:
        call.selects = False
    try:
        lent.check(name)
    except MethodError:
        assert call.visual is not None
        call.visual.derived.clear()  # so that later calls of the layout get what they should
        raise
    check_choice(choice, tokens, name)
    if choice.hidden is not None and number and snapshot.hidden.shape[2:] != tokens.hidden.shape[1:]:
        raise MethodError(
            f"{name} merges tokens before layer {number}, where {type(snapshot.layer).__name__} takes several "
            f"streams a token ({tuple(snapshot.hidden.shape[2:])}, hyper-connections), and it is unknown how to "
            "merge these; choose a method that merges nothing, such as 'iwp' or 'divprune', or one that merges "
            "before layer 0, where all streams are copies"
        )
    _check_finite(method, choice, checks)
    return tokens, choice


def _check_finite(method: Method, choice: Choice, checks: DeferredChecks) -> None:
    """Adds the checks that no token was ranked by NaN, and that the states of kept tokens are finite.

    Methods that do not rank by their scores report NaN for tokens without one.
    """
    name, scores, hidden = name_of(method), choice.scores, choice.hidden

    def refuse_scores() -> None:
        assert scores is not None
        if bool(scores.isnan().any()):
            raise MethodError(f"{name} scored tokens NaN; expected numbers (infinite ones keep or drop a token)")

    def refuse_states() -> None:
        assert hidden is not None
        if not bool(torch.isfinite(hidden[choice.keep.to(hidden.device)]).all()):
            raise MethodError(f"{name} merged tokens to states with NaN or Inf; expected finite ones")

    if scores is not None and isinstance(method, ScoreMethod):
        checks.add(scores, refuse_scores)
    if hidden is not None:
        checks.add(hidden, refuse_states)


def _with_required(keep: Tensor, required: Tensor, groups: Tensor, scores: Tensor | None) -> Tensor:
    """`keep` `[M]` with the `required` tokens, each instead of the lowest selected token of its group."""
    missing = required & ~keep
    if not bool(missing.any()):
        return keep
    keep = keep.clone()
    ranks = torch.arange(len(keep), 0, -1).float() if scores is None else torch.nan_to_num(scores)
    for group in groups[missing].unique().tolist():
        out = (keep & ~required & (groups == group)).nonzero()[:, 0]
        lowest = torch.sort(ranks[out], stable=True, descending=True).indices
        count = int((missing & (groups == group)).sum())
        keep[out[lowest[len(out) - count :]]] = False
    return keep | required


def _combine(live: Tensor, parts: list[tuple[Tensor, Selection]]) -> Selection:
    """Combines what methods selected from the tokens that each prunes, a mask `[M]`; the tokens of no method stay."""
    stays = torch.ones(len(live), dtype=torch.bool)
    for members, selection in parts:
        stays[members] = torch.isin(live[members], selection.kept)
    merged = [selection.merged for _, selection in parts if selection.merged is not None]
    return Selection(
        live[stays],
        (torch.cat([tokens for tokens, _ in merged]), torch.cat([states for _, states in merged])) if merged else None,
        _values_of_all([(members, selection.scores) for members, selection in parts]),
        _values_of_all([(members, selection.states) for members, selection in parts]),
    )


def _values_of_all(parts: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Values `[M, ...]` of all tokens from those of the members `[M]` of each part; NaN where none has a value."""
    out: Tensor | None = None
    for members, values in parts:
        if values is not None:
            out = values.new_full((len(members), *values.shape[1:]), torch.nan) if out is None else out
            out[members] = values
    return out
