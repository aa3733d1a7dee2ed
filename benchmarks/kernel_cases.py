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


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model with 7 billion weights and large pictures, and where its tensors go.

    Attributes:
        rows, keep: Visual tokens, and how many are kept.
        scale: Divides widths and heads, for tests of the benchmark itself.
    """

    device: torch.device
    dtype: torch.dtype
    rows: int = 2880
    keep: int = 160
    scale: int = 1
    groups: int = 4
    heads: int = 28
    length: int = 40  # rows of text that attend
    before: int = 35  # positions before the visual tokens

    @property
    def size(self) -> int:
        return 128 // self.scale

    @property
    def width(self) -> int:
        return 4096 // self.scale

    @property
    def total(self) -> int:
        return self.before + self.rows + self.length

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return torch.empty(0, dtype=self.dtype).element_size()

    def there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)


def cases(
    device: torch.device, dtype: torch.dtype, rows: int = 2880, keep: int = 160, scale: int = 1
) -> Iterator[Case]:
    """Yields every case; `scale` divides widths and heads, for tests of the benchmark itself."""
    sizes = Sizes(device, dtype, rows, keep, scale)
    for kind in (cached_choices, feature_choices, decoder_attention, tower_attention, layer_changes, compaction):
        yield from kind(sizes)


def _relevance(of: Sizes) -> Tensor:
    return torch.rand(of.rows, generator=torch.Generator().manual_seed(1)).to(of.device)


def cached_choices(of: Sizes) -> Iterator[Case]:
    """Choices by keys and values of the cache."""
    relevance = _relevance(of)
    for data in ("clustered", "noise"):
        k = of.there(features(of.rows, of.groups, of.size, data=data, seed=2) * 0.5)
        v = of.there(features(of.rows, of.groups, of.size, data=data, seed=3))
        yield Case(
            "progressive_mmr", f"N={of.rows}, K={of.keep}, G={of.groups}, d={of.size}", data,
            (relevance, k, v, torch.tensor([0, of.rows]), torch.tensor([of.keep])),
            lambda k=k, v=v: plain_mmr(relevance, k, v, of.keep), 4 * of.rows * of.keep * of.groups * of.size,
            2 * of.item * of.rows * of.groups * of.size + 4 * of.rows,
        )  # fmt: skip


def feature_choices(of: Sizes) -> Iterator[Case]:
    """Choices by features of visual tokens."""
    rows, keep, moved = of.rows, of.keep, of.item * of.rows * of.width
    relevance, places = _relevance(of), (torch.tensor([0, rows]), torch.tensor([keep]))
    size, triangle = f"N={rows}, K={keep}, D={of.width}", 2 * rows * keep * of.width + rows * keep**2
    for data in ("clustered", "noise"):
        x = of.there(features(rows, of.width, data=data, seed=4))
        for weights in (None, relevance):
            name = "DivPrune" if weights is None else "weighted, ZOO-Prune"
            pairs = rows * rows if weights is None else rows * keep
            yield Case(
                "weighted_farthest_point", f"{size}, {name}", data, (x, weights, *places),
                lambda x=x, w=weights: plain_farthest(x, w, keep), 2 * pairs * of.width, moved,
            )  # fmt: skip
        yield Case(
            "dpp_map", size, data, (x, relevance + 0.1, *places),
            lambda x=x: plain_dpp(x, relevance + 0.1, keep), triangle, moved,
        )  # fmt: skip
        yield Case(
            "facility_location", f"{size}, SCOPE", data, (x, relevance + 0.1, *places),
            lambda x=x: plain_coverage(x, relevance + 0.1, keep), rows * rows * of.width, moved,
        )  # fmt: skip
        yield Case(
            "residual_pivots", size, data, (x, None, *places),
            lambda x=x: plain_residual(x, keep), triangle, moved,
        )  # fmt: skip


def decoder_attention(of: Sizes) -> Iterator[Case]:
    """Scores by the attention of text in the decoder."""
    q = of.there(features(of.length, of.heads, of.size, data="noise", seed=5))
    k, v = (of.there(features(of.total, of.groups, of.size, data="noise", seed=seed)) for seed in (6, 7))
    order = torch.arange(of.total - of.length, of.total, device=of.device)
    visual = torch.arange(of.before, of.before + of.rows, device=of.device)
    places, scaling = (torch.tensor([0, of.length]), torch.tensor([0, of.total]), order), of.size**-0.5

    def attention() -> Tensor:
        return plain_map(q.transpose(0, 1), k.transpose(0, 1), scaling, order)

    def magnitude() -> Tensor:
        norm = v[visual].float().norm(dim=-1).T.repeat_interleave(of.heads // of.groups, 0)  # [H, N]
        return (attention()[..., visual] * norm[:, None]).mean((0, 1)).log()

    products = 2 * of.length * of.heads * of.total * of.size
    moved = of.item * (of.length * of.heads * of.size + of.total * of.groups * of.size)
    what = f"{of.length} rows, {of.total} keys, H={of.heads}, G={of.groups}, d={of.size}"
    yield Case(
        "rank1_relevance", what, "noise", (q, k, v, *places, visual, scaling), magnitude, products,
        moved + of.item * of.rows * of.groups * of.size + 4 * of.rows,
    )  # fmt: skip
    yield Case(
        "attention_rows", what, "noise", (q, k, *places, scaling), lambda: attention().mean((0, 1)), products,
        moved + 4 * of.total,
    )  # fmt: skip


def tower_attention(of: Sizes) -> Iterator[Case]:
    """Scores by the attention in the vision tower."""
    heads, size, scaling = 16 // min(of.scale, 8), 72 // min(of.scale, 4), of.size**-0.5
    q, k = (of.there(features(heads, of.rows, size, data="noise", seed=seed))[None] for seed in (8, 9))
    yield Case(
        "received_attention", f"H={heads}, N={of.rows}, d={size}", "noise", (q, k, scaling),
        lambda: plain_map(q[0], k[0], scaling).mean((0, 1))[None], 2 * heads * of.rows * of.rows * size,
        2 * of.item * heads * of.rows * size + 4 * of.rows,
    )  # fmt: skip


def layer_changes(of: Sizes) -> Iterator[Case]:
    """Scores by what a layer changes."""
    before, after = (of.there(features(of.rows, of.width, data="noise", seed=seed)) for seed in (10, 11))

    def variation() -> tuple[Tensor, Tensor]:
        a, b = before.float(), after.float()
        return b.norm(dim=-1) / a.norm(dim=-1), 1 - torch.cosine_similarity(b, a, dim=-1)

    yield Case(
        "transition_variation", f"N={of.rows}, D={of.width}", "noise", (before, after), variation,
        6 * of.rows * of.width, 2 * of.item * of.rows * of.width + 8 * of.rows,
    )  # fmt: skip


def compaction(of: Sizes) -> Iterator[Case]:
    """The removal of columns of hidden states, of positions and of one layer's cache."""
    start, end = of.before, of.before + of.rows
    cache = [
        of.there(features(of.total, of.groups, of.size, data="noise", seed=seed)).transpose(0, 1)[None]
        for seed in (12, 13)
    ]
    hidden = of.there(features(of.total, of.width, data="noise", seed=14))[None]
    positions = torch.zeros(1, of.total, dtype=torch.long, device=of.device)
    tensors = [hidden, *(part.transpose(1, 2) for part in cache), positions]
    kept = start + torch.arange(of.keep) * of.rows // of.keep
    index = torch.cat([torch.arange(start), kept, torch.arange(end, of.total)])[None].to(of.device)
    yield Case(
        "compact", f"{of.total} to {index.shape[1]} columns, D={of.width}, one layer's cache", "noise",
        (tensors, index), lambda: [tensor[:, index[0]] for tensor in tensors], 0,
        2 * index.shape[1] * (of.item * (of.width + 2 * of.groups * of.size) + 8),
    )  # fmt: skip
