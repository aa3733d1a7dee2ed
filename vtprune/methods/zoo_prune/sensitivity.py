# SPDX-License-Identifier: Apache-2.0
"""Sensitivity of a function to small changes of its input: by differences, by derivatives, in closed form."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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


def normed_sensitivity(
    x: Tensor,
    norm: nn.Module,
    w1: Tensor,
    b1: Tensor | None,
    act: Callable[[Tensor], Tensor],
    w2: Tensor,
    quadratics: Sequence[Tensor],
) -> Tensor:
    """`exact_sensitivity` where every patch goes through a norm first, and the patches of a token side by side on.

    The Jacobian of a norm `g * c / r`, with `c` the (centered) patch of width `w` and `u = c / (sqrt(w) r)`, is
    `diag(g) (C - u u^T) / r`: diagonal minus rank one (`C` is the identity, or takes the mean away). So
    `E |J v|^2 = sum_p (s^T Q_p s - (2 - |u_p|^2) |W2 (s * W1_p (g * u_p))|^2) / r_p^2 / d_in` over the patches `p`.

    Args:
        x: `[R, k, w]` patches of every token.
        norm: A layer norm or a root-mean-square norm over the last dimension.
        w1, b1: First layer, `[h, k w]`.
        act: Activation, elementwise.
        w2: Second layer, `[d_out, h]`.
        quadratics: `[h, h]` for each patch, see `norm_forms`.

    Returns:
        Tensor: `[R]`.
    """
    centered = isinstance(norm, nn.LayerNorm)
    gain, shift, eps = _affine(norm)
    c = x - x.mean(-1, keepdim=True) if centered else x
    r = (c.square().mean(-1, keepdim=True) + eps).sqrt()  # [R, k, 1]
    z = c / r * gain
    u = z * x.shape[-1] ** -0.5  # [R, k, w], g * u
    a = nn.functional.linear((z if shift is None else z + shift).flatten(1), w1, b1)
    slope = slope_along(act, a, torch.ones_like(a))  # [R, h]
    length = (c / r).square().mean(-1)  # [R, k], |u|^2
    total = torch.zeros_like(slope[:, 0])
    for p, (part, quadratic) in enumerate(zip(w1.split(x.shape[-1], 1), quadratics, strict=True)):
        whole = ((slope @ quadratic) * slope).sum(1)
        along = nn.functional.linear(slope * nn.functional.linear(u[:, p], part), w2).square().sum(1)
        total += (whole - (2 - length[:, p]) * along) / r[:, p, 0].square()
    return total.clamp_min(0).div(x.shape[1] * x.shape[2]).sqrt()


def norm_forms(w1: Tensor, w2: Tensor, norm: nn.Module) -> list[Tensor]:
    """`Q_p = (W2^T W2) * (W1_p G C G W1_p^T)` for `normed_sensitivity`: a matrix `[h, h]` for each patch."""
    gain, _, _ = _affine(norm)
    forms = []
    for part in w1.split(len(gain), 1):
        part = part * gain
        if isinstance(norm, nn.LayerNorm):
            part = part - part.mean(1, keepdim=True)
        forms.append(quadratic_form(part, w2))
    return forms


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor | None, float]:
    """Gain `[w]` and shift of a norm, float32, and what it adds to the variance."""
    gain, shift = (getattr(norm, name, None) for name in ("weight", "bias"))
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0
    return gain.detach().float(), None if shift is None else shift.detach().float(), float(eps)  # type: ignore[union-attr]


@dataclass(frozen=True)
class TwoLinears:
    """The leaves of a projector that look like linear - activation - linear, with a norm in front or without.

    Whether they are that has to be tried.
    """

    norm: nn.Module | None
    first: Any
    act: nn.Module
    second: Any

    @classmethod
    def of(cls, projector: nn.Module) -> TwoLinears | None:
        """None where the leaves are others."""
        leaves = [m for m in projector.modules() if not list(m.children())]
        norm = leaves.pop(0) if len(leaves) == 4 and _is_norm(leaves[0]) else None
        if [_is_linear(m) for m in leaves] != [True, False, True] or list(leaves[1].parameters()):
            return None
        return cls(norm, *leaves)

    @property
    def weights(self) -> list[Tensor]:
        """All that the closed form depends on."""
        kept = [self.first.weight, self.second.weight]
        return kept if self.norm is None else [*kept, self.norm.weight]  # type: ignore[list-item]

    def run(self, x: Tensor) -> Tensor:
        """What they make of `[R, k, w]` in float32."""
        if self.norm is not None:
            gain, shift, eps = _affine(self.norm)
            c = x - x.mean(-1, keepdim=True) if isinstance(self.norm, nn.LayerNorm) else x
            x = c / (c.square().mean(-1, keepdim=True) + eps).sqrt() * gain
            x = x if shift is None else x + shift
        (w1, b1), (w2, b2) = map(_float, (self.first, self.second))
        return nn.functional.linear(self.act(nn.functional.linear(x.flatten(1), w1, b1)), w2, b2)


def _float(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight.detach().float(), None if linear.bias is None else linear.bias.detach().float()


def _is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a norm over the last dimension: its class says so, and it has a gain `[w]`."""
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and isinstance(weight, Tensor) and weight.dim() == 1


