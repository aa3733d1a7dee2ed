# SPDX-License-Identifier: Apache-2.0
"""Least-squares fits of position curves to collected scores (Attention Debiasing, arXiv 2508.17807)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ...core.options import shorten
from ...errors import MethodError

Form = Literal["exponential", "reciprocal-cubic"]
Fit = Literal["exponential", "log-linear", "reciprocal-cubic"]


def fit_coefficients(scores: Sequence[Tensor], shown: Sequence[Tensor] | None, form: Fit) -> tuple[float, ...]:
    """Coefficients of a `Curve` of the given form; see `Curve.fit` for arguments and errors."""
    if form not in get_args(Fit):
        raise MethodError(f"form is {shorten(form)}; expected one of {', '.join(map(repr, get_args(Fit)))}")
    places, values = _mean_by_place(scores, shown)
    if len(places) < 4:
        raise MethodError(
            f"the score vectors have {len(places)} places; a curve needs at least 4, so collect longer vectors"
        )
    if not bool(torch.isfinite(values).all()):
        raise MethodError("a score vector is zero everywhere or not finite, so no curve can be fitted; leave it out")
    if form == "log-linear":
        return (_log_slope(places, values),)
    return (_fit_exponential(places, values),) if form == "exponential" else _fit_cubic(places, values)


def _mean_by_place(scores: Sequence[Tensor], shown: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Places in [0, 1] with data, and the mean normalized score at each; shorter vectors go to the nearest places."""
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


def _log_slope(x: Tensor, y: Tensor) -> float:
    """Slope of the least-squares line through the logarithms of the positive values."""
    line = torch.stack([torch.ones_like(x), x], 1)[y > 0]
    return float(torch.linalg.lstsq(line, y[y > 0].log()[:, None]).solution[1])


def _fit_exponential(x: Tensor, y: Tensor) -> float:
    """Least-squares `sigma` of `mu exp(sigma x)` by Gauss-Newton steps, halved until they reduce the loss."""

    def residual(sigma: float) -> tuple[Tensor, Tensor, float]:
        e = torch.exp(sigma * x)
        mu = (y @ e) / (e @ e)
        return y - mu * e, torch.stack([e, mu * x * e], 1), float((y - mu * e).square().sum())

    sigma = _log_slope(x, y)
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


def _fit_cubic(x: Tensor, y: Tensor) -> tuple[float, ...]:
    """Least-squares cubic, divided by its value at 0."""
    powers = torch.stack([x**k for k in range(4)], 1)
    cubic = torch.linalg.lstsq(powers, y[:, None]).solution[:, 0]
    if bool((powers @ cubic <= 0).any()):
        raise MethodError("the fitted cubic is not positive everywhere; collect more samples or fit an exponential")
    return tuple((cubic[1:] / cubic[0]).tolist())
