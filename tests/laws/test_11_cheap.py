# SPDX-License-Identifier: Apache-2.0
"""Law 11: a pruned prefill costs as much as a prompt of the kept tokens only, plus the layers before the cut and the
reads of the method.

Cost is counted in floating-point operations of matrix products, which are the same on every machine.
"""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES
from support import LAYOUTS, ONE, model_of, pruned
from torch.utils.flop_counter import FlopCounterMode


def decoder_flops(model: torch.nn.Module, decoder: torch.nn.Module, batch: dict) -> tuple[int, list[int]]:
    """Floating-point operations of the decoder, and the number of columns of each layer."""
    counter, columns = FlopCounterMode(display=False), []
    handles = []

    def enter(module: Any, args: tuple, kwargs: dict) -> None:
        counter.__enter__()

    def leave(module: Any, args: tuple, kwargs: dict, out: Any) -> None:
        counter.__exit__(None, None, None)

    handles.append(decoder.register_forward_pre_hook(enter, with_kwargs=True))
    handles.append(decoder.register_forward_hook(leave, with_kwargs=True))
    for layer in decoder.layers:
        handles.append(
            layer.register_forward_hook(
                lambda m, a, out: columns.append((out[0] if isinstance(out, tuple) else out).shape[1])
            )
        )
    model(**batch)
    for handle in handles:
        handle.remove()
    return counter.get_total_flops(), columns


def test_layers_run_on_the_kept_columns_only(family: str, layout: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    with pruned(model, LAYOUTS[layout], ratio=0.3) as (patch, _):
        pruned_flops, columns = decoder_flops(model, patch.anatomy.decoder, batch)
        slots = patch.last.slots
        assert columns == slots
        decoder = patch.anatomy.decoder
    # Each layer's cost is taken from an unpruned prompt of the same length.
    limit = 0
    for number, length in enumerate(slots):
        short = {"inputs_embeds": torch.randn(1, length, 32), "use_cache": False}
        counter = FlopCounterMode(display=False, mods=decoder)
        with counter:
            decoder(**short)
        name = f"{type(decoder).__name__}.layers.{number}"
        limit += sum(counter.get_flop_counts()[name].values())
    assert pruned_flops <= 1.05 * limit
