# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings that are convolutions over single patches, computed as matrix products.

Towers that take patches as a packed sequence embed each by a convolution whose kernel covers it. The same numbers, up
to rounding, come from a matrix product, for which libraries have faster code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "_conv_forward"  # called by the forward of torch's convolutions with input, weight and bias


def find_products(modules: Iterable[nn.Module], wanted: Callable[[], bool]) -> Iterator[tuple[nn.Module, Callable]]:
    """Convolutions without padding, and functions that take the place of their method `NAME`.

    Args:
        modules: Modules to search.
        wanted: Tells whether the call in progress may be rounded differently.

    Yields:
        tuple: A convolution, and a function that computes a matrix product where the input is as large as the kernel.
    """
    for conv in (inner for module in modules for inner in module.modules()):
        if not isinstance(conv, (nn.Conv2d, nn.Conv3d)) or conv.groups != 1 or conv.padding_mode != "zeros":
            continue
        if conv.padding in ("valid", (0,) * len(conv.kernel_size)) and set(conv.dilation) == {1}:
            yield conv, _product(getattr(conv, NAME), wanted)


def _product(convolve: Callable, wanted: Callable[[], bool]) -> Callable:
    @functools.wraps(convolve)
    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_dynamo_compiling() or x.shape[1:] != weight.shape[1:] or not wanted():
            return convolve(x, weight, bias)
        rows = F.linear(x.flatten(1), weight.flatten(1), bias)
        return rows.reshape(*rows.shape, *[1] * (x.dim() - 2))

    return product
