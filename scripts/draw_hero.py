# SPDX-License-Identifier: Apache-2.0
"""Draws docs/pruned.png, the picture of the README, with the built-in model.

python scripts/draw_hero.py docs/pruned.png
"""

from __future__ import annotations

import sys

import vtprune
from vtprune import refvlm
from vtprune.refvlm import loading
from vtprune.report.overlay import before_and_after


def main(path: str) -> None:
    """Writes the picture before and after pruning; exits if the pruned model gives another answer."""
    model, processor = refvlm.load(name="qwen2_5_vl")
    crowd = refvlm.crowds.crowd(27, (36, 36))
    question = next(question for question in crowd.questions if question.kind == "digit")
    inputs = loading.inputs(model, processor, crowd.image, question.text)

    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    whole = answer()
    with vtprune.patch(model, ratio=0.1) as patch:
        pruned = answer()
        picture = before_and_after(crowd.image, patch.last.show(crowd.image), (whole, pruned))
    if not whole == pruned == question.answer:
        raise SystemExit(f"{question.text} {whole} unpruned, {pruned} pruned; expected {question.answer}")
    picture.save(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
