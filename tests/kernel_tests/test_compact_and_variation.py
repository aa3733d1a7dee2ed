# SPDX-License-Identifier: Apache-2.0
"""Tests of token compaction and of transition variation (how much a module changes each token)."""

from __future__ import annotations

import importlib

import pytest
import torch

from vtprune_kernels import compact, transition_variation
from vtprune_kernels.compact.naive import compact as naive_compact
from vtprune_kernels.transition_variation.naive import transition_variation as naive_variation


@pytest.mark.parametrize("batch, length, kept", [(1, 7, 3), (1, 123, 123), (3, 123, 40), (2, 1, 1), (2, 9, 0)])
def test_compact_gathers_every_tensor(batch, length, kept):
    generator = torch.Generator().manual_seed(length)
    cache = torch.randn(batch, 2, length, 6, generator=generator).bfloat16()
    rotation = torch.randn(1, length, 8, generator=generator).expand(batch, -1, -1)
    tensors = [
        torch.randn(batch, length, 33, generator=generator),
        cache.transpose(1, 2),
        rotation,
        torch.arange(batch * length).reshape(batch, length),
        torch.rand(batch, length, generator=generator) < 0.5,
        torch.randn(batch, length, 64, generator=generator)[..., ::2].half(),
    ]
    order = torch.rand(batch, length, generator=generator).argsort(1)[:, :kept]
    index = order.sort(1).values
    for found, expected, source in zip(compact(tensors, index), naive_compact(tensors, index), tensors, strict=True):
        assert found.dtype == source.dtype and found.shape == (batch, kept, *source.shape[2:])
        assert torch.equal(found, expected)


def test_compact_fills_padding_with_zeros():
    source = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 3, 8], [2, -1, -1]])
    for samples in (slice(0, 2), slice(1, 2)):
        found = compact([source[samples]], index[samples])
        assert torch.equal(found[0], naive_compact([source[samples]], index[samples])[0])
    assert not torch.equal(source[1, 8], torch.zeros(4)) and torch.equal(found[0][0, 1:], torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 60), (2, 123, 80), (1, 1)])
def test_variation_equals_the_definition(dtype, shape):
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    ratio, direction = transition_variation(before, after)
    expected = naive_variation(before, after)
    torch.testing.assert_close((ratio, direction), expected, atol=1e-6, rtol=1e-5)
    a, b = before.double(), after.double()
    torch.testing.assert_close(ratio.double(), b.norm(dim=-1) / a.norm(dim=-1), atol=0, rtol=1e-5)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(direction.double(), 1 - cosine, atol=1e-6, rtol=1e-5)


def test_variation_of_unchanged_and_turned_tokens():
    rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    ratio, direction = transition_variation(rows, -2 * rows)
    torch.testing.assert_close(ratio, torch.full((6,), 2.0))
    torch.testing.assert_close(direction, torch.full((6,), 2.0))
    ratio, _ = transition_variation(torch.zeros(1, 4), torch.ones(1, 4))
    assert torch.isinf(ratio).all()  # no epsilon, as published


def test_compact_is_differentiable(monkeypatch):
    """A column's gradient is the sum over its copies, and zero from padding; also on the kernel's path."""
    source = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    index = torch.tensor([[0, 2, 2, 6], [1, 5, -1, -1]])
    module = importlib.import_module("vtprune_kernels.compact")
    calls = []

    def kernel(tensors, where):
        calls.append(len(tensors))
        return naive_compact([tensor.detach() for tensor in tensors], where)

    monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(module, "triton_source", lambda operation: kernel)
    weight = torch.arange(24.0, dtype=torch.float64).reshape(2, 4, 3)
    (compact([source * 1, source.detach()], index)[0] * weight).sum().backward()
    expected = torch.zeros(2, 7, 3, dtype=torch.float64)
    for sample, columns in enumerate(index.tolist()):
        for place, column in enumerate(columns):
            if column >= 0:
                expected[sample, column] += weight[sample, place]
    assert torch.equal(source.grad, expected) and not calls
    assert torch.autograd.gradcheck(lambda x: compact([x], index)[0], source)
    with torch.no_grad():
        assert torch.equal(compact([source], index)[0], naive_compact([source.detach()], index)[0])
    assert calls == [1]
