# SPDX-License-Identifier: Apache-2.0
"""How strongly a function answers to small changes of its input: by differences, by derivatives, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def unit_directions(draws: Tensor) -> Tensor:
    """Rows `[m, d]` of Gaussian draws, divided by their length."""
    return draws / (draws.norm(dim=1, keepdim=True) + 1e-12)


def difference_sensitivity(
    project: Callable[[Tensor], Tensor], x: Tensor, shifts: Iterable[Tensor], h: float
) -> Tensor:
    """Mean over directions of the central difference `|M(x + h u) - M(x - h u)| / 2h`, as released.

    Args:
        project: The projector, `[..., P, d]` -> `[..., R, D]`.
        x: Its input.
        shifts: Unit directions, each broadcastable to `x`.
        h: Step.

    Returns:
        Tensor: `[..., R]`.
    """
    norms = [((project(x + h * u) - project(x - h * u)) / (2 * h)).norm(dim=-1) for u in shifts]
    return torch.stack(norms).mean(0)


def jvp_sensitivity(project: Callable[[Tensor], Tensor], x: Tensor, shifts: Iterable[Tensor]) -> Tensor:
    """The limit of `difference_sensitivity` for small steps, by forward-mode differentiation, free of rounding."""
    precise = torch.promote_types(x.dtype, torch.float32)
    norms = []
    for u in shifts:
        slope = torch.func.jvp(project, (x,), (u.expand_as(x).contiguous(),))[1]
        norms.append(slope.to(precise).norm(dim=-1))
    return torch.stack(norms).mean(0)


def exact_sensitivity(
    x: Tensor, w1: Tensor, b1: Tensor | None, act: Callable[[Tensor], Tensor], quadratic: Tensor
) -> Tensor:
    """Root mean square of `|J_i u|` over all unit directions, in closed form: nothing is drawn.

    With `g_i = act'(W1 x_i + b1)` and `u` uniform on the sphere, `E |J_i u|^2 = g_i^T Q g_i / d_in`.

    Args:
        x: `[R, d_in]`.
        w1, b1: First layer.
        act: Activation, elementwise.
        quadratic: `[h, h]`, `Q = (W2^T W2) * (W1 W1^T)`, elementwise product.

    Returns:
        Tensor: `[R]`.
    """
    a = nn.functional.linear(x, w1, b1)
    slope = torch.func.jvp(act, (a,), (torch.ones_like(a),))[1]  # [R, h]
    return ((slope @ quadratic) * slope).sum(1).clamp_min(0).div(x.shape[1]).sqrt()


def two_linears(projector: nn.Module) -> tuple[nn.Linear, nn.Module, nn.Linear] | None:
    """The leaves of a projector that look like linear - activation - linear; whether they are has to be tried."""
    leaves = [m for m in projector.modules() if not list(m.children())]
    if [type(m) is nn.Linear for m in leaves] != [True, False, True] or list(leaves[1].parameters()):
        return None
    return leaves[0], leaves[1], leaves[2]  # type: ignore[return-value]


def quadratic_form(w1: Tensor, w2: Tensor) -> Tensor:
    """`[h, h]` for `exact_sensitivity`, from the weights `[h, d_in]` and `[d_out, h]`."""
    return (w2.T @ w2) * (w1 @ w1.T)
