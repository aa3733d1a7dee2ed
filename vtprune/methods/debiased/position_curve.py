# SPDX-License-Identifier: Apache-2.0
"""Curves of attention over token position, and the weights that undo them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from ...core.files import FileError, read_json, write_text
from ...core.options import Range, check_options, shorten
from ...errors import MethodError
from .curve_fitting import Fit, Form, fit_coefficients

_SETS = ("gqa", "mmb", "mmb_cn", "mme", "mmvet", "pope", "sqa", "textvqa", "vizwiz", "vqav2")
_SIGMAS = {
    "pyramiddrop": (2.294, 1.525, 1.493, 1.878, 2.377, 2.329, 1.552, 1.809, 1.448, 2.160),
    "sparsevlm": (1.323, 1.838, 1.494, 2.187, 2.429, 2.666, 1.721, 1.810, 1.577, 2.370),
    "himap": (1.249, 0.925, 0.851, 1.174, 0.979, 1.296, 0.982, 0.850, 1.133, 1.273),
    "tokencarve": (0.959, 0.745, 0.640, 0.845, 0.976, 0.986, 0.678, 0.679, 0.823, 0.976),
}
_DEFAULTS = {"fastv": "fastv", "pyramiddrop": "pyramiddrop/gqa", "sparsevlm": "sparsevlm/gqa"}
# Schema of a saved curve; `Curve` checks forms and ranges.
_SAVED = {
    "type": "object",
    "required": ["form", "coefficients"],
    "additionalProperties": False,
    "properties": {
        "form": {"type": "string"},
        "coefficients": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
    },
}
_LAST = 575  # the released vectors have 576 entries


@dataclass(frozen=True)
class Curve:
    """Weights by the relative place `x` in [0, 1] of a token among the visual tokens of its sample.

    `"exponential"`: `exp(-sigma x)`; `"reciprocal-cubic"`: `1 / (1 + a x + b x^2 + c x^3)`. Both are 1 at the first
    token.

    Attributes:
        form: `"exponential"` or `"reciprocal-cubic"`.
        coefficients: `(sigma,)` or `(a, b, c)`.
    """

    form: Form
    coefficients: tuple[Annotated[float, Range(-1e6, 1e6)], ...]

    def __post_init__(self) -> None:
        check_options(self)
        expected = {"exponential": 1, "reciprocal-cubic": 3}[self.form]
        if len(self.coefficients) != expected:
            raise MethodError(
                f"a curve of form {self.form!r} with {len(self.coefficients)} coefficients; expected {expected}"
            )
        weights = self(torch.linspace(0, 1, _LAST + 1, dtype=torch.float32, device="cpu"))
        if not bool(((weights > 0) & weights.isfinite()).all()):
            raise MethodError(
                f"the weights of {self.form!r} with coefficients {self.coefficients} are not all positive and finite; "
                "expected a curve above 0 on [0, 1]"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Weights at `x`, of the same shape."""
        if self.form == "exponential":
            return torch.exp(-self.coefficients[0] * x)
        a, b, c = self.coefficients
        return 1 / (1 + x * (a + x * (b + x * c)))

    @classmethod
    def preset(cls, name: str) -> Curve:
        """Returns a released curve.

        Args:
            name: `"fastv"`, or host and benchmark: `"pyramiddrop/gqa"`, `"sparsevlm/pope"`. Hosts are pyramiddrop,
                sparsevlm, himap and tokencarve; their sigma has three decimals.

        Raises:
            MethodError: There is no such curve.
        """
        if name == "fastv":
            return cls("reciprocal-cubic", (3.01519760e-3 * _LAST, -1.45979083e-5 * _LAST**2, 2.56911352e-8 * _LAST**3))
        host, _, benchmark = name.partition("/")
        if host not in _SIGMAS or benchmark not in _SETS:
            raise MethodError(
                f"there is no released curve {shorten(name)}; expected 'fastv', or one of {', '.join(_SIGMAS)}, a "
                f"slash, and one of {', '.join(_SETS)}"
            )
        return cls("exponential", (_SIGMAS[host][_SETS.index(benchmark)],))

    @classmethod
    def of(cls, choice: Curve | str | None, host: str) -> Curve:
        """Returns the curve that the option `curve` stands for.

        Args:
            choice: A curve, the name of a released one, the path of a saved one (`.json`), `"flat"` for equal
                weights, or None for the one that was released for the host (of several, that of GQA).
            host: Name of the method whose scores are weighted.

        Raises:
            MethodError: There is no such curve, or none for the host.
        """
        if isinstance(choice, Curve):
            return choice
        if choice == "flat":
            return cls("exponential", (0.0,))
        if choice is not None:
            return cls.load(choice) if choice.endswith(".json") else cls.preset(choice)
        if host not in _DEFAULTS:
            raise MethodError(
                f"no curve was released for {host or 'this method'}; pass curve=, or curve='flat' and then fit one to "
                "pictures of your own"
            )
        return cls.preset(_DEFAULTS[host])

    @classmethod
    def fit(cls, scores: Sequence[Tensor], shown: Sequence[Tensor] | None = None, form: Fit = "exponential") -> Curve:
        """Fits a curve to score vectors of a host; do not collect them on a test set.

        Each vector is divided by its mean over the tokens that show the picture; the mean over samples at each place is
        fitted by least squares: `mu exp(sigma x)`, starting at the log-linear fit, or a cubic.

        Args:
            scores: For each sample `[N]` scores before any weighting.
            shown: For each sample `[N]` bool, False for padding; by default all True.
            form: Form of the curve; `"log-linear"` is the exponential through the logarithms. Where the scores of a few
                last places are many times as large as all others, least squares follow these alone.

        Raises:
            MethodError: The vectors are too few or too short for the form, or the fit is not positive everywhere.
        """
        return cls("exponential" if form == "log-linear" else form, fit_coefficients(scores, shown, form))

    def save(self, path: str | Path) -> None:
        """Writes the curve as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Curve:
        """Reads a file of `save`; raises `MethodError` where it is missing or holds something else."""
        try:
            data = read_json(path, _SAVED)
            return cls(data["form"], tuple(data["coefficients"]))
        except (FileError, MethodError) as error:
            raise MethodError(f"{path} holds no curve, such as `Debiased.fit` saves: {error}") from error
