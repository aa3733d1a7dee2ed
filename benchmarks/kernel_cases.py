# SPDX-License-Identifier: Apache-2.0
"""Cases of `benchmarks.kernels`: every operation at sizes of real models, with the plain published formulation.

The plain formulations follow the papers: all similarities as one float32 matrix, then a loop; attention as a full map.
The specifications (`naive.py`) are slower still, because they are written for clarity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import vtprune_kernels


@dataclass
class Case:
    """One operation on one set of inputs.

    Attributes:
        operation: Name in `vtprune_kernels`.
        size, data: Description of the inputs.
        arguments: Inputs of the operation and of `naive`.
        plain: The published formulation on the same inputs.
        flops: Multiply-adds of the definition, without all pairs; lazy evaluation needs fewer.
        bytes: Inputs read once and results written once.
    """

    operation: str
    size: str
    data: str
    arguments: tuple
    plain: Callable[[], Any]
    flops: float
    bytes: float
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Any:
        return getattr(vtprune_kernels, self.operation)(*self.arguments, **self.options)

    def naive(self) -> Any:
        module = import_module(f"vtprune_kernels.{self.operation}.naive")
        return getattr(module, self.operation)(*self.arguments, **self.options)


def features(rows: int, *shape: int, data: str, seed: int) -> Tensor:
    """Features `[rows, *shape]`: `"clustered"` around 60 centers with similar neighbors, like images, or `"noise"`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, *shape, generator=generator)
    if data == "noise":
        return noise
    centers = torch.randn(60, *shape, generator=generator)
    return centers[torch.randint(60, (rows,), generator=generator).sort().values] + 0.7 * noise


def plain_mmr(relevance: Tensor, keys: Tensor, values: Tensor, count: int) -> Tensor:
    keys, values = keys.float().transpose(0, 1), values.float().transpose(0, 1)
    values = values / values.norm(dim=-1, keepdim=True)
    norm = keys.square().sum(-1)
    distance = (norm[:, :, None] + norm[:, None] - 2 * keys @ keys.mT).clamp_min(0)
    similarity = ((values @ values.mT) * torch.exp(-distance / (2 * keys.shape[-1] ** 0.5))).mean(0)
    closest = torch.zeros_like(relevance)
    chosen: list[int] = []
    for _ in range(count):
        value = relevance - 0.5 * closest
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
        closest = torch.maximum(closest, similarity[chosen[-1]])
    return torch.tensor([chosen])


def plain_farthest(rows: Tensor, weights: Tensor | None, count: int) -> Tensor:
    unit = rows.float() / rows.float().norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    weight = torch.ones_like(distance[0]) if weights is None else weights
    first = distance.topk(2, dim=0, largest=False).values[1] if weights is None else weight
    chosen = [int(first.argmax())]
    nearest = distance[chosen[0]].clone()
    for _ in range(count - 1):
        value = weight * nearest
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return torch.tensor([chosen])


def plain_dpp(rows: Tensor, relevance: Tensor, count: int) -> Tensor:
    unit = rows.float() / rows.float().norm(dim=1, keepdim=True)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    left, factor = kernel.diagonal().clone(), kernel.new_zeros(count, len(kernel))
    chosen: list[int] = []
    for step in range(count):
        best = int(left.argmax())
        factor[step] = (kernel[best] - factor[:step, best] @ factor[:step]) / left[best].sqrt()
        left = left - factor[step].square()
        chosen.append(best)
        left[chosen] = -torch.inf
    return torch.tensor([chosen])


def plain_coverage(rows: Tensor, weights: Tensor, count: int) -> Tensor:
    unit = rows.float() / rows.float().norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    covered = torch.zeros_like(weights)
    chosen: list[int] = []
    for _ in range(count):
        value = (cosine - covered).clamp_min(0).sum(1) * weights
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
        covered = torch.maximum(covered, cosine[chosen[-1]])
    return torch.tensor([chosen])


def plain_residual(rows: Tensor, count: int) -> Tensor:
    residual = rows.float().clone()
    chosen: list[int] = []
    for _ in range(count):
        energy = residual.square().sum(1)
        energy[chosen] = -torch.inf
        chosen.append(int(energy.argmax()))
        direction = residual[chosen[-1]] / residual[chosen[-1]].norm()
        residual -= (residual @ direction)[:, None] * direction
    return torch.tensor([chosen])


def plain_map(queries: Tensor, keys: Tensor, scaling: float, order: Tensor | None = None) -> Tensor:
    """Softmax attention `[H, R, N]` with keys repeated for grouped heads."""
    keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], 0)
    logits = queries.float() @ keys.float().mT * scaling
    if order is not None:
        hidden = torch.arange(keys.shape[1], device=keys.device) > order[:, None]
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1)


