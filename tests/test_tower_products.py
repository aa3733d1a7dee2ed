# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings as matrix products in cut towers."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import FAMILIES, Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune import towers
from vtprune.towers.products import NAME, find_products
from vtprune.towers.similar import match

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PROMPT = [[4, Image(1), 6]]


class Convolutions(TorchDispatchMode):
    """Counts convolutions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def convolutions(model, batch):
    with torch.no_grad(), Convolutions() as seen:
        model(**batch)
    return seen.count


@pytest.mark.parametrize("name", PACKED)
def test_cut_towers_do_without_convolutions(name):
    model, batch = FAMILIES[name].build(), FAMILIES[name].batch(PROMPT)
    assert convolutions(model, batch) == 1
    with vtprune.patch(model, tower=0.5) as patch:
        assert convolutions(model, batch) == 0
        with patch.paused():
            assert convolutions(model, batch) == 1
    assert convolutions(model, batch) == 1
    for options in ({"ratio": 0.5}, {"tower": 1.0}):  # nothing in the tower may change
        with vtprune.patch(model, **options):
            assert convolutions(model, batch) == 1


@pytest.mark.parametrize("name", PACKED)
def test_pixels_uses_a_product_where_patches_are_dropped(name):
    model, batch = FAMILIES[name].build(), FAMILIES[name].batch(PROMPT)
    with vtprune.patch(model, tower=towers.Pixels(tolerance=0.0)):
        assert convolutions(model, batch) >= 1  # noise: every patch is new
        assert convolutions(model, {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sides", [(3, 5), (2, 3, 5)], ids=str)
def test_equals_the_convolution(sides, bias, dtype):
    torch.manual_seed(0)
    make = {2: nn.Conv2d, 3: nn.Conv3d}[len(sides)]
    conv = make(3, 7, sides, stride=sides, bias=bias).to(dtype)
    x = torch.randn(11, 3, *sides).to(dtype)
    ((found, product),) = find_products([nn.Sequential(conv)], lambda: True)
    assert found is conv
    y = product(x, conv.weight, conv.bias)
    want = conv(x)
    assert y.shape == want.shape and y.dtype == dtype
    torch.testing.assert_close(y, want, rtol=0, atol=16 * torch.finfo(dtype).eps)
    (grad,) = torch.autograd.grad(y.float().square().sum(), conv.weight)
    # In float32: how precisely half-precision convolutions sum gradients depends on the processor.
    conv = conv.float()
    (expected,) = torch.autograd.grad(conv(x.float()).square().sum(), conv.weight)
    torch.testing.assert_close(grad.float(), expected, rtol=0.02, atol=32 * torch.finfo(dtype).eps)


def test_pictures_larger_than_the_kernel_are_convolved():
    conv = nn.Conv2d(3, 7, 4, stride=4)
    ((_, product),) = find_products([conv], lambda: True)
    x = torch.randn(2, 3, 8, 4)
    assert torch.equal(product(x, conv.weight, conv.bias), conv(x))


def test_padded_dilated_and_grouped_convolutions_are_left_alone():
    others = [{"padding": 1}, {"padding": "same", "stride": 1}, {"dilation": 2}, {"groups": 3}]
    others.append({"padding": 1, "padding_mode": "reflect"})
    convs = [nn.Conv2d(3, 6, 2, **{"stride": 2, **options}) for options in others]
    assert not list(find_products(convs, lambda: True))


def test_hooks_and_wrapped_weights_are_respected():
    """A hook on the convolution runs, and a parametrized weight is the one that is used."""
    model, batch = FAMILIES["qwen2_5_vl"].build(), FAMILIES["qwen2_5_vl"].batch(PROMPT)
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv3d))

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    with torch.no_grad(), vtprune.patch(model, tower=0.5):
        doubled = conv.weight.clone()
        conv.weight.mul_(2)
        want = model(**batch).logits
        conv.weight.copy_(doubled)
    nn.utils.parametrize.register_parametrization(conv, "weight", Doubled())
    seen = []
    handle = conv.register_forward_hook(lambda m, a, o: seen.append(o.shape))
    with torch.no_grad(), vtprune.patch(model, tower=0.5):
        torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=0)
        assert convolutions(model, batch) == 0
    handle.remove()
    assert len(seen) == 2


def test_nothing_stays_behind():
    model = FAMILIES["qwen2_5_vl"].build()
    before = [set(vars(module)) for module in model.modules()]
    patch = vtprune.patch(model, tower=0.5)
    assert any(NAME in vars(module) for module in model.modules())
    patch.remove()
    assert all(a == set(vars(m)) for a, m in itertools.zip_longest(before, model.modules()))


def test_of_equal_patches_the_first_is_the_partner() -> None:
    for seed in range(20):
        kinds = torch.arange(42) // 2 % 3  # both halves hold the same three kinds of patches
        units = torch.nn.functional.normalize(torch.randn(3, 33, generator=torch.Generator().manual_seed(seed)), dim=-1)
        stays, copies = match(units[kinds], 32)
        assert stays.nonzero()[:, 0].tolist() == [i for i in range(42) if i % 2 or i >= 20]
        assert copies[:20:2].tolist() == [1, 3, 5, 1, 3, 5, 1, 3, 5, 1]
