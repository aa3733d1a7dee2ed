# SPDX-License-Identifier: Apache-2.0
"""Parts of the soak test. Each returns its counts as JSON and raises if a property fails."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

import linear
import test_prompts
from abreast import check_threads
from drawn import Case, cases, profile
from families import FAMILIES
from hypothesis import Phase, given
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test
from interrupted import check_every_call, check_interrupted, check_signals
from lifecycle import Lifecycle
from standing import accepted

import vtprune
from tests.soak import fuzz, growth

PACKAGE = f"{Path(vtprune.__file__).parent}{os.sep}"
SIZES = (8192, 16384, 32768)
MOST_PER_DOUBLING = 2.5  # linear is 2, quadratic 4


def prompts(args: argparse.Namespace) -> dict[str, Any]:
    """Random prompts: budgets are exact, kept tokens are visual and in order, and samples alone equal batched ones."""
    seen: Counter[str] = Counter()
    methods: Counter[str] = Counter()
    for family in FAMILIES:

        def check(case: Case) -> None:
            test_prompts.check(case)
            seen["cases"] += 1
            seen["samples"] += len(case.prompts)
            seen["pictures"] += sum(not isinstance(part, int) for prompt in case.prompts for part in prompt)
            methods[case.method.name or "drawn schedule"] += 1

        settings = profile(-(-args.cases // len(FAMILIES)), derandomize=False, phases=[Phase.generate, Phase.shrink])
        seeded(args.seed)(settings(given(case=cases(family))(check)))()
    return {**seen, "families": len(FAMILIES), "methods": dict(sorted(methods.items()))}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Memory of the process does not grow over a thousand generations."""
    result = growth.run(args.generations, warm_up=args.generations // 2)
    growth.check(result)
    return result


def threads(args: argparse.Namespace) -> dict[str, Any]:
    """Eight threads on one model, and on two models with different patches, for every method."""
    one = two = 0
    for number, family in enumerate(FAMILIES):
        names = accepted(family)
        # Every method on one of three families; all pairs would take too long.
        for name in names[number % 3 :: 3]:
            one += check_threads(family, [{"method": name, "ratio": 0.3}])
        pair = [{"method": names[number % len(names)], "ratio": 0.3}, {"method": names[-1 - number], "keep": 5}]
        two += check_threads(family, pair)
    return {"threads": 8, "generations_one_model": one, "generations_two_models": two}


def interruptions(args: argparse.Namespace) -> dict[str, Any]:
    """Generations interrupted by exceptions at every place, at calls and returns, and by signals at random moments."""
    count = calls = signals = pairs = 0
    for number, family in enumerate(FAMILIES):
        for name in accepted(family)[number % 4 :: 4]:
            count += check_interrupted(family, name)
            calls += check_every_call(family, name, PACKAGE, stride=101)
            signals += check_signals(family, name, times=10, seed=args.seed)
            pairs += 1
    return {
        "pairs_of_family_and_method": pairs,
        "interrupted": count,
        "interrupted_at_a_call": calls,
        "interrupted_by_a_signal": signals,
    }


def lifecycle(args: argparse.Namespace) -> dict[str, Any]:
    """Patch, pause, remove, patch again, in any order."""
    walks, steps = 60, 25
    # Not derandomized, so that every run draws different examples.
    settings = profile(walks, derandomize=False, stateful_step_count=steps, phases=[Phase.generate, Phase.shrink])
    run_state_machine_as_test(seeded(args.seed)(Lifecycle), settings=settings)
    return {"walks": walks, "steps_at_most": steps}


def long_prompts(args: argparse.Namespace) -> dict[str, Any]:
    """Memory at most doubles when visual tokens double, up to 32,768 tokens."""
    peaks = linear.growth(SIZES, list(accepted("llava")))
    factors = {name: [round(b / a, 2) for a, b in zip(p, p[1:], strict=False)] for name, p in peaks.items()}
    steep = {name: f for name, f in factors.items() if max(f) > MOST_PER_DOUBLING}
    assert not steep, f"memory grows faster than the number of tokens: {steep}, {peaks}"
    return {"tokens": SIZES, "peak_bytes": peaks, "factor_per_doubling": factors}


def readers(args: argparse.Namespace) -> dict[str, Any]:
    """Every random or damaged file is read or refused with an error of vtprune, in bounded time."""
    return fuzz.run(args.cases, args.seed)


PARTS = {
    "readers": readers,
    "prompts": prompts,
    "memory": memory,
    "threads": threads,
    "interruptions": interruptions,
    "lifecycle": lifecycle,
    "long_prompts": long_prompts,
}
