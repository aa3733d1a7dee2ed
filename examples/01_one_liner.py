# SPDX-License-Identifier: Apache-2.0
"""Prunes a vision-language model with one line, and prints its answer with and without pruning."""

from __future__ import annotations

import vtprune
from vtprune import refvlm


def main() -> None:
    # The small trained model inside the package. Yours works the same way: AutoModelForImageTextToText.from_pretrained.
    model, processor = refvlm.load()
    scene = refvlm.scenes.scene(7)
    question = next(question for question in scene.questions if question.kind == "digit")
    inputs = processor(images=scene.image, text=refvlm.prompt(question.text), return_tensors="pt")

    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    whole = answer()
    patch = vtprune.patch(model, ratio=0.1)  # keep 10 % of the visual tokens
    pruned = answer()

    print(f"{question.text} unpruned: {whole}, pruned: {pruned}, right: {question.answer}")
    print(patch.last.report())


if __name__ == "__main__":
    main()
