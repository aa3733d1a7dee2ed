# SPDX-License-Identifier: Apache-2.0
"""What stands under `"vtprune"` in vLLM's `additional_config`: a method, a budget per image, options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ... import __version__, methods
from ...core import budget
from ...core.registry import make
from ...errors import BudgetError, MethodError, VTPruneError
from ...methods import Method

KEY = "vtprune"
# Methods that choose between projector and decoder, knowing the image alone. What the others miss there:
QUESTION_FREE = ("divprune", "iwp", "pooling", "random", "resprune", "scope", "uniform", "visionzip", "zoo_prune")
_TOWER_READERS = ("scope", "visionzip", "zoo_prune")  # scope with alpha=0 is coverage alone
_FIELDS = ("method", "ratio", "keep", "options")
# What iwp must be before the decoder, and what serves it best there: `IWP.query`.
_FIXED = {"iwp": {"layer": 0, "query": "none"}}
_DEFAULTS = {"iwp": {"rope_in_duplication": False}}


def reads_tower(method: Method) -> bool:
    """Whether a method reads inside the vision encoder, besides the features that come out of it."""
    return method.name in _TOWER_READERS and getattr(method, "alpha", None) != 0


class ServingError(VTPruneError):
    """A configuration or a model that cannot be served pruned; no ValueError, which pydantic would wrap."""


@dataclass(frozen=True)
class Settings:
    """A checked configuration.

    Attributes:
        method: Cuts before the decoder only.
        budget: `ratio` or `keep`, per image.
        fingerprint: Differs wherever chosen tokens may differ: part of the identity of cached images.
    """

    method: Method
    budget: budget.Budget
    fingerprint: str

    def counts(self, runs: Sequence[int]) -> list[int]:
        """How many tokens of each unbroken run of an image's placeholders stay; the image's budget is exact.

        Args:
            runs: Lengths of the runs (one, or one for every tile).
        """
        total = sum(runs)
        if total == 0:
            return [0] * len(runs)
        wanted = self.budget.keep if self.budget.keep is not None else max(1, round((self.budget.share or 1) * total))
        return budget.split_keep(wanted, runs)

    def __str__(self) -> str:
        return f"{self.method.name}, {self.budget} of every image"


def parse(config: Any) -> Settings:
    """Checks a configuration.

    Args:
        config: The object under `"vtprune"`: `method` (default `divprune`), one of `ratio` and `keep`, and `options` of
            the method.

    Raises:
        ServingError: One line that says what is wrong and what was expected.
    """
    if not isinstance(config, Mapping):
        raise ServingError(f"vtprune: the configuration is {config!r}; expected an object with {', '.join(_FIELDS)}")
    unknown = [name for name in config if name not in _FIELDS]
    if "mean_ratio" in unknown:
        raise ServingError("vtprune: mean_ratio: vLLM cuts before the decoder, where it equals ratio; give ratio")
    if unknown:
        raise ServingError(f"vtprune: unknown field {', '.join(map(repr, unknown))}; expected {', '.join(_FIELDS)}")
    options = config.get("options", {})
    if not isinstance(options, Mapping):
        raise ServingError(f"vtprune: options is {options!r}; expected an object with options of the method")
    try:
        allowed = budget.Budget(**{name: config.get(name) for name in ("ratio", "keep")})
        if allowed.auto is not None:
            raise BudgetError(
                "ratio='auto' counts by features, and vLLM needs the count before the model runs; give a number"
            )
        method = _method(config.get("method", "divprune"), options)
    except (BudgetError, MethodError) as error:
        raise ServingError(
            f"vtprune: {' '.join(str(error).split())}".replace("ratio, keep and mean_ratio", "ratio and keep")
        ) from None
    text = json.dumps([__version__, method.name, repr(method), allowed.share, allowed.keep])
    return Settings(method, allowed, hashlib.sha256(text.encode()).hexdigest()[:16])


def _method(name: Any, options: Mapping[str, Any]) -> Method:
    methods.get(str(name))  # raises for an unknown name
    if name not in QUESTION_FREE:
        raise MethodError(
            f"method {name} needs more than the image (the question, or deeper layers), which vLLM does not let a "
            f"plug-in see; in vLLM there are {', '.join(QUESTION_FREE)}"
        )
    fixed = _FIXED.get(str(name), {})
    for option, value in fixed.items():
        if options.get(option, value) != value:
            raise MethodError(f"{name}: in vLLM {option} is {value!r}, found {options[option]!r}")
    method = make(str(name), {**fixed, **_DEFAULTS.get(str(name), {}), **options})
    layers = [stage.layer for stage in method.schedule(1)]
    if layers != [0]:
        raise MethodError(
            f"{name} with {dict(options)} cuts before layers {layers}; vLLM allows a cut before layer 0 only"
        )
    return method