def _is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix `weight` `[out, in]`: `nn.Linear`, or a serving engine's replacement."""
    weight = getattr(module, "weight", None)
    plain = type(module) is nn.Linear or (hasattr(module, "input_size") and hasattr(module, "output_size"))
    return plain and isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()


def quadratic_form(w1: Tensor, w2: Tensor) -> Tensor:
    """`[h, h]` for `exact_sensitivity`, from the weights `[h, d_in]` and `[d_out, h]`."""
    return (w2.T @ w2) * (w1 @ w1.T)


class ClosedForms:
    """Sensitivity of projectors in closed form, with the matrices `Q` of each kept for as long as the projector lives.

    One matrix `[h, h]`; `k` of them for a merger with a norm over each of `k` patches. What is kept stays behind when
    an instance is copied or pickled.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return ClosedForms, ()  # weak references cannot be pickled

    def __call__(self, projector: nn.Module | None, x: Tensor, y: Tensor) -> Tensor | None:
        """Sensitivity of a projector, or None where it is not (norm -) linear - activation - linear on every row.

        Args:
            projector: The module.
            x: `[R, k, w]` float32, what it was given for each row that it gave out.
            y: `[R, D]` what it gave out, by which the form is tried.

        Returns:
            Tensor: `[R]` float32.
        """
        parts = None if projector is None else TwoLinears.of(projector)
        if projector is None or parts is None or any(w.is_meta for w in parts.weights):
            return None
        (w1, b1), (w2, _) = map(_float, (parts.first, parts.second))
        width = x.shape[1] * x.shape[2] if parts.norm is None else len(parts.norm.weight)  # type: ignore[arg-type]
        if w1.shape[1] != x.shape[1] * x.shape[2] or w2.shape[1] != w1.shape[0] or w1.shape[1] % width:
            return None  # packed or split over devices
        x = x.reshape(len(x), -1, width)  # a norm over a part of a row, or over all of it
        tried, shown = parts.run(x[:16]), y[:16].float()
        if tried.shape != shown.shape or (tried - shown).norm() > 0.05 * shown.norm():
            return None  # something else happens between the layers
        version = tuple((w.data_ptr(), w._version, w.device, w.dtype) for w in parts.weights)
        if self._known.get(projector, (None,))[0] != version:
            forms = [quadratic_form(w1, w2)] if parts.norm is None else norm_forms(w1, w2, parts.norm)
            self._known[projector] = (version, forms)
        forms = self._known[projector][1]
        if parts.norm is None:
            return exact_sensitivity(x.flatten(1), w1, b1, parts.act, forms[0])
        return normed_sensitivity(x, parts.norm, w1, b1, parts.act, w2, forms)
