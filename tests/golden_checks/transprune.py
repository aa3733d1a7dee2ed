# SPDX-License-Identifier: Apache-2.0
"""Golden check of TransPrune: TTV of one layer, and two cuts from hidden states, weights and TTV so far."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.attention import visual_attention
from vtprune.core.ragged import top_k
from vtprune.methods.transprune import TransPrune, change, combine, variation
from vtprune_kernels import attention_rows

from .golden_files import cases, close, layer_inputs


def check_variation(case: dict[str, np.ndarray]) -> None:
    whole = torch.tensor([0, len(case["ttv"])])
    parts = []
    for module in ("attn", "mlp"):
        x_in, x_out = (torch.from_numpy(case[f"{module}_{end}"]) for end in ("in", "out"))
        parts.append(variation(change(x_in, x_out), whole))
        close(parts[-1], case[f"ttv_{module}"])
    close(parts[0] + parts[1], case["ttv"])


def check_cut(case: dict[str, np.ndarray]) -> None:
    start, count, budget = (int(case[name]) for name in ("image_start", "num_image_tokens", "budget"))
    share = TransPrune().schedule(32)[int(case["stage"])].share
    assert int(int(case["num_image_tokens_original"]) * share) == budget

    inputs, pool = layer_inputs(case, len(case["hidden"]) - start - count), torch.tensor([0, count])
    arguments = (inputs.queries, inputs.keys, inputs.query_offsets, inputs.key_offsets, inputs.query_order)
    close(attention_rows(*arguments, inputs.scaling, reduce="none"), case["attention_rows"])
    iga = visual_attention(inputs)
    close(iga / (iga.sum() + 1e-8), case["iga"])

    layers = torch.from_numpy(case["ttv_layers"])
    ttv = layers.sum(0)[start : start + count]
    close(combine(ttv, iga, pool, alpha=1.0) / 2, case["ttv_norm"])
    scores = combine(ttv, iga, pool)
    close(scores, case["scores"])
    kept = top_k(scores, pool, torch.tensor([budget])).nonzero().flatten()
    assert kept.tolist() == case["kept"].tolist()
    survivors = torch.cat([torch.arange(start), kept + start, torch.arange(start + count, layers.shape[1])])
    np.testing.assert_array_equal(layers[:, survivors].numpy(), case["ttv_layers_after"])


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        if "attn_in" in case:
            check_variation(case)
        else:
            check_cut(case)
