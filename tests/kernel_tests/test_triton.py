# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the specifications: on a GPU if present, else in Triton's interpreter.

The interpreter is slow, so the shapes are small and odd. Outputs are initialized with NaN to reveal unwritten values.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_tests.cases import assert_order, clustered, exact_rows, offsets_of, strided

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}  # inputs are exact: only sums are rounded


def pair(operation):
    """The Triton operation, run on the device with results on the CPU, and its specification."""
    run, naive = (
        getattr(importlib.import_module(f"vtprune_kernels.{operation}.{part}"), operation)
        for part in ("triton", "naive")
    )

    def there(value):
        if isinstance(value, list):
            return [there(item) for item in value]
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    def back(value):
        return [item.cpu() for item in value] if isinstance(value, (list, tuple)) else value.cpu()

    def call(*arguments, **options):
        return back(run(*map(there, arguments), **{name: there(value) for name, value in options.items()}))

    return call, naive


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Initializes new tensors with NaN, or with an invalid index."""

    def fill(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 101)

    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


@pytest.fixture(params=[None, 14_000, 0], ids=["matrix", "matrix in parts", "no matrix"])
def memory(request, monkeypatch):
    """Byte limit of the matrix of all pairs: enough for all groups of a test, for some of them, or for none."""
    if request.param is not None:
        monkeypatch.setattr(importlib.import_module("vtprune_kernels._triton_pairs"), "MATRIX_BYTES", request.param)
        window = importlib.import_module("vtprune_kernels._triton_window")  # a small window, searched in parts
        monkeypatch.setattr(window, "WINDOW_BYTES", 20_000)
        monkeypatch.setattr(window, "_SCAN", 64)


every_path_and_dtype = pytest.mark.parametrize(
    "memory, dtype",
    [(None, dtype) for dtype in DTYPES] + [(14_000, torch.float32), (0, torch.float16), (0, torch.bfloat16)],
    ids=[
        "matrix, float32",
        "matrix, float16",
        "matrix, bfloat16",
        "matrix in parts",
        "no matrix, float16",
        "no matrix, bfloat16",
    ],
    indirect=["memory"],
)


def mmr_case(lengths, groups, size, dtype, seed=0):
    rows = sum(lengths)
    relevance = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    keys = (clustered(rows, groups, size, seed=seed + 1) * 0.7).to(dtype)
    values = clustered(rows, groups, size - 4, seed=seed + 2).to(dtype)
    return relevance, keys, values, offsets_of(lengths)


@pytest.mark.parametrize("lengths, counts", [((1,), [1]), ((5, 0, 41, 1, 9), [2, 0, 13, 1, 9])], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"pool": 1}, {"objective": "log", "chunk": 3}, {"chunk": 1, "scaling": 0.1}], ids=str
)
def test_progressive_mmr(lengths, counts, options, memory):
    run, naive = pair("progressive_mmr")
    relevance, keys, values, offsets = mmr_case(lengths, 2, 20, torch.float32)
    budgets = torch.tensor(counts)
    expected = naive(relevance, keys, values, offsets, budgets, **options)
    assert_order(run(relevance, keys, values, offsets, budgets, **options), expected, offsets, budgets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_progressive_mmr_with_strides(dtype, memory):
    run, naive = pair("progressive_mmr")
    relevance, keys, values, offsets = mmr_case((23, 12), 3, 17, dtype, seed=4)
    budgets = torch.tensor([9, 4])
    expected = naive(relevance, keys, values, offsets, budgets, growth=1.0)
    order = run(strided(relevance), strided(keys), strided(values), offsets, budgets, growth=1.0)
    assert_order(order, expected, offsets, budgets)


def test_progressive_mmr_breaks_ties_by_row(memory):
    run, naive = pair("progressive_mmr")
    rows, offsets, budgets = torch.eye(16)[:5].repeat(3, 1)[:, None], torch.tensor([0, 15]), torch.tensor([9])
    for relevance in (torch.tensor([0.5, 0.25, -0.0]).repeat(5), torch.tensor([0.0, -0.0]).repeat(8)[:15]):
        expected = naive(relevance, rows, rows, offsets, budgets, growth=1.0)
        assert_order(run(relevance, rows, rows, offsets, budgets, growth=1.0), expected, offsets, budgets)


def attention_case(dtype, heads, groups, size):
    keys, rows = (9, 70, 1), (3, 5, 1)
    g = torch.Generator().manual_seed(heads)
    q = (torch.randn(sum(rows), heads, size, generator=g) * 2).to(dtype)
    k, v = (torch.randn(sum(keys), groups, size + extra, generator=g).to(dtype) for extra in (0, 3))
    order = torch.cat([torch.arange(n - r, n) for n, r in zip(keys, rows, strict=True)])
    starts = offsets_of(keys)
    visual = torch.cat([torch.arange(2, 6), torch.arange(11, 74), torch.tensor([79])])
    return q, k, v, offsets_of(rows), starts, order, visual, size**-0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, groups, size", [(4, 4, 16), (6, 2, 60), (3, 1, 80), (2, 1, 130)])
def test_attention_rows(dtype, heads, groups, size):
    run, naive = pair("attention_rows")
    q, k, _, query_offsets, key_offsets, order, _, scaling = attention_case(dtype, heads, groups, size)
    weights = torch.tensor([0.0, 1, 0.5, 1, 0, 2, 1, 1, 0])
    for settings in ((None, "mean"), (5.0, "mean", weights), (5.0, "none")):
        inputs = (query_offsets, key_offsets, order, scaling, *settings)
        found = run(strided(q), strided(k), *inputs)
        torch.testing.assert_close(found, naive(q, k, *inputs), atol=TOLERANCE[dtype], rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, groups, size", [(4, 4, 16), (6, 2, 60), (3, 1, 80)])
def test_rank1_relevance(dtype, heads, groups, size):
    run, naive = pair("rank1_relevance")
    q, k, v, *rest = attention_case(dtype, heads, groups, size)
    for settings in (("mean", "visible"), ("rms", "visual"), ("max", "visible", 5.0)):
        found = run(strided(q), strided(k), strided(v), *rest, *settings)
        torch.testing.assert_close(found, naive(q, k, v, *rest, *settings), atol=1e-4, rtol=1e-5)


def test_rank1_relevance_of_keys_that_no_row_sees():
    run, naive = pair("rank1_relevance")
    q, k, v, query_offsets, key_offsets, order, visual, scaling = attention_case(torch.float32, 2, 1, 16)
    order[:3] = 0
    inputs = (q * 300, k, v, query_offsets, key_offsets, order, visual, scaling)
    for normalize in ("visible", "visual"):
        torch.testing.assert_close(
            run(*inputs, "mean", normalize), naive(*inputs, "mean", normalize), atol=1e-3, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_received_attention(dtype):
    run, naive = pair("received_attention")
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 4, 37, 20, generator=g).to(dtype), torch.randn(2, 2, 37, 20, generator=g).to(dtype)
    some = torch.rand(2, 37, generator=g) < 0.4
    some[1, 12:] = False
    for rows, offsets in ((None, None), (some, torch.tensor([0, 12, 12, 37])), (some[0], None)):
        found = run(q, k, 0.3, rows, offsets)
        torch.testing.assert_close(found, naive(q, k, 0.3, rows, offsets), atol=TOLERANCE[dtype], rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 60), (2, 3, 80), (1, 1), (0, 4)])
def test_transition_variation(dtype, shape):
    run, naive = pair("transition_variation")
    before, after = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = run(strided(before), strided(after)) if shape[0] else run(before, after)
    torch.testing.assert_close(found, list(naive(before, after)), atol=1e-5, rtol=1e-5)


def test_copies_tie_and_other_rows_do_not(memory):
    run, naive = pair("facility_location")
    features = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.75**0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0.500003, 0.866024]])
    offsets, budgets = torch.tensor([0, 4]), torch.tensor([2])
    for weights in (None, torch.ones(4)):
        assert run(features, weights, offsets, budgets).tolist() == [[2, 0]]
    noise = 3e-7 * torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    features = clustered(20, 60, seed=1).repeat(2, 1) * (1 + noise)
    weights = torch.rand(20, generator=torch.Generator().manual_seed(2)).repeat(2) * (1 + noise[:, 0])
    offsets, budgets = torch.tensor([0, 40]), torch.tensor([12])
    for weight in (None, weights):
        order = run(features, weight, offsets, budgets)
        assert int(order.max()) < 20
        assert_order(order, naive(features, weight, offsets, budgets), offsets, budgets)


@every_path_and_dtype
@pytest.mark.parametrize("lengths, counts", [((1,), [1]), ((5, 0, 41, 1, 9), [5, 0, 13, 1, 1])], ids=str)
def test_choices_of_diverse_rows(dtype, lengths, counts, memory):
    rows = sum(lengths)
    features = clustered(rows, 60, seed=1).to(dtype)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(2)) + 0.1
    offsets, budgets = offsets_of(lengths), torch.tensor(counts)
    plain = [(name, None, {}) for name in ("weighted_farthest_point", "facility_location", "residual_pivots")]
    weighted = [(name, weights, {}) for name in ("dpp_map", *(name for name, _, _ in plain))]
    for name, weight, options in (*plain, *weighted, ("facility_location", weights, {"combine": "sum"})):
        run, naive = pair(name)
        order = run(strided(features), None if weight is None else strided(weight), offsets, budgets, **options)
        assert_order(order, naive(features, weight, offsets, budgets, **options), offsets, budgets)


def test_more_picks_than_dimensions(memory):
    features, offsets, counts = (
        torch.randn(50, 12, generator=torch.Generator().manual_seed(3)),
        offsets_of((30, 20)),
        [16, 20],
    )
    weights = torch.rand(50, generator=torch.Generator().manual_seed(2)) + 0.1
    for operation in ("dpp_map", "residual_pivots"):
        run, naive = pair(operation)
        order = run(features, weights, offsets, torch.tensor(counts))
        assert torch.equal(order, naive(features, weights, offsets, torch.tensor(counts)))


def test_choices_survive_ties_zeros_and_broken_numbers(memory):
    rows, offsets, budgets = exact_rows(6, 32, seed=5).repeat(3, 1), torch.tensor([0, 18]), torch.tensor([12])
    run, naive = pair("weighted_farthest_point")
    for weights in (None, torch.tensor([1.0, 0.5, 0.5]).repeat(6)):
        assert_order(run(rows, weights, offsets, budgets), naive(rows, weights, offsets, budgets), offsets, budgets)
    run, naive = pair("facility_location")
    for weights in (None, torch.tensor([1.0, 0.5, 0.5]).repeat(6), torch.zeros(18)):
        assert_order(run(rows, weights, offsets, budgets), naive(rows, weights, offsets, budgets), offsets, budgets)
    run, naive = pair("weighted_farthest_point")
    rows[3:5], rows[7] = 0, torch.nan
    weights, everything = torch.rand(18, generator=torch.Generator().manual_seed(1)), torch.tensor([18])
    orders = [run(rows, weight, offsets, everything) for weight in (None, weights, weights * torch.nan)]
    for operation in ("dpp_map", "facility_location", "residual_pivots"):
        run, naive = pair(operation)
        orders.append(run(rows, weights, offsets, everything))
    for order in orders:
        assert order[0].sort().values.tolist() == list(range(18))
    run, naive = pair("dpp_map")
    rows, relevance = torch.eye(8).repeat(3, 1), torch.arange(24, 0, -1) / 24.0  # rank 8: the rest by relevance
    assert run(rows, relevance, torch.tensor([0, 24]), torch.tensor([24]))[0].tolist() == list(range(24))


@pytest.mark.parametrize("dtype, max_length", [(torch.float32, None), (torch.bfloat16, 160)], ids=str)
@pytest.mark.parametrize(  # the matrix is updated every 32 picks, a window every 8
    "memory, picks", [(None, 34), (0, 18)], ids=["matrix", "no matrix"], indirect=["memory"]
)
def test_choices_over_several_tiles_and_blocks_of_picks(dtype, max_length, memory, picks):
    lengths, counts = (130, 3, 2), torch.tensor([picks, 0, 1])
    features, offsets = clustered(135, 64, seed=1).to(dtype), offsets_of(lengths)
    weights = torch.rand(135, generator=torch.Generator().manual_seed(2)) + 0.1
    keys, values = (clustered(135, 2, 20, seed=seed).to(dtype) for seed in (3, 4))
    for operation, *inputs in (
        ("weighted_farthest_point", features, None),
        ("dpp_map", features, weights),
        ("facility_location", features, weights),
        ("residual_pivots", features, weights),
        ("progressive_mmr", weights, keys, values),
    ):
        run, naive = pair(operation)
        order = run(*inputs, offsets, counts, max_length=max_length)
        assert_order(order, naive(*inputs, offsets, counts), offsets, counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosines_of_all_pairs_and_the_nearest_other_row(dtype):
    module = importlib.import_module("vtprune_kernels._triton_pairs")
    features, offsets = clustered(150, 40, seed=1).to(dtype), offsets_of((3, 141, 6))
    factor = 1 / features.float().norm(dim=1)
    matrix, nearest = torch.full((2, 141, 141), torch.nan), torch.full((150,), torch.inf)
    there = [tensor.to(DEVICE) for tensor in (features, factor, offsets, matrix, nearest)]
    module.pairs(*there[:3], 141, 1, 2, *there[3:])
    matrix, nearest = there[3].cpu(), there[4].cpu()
    for number, (start, stop) in enumerate([(3, 144), (144, 150)]):
        unit, length = features[start:stop].float() * factor[start:stop, None], stop - start
        cosine = unit @ unit.T
        torch.testing.assert_close(matrix[number, :length, :length], cosine, atol=2e-6, rtol=0)
        assert matrix[number, length:].isnan().all() and matrix[number, :, length:].isnan().all()
        other = 1 - cosine.fill_diagonal_(-torch.inf).amax(1)
        torch.testing.assert_close(nearest[start:stop], other, atol=2e-6, rtol=0)
    assert (nearest[:3] == torch.inf).all()


@pytest.mark.parametrize("dtype, bias", [(torch.float32, 600.0), (torch.float16, 1.0), (torch.bfloat16, 1.0)], ids=str)
def test_similarities_of_all_pairs(dtype, bias):
    """A bias shared by all keys, which dominates their products, changes no distance."""
    module = importlib.import_module("vtprune_kernels.progressive_mmr.triton_similarity")
    similarity = importlib.import_module("vtprune_kernels.progressive_mmr.naive").similarity
    keys = ((clustered(150, 2, 20, seed=1) * 0.7) + bias).to(dtype)
    values = clustered(150, 2, 200, seed=2).to(dtype)
    offsets, matrix = offsets_of((3, 141, 6)), torch.full((2, 141, 141), torch.nan)
    matrix = matrix.to(DEVICE)
    updates = module.Updates(keys.to(DEVICE), values.to(DEVICE), None)
    updates.matrix(offsets.to(DEVICE), 1, matrix)
    for number, (start, stop) in enumerate([(3, 144), (144, 150)]):
        found = matrix[number].cpu()
        expected = torch.stack([similarity(keys[start:stop], values[start:stop], one) for one in range(stop - start)])
        torch.testing.assert_close(found[: stop - start, : stop - start], expected, atol=5e-6, rtol=0)
        assert found[stop - start :].isnan().all() and found[:, stop - start :].isnan().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the launches of the interpreter")
@pytest.mark.parametrize("operation, most", [("weighted_farthest_point", 3), ("progressive_mmr", 3), ("dpp_map", 5)])
def test_a_choice_takes_few_launches(operation, most, monkeypatch):
    """The number of launches does not depend on the budget (the DPP updates its matrix every 32 picks)."""
    from triton.runtime import interpreter

    launches, call = [], interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *a, **k: launches.append(self.fn.__name__) or call(self, *a, **k),
    )
    run, _ = pair(operation)
    features, weights = clustered(60, 64, seed=1), torch.rand(60, generator=torch.Generator().manual_seed(2)) + 0.1
    inputs = (weights, features[:, None], features[:, None]) if operation == "progressive_mmr" else (features, weights)
    run(*inputs, torch.tensor([0, 60]), torch.tensor([50]))
    assert len(launches) == most, launches


@pytest.mark.parametrize("operation", ["weighted_farthest_point", "dpp_map"])
def test_a_window_is_made_anew_only_after_a_pick_outside(operation, monkeypatch):
    module = importlib.import_module("vtprune_kernels._triton_window")
    renew, made = module.Window.renew, []

    def watched(window, values, step, cholesky=None):
        renew(window, values, step, cholesky)
        if step % module.EVERY == 0:
            made.append(int(window.fresh.sum()))

    monkeypatch.setattr(module.Window, "renew", watched)
    monkeypatch.setattr(importlib.import_module("vtprune_kernels._triton_pairs"), "MATRIX_BYTES", 0)
    run, _ = pair(operation)
    features, weights = clustered(60, 64, seed=1), torch.rand(60, generator=torch.Generator().manual_seed(2)) + 0.1
    for rows, expected in ((60, [1, 0, 0]), (1, [1, 1, 1])):
        made.clear()
        monkeypatch.setattr(module, "WINDOW_BYTES", 4 * 60 * rows)
        run(features, weights, torch.tensor([0, 60]), torch.tensor([26]))
        assert made == expected


def test_progressive_mmr_chooses_among_the_candidates_only(memory):
    """Of two rows tied for the last of twelve candidate places, only the smaller index can be selected."""
    run, naive = pair("progressive_mmr")
    directions = torch.eye(16)
    rows = torch.cat([directions[:2], directions[2].expand(5, -1), directions[3:5], directions[2].expand(6, -1)])[
        :, None
    ]
    relevance = torch.tensor([5.0, 4.0, *[1.0] * 5, 0.9, 0.9, *[1.0] * 6])
    inputs = (relevance, rows, rows, torch.tensor([0, 15]), torch.tensor([5]))
    for max_length in (None, 40):
        order = run(*inputs, duplication=1.0, growth=1.5, max_length=max_length)
        assert order.tolist() == [[0, 1, 2, 7, 3]]  # not row 8, which is worth more than another copy of row 2
    assert naive(*inputs, duplication=1.0, growth=1.5).tolist() == [[0, 1, 2, 7, 3]]


@pytest.mark.parametrize("width", [9, 12])
def test_a_given_width_pads_the_result(width, memory):
    features, offsets, budgets = clustered(20, 16, seed=3), torch.tensor([0, 12, 20]), torch.tensor([9, 2])
    for operation, second in (
        ("weighted_farthest_point", None),
        ("dpp_map", torch.ones(20)),
        ("facility_location", None),
        ("residual_pivots", None),
    ):
        run, naive = pair(operation)
        order = run(features, second, offsets, budgets, max_budget=width)
        assert order.shape == (2, width) and torch.equal(
            order, naive(features, second, offsets, budgets, max_budget=width)
        )
    run, naive = pair("progressive_mmr")
    inputs = (torch.rand(20), features[:, None], features[:, None], offsets, budgets)
    assert torch.equal(run(*inputs, max_budget=width), naive(*inputs, max_budget=width))


def test_compact():
    run, naive = pair("compact")
    g = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(2, 13, 33, generator=g),
        torch.randn(2, 2, 13, 6, generator=g).bfloat16().transpose(1, 2),
        torch.randn(1, 13, 8, generator=g).expand(2, -1, -1),
        torch.arange(26).reshape(2, 13),
        torch.rand(2, 13, generator=g) < 0.5,
        torch.randn(2, 13, 2, 3, 4, generator=g).half(),
        torch.randn(2, 13, 0),
        torch.randn(2, 13, 2500, generator=g)[..., ::2],
        torch.randn(2, 13, 1, generator=g),
        torch.randn(2, 13, 4, dtype=torch.complex64, generator=g),
        torch.randn(13, 2, 5, generator=g).transpose(0, 1),
    ]
    for index in (
        torch.tensor([[0, 5, 12], [3, -1, -1]]),
        torch.tensor([[7], [7]]),
        torch.zeros(2, 0, dtype=torch.int64),
    ):
        for found, expected in zip(run(tensors, index), naive(tensors, index), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_every_source_compiles_for_a_gpu_that_is_not_here():
    """Every kernel compiles for a GPU that is not present: the interpreter accepts more than the compiler."""
    folder = Path(__file__).resolve().parent
    path = os.pathsep.join([str(folder.parent), str(folder.parents[1] / "kernels" / "torch-ext")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(folder / "compile_for_gpu.py"), "cuda:90", "bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == f"{len(lines)} kernels compiled for cuda:90, bfloat16"
    shared = {"_triton_attention", "_triton_rows", "_triton_pairs", "_triton_window"}
    choices = {"progressive_mmr", "weighted_farthest_point", "dpp_map", "facility_location"}
    assert {line.split()[0] for line in lines} == shared | choices | {"compact", "transition_variation"}
