# SPDX-License-Identifier: Apache-2.0
"""Methods that prune before the decoder, on hand-made tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vtprune import methods
from vtprune.core.budget import check_schedule, mean_share
from vtprune.methods import Tokens
from vtprune.methods.pooling import cells, centers
from vtprune.methods.prumerge import grid_places, merge, outlier_ratio
from vtprune.methods.vflowopt.grid_recycling import grid_cells, mark_exactly, recycle
from vtprune.methods.vflowopt.importance_map import selected_rows
from vtprune.methods.visionzip import assign, contextual_targets
from vtprune.methods.visionzip import merge as contextual
from vtprune.methods.vispruner import remove_duplicates, select
from vtprune.methods.zoo_prune import sensitivity
from vtprune.vision.crops import by_crop, share


def tokens_of(grids: list[tuple[int, int]], budgets: list[int], newlines: bool = False, seed: int = 0) -> Tokens:
    """One image of `rows x columns` for every sample; the same grid has the same random states everywhere."""
    row, col, states, counts = [], [], [], []
    for height, width in grids:
        r, c = torch.meshgrid(torch.arange(height), torch.arange(width + newlines), indexing="ij")
        line_end = (c == width).flatten()
        row.append(torch.where(line_end, -1, r.flatten()))
        col.append(torch.where(line_end, -1, c.flatten()))
        counts.append(len(line_end))
        states.append(torch.randn(len(line_end), 8, generator=torch.Generator().manual_seed(seed + height * width)))
        states[-1][line_end] = 0.5
    sizes = torch.tensor(counts)
    sample = torch.repeat_interleave(torch.arange(len(grids)), sizes)
    index = torch.cat([torch.arange(n) for n in counts])
    zeros = torch.zeros_like(sample)
    return Tokens(
        hidden=torch.cat(states),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        budgets=torch.tensor(budgets),
        originals=sizes,
        sample=sample,
        image=sample,
        frame=zeros,
        crop=zeros,
        grid_row=torch.cat(row),
        grid_col=torch.cat(col),
        index=index,
        feature=torch.arange(len(sample)),
        position=index + 3,
        layer=0,
        stage=0,
        num_layers=4,
    )


GRIDS = [(4, 6), (5, 5), (1, 7), (3, 3)]


@pytest.mark.parametrize(
    "method", [methods.DivPrune(), methods.Pooling(), methods.Scope(alpha=0), methods.ResPrune()], ids=repr
)
@pytest.mark.parametrize("newlines", [False, True])
def test_batch_equals_its_samples_and_meets_the_budget(method: methods.Method, newlines: bool) -> None:
    for budgets in ([5, 3, 2, 1], [24, 1, 7, 8]):
        together = method.choose(tokens_of(GRIDS, budgets, newlines))
        begin = 0
        for grid, budget in zip(GRIDS, budgets, strict=True):
            one = tokens_of([grid], [budget], newlines)
            alone, here = method.choose(one), slice(begin, begin + len(one))
            begin += len(one)
            assert int(alone.keep.sum()) == budget
            assert torch.equal(alone.keep, together.keep[here])
            if alone.hidden is not None:
                torch.testing.assert_close(alone.hidden[alone.keep], together.hidden[here][alone.keep])


def test_equal_tokens_are_kept_from_the_left() -> None:
    tokens = tokens_of([(3, 4), (2, 2)], [5, 2])
    tokens.hidden = torch.ones_like(tokens.hidden)
    keep = methods.DivPrune().choose(tokens).keep
    assert keep.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 12, 13]
    order = torch.arange(9)
    first, second = select(torch.ones(9, 4), torch.ones(9), 5, 2)
    assert first.tolist() == [0, 1] and len(set(second.tolist()) | {0, 1}) == 5
    assert mark_exactly(torch.ones(9), torch.full((9,), -1), 4).tolist() == [False] * 4 + [True] * 5
    assert remove_duplicates(torch.ones(9, 4), order, 9).tolist() == order.tolist()


def test_share_is_exact_and_never_more_than_there_is() -> None:
    assert share(10, [8, 8, 8], [1, 1, 1]) == [4, 3, 3]
    assert share(10, [2, 8, 8], [1, 1, 1]) == [2, 4, 4]
    assert share(9, [8, 8, 4], [2, 1, 0]) == [6, 3, 0]
    assert share(18, [8, 8, 4], [2, 1, 0]) == [8, 8, 2]
    assert share(0, [3, 3], [1, 1]) == [0, 0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(1, 9, (5,), generator=generator).tolist()
        weights = torch.randint(0, 4, (5,), generator=generator).tolist()
        total = int(torch.randint(0, sum(sizes) + 1, (1,), generator=generator))
        out = share(total, sizes, weights)
        assert sum(out) == total and all(0 <= n <= size for n, size in zip(out, sizes, strict=True))


def test_newlines_get_what_the_crops_leave_over() -> None:
    tokens = tokens_of([(3, 4)], [13], newlines=True)
    crops = by_crop(tokens)
    assert crops.budgets.tolist() == [12, 1] and crops.placed.tolist() == [True, False]
    assert crops.rows[-3:].tolist() == [4, 9, 14]
    tokens.budgets[:] = 6
    assert by_crop(tokens).budgets.tolist() == [6, 0]
    assert by_crop(tokens, keep_newlines=True).budgets.tolist() == [3, 3]
    tokens.budgets[:] = 5  # three newlines would be more than half
    assert by_crop(tokens, keep_newlines=True).budgets.tolist() == [5, 0]


def test_unpadded_tile_keeps_the_share_of_a_full_one() -> None:
    tokens = tokens_of([(4, 5)], [9])
    crop = torch.tensor([0] * 8 + [1] * 8 + [2] * 4)
    assert by_crop(tokens, crop).budgets.tolist() == [3, 3, 3]
    tokens.budgets[:] = 15
    assert by_crop(tokens, crop).budgets.tolist() == [6, 5, 4]


def projector(act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), act or nn.GELU(), nn.Linear(20, 9)).double().requires_grad_(False)


def test_closed_form_is_the_mean_square_over_all_directions() -> None:
    module, x = projector(), torch.randn(7, 12, dtype=torch.float64)
    basis = torch.eye(12, dtype=torch.float64)
    # Over an orthonormal basis the mean of |J u|^2 is exactly |J|^2 / d.
    squares = [torch.func.jvp(module, (x,), (u.expand_as(x).contiguous(),))[1].square().sum(1) for u in basis]
    quadratic = sensitivity.quadratic_form(module[0].weight, module[2].weight)
    found = sensitivity.exact_sensitivity(x, module[0].weight, module[0].bias, module[1], quadratic)
    torch.testing.assert_close(found, torch.stack(squares).mean(0).sqrt())


def test_difference_tends_to_the_derivative() -> None:
    module, x = projector(), torch.randn(7, 12, dtype=torch.float64)
    u = sensitivity.unit_directions(torch.randn(5, 12, dtype=torch.float64))
    exact = sensitivity.jvp_sensitivity(module, x, u)
    near = sensitivity.difference_sensitivity(module, x, u, 1e-4)
    far = sensitivity.difference_sensitivity(module, x, u, 1.0)
    torch.testing.assert_close(near, exact, rtol=1e-7, atol=0)
    assert (far - exact).abs().max() > 1e-3


def test_two_linears_are_told_from_other_projectors() -> None:
    find = sensitivity.TwoLinears.of
    linears = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)
    assert find(projector()) is not None
    behind = find(nn.Sequential(nn.LayerNorm(4), *linears))
    assert behind is not None and behind.norm is not None
    assert find(nn.Sequential(nn.Linear(4, 4), *linears)) is None
    assert find(nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4))) is None
    assert find(nn.Linear(4, 4)) is None


class Merger(nn.Module):
    """A norm over every patch or over all patches of a token, then two linear layers."""

    def __init__(self, norm: nn.Module, width: int, patches: int) -> None:
        super().__init__()
        self.norm, self.width, self.patches = norm, width, patches
        self.first, self.act = nn.Linear(width * patches, 10), nn.GELU()
        self.second = nn.Linear(10, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.width * self.patches
        x = self.norm(x).view(-1, wide) if self.norm.weight.numel() == self.width else self.norm(x.reshape(-1, wide))
        return self.second(self.act(self.first(x)))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("over", [6, 24])  # of a patch; of the four patches of a token
def test_exact_sensitivity_behind_a_norm_is_that_of_finite_differences(kind: Any, over: int) -> None:
    torch.manual_seed(0)
    merger = Merger(kind(over, eps=0.3), 6, 4)  # an eps large enough to matter
    with torch.no_grad():
        for parameter in merger.parameters():
            parameter.normal_(0.2, 0.7)
    x = torch.randn(5, 4, 6) * torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0])[:, None, None] + 0.4
    with torch.no_grad():
        found = sensitivity.ClosedForms()(merger, x, merger(x.reshape(-1, 6)))
    assert found is not None
    exact, step, total = merger.double(), 1e-5, torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        for direction in torch.eye(24, dtype=torch.float64).view(24, 4, 6):  # same mean as over the sphere
            ends = [exact((x.double() + sign * step * direction).reshape(-1, 6)) for sign in (1, -1)]
            total += ((ends[0] - ends[1]) / (2 * step)).square().sum(1)
    torch.testing.assert_close(found.double(), (total / 24).sqrt(), rtol=1e-4, atol=1e-6)


def test_removing_doubles_meets_any_count() -> None:
    features = torch.randn(13, 5, generator=torch.Generator().manual_seed(1))
    for count in range(14):
        left = remove_duplicates(features, torch.arange(13), count, step=3)
        assert len(set(left.tolist())) == count
    doubled = torch.cat([features, features])[torch.arange(26).view(2, 13).T.flatten()]  # a, a, b, b, ...
    assert sorted(i // 2 for i in remove_duplicates(doubled, torch.arange(26), 13, step=13).tolist()) == list(range(13))


def test_of_equal_doubles_the_first_is_removed() -> None:
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        features = torch.randn(4, 33, generator=draw)[torch.arange(40) // 2 % 4]
        assert remove_duplicates(features, torch.arange(40), 32).tolist() == [*range(16, 40, 2), *range(1, 40, 2)]


def test_contextual_tokens_are_sums_or_averages() -> None:
    assert contextual_targets(11, 4).tolist() == [0, 2, 4, 6]
    features, targets, belongs = torch.eye(4), torch.tensor([0, 2]), torch.tensor([0, 0, 1, 0])
    expected = torch.tensor([[1, 0.5, 0, 0.5], [0, 0, 1, 0]])
    torch.testing.assert_close(contextual(features, targets, belongs), expected)
    expected = torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3], [0, 0, 1, 0]])
    torch.testing.assert_close(contextual(features, targets, belongs, average=True), expected)


def test_a_patch_joins_the_first_of_equal_targets() -> None:
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        kinds = torch.randint(0, 3, (7,), generator=draw)
        metric = torch.randn(3, 33, generator=draw)[kinds].repeat(4, 1)
        metric[7:] += 0.01 * torch.randn(21, 33, generator=draw)
        first = [kinds.tolist().index(kind) for kind in kinds.tolist() * 3]
        assert assign(metric, torch.arange(7)).tolist() == [*range(7), *first]


def test_prumerge_survives_images_without_outliers() -> None:
    assert outlier_ratio(torch.ones(30)) == 0.0
    assert outlier_ratio(torch.cat([torch.rand(30), torch.tensor([50.0])])) == 1 / 31
    assert grid_places(10, 0.0).tolist() == list(range(9))
    assert grid_places(10, 0.4).tolist() == list(range(9))
    assert grid_places(10, 0.1).tolist() == [0, 3, 6]


def test_prumerge_average_divides_by_the_weights() -> None:
    features, attention = torch.randn(6, 3), torch.rand(6)
    kept, near = torch.tensor([4, 1]), torch.tensor([[0, 1], [2, 3]])
    summed, mean = (merge(features, attention, kept, near, average) for average in (False, True))
    torch.testing.assert_close(summed[0], features[4] + attention[0] * features[0] + attention[1] * features[1])
    torch.testing.assert_close(mean[0], summed[0] / (1 + attention[0] + attention[1]))
    torch.testing.assert_close(mean[2], summed[2] / attention[[0, 2, 3, 5]].sum())


def test_marking_leaves_exactly_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, side in ((30, 2.0), (64, 3.5), (50, 50.0)):
        importance = torch.rand(n, generator=generator)
        row, col = torch.arange(n) // 8, torch.arange(n) % 8
        row[::9] = -1  # newlines
        cell = grid_cells(row, col, torch.zeros_like(row), side)
        for keep in range(int(cell.max()) + 1, n):
            marked = mark_exactly(importance, cell, keep)
            kept, merged, group, best = recycle(torch.randn(n, 4), importance, cell, marked)
            assert int(kept.sum()) == keep
            assert importance[marked].max() <= importance[~marked].min() if (~marked).any() else True
            assert torch.equal(kept, ~marked | torch.isin(torch.arange(n), best))


def test_no_row_above_the_threshold_means_all_rows() -> None:
    received, part = torch.tensor([0.2, 0.3, 0.5, 0.1, 0.1, 0.9]), torch.tensor([0, 0, 0, 1, 1, -1])
    assert selected_rows(received, part, 1.4).tolist() == [False, False, True, True, True, False]
    assert selected_rows(received, part, 0.95).tolist() == [False, False, True, True, True, False]
    assert selected_rows(received, part, 2.0).tolist() == [True, True, True, True, True, False]


@pytest.mark.parametrize(("preset", "mean"), [(0.5, 0.501), (0.25, 0.251), (0.1, 0.100)])
def test_released_strategies_keep_what_they_say(preset: float, mean: float) -> None:
    stages = methods.VFlowOpt(preset=preset).schedule(28)
    assert [stage.layer for stage in stages] == [0, 9, 18]
    assert mean_share(stages, [stage.share for stage in stages], 28) == pytest.approx(mean, abs=5e-4)
    for layers in range(1, 7):
        check_schedule(methods.VFlowOpt(preset=preset).schedule(layers), layers, "vflowopt")


def test_pooling_of_a_whole_factor_is_average_pooling() -> None:
    tokens = tokens_of([(6, 8)], [12])
    choice = methods.Pooling().choose(tokens)
    expected = nn.functional.avg_pool2d(tokens.hidden.T.reshape(1, 8, 6, 8), 2).flatten(2)[0].T
    torch.testing.assert_close(choice.hidden[choice.keep].sort(0).values, expected.sort(0).values)


def test_every_count_cuts_the_grid_into_that_many_cells() -> None:
    for height, width in ((5, 7), (1, 9), (9, 1), (4, 4), (39, 3)):
        row, col = torch.arange(height * width) // width, torch.arange(height * width) % width
        for count in range(1, height * width + 1):
            cell = cells(row, col, count)
            sizes = torch.bincount(cell, minlength=count)
            assert len(sizes) == count and sizes.min() >= 1
            middles = centers(row, col, cell)
            assert torch.equal(cell[middles], torch.arange(count))
