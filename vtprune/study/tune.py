# SPDX-License-Identifier: Apache-2.0
"""Bayesian optimization of a VFlowOpt strategy on your own pictures."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.budget import Budget
from ..core.files import MAX_RESULTS, FileError, read_json
from ..core.options import fits
from ..engine.patching import inspect, patch, refuse_patched
from ..errors import MethodError, VTPruneError
from ..methods import resolve
from ..methods.vflowopt.method import VFlowOpt
from ..models import identity
from . import metrics, progress
from .given import batches_of

_PRESETS = (0.5, 0.25, 0.1)
Bounds = dict[str, tuple[float, float]]
_SHARE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_TRIAL = {
    "threshold": {"type": "number", "minimum": 0, "maximum": 1e6},
    "alpha": {"type": "number", "minimum": -1e6, "maximum": 1e6},
    "grid": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e6},
    "first": _SHARE,
    "second": _SHARE,
    "value": {"type": "number", "minimum": -1e9, "maximum": 1e9},
}
_MOST = 2**32 - 1  # seeds that the generators take
# Schema of the search in a strategy file.
_SEARCH: dict[str, Any] = {
    "mean_ratio": _SHARE,
    "num_layers": {"type": "integer", "minimum": 1, "maximum": 10_000},
    "samples": {"type": "integer", "minimum": 1, "maximum": 10**9},
    "seed": {"type": "integer", "minimum": 0, "maximum": _MOST},
    "inputs": {"type": "string"},
    "weights": {"type": "string"},
    "trials": {
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "required": [*_TRIAL], "properties": _TRIAL, "additionalProperties": False},
    },
    "agreement": {"type": "number", "minimum": -1.01, "maximum": 1.01},
    "versions": {"type": "object", "additionalProperties": {"type": "string"}},
}
_SAVED = {"required": [*_SEARCH], "properties": _SEARCH, "additionalProperties": False}


@dataclass
class Search:
    """The trials of a search and its best strategy.

    Attributes:
        mean_ratio: Mean share of visual tokens over the decoder-layer inputs, the same in all trials.
        num_layers: Layers of the decoder.
        samples: Number of prompts that a trial was evaluated on.
        seed: Seed of the generators.
        inputs, weights: Hashes of the prompts and of the model's weights, see `models.identity`.
        trials: For every trial its parameters and, as `value`, the sum over prompts of the cosine between the last
            hidden states with and without pruning.
    """

    mean_ratio: float
    num_layers: int
    samples: int
    seed: int
    inputs: str
    weights: str
    trials: list[dict[str, float]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, float]:
        """The trial with the largest value; the first one of equals."""
        return max(self.trials, key=lambda trial: trial["value"])

    @property
    def strategy(self) -> VFlowOpt:
        """The best strategy, a `method` for `vtprune.patch`."""
        return strategy(self.best, self.mean_ratio, self.num_layers)

    def save(self, path: str | Path) -> None:
        """Writes the best strategy and the trials as JSON, for `VFlowOpt.load` and for `tune(..., resume=True)`."""
        about = {"agreement": self.best["value"] / self.samples, "versions": progress.versions()}
        with progress.replacing(path) as part:
            self.strategy.save(part, **about, **vars(self))

    @classmethod
    def load(cls, path: str | Path) -> Search:
        """Reads a search written by `save`.

        Raises:
            VTPruneError: The file is missing or is not a saved search.
        """
        try:
            VFlowOpt.load(path)
            data = read_json(path, {"required": ["about"], "properties": {"about": _SAVED}}, MAX_RESULTS)["about"]
        except (FileError, MethodError) as error:
            raise VTPruneError(f"{path} is not a saved search and cannot be resumed: {error}") from error
        return cls(**{field.name: data[field.name] for field in fields(cls)})


def bounds(mean_ratio: float) -> Bounds:
    """Search ranges of the parameters: as released, those of the first two cuts in proportion to the budget.

    Args:
        mean_ratio: The budget. Above 0.5 the first cut is kept below 1.

    Returns:
        Bounds: `t`, `alpha`, `a` as published, `r_v` and `r_1` for the shares that the first two cuts keep.
    """
    return {
        "threshold": (0.0, 50.0),
        "alpha": (-1.0, 1.0),
        "grid": (3.0, 24.0),
        "first": (mean_ratio, min(1.5 * mean_ratio, (1 + mean_ratio) / 2)),
        "second": (0.8 / 1.5, 1.0),
    }


def strategy(params: Mapping[str, float], mean_ratio: float, num_layers: int) -> VFlowOpt:
    """VFlowOpt with the given parameters and, at the last cut, the share that meets the budget.

    Args:
        params: `threshold`, `alpha`, `grid`, `first` and `second`, the share that the second cut keeps of the first.
        mean_ratio: Mean share of visual tokens over the decoder-layer inputs.
        num_layers: Layers of the decoder.

    Returns:
        VFlowOpt: It keeps all tokens at the last cut if even that costs less than `mean_ratio`.
    """
    start, end = VFlowOpt().cuts(num_layers)
    first, second = params["first"], params["second"]
    spent = (start + (end - start) * second) * first
    third = (num_layers * mean_ratio - spent) / ((num_layers - end) * first * second)
    if third <= 0:
        raise VTPruneError(
            f"first={first:g} and second={second:g} cost more than mean_ratio={mean_ratio:g} in {num_layers} layers "
            "before the last cut; use smaller shares"
        )
    return VFlowOpt(
        threshold=params["threshold"],
        alpha=params["alpha"],
        grid=params["grid"],
        first=first,
        later=(second, min(1.0, third)),
    )


def tune(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    mean_ratio: float,
    *,
    trials: int = 30,
    seed: int = 0,
    path: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    log: Callable[[Search], None] = lambda search: None,
) -> Search:
    """Searches parameters of VFlowOpt that keep the last token's hidden state closest to the unpruned one.

    Paper: arXiv 2508.05211, the section on strategies. Maximizes the sum over prompts of the cosine between the states
    of the last prompt token after the final norm, unpruned and pruned, in float32; NaN counts as 0. A Gaussian process
    proposes the trials (the paper: 27 random ones of 300; here: 10 of `trials`); the first trial is the released
    strategy nearest to the budget. The same seed gives the same search, even if it is interrupted and resumed.

    Args:
        model: An unpatched vision-language model; it is unpatched afterwards.
        batches: Keyword arguments of its calls, without answers; about 30 pictures are enough.
        mean_ratio: Cost of every trial, in (0, 1).
        trials: Total number of trials, including those of a resumed search.
        seed: Seed of the generators.
        path: File to write after every trial (`Search.save`).
        resume: Resume the search saved in `path`.
        force: Overwrite `path`.
        log: Called after every trial.

    Returns:
        Search: Its `strategy` is the method to use.

    Raises:
        BudgetError: `mean_ratio` is out of range.
        InputError: `batches` is a single batch, or holds something else.
        VTPruneError: optuna is not installed, the model is patched, no prompt has a visual token, the saved search has
            other settings, or `path` exists without `resume` or `force`.
        StaleResultError: The saved search is of another version.
    """
    proposals = _Proposals()
    _check(model, mean_ratio, trials, seed)
    if path is not None and Path(path).exists() and not resume and not force:
        raise VTPruneError(f"{path} exists; pass resume=True to continue its search, or force=True to overwrite it")
    batches = list(batches_of(batches))
    reference = [metrics.last_states(model, batch) for batch in batches]
    hashes = identity.inputs_hash(batches), identity.weights_hash(model)
    search = Search(mean_ratio, inspect(model).num_layers, sum(map(len, reference)), seed, *hashes)
    if search.samples == 0:
        raise VTPruneError("there are no prompts; expected at least one batch")
    if resume:
        search = _resumed(search, path)
    proposals.begin(search)
    while len(search.trials) < trials:
        params = proposals.next()
        value = _value(strategy(params, mean_ratio, search.num_layers), model, batches, reference, mean_ratio)
        search.trials.append({**params, "value": value})
        proposals.tell(search.trials[-1])
        if path is not None:
            search.save(path)
        log(search)
    return search


def _check(model: nn.Module, mean_ratio: float, trials: int, seed: int) -> None:
    if not Budget(mean_ratio=mean_ratio).may_drop or trials < 1:
        raise VTPruneError(
            f"found mean_ratio={mean_ratio} and trials={trials}; expected a share below 1 and at least 1 trial"
        )
    if not fits(seed, int) or not 0 <= seed <= _MOST - trials:
        raise VTPruneError(f"found seed={seed}; expected a whole number from 0 to {_MOST - trials}")
    refuse_patched(model, "searching a strategy")


class _Proposals:
    """Parameters to try next: those of the released strategy first, then those that a Gaussian process proposes.

    Raises:
        VTPruneError: optuna or scipy is not installed.
    """

    def __init__(self) -> None:
        try:
            self.optuna: Any = importlib.import_module("optuna")
            importlib.import_module("scipy")  # the sampler imports it lazily
        except ImportError as error:
            raise VTPruneError(
                "the search needs optuna and scipy, which are not installed: pip install optuna scipy"
            ) from error
        self.optuna.logging.set_verbosity(self.optuna.logging.ERROR)
        self.study = self.optuna.create_study(direction="maximize")
        self.asked: Any = None  # the trial that was proposed last

    def begin(self, search: Search) -> None:
        """Starts after the trials of a search."""
        self.search, space = search, bounds(search.mean_ratio)
        self.ranges = {name: self.optuna.distributions.FloatDistribution(*limits) for name, limits in space.items()}
        for trial in search.trials:
            self.tell(trial)

    def next(self) -> dict[str, float]:
        if not self.search.trials:
            return _released(bounds(self.search.mean_ratio), self.search.mean_ratio)
        # A new sampler for every trial, so that a resumed search equals an uninterrupted one.
        seed = self.search.seed + len(self.search.trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            self.study.sampler = self.optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)
            self.asked = self.study.ask(self.ranges)
        return dict(self.asked.params)

    def tell(self, trial: Mapping[str, float]) -> None:
        """Takes the value of what was proposed last, or of a trial that was not proposed here."""
        if self.asked is not None:
            self.study.tell(self.asked, trial["value"])
            return
        known = {name: trial[name] for name in self.ranges}
        made = self.optuna.create_trial(params=known, distributions=self.ranges, value=trial["value"])
        self.study.add_trial(made)


def _value(
    method: VFlowOpt, model: nn.Module, batches: list[Mapping[str, Any]], reference: list[Tensor], mean_ratio: float
) -> float:
    with patch(model, mean_ratio=mean_ratio, method=resolve(method)) as running:
        pairs = zip(batches, reference, strict=True)
        value = sum(float(metrics.cosine(want, metrics.last_states(model, batch)).sum()) for batch, want in pairs)
        if running.last is None:
            raise VTPruneError(metrics.NO_PICTURES)
        return value


def _released(space: Bounds, mean_ratio: float) -> dict[str, float]:
    """Parameters of the released strategy for the nearest budget, clamped to the search ranges."""
    preset = min(_PRESETS, key=lambda share: abs(math.log(share / mean_ratio)))
    known = VFlowOpt(preset=preset)
    assert known.first is not None and known.later is not None
    params = {
        "threshold": known.threshold,
        "alpha": known.alpha,
        "grid": known.grid,
        "first": known.first * mean_ratio / preset,
        "second": known.later[0],
    }
    return {name: min(max(float(params[name] or 0), low), high) for name, (low, high) in space.items()}


_HASHED = {"inputs": "over other prompts or pictures", "weights": "of a model with other weights"}


def _resumed(fresh: Search, path: str | Path | None) -> Search:
    if path is None:
        raise VTPruneError("resume=True needs a path; pass the file of the search to resume")
    old = Search.load(path)
    progress.load(path, {"about": {"versions": progress.versions()}})  # raises for another version
    for name in ("mean_ratio", "num_layers", "samples", "seed", "inputs", "weights"):
        found, expected = getattr(old, name), getattr(fresh, name)
        if found != expected:
            what = _HASHED.get(name, f"with {name}={found}, this one has {expected}")
            raise VTPruneError(f"{path} has a search {what}; resume with the same settings, or use another file")
    space = bounds(fresh.mean_ratio)
    for number, trial in enumerate(old.trials):
        for name, (low, high) in space.items():
            if not low <= trial[name] <= high:
                raise VTPruneError(
                    f"{path} has {name}={trial[name]:g} in trial {number}, which no search with this budget tries; "
                    f"expected {low:g} to {high:g}"
                )
    return old
