# SPDX-License-Identifier: Apache-2.0
"""Golden check of IPCV: scores, kept patches and neighbors, and whole towers under the engine's cut."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from vtprune.towers import Change
from vtprune.towers.change import change, nearest_kept
from vtprune.towers.cut import TowerCut

from .golden_files import cases, merged_close

Case = dict[str, np.ndarray]


def check(data: dict[str, np.ndarray]) -> None:
    for group, case in cases(data):
        if group == "core":
            _check_core(case)
        elif case["embeddings"].ndim == 2:
            _check_packed(case)
        else:
            _check_tiles(case)


def _check_choice(case: Case, before: Tensor, at_cut: Tensor, keep: Tensor) -> None:
    merged_close(change(before, at_cut), case["scores"].reshape(-1))
    dropped, sources = nearest_kept(at_cut, keep, torch.tensor([0, len(keep)]), int(case["neighbours_k"]))
    np.testing.assert_array_equal(dropped, (~keep).nonzero()[:, 0])
    sources = sources[:, : case["neighbours"].shape[1]]  # one that is missing is -1, at the end
    np.testing.assert_array_equal(sources.sort(1).values, case["neighbours"].reshape(len(dropped), -1))


def _check_core(case: Case) -> None:
    """Checks the selection, and the rebuild from given states."""
    before, at_cut = torch.from_numpy(case["states_before"]), torch.from_numpy(case["states_at_cut"])
    later = torch.from_numpy(case["states_later"])
    tower = _Tower([_Given(lambda x: at_cut), _Given(lambda x: later[torch.from_numpy(case["kept"])])], [len(before)])
    method = Change(keep=int(case["budget"]), block=1, neighbors=int(case["neighbours_k"]))
    out, cut = _run(tower, before, method)
    np.testing.assert_array_equal(cut._take()[0].kept[0], case["kept"])
    keep = torch.zeros(len(before), dtype=torch.bool)
    keep[torch.from_numpy(case["kept"])] = True
    _check_choice(case, before, at_cut, keep)
    merged_close(out, case["rebuilt"])


def _check_packed(case: Case) -> None:
    """Checks a whole Qwen2-VL tower; the released code selects from one pool over all pictures."""
    embeddings = torch.from_numpy(case["embeddings"])
    lengths = [int(np.prod(grid)) for grid in case["grid_thw"]]
    blocks = [_Packed(case, number) for number in range(len(case["qkv_weight"]))]
    at = int(case["prune_layer"])
    tower = _Tower(blocks, lengths, rotation=_rotation(case))
    method = Change(
        keep=int(case["budget"]), block=at, neighbors=int(case["neighbours_k"]), stabilize=int(case["stabilise_layers"])
    )
    out, cut = _run(tower, embeddings, method)
    kept = cut._take()[0].kept[0]
    np.testing.assert_array_equal(kept, case["kept"])
    keep = torch.zeros(len(embeddings), dtype=torch.bool)
    keep[kept] = True
    before, at_cut = tower.outputs[at - 2], tower.outputs[at - 1]
    merged_close(at_cut, case["states_at_cut"])
    _check_choice(case, before, at_cut, keep)
    merged_close(tower.outputs[at][kept], case["kept_after_cut_layer"])
    merged_close(out[kept], case["kept_last"])
    merged_close(out, case["rebuilt"])


def _check_tiles(case: Case) -> None:
    """Checks an InternVL tower: selection is per tile, but the released code takes neighbors from all tiles.

    Kept rows are compared with the released code's; dropped ones with its formula, given the neighbors of the data.
    """
    embeddings, at, last = torch.from_numpy(case["embeddings"]), int(case["prune_layer"]), len(case["qkv_weight"])
    states, before = embeddings, embeddings
    blocks = [_Tiles(case, number) for number in range(last)]
    with torch.no_grad():
        for block in blocks[:at]:
            before, states = states, block(states)
    merged_close(states, case["states_at_cut"])
    patches, flat = states[:, 1:], states.flatten(0, 1)
    tiles, count = patches.shape[:2]
    merged_close(change(before[:, 1:].flatten(0, 1), patches.flatten(0, 1)), case["scores"].reshape(-1))
    scores = torch.from_numpy(case["scores"])
    budget = int(case["budget"]) - 1
    top = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :budget].sort(1).values
    kept = torch.cat([torch.zeros(tiles, 1, dtype=torch.int64), top + 1], 1)
    np.testing.assert_array_equal(kept, case["kept"])
    # In the released code, class tokens are among the kept patches that neighbors are taken from.
    keep = torch.zeros(tiles, count + 1, dtype=torch.bool).scatter_(1, kept, True).flatten()
    dropped, sources = nearest_kept(flat, keep, torch.tensor([0, len(flat)]), int(case["neighbours_k"]))
    np.testing.assert_array_equal(sources.sort(1).values, case["neighbours"].reshape(len(dropped), -1))

    def rebuilt(now: Tensor) -> Tensor:
        now = now.flatten(0, 1).clone()
        now[dropped] = flat[dropped] + (now[sources] - flat[sources]).mean(1)
        return now.reshape(states.shape)

    with torch.no_grad():
        full = states
        for number, block in enumerate(blocks[at:]):
            rows = torch.arange(tiles)[:, None]
            if number < int(case["stabilise_layers"]):
                out = block(full)
            else:
                out = full.clone()
                out[rows, kept] = block(full[rows, kept])
            full = rebuilt(out)
    merged_close(full[torch.arange(tiles)[:, None], kept], case["kept_last"])
    merged_close(full, case["rebuilt"])


class _Given(nn.Module):
    """A block that returns given states."""

    def __init__(self, function) -> None:
        super().__init__()
        self.attn, self.function = nn.Identity(), function

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Tensor) -> Tensor:
        return self.function(hidden_states)


class _Packed(nn.Module):
    """A Qwen2-VL block on a packed sequence."""

    def __init__(self, case: Case, number: int) -> None:
        super().__init__()
        names = ("norm1", "norm2", "qkv", "proj", "fc1", "fc2")
        self.weights = {n: [torch.from_numpy(case[f"{n}_{p}"][number]) for p in ("weight", "bias")] for n in names}
        self.heads, self.attn = int(case["num_heads"]), nn.Identity()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *self.weights[name])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], *self.weights[name], 1e-6)

    def _attend(self, x: Tensor, cu_seqlens: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self._linear("qkv", x).reshape(len(x), 3, self.heads, -1).unbind(1)
        turn = torch.cat([angles, angles], -1)[:, None]
        q, k = (t * turn.cos() + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * turn.sin() for t in (q, k))
        out = torch.empty_like(q)
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            a, b, c = (t[start:end].transpose(0, 1) for t in (q, k, v))
            out[start:end] = nn.functional.scaled_dot_product_attention(a, b, c).transpose(0, 1)
        return self._linear("proj", out.flatten(1))

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Tensor) -> Tensor:
        x = hidden_states + self._attend(self._norm("norm1", hidden_states), cu_seqlens, position_embeddings)
        inner = self._linear("fc1", self._norm("norm2", x))
        return x + self._linear("fc2", inner * torch.sigmoid(1.702 * inner))


class _Tiles(_Packed):
    """An InternVL block on a batch of tiles."""

    def __init__(self, case: Case, number: int) -> None:
        super().__init__(case, number)
        self.scales = [torch.from_numpy(case[f"layer_scale{i}"][number]) for i in (1, 2)]

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        batch, length, width = hidden_states.shape
        qkv = self._linear("qkv", self._norm("norm1", hidden_states))
        q, k, v = qkv.reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = hidden_states + self.scales[0] * self._linear("proj", out)
        return x + self.scales[1] * self._linear("fc2", nn.functional.gelu(self._linear("fc1", self._norm("norm2", x))))


def _rotation(case: Case) -> Tensor:
    """Row and column angles `[N, dh / 2]`, in the order of the 2 x 2 merge groups."""
    width = case["embeddings"].shape[1] // int(case["num_heads"])
    frequency = 1 / 10000 ** (torch.arange(0, width // 2, 2).float() / (width // 2))
    angles = []
    for t, h, w in case["grid_thw"].tolist():
        row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        row, col = (x.reshape(h // 2, 2, w // 2, 2).transpose(1, 2).flatten().repeat(t) for x in (row, col))
        angles.append(torch.cat([row[:, None] * frequency, col[:, None] * frequency], 1))
    return torch.cat(angles)


class _Tower(nn.Module):
    """Blocks over one packed sequence of a single picture; attention stays within segments of `lengths`."""

    def __init__(self, blocks: list[nn.Module], lengths: list[int], rotation: Tensor | None = None) -> None:
        super().__init__()
        self.blocks, self.lengths, self.rotation = nn.ModuleList(blocks), lengths, rotation
        self.outputs: list[Tensor] = []

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        offsets = torch.tensor([0, *self.lengths]).cumsum(0)
        for block in self.blocks:
            hidden_states = block(hidden_states, cu_seqlens=offsets, position_embeddings=self.rotation)
            self.outputs.append(hidden_states)
        return hidden_states


@torch.no_grad()
def _run(tower: _Tower, states: Tensor, method: Change) -> tuple[Tensor, TowerCut]:
    """The tower's output under the engine's cut."""
    anatomy = SimpleNamespace(vision_tower=tower, config=SimpleNamespace(), decoder=nn.Identity(), composite=tower)
    cut = TowerCut(anatomy, method, lambda: True)  # type: ignore[arg-type]
    handles = cut.attach(lambda function: function)
    try:
        return tower(states, torch.tensor([[1, 1, len(states)]])), cut
    finally:
        for handle in handles:
            handle.remove()
