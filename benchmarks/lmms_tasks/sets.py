# SPDX-License-Identifier: Apache-2.0
"""Local question sets for lmms-eval: the easy-VQA test split and held-out scenes of the built-in model.

Documents reference their picture, which is read or drawn per request. Nothing is downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from PIL import Image

from vtprune.refvlm import easy_vqa, evaluate, scenes

SCENES = 1000  # as many as in the reported accuracy of the built-in model


class _Local:
    """Mixin for tasks with documents from Python instead of the hub; precedes lmms-eval's task class."""

    dataset: DatasetDict

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})  # type: ignore[call-arg]

    def download(self, dataset_kwargs: dict | None = None) -> None:
        self.dataset = DatasetDict({"test": Dataset.from_list(list(self.rows()))})
        self.dataset_no_image = self.dataset

    def rows(self) -> Iterable[dict[str, Any]]:
        raise NotImplementedError


class EasyVQA(_Local, ConfigurableMessagesTask):
    """The 9,673 questions of the easy-VQA test split, in the package's order."""

    def rows(self) -> Iterable[dict[str, Any]]:
        for sample in easy_vqa.samples("test"):
            yield {
                "picture": sample.image_id,
                "question": sample.question,
                "answer": sample.answer,
                "kind": sample.kind,
            }


class Scenes(_Local, ConfigurableMessagesTask):
    """One question on each of 1,000 held-out scenes: those of `python -m vtprune.refvlm.evaluate`."""

    def rows(self) -> Iterable[dict[str, Any]]:
        for seed, sample in enumerate(evaluate.held_out_scenes(SCENES)):
            yield {"picture": seed, "question": sample.question, "answer": sample.answer, "kind": sample.kind}


class SceneChoices(_Local, ConfigurableTask):
    """The same questions as multiple choice: the most probable answer of the question's kind is selected.

    Requires lmms-eval's `--force_simple`.
    """

    def rows(self) -> Iterable[dict[str, Any]]:
        samples = list(evaluate.held_out_scenes(SCENES))
        choices = {kind: sorted({s.answer for s in samples if s.kind == kind}) for kind in {s.kind for s in samples}}
        for seed, sample in enumerate(samples):
            known = choices[sample.kind]
            yield {"picture": seed, "question": sample.question, "choices": known, "right": known.index(sample.answer)}


def easy_vqa_picture(doc: dict[str, Any]) -> list[Image.Image]:
    with Image.open(_easy_vqa_paths()[doc["picture"]]) as file:
        return [file.convert("RGB")]


def scene_picture(doc: dict[str, Any]) -> list[Image.Image]:
    return [scenes.scene(doc["picture"]).image]


def no_picture(doc: dict[str, Any]) -> list[Image.Image]:
    return []


def right(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for an exact match, as in `vtprune.refvlm.evaluate`."""
    return {"right": float(results[0].strip() == doc["answer"])}


@functools.cache
def _easy_vqa_paths() -> dict[int, str]:
    return easy_vqa.image_paths("test")
