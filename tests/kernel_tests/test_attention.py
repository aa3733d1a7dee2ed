# SPDX-License-Identifier: Apache-2.0
"""Attention rows, received attention and rank-one relevance against the specification and the definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernel_tests.cases import offsets_of, strided
from vtprune_kernels import attention_rows, rank1_relevance, received_attention
from vtprune_kernels.attention_rows.naive import attention_rows as naive_rows
from vtprune_kernels.rank1_relevance.naive import rank1_relevance as naive_relevance
from vtprune_kernels.received_attention.naive import received_attention as naive_received


def case(heads=6, groups=2, size=60, seed=0, keys=(9, 123, 1), rows=(3, 5, 1)):
    """Three samples with visual tokens from column 2 on; the last columns are the query rows."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(rows), heads, size, generator=generator) * 3
    k, v = (torch.randn(sum(keys), groups, size + extra, generator=generator) for extra in (0, 4))
    query_order = torch.cat([torch.arange(n - r, n) for n, r in zip(keys, rows, strict=True)])
    starts = offsets_of(keys)
    visual = [
        torch.arange(int(a) + min(2, n - 1), int(a) + max(n - r, 1))
        for a, n, r in zip(starts[:-1], keys, rows, strict=True)
    ]
    return q, k, v, offsets_of(rows), starts, query_order, torch.cat(visual), size**-0.5


@pytest.mark.parametrize("heads, groups, size", [(4, 4, 64), (6, 2, 60), (8, 1, 80)])
@pytest.mark.parametrize("reduce, normalize", list(itertools.product(("mean", "rms", "max"), ("visible", "visual"))))
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_relevance_equals_specification(heads, groups, size, reduce, normalize, softcap):
    q, k, v, *rest = case(heads, groups, size)
    found = rank1_relevance(q, k, v, *rest, reduce, normalize, softcap)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, naive_relevance(q, k, v, *rest, reduce, normalize, softcap), atol=1e-5, rtol=1e-5)


