# SPDX-License-Identifier: Apache-2.0
"""How attention to visual tokens grows with their position, and the weights that undo it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import MethodError

Form = Literal["exponential", "reciprocal-cubic"]

_SETS = ("gqa", "mmb", "mmb_cn", "mme", "mmvet", "pope", "sqa", "textvqa", "vizwiz", "vqav2")
_SIGMAS = {
    "pyramiddrop": (2.294, 1.525, 1.493, 1.878, 2.377, 2.329, 1.552, 1.809, 1.448, 2.160),
    "sparsevlm": (1.323, 1.838, 1.494, 2.187, 2.429, 2.666, 1.721, 1.810, 1.577, 2.370),
    "himap": (1.249, 0.925, 0.851, 1.174, 0.979, 1.296, 0.982, 0.850, 1.133, 1.273),
    "tokencarve": (0.959, 0.745, 0.640, 0.845, 0.976, 0.986, 0.678, 0.679, 0.823, 0.976),
}
_LAST = 575  # the released vectors have 576 entries


@dataclass(frozen=True)
class Curve:
    """Weights over the place `x` in [0, 1] of a token among the visual tokens of its sample.

    `"exponential"`: `exp(-sigma x)`; `"reciprocal-cubic"`: `1 / (1 + a x + b x^2 + c x^3)`. Both are 1 at the first
    token.

    Attributes:
        form: Which of the two.
        coefficients: `(sigma,)` or `(a, b, c)`.
    """

    form: Form
    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        expected = {"exponential": 1, "reciprocal-cubic": 3}.get(self.form)
        if expected is None or len(self.coefficients) != expected:
            raise MethodError(
                f"a curve of form {self.form!r} with {len(self.coefficients)} coefficients; expected 'exponential' "
                "with 1 or 'reciprocal-cubic' with 3"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Weights at `x`, of the same shape."""
        if self.form == "exponential":
            return torch.exp(-self.coefficients[0] * x)
        a, b, c = self.coefficients
        return 1 / (1 + x * (a + x * (b + x * c)))

    @classmethod
    def preset(cls, name: str) -> Curve:
        """A released curve.

        Args:
            name: `"fastv"`, or host and benchmark: `"pyramiddrop/gqa"`, `"sparsevlm/pope"`. Hosts are pyramiddrop,
                sparsevlm, himap and tokencarve; sigma is known to three decimals.

        Raises:
            MethodError: There is no such curve.
        """
        if name == "fastv":
            return cls("reciprocal-cubic", (3.01519760e-3 * _LAST, -1.45979083e-5 * _LAST**2, 2.56911352e-8 * _LAST**3))
        host, _, benchmark = name.partition("/")
        if host not in _SIGMAS or benchmark not in _SETS:
            raise MethodError(
                f"there is no released curve {name!r}; expected 'fastv', or one of {', '.join(_SIGMAS)}, a slash, and "
                f"one of {', '.join(_SETS)}"
            )
        return cls("exponential", (_SIGMAS[host][_SETS.index(benchmark)],))

    @classmethod
    def fit(cls, scores: Sequence[Tensor], shown: Sequence[Tensor] | None = None, form: Form = "exponential") -> Curve:
        """Fits a curve to score vectors of a host, collected on data that is not a test set.

        Each vector is divided by its mean over the tokens that show the picture; the mean over samples at each place is
        fitted by least squares: `mu exp(sigma x)`, from the log-linear fit on, or a cubic.

        Args:
            scores: For each sample `[N]` scores before any weighting.
            shown: For each sample `[N]` bool, False for padding; by default all True.
            form: Form of the curve.

        Raises:
            MethodError: The vectors are too few or too short for the form, or the fit is not positive everywhere.
        """
        places, values = _mean_by_place(scores, shown)
        if len(places) < 4:
            raise MethodError(f"a curve is fitted to 4 places or more; the score vectors have {len(places)}")
        if not bool(torch.isfinite(values).all()):
            raise MethodError("a score vector is zero everywhere, or not finite; a curve cannot be fitted to it")
        if form == "exponential":
            return cls(form, (_fit_exponential(places, values),))
        powers = torch.stack([places**k for k in range(4)], 1)
        cubic = torch.linalg.lstsq(powers, values[:, None]).solution[:, 0]
        if bool((powers @ cubic <= 0).any()):
            raise MethodError("the fitted cubic is not positive everywhere; collect more samples or fit an exponential")
        return cls(form, tuple((cubic[1:] / cubic[0]).tolist()))

    def save(self, path: str | Path) -> None:
        """Writes the curve as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Curve:
        """Reads what `save` wrote."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(data["form"], tuple(data["coefficients"]))


def _mean_by_place(scores: Sequence[Tensor], shown: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Places with data, and the mean normalised score there. Vectors of other lengths go to the nearest place."""
    last = max((len(s) for s in scores), default=1) - 1
    total, count = torch.zeros(last + 1, dtype=torch.float64), torch.zeros(last + 1, dtype=torch.float64)
    for number, score in enumerate(scores):
        mask = torch.ones(len(score), dtype=torch.bool) if shown is None else shown[number].cpu()
        place = torch.arange(len(score))[mask] * last / max(len(score) - 1, 1)
        value = score.detach().cpu().double()[mask]
        total.index_add_(0, place.round().long(), value / value.mean())
        count.index_add_(0, place.round().long(), torch.ones_like(value))
    seen = count > 0
    return torch.arange(last + 1).double()[seen] / max(last, 1), (total / count)[seen]


def _fit_exponential(x: Tensor, y: Tensor) -> float:
    """Least-squares `sigma` of `mu exp(sigma x)` by Gauss-Newton steps, halved where they do not help."""

    def residual(sigma: float) -> tuple[Tensor, Tensor, float]:
        e = torch.exp(sigma * x)
        mu = (y @ e) / (e @ e)
        return y - mu * e, torch.stack([e, mu * x * e], 1), float((y - mu * e).square().sum())

    positive = y > 0
    start = torch.stack([torch.ones_like(x), x], 1)[positive]
    sigma = float(torch.linalg.lstsq(start, y[positive].log()[:, None]).solution[1])
    error, slopes, loss = residual(sigma)
    for _ in range(100):
        step = float(torch.linalg.lstsq(slopes, error[:, None]).solution[1])
        while residual(sigma + step)[2] > loss and abs(step) > 1e-12:
            step /= 2
        if abs(step) <= 1e-12:
            break
        sigma += step
        error, slopes, loss = residual(sigma)
    return sigma