def cases(
    device: torch.device, dtype: torch.dtype, rows: int = 2880, keep: int = 160, scale: int = 1
) -> Iterator[Case]:
    """Yields every case; `scale` divides widths and heads, for tests of the benchmark itself."""
    groups, heads, size, width, length = 4, 28, 128 // scale, 4096 // scale, 40
    item = torch.empty(0, dtype=dtype).element_size()
    offsets, budgets = torch.tensor([0, rows]), torch.tensor([keep])
    size_of = f"N={rows}, K={keep}"

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    relevance = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(device)
    for data in ("clustered", "noise"):
        k = there(features(rows, groups, size, data=data, seed=2) * 0.5)
        v = there(features(rows, groups, size, data=data, seed=3))
        yield Case(
            "progressive_mmr", f"{size_of}, G={groups}, d={size}", data, (relevance, k, v, offsets, budgets),
            lambda k=k, v=v: plain_mmr(relevance, k, v, keep), 4 * rows * keep * groups * size,
            2 * item * rows * groups * size + 4 * rows,
        )  # fmt: skip
    for data in ("clustered", "noise"):
        x = there(features(rows, width, data=data, seed=4))
        for weights in (None, relevance):
            name = "DivPrune" if weights is None else "weighted, ZOO-Prune"
            pairs = rows * rows if weights is None else rows * keep
            yield Case(
                "weighted_farthest_point", f"{size_of}, D={width}, {name}", data, (x, weights, offsets, budgets),
                lambda x=x, w=weights: plain_farthest(x, w, keep), 2 * pairs * width, item * rows * width,
            )  # fmt: skip
        yield Case(
            "dpp_map", f"{size_of}, D={width}", data, (x, relevance + 0.1, offsets, budgets),
            lambda x=x: plain_dpp(x, relevance + 0.1, keep), 2 * rows * keep * width + rows * keep**2,
            item * rows * width,
        )  # fmt: skip
        yield Case(
            "facility_location", f"{size_of}, D={width}, SCOPE", data, (x, relevance + 0.1, offsets, budgets),
            lambda x=x: plain_coverage(x, relevance + 0.1, keep), rows * rows * width, item * rows * width,
        )  # fmt: skip
        yield Case(
            "residual_pivots", f"{size_of}, D={width}", data, (x, None, offsets, budgets),
            lambda x=x: plain_residual(x, keep), 2 * rows * keep * width + rows * keep**2, item * rows * width,
        )  # fmt: skip
    total = rows + 35 + length
    q = there(features(length, heads, size, data="noise", seed=5))
    k, v = (there(features(total, groups, size, data="noise", seed=seed)) for seed in (6, 7))
    order, visual = torch.arange(total - length, total, device=device), torch.arange(35, 35 + rows, device=device)
    places = (torch.tensor([0, length]), torch.tensor([0, total]), order)
    scaling = size**-0.5

    def attention() -> Tensor:
        return plain_map(q.transpose(0, 1), k.transpose(0, 1), scaling, order)

    def magnitude() -> Tensor:
        norm = v[visual].float().norm(dim=-1).T.repeat_interleave(heads // groups, 0)  # [H, N]
        return (attention()[..., visual] * norm[:, None]).mean((0, 1)).log()

    products = 2 * length * heads * total * size
    moved = item * (length * heads * size + total * groups * size)
    what = f"{length} rows, {total} keys, H={heads}, G={groups}, d={size}"
    yield Case(
        "rank1_relevance", what, "noise", (q, k, v, *places, visual, scaling), magnitude, products,
        moved + item * rows * groups * size + 4 * rows,
    )  # fmt: skip
    yield Case(
        "attention_rows", what, "noise", (q, k, *places, scaling), lambda: attention().mean((0, 1)), products,
        moved + 4 * total,
    )  # fmt: skip
    vision = (16 // min(scale, 8), rows, 72 // min(scale, 4))
    vq, vk = (there(features(*vision, data="noise", seed=seed))[None] for seed in (8, 9))
    yield Case(
        "received_attention", f"H={vision[0]}, N={rows}, d={vision[2]}", "noise", (vq, vk, scaling),
        lambda: plain_map(vq[0], vk[0], scaling).mean((0, 1))[None], 2 * vision[0] * rows * rows * vision[2],
        2 * item * vision[0] * rows * vision[2] + 4 * rows,
    )  # fmt: skip
    before, after = (there(features(rows, width, data="noise", seed=seed)) for seed in (10, 11))

    def variation() -> tuple[Tensor, Tensor]:
        a, b = before.float(), after.float()
        return b.norm(dim=-1) / a.norm(dim=-1), 1 - torch.cosine_similarity(b, a, dim=-1)

    yield Case(
        "transition_variation", f"N={rows}, D={width}", "noise", (before, after), variation, 6 * rows * width,
        2 * item * rows * width + 8 * rows,
    )  # fmt: skip
    cache = [there(features(total, groups, size, data="noise", seed=seed)).transpose(0, 1)[None] for seed in (12, 13)]
    hidden = there(features(total, width, data="noise", seed=14))[None]
    tensors = [hidden, *(part.transpose(1, 2) for part in cache), order.new_zeros(1, total)]
    index = torch.cat([torch.arange(35), 35 + torch.arange(keep) * rows // keep, torch.arange(35 + rows, total)])
    index = index[None].to(device)
    yield Case(
        "compact", f"{total} to {index.shape[1]} columns, D={width}, one layer's cache", "noise", (tensors, index),
        lambda: [tensor[:, index[0]] for tensor in tensors], 0,
        2 * index.shape[1] * (item * (width + 2 * groups * size) + 8),
    )  # fmt: skip
