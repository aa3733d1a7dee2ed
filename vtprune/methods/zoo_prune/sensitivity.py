# SPDX-License-Identifier: Apache-2.0
"""Sensitivity of a function to small changes of its input: by differences, by derivatives, in closed form."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# PyTorch tracks the levels of forward-mode differentiation per process, not per thread: two threads at once raise an
# error or get each other's derivatives.
_FORWARD_MODE = threading.Lock()


def slope_along(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """Derivative of a function at `x` in a direction of the same shape; one thread at a time."""
    with _FORWARD_MODE:
        return torch.func.jvp(function, (x,), (direction,))[1]


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
    """The limit of `difference_sensitivity` for small steps, by forward-mode differentiation."""
    precise = torch.promote_types(x.dtype, torch.float32)
    norms = []
    for u in shifts:
        slope = slope_along(project, x, u.expand_as(x).contiguous())
        norms.append(slope.to(precise).norm(dim=-1))
    return torch.stack(norms).mean(0)


def exact_sensitivity(
    x: Tensor, w1: Tensor, b1: Tensor | None, act: Callable[[Tensor], Tensor], quadratic: Tensor
) -> Tensor:
    """Root mean square of `|J_i u|` over all unit directions, in closed form, without random draws.

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
    slope = slope_along(act, a, torch.ones_like(a))  # [R, h]
    return ((slope @ quadratic) * slope).sum(1).clamp_min(0).div(x.shape[1]).sqrt()


def two_linears(projector: nn.Module) -> tuple[Any, nn.Module, Any] | None:
    """Leaf modules of a projector that look like linear - activation - linear; the caller has to check the output."""
    leaves = [m for m in projector.modules() if not list(m.children())]
    if [_is_linear(m) for m in leaves] != [True, False, True] or list(leaves[1].parameters()):
        return None
    return leaves[0], leaves[1], leaves[2]


def _is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix `weight` `[out, in]`: `nn.Linear`, or a serving engine's replacement."""
    weight = getattr(module, "weight", None)
    plain = type(module) is nn.Linear or (hasattr(module, "input_size") and hasattr(module, "output_size"))
    return plain and isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def quadratic_form(w1: Tensor, w2: Tensor) -> Tensor:
    """`[h, h]` for `exact_sensitivity`, from the weights `[h, d_in]` and `[d_out, h]`."""
    return (w2.T @ w2) * (w1 @ w1.T)


class ClosedForms:
    """`exact_sensitivity` of projectors, with the matrix `Q` of each cached as long as the projector lives.

    Copies and pickles of an instance have an empty cache.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return ClosedForms, ()  # weak references cannot be pickled

    def __call__(self, projector: nn.Module | None, x: Tensor, y: Tensor) -> Tensor | None:
        """Sensitivity of a projector, or None where it is not linear - activation - linear on every row.

        Args:
            projector: The module.
            x: `[n, R, d_in]` float32 input of the projector.
            y: `[n, R', D]` its output, with which the closed form is checked.

        Returns:
            Tensor: `[n R]` float32.
        """
        parts = None if projector is None or x.shape[1] != y.shape[1] else two_linears(projector)
        if projector is None or parts is None or parts[0].weight.is_meta or parts[2].weight.is_meta:
            return None
        first, act, second = parts
        w1, w2 = first.weight.detach().float(), second.weight.detach().float()
        b1, b2 = (None if part.bias is None else part.bias.detach().float() for part in (first, second))
        rows, output = x.flatten(0, 1), y.flatten(0, 1).float()
        if w1.shape[1] != rows.shape[1] or w2.shape[1] != w1.shape[0]:
            return None  # quantized (packed) or sharded weights
        tried = nn.functional.linear(act(nn.functional.linear(rows[:16], w1, b1)), w2, b2)
        if tried.shape != output[:16].shape or (tried - output[:16]).norm() > 0.05 * output[:16].norm():
            return None  # not the plain composition of the three
        version = tuple((w.data_ptr(), w._version, w.device, w.dtype) for w in (first.weight, second.weight))
        if self._known.get(projector, (None,))[0] != version:
            self._known[projector] = (version, quadratic_form(w1, w2))
        return exact_sensitivity(rows, w1, b1, act, self._known[projector][1])
