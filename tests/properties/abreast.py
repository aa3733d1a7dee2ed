# SPDX-License-Identifier: Apache-2.0
"""Thread tests: eight threads on one patched model, or on two models with different patches."""

from __future__ import annotations

import threading
from typing import Any

import torch
from standing import answer, batches, model

import vtprune

THREADS = 8


def check_threads(family: str, recipes: list[dict[str, Any]]) -> int:
    """Asserts that answers in threads equal those of a serial run; thread `i` uses recipe `i % len(recipes)`.

    Every thread passes over all prompts once; threads start at different prompts.

    Args:
        family: Model family.
        recipes: Arguments of `vtprune.patch`, one dict per model.

    Returns:
        int: Number of generations that ran in threads.
    """
    prompts = batches(family)
    patches = [vtprune.patch(model(family, number), **recipe) for number, recipe in enumerate(recipes)]
    wrong: list[str] = []
    done: list[int] = []
    try:
        serial = [[answer(patch, batch) for batch in prompts] for patch in patches]
        start = threading.Barrier(THREADS)

        def work(number: int) -> None:
            which = number % len(patches)
            try:
                start.wait()
                with torch.no_grad():
                    for step in range(number, number + len(prompts)):
                        prompt = step % len(prompts)
                        if answer(patches[which], prompts[prompt]) != serial[which][prompt]:
                            wrong.append(f"thread {number}, prompt {prompt}: not the serial answer")
                        done.append(number)
            except BaseException as error:
                wrong.append(f"thread {number}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for patch in patches:
            patch.remove()
    assert not wrong, f"{family}, {recipes}: {wrong}"
    assert len(done) == THREADS * len(prompts)
    return len(done)