def test_relevance_is_softmax_weight_times_value_length():
    """Relevance of one sample equals softmax weight times value norm, computed in float64."""
    q, k, v, query_offsets, key_offsets, query_order, visual, scaling = case(keys=(40,), rows=(6,))
    magnitudes = []
    for row, place in enumerate(query_order.tolist()):
        for head in range(6):
            attention = torch.softmax(scaling * k[: place + 1, head // 3].double() @ q[row, head].double(), 0)
            magnitudes.append(attention[visual] * v[visual, head // 3].double().norm(dim=-1))
    magnitudes = torch.stack(magnitudes)
    expected = {"mean": magnitudes.mean(0), "rms": magnitudes.square().mean(0).sqrt(), "max": magnitudes.amax(0)}
    for reduce, value in expected.items():
        found = rank1_relevance(q, k, v, query_offsets, key_offsets, query_order, visual, scaling, reduce)
        torch.testing.assert_close(found.double().exp(), value, atol=0, rtol=2e-5)


def test_relevance_survives_huge_logits_and_rows_without_keys():
    q, k, v, *rest = case(seed=1)
    found = rank1_relevance(q * 400, k * 20, v, *rest)
    assert torch.isfinite(found).all()
    q, k, v, query_offsets, key_offsets, query_order, visual, scaling = case(seed=1)
    query_order[:3] = 0  # these rows see no visual key
    found = rank1_relevance(q, k, v, query_offsets, key_offsets, query_order, visual, scaling, normalize="visual")
    assert (found[visual < 9] == -torch.inf).all() and torch.isfinite(found[visual >= 9]).all()


@pytest.mark.parametrize("reduce", ["mean", "none"])
@pytest.mark.parametrize("heads, groups, size", [(4, 4, 64), (6, 2, 60), (8, 1, 80)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_equal_specification(reduce, heads, groups, size, softcap):
    q, k, _, query_offsets, key_offsets, query_order, _, scaling = case(heads, groups, size)
    inputs = (q, k, query_offsets, key_offsets, query_order, scaling, softcap, reduce)
    weights = torch.rand(len(q), generator=torch.Generator().manual_seed(1))
    weights[0] = 0
    for weight in (None, weights):
        found, expected = attention_rows(*inputs, weight), naive_rows(*inputs, weight)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_rows_equal_pytorch_attention():
    q, k, _, query_offsets, key_offsets, query_order, _, scaling = case(keys=(70,), rows=(4,))
    eye = torch.eye(70)[None, None].expand(1, 6, 70, 70)  # identity values: the output is the attention matrix
    mask = torch.arange(70) <= query_order[:, None]
    keys = k.permute(1, 0, 2)[None].repeat_interleave(3, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, eye, mask, scale=scaling)
    inputs = (q, k, query_offsets, key_offsets, query_order, scaling)
    torch.testing.assert_close(attention_rows(*inputs, reduce="none"), expected[0], atol=1e-6, rtol=1e-5)
    chosen = torch.tensor([0.0, 1, 0, 1])
    by_mask = attention_rows(*inputs, weights=chosen)
    torch.testing.assert_close(by_mask, expected[0, :, [1, 3]].mean((0, 1)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 123, 577])
@pytest.mark.parametrize("heads, groups, size", [(2, 2, 64), (4, 2, 80), (3, 1, 60)])
def test_received_attention_equals_specification(length, heads, groups, size):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, heads, length, size, generator=generator)
    k = torch.randn(2, groups, length, size, generator=generator)
    some = torch.rand(2, length, generator=generator) < 0.4
    some[1] = False
    offsets = torch.tensor([0, length // 3, length // 3, length])
    for rows, parts in itertools.product((None, some, some[0]), (None, offsets)):
        found = received_attention(q, k, size**-0.5, rows, parts)
        torch.testing.assert_close(found, naive_received(q, k, size**-0.5, rows, parts), atol=1e-6, rtol=1e-5)


def test_received_attention_in_blocks_sums_to_one(monkeypatch):
    from vtprune_kernels.received_attention import vectorized

    q, k = torch.randn(2, 1, 2, 200, 16, generator=torch.Generator().manual_seed(0))
    whole = received_attention(q, k, 0.25)
    monkeypatch.setattr(vectorized, "_BLOCK", 2 * 200 * 7)
    torch.testing.assert_close(received_attention(q, k, 0.25), whole, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(whole.sum(), torch.tensor(1.0))


def test_rows_in_blocks_equal_the_whole(monkeypatch):
    from vtprune_kernels.attention_rows import vectorized as rows_module
    from vtprune_kernels.rank1_relevance import vectorized as relevance_module

    q, k, v, query_offsets, key_offsets, query_order, visual, scaling = case(seed=3)
    some = (query_offsets, key_offsets, query_order)
    whole = [attention_rows(q, k, *some, scaling, reduce=reduce) for reduce in ("mean", "none")]
    whole += [rank1_relevance(q, k, v, *some, visual, scaling, reduce) for reduce in ("mean", "rms", "max")]
    monkeypatch.setattr(rows_module, "_BLOCK", 1)
    monkeypatch.setattr(relevance_module, "_BLOCK", 1)
    parts = [attention_rows(q, k, *some, scaling, reduce=reduce) for reduce in ("mean", "none")]
    parts += [rank1_relevance(q, k, v, *some, visual, scaling, reduce) for reduce in ("mean", "rms", "max")]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v, *rest, visual, scaling = case(seed=2)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    exact = rank1_relevance(q.float(), k.float(), v.float(), *rest, visual, scaling)
    assert torch.equal(rank1_relevance(strided(q), strided(k), strided(v), *rest, visual, scaling), exact)
    exact = attention_rows(q.float(), k.float(), *rest, scaling)
    assert torch.equal(attention_rows(strided(q), strided(k), *rest, scaling), exact)
    q, k = q[None].transpose(1, 2), k[None, : len(q)].transpose(1, 2)
    assert torch.equal(received_attention(q, k, 0.1), received_attention(q.float(), k.float(), 0.1))
