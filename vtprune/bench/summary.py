# SPDX-License-Identifier: Apache-2.0
"""Summary rows of a benchmark: medians, spread, distance to the limit, and whether pruning pays.

Ratios are medians of the ratios within each round, whose runs are adjacent in time: under varying load they are far
more stable than ratios of medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

NOTHING_TO_GAIN = 0.95  # with a limit above this share of the unpruned time, the gain is too small to measure


def rows(data: Mapping[str, Any], cpu: bool = False) -> list[dict[str, Any]]:
    """One row for every variant in every setting of a result.

    Args:
        data: Return value of `vtprune.bench.measure.run`.
        cpu: Use CPU time of the process instead of wall-clock time.

    Returns:
        list[dict]: With `batch`, `tokens` and `variant`, and either `refused`, the reason, or

        * `visual`, `text`, `kept`, `mean_ratio`: tokens of a sample;
        * `vision`, `decision`, `prefill`, `token`, `end_to_end`: seconds as `median`, `low` and `high`;
        * `peak_bytes`, `kv_bytes`, `kv_bytes_formula`;
        * `speedup`, `speedup_end_to_end`: unpruned time divided by this time; `decision_share`, selection time divided
          by the unpruned prefill;
        * `flops_bound`: seconds of the prefill if time were proportional to FLOPs, and `flops_gain`, the achieved share
          of that gain;
        * and where a limit was measured `over_limit` (0.05 is 5 % more than the limit's prefill), `gain` and
          `gain_end_to_end`, the achieved shares of the possible gain; and `verdict`.
    """
    return [row for setting in data["settings"].values() for row in rows_of(setting, data["variants"], cpu)]


def rows_of(setting: Mapping[str, Any], variants: Iterable[str], cpu: bool = False) -> list[dict[str, Any]]:
    """The rows of one setting; none if no round of it has run."""
    rounds = [entry["runs"] for entry in setting["rounds"]]
    if cpu:
        rounds = [{variant: {**run, **(run.get("cpu") or {})} for variant, run in runs.items()} for runs in rounds]
    return [_row(setting, rounds, variant) for variant in variants] if rounds else []


def _row(setting: Mapping[str, Any], rounds: list[dict], variant: str) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": setting["batch"], "tokens": setting["tokens"], "variant": variant}
    rounds = [runs for runs in rounds if variant in runs]
    good = [runs for runs in rounds if "refused" not in runs[variant]]
    if not good:
        return row | {"refused": rounds[0][variant]["refused"]}
    mine = [runs[variant] for runs in good]
    row |= {name: mine[0][name] for name in ("visual", "text", "kept", "mean_ratio", "kv_bytes", "kv_bytes_formula")}
    row["rounds"] = len(mine)
    peaks = [run["peak_bytes"] for run in mine if run["peak_bytes"] is not None]
    row["peak_bytes"] = statistics.median(peaks) if peaks else None
    for name in ("vision", "decision", "prefill", "token"):
        row[name] = _spread([run[name] for run in mine if run[name] is not None])
    both = [runs for runs in good if "refused" not in runs["unpruned"]]
    limit = f"limit {variant.split()[-1]}"  # the limit of the same budget
    row["end_to_end"] = _spread([_total(runs, variant) for runs in (both if variant == limit else good)])
    if both:
        row |= _against_unpruned(both, variant)
    three = [runs for runs in both if "refused" not in runs.get(limit, {"refused": ""})]
    if three and variant != "unpruned":
        row |= _against_limit(three, variant, limit)
        row["verdict"] = _verdict(row, three, variant, limit) if variant != limit else ""
    return row


def _spread(values: list[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else None


def _median(rounds: list[dict], value: Callable[[dict], float]) -> float:
    return statistics.median(value(runs) for runs in rounds)


def _total(runs: dict, variant: str) -> float:
    """Seconds of an answer; the limit starts from embeddings, and encoding its pictures would cost the same."""
    extra = runs["unpruned"]["vision"] if variant.startswith("limit ") else 0.0
    return runs[variant]["total"] + extra


def _first_token(runs: dict, variant: str) -> float:
    """Seconds of vision tower and prefill; the limit is given embeddings, and its pictures would cost the same."""
    encoding = "unpruned" if variant.startswith("limit ") else variant
    return runs[encoding]["vision"] + runs[variant]["prefill"]


def _against_unpruned(rounds: list[dict], variant: str) -> dict[str, Any]:
    share = rounds[0][variant]["flops_share"]
    before = _median(rounds, lambda runs: runs["unpruned"]["prefill"])
    found = {
        "speedup": _median(rounds, lambda runs: runs["unpruned"]["prefill"] / runs[variant]["prefill"]),
        "speedup_end_to_end": _median(rounds, lambda runs: _total(runs, "unpruned") / _total(runs, variant)),
        "flops_share": share,
        "flops_bound": before * share,
        "decision_share": _median(rounds, lambda runs: runs[variant]["decision"] / runs["unpruned"]["prefill"]),
        "speedup_first_token": _median(
            rounds, lambda runs: _first_token(runs, "unpruned") / _first_token(runs, variant)
        ),
    }
    if variant == "unpruned" and rounds[0]["unpruned"]["vision"]:
        found["first_token_bound"] = _median(
            rounds, lambda runs: _first_token(runs, "unpruned") / runs["unpruned"]["vision"]
        )
    if share < 1:
        found["flops_gain"] = _median(
            rounds, lambda runs: (1 - runs[variant]["prefill"] / runs["unpruned"]["prefill"]) / (1 - share)
        )
    return found


def _against_limit(rounds: list[dict], variant: str, limit: str) -> dict[str, Any]:
    return {
        "over_limit": _median(rounds, lambda runs: runs[variant]["prefill"] / runs[limit]["prefill"] - 1),
        "gain": _gain(rounds, lambda runs, name: runs[name]["prefill"], variant, limit),
        "gain_end_to_end": _gain(rounds, _total, variant, limit),
    }


def _gain(rounds: list[dict], time: Callable[[dict, str], float], variant: str, limit: str) -> float | None:
    """Achieved share of the possible gain; None where hardly any gain is possible."""
    if _median(rounds, lambda runs: time(runs, limit) / time(runs, "unpruned")) > NOTHING_TO_GAIN:
        return None
    return _median(
        rounds,
        lambda runs: (time(runs, "unpruned") - time(runs, variant)) / (time(runs, "unpruned") - time(runs, limit)),
    )


def _verdict(row: Mapping[str, Any], rounds: list[dict], variant: str, limit: str) -> str:
    """Why pruning does not pay; empty if it does."""
    saved = 1e3 * _median(rounds, lambda runs: runs["unpruned"]["prefill"] - runs[limit]["prefill"])
    selection = 1e3 * row["decision"]["median"]
    if row["gain"] is None:
        shorter = f"only {saved:.1f} ms shorter" if saved > 0 else "no shorter"
        return f"nothing to gain: even without selection the prefill would be {shorter}"
    if row["speedup"] <= 1:
        return f"does not pay: selection takes {selection:.1f} ms, and the limit saves {saved:.1f} ms"
    if row["speedup_end_to_end"] <= 1:
        return "does not pay: the prefill is faster, the whole answer is not"
    return ""
