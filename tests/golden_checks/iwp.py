# SPDX-License-Identifier: Apache-2.0
"""Golden check of IWP: magnitudes, similarities, and the exact greedy selection under every objective."""

from __future__ import annotations

import numpy as np
import torch
from synthetic_tokens import Sample, tokens
from torch import Tensor

from vtprune.methods.iwp.method import IWP, Candidates
from vtprune_kernels.progressive_mmr import Duplication

FIRST = "queries_pre_rope"
EXACT = {"chunk": 1}
CHOICES = {
    "norope": {"rope_in_duplication": False},
    "logrel": {"relevance": "log"},
    "rankrel": {"relevance": "rank"},
    "alt": {"objective": "log", "duplication": 0.9},
}


def check(data: dict[str, np.ndarray]) -> None:
    prefixes = [name.removesuffix(FIRST) for name in data if name.endswith(FIRST)]
    assert prefixes
    for prefix in prefixes:
        check_group({name.removeprefix(prefix): data[name] for name in data if name.startswith(prefix)})


def sample_of(case: dict[str, np.ndarray]) -> Sample:
    queries, keys, rotated, values = (
        torch.from_numpy(case[name]) for name in (FIRST, "keys_pre_rope_all", "keys_post_rope_visual", "values_visual")
    )
    start, count, length = int(case["image_start"]), values.shape[1], keys.shape[1]
    # Rotated keys and values of the text are not in the file; NaN shows any read of them.
    everywhere = [torch.full((len(x), length, x.shape[2]), torch.nan) for x in (rotated, values)]
    for whole, visual in zip(everywhere, (rotated, values), strict=True):
        whole[:, start : start + count] = visual
    return Sample(queries, keys, everywhere[1], start, count, rotated_keys=everywhere[0])


def check_group(case: dict[str, np.ndarray]) -> None:
    budget = int(case["budget"])
    batch = tokens([sample_of(case)], [budget])

    def close(found: Tensor, name: str, rtol: float = 1e-5, atol: float = 0.0) -> None:
        np.testing.assert_allclose(found.numpy(), case[name], rtol=rtol, atol=atol, err_msg=name)

    def magnitude(**options: str) -> Tensor:
        return IWP(objective="log", **options).candidates(batch).relevance.exp()

    close(magnitude(), "magnitude")
    close(magnitude(reduce="rms"), "magnitude_rms")
    close(magnitude(reduce="max"), "magnitude_max")
    close(magnitude(normalize="visual"), "magnitude_visual_only")
    close(magnitude(query="last"), "magnitude_last_query")
    close(IWP().candidates(batch).relevance, "relevance")
    close(IWP(relevance="log").candidates(batch).relevance, "relevance_log", atol=1e-6)
    close(IWP(relevance="rank").candidates(batch).relevance, "relevance_rank", atol=1e-6)

    rows, plain = IWP().candidates(batch), IWP(rope_in_duplication=False).candidates(batch)
    # log |phi(k)^T v| = |k|^2 / (2 sqrt(dh)) + log |v|, the same before and after rotation.
    for keys in (rows.keys, plain.keys):
        norm = keys.square().sum(-1) / (2 * keys.shape[-1] ** 0.5) + rows.values.norm(dim=-1).log()
        close(norm.T, "log_update_norm", atol=1e-5)
    check_similarity(case, rows, plain)
    median = IWP().statistics(batch)["closest_similarity"]
    np.testing.assert_allclose(median, float(case["median_of_row_max_similarity"]), atol=1e-5)

    options = {f"lambda{name[-3:]}": {"duplication": int(name[-3:]) / 100} for name in case if "kept_lambda" in name}
    assert options
    for name, settings in {**options, **CHOICES}.items():
        check_choice(case, name, IWP(**EXACT, **settings), batch)


def check_similarity(case: dict[str, np.ndarray], rows: Candidates, plain: Candidates) -> None:
    everything = torch.arange(len(rows.relevance))
    sampled = torch.from_numpy(case["similarity_rows_index"])
    for part, name in ((rows, "similarity_rows"), (plain, "similarity_rows_no_rope")):
        found = Duplication(part.keys, part.values, part.scaling)(sampled, everything)
        np.testing.assert_allclose(found, case[name], rtol=0, atol=1e-5)
    if "similarity" in case:
        found = Duplication(rows.keys, rows.values, rows.scaling)(everything, everything)
        np.testing.assert_allclose(found, case["similarity"], rtol=0, atol=1e-5)


def check_choice(case: dict[str, np.ndarray], name: str, method: IWP, batch) -> None:
    rows = method.candidates(batch)
    order = method.order(rows, batch.budgets)[0]
    np.testing.assert_array_equal(order, case[f"kept_in_order_{name}"], err_msg=name)
    keep = method.choose(batch).keep
    np.testing.assert_array_equal(keep.nonzero().squeeze(1), case[f"kept_{name}"], err_msg=name)
    among = Duplication(rows.keys, rows.values, rows.scaling)(order, order)
    closest = torch.stack([torch.tensor(0.0), *(among[i, :i].amax() for i in range(1, len(order)))]).clamp_min(0)
    if method.objective == "log":
        value = rows.relevance[order] + 0.5 * torch.log(1 - method.duplication * closest.square() + 1e-6)
    else:
        value = rows.relevance[order] - method.duplication * closest
    np.testing.assert_allclose(value, case[f"objective_{name}"], rtol=1e-6, atol=1e-5, err_msg=name)
