# SPDX-License-Identifier: Apache-2.0
"""The models of the demo, and one question answered with and without pruning."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

import vtprune
from vtprune.errors import one_line
from vtprune.refvlm import loading
from vtprune.report import explain
from vtprune.report.overlay import Pictures
from vtprune.report.pruning import Pruning
from vtprune.study import timing
from vtprune.study.auto import calibrate
from vtprune.study.timing import Side

_log = logging.getLogger("vtprune.space")


@dataclass(frozen=True)
class Answer:
    """Answers to a question without and with one method.

    Attributes:
        model, method: Names.
        certificate: The certificate that the ratio and the method come from, or None.
        before, after: Answers without and with pruning; None if it failed.
        pruning: Record of the pruned prefill, with its states; None if it failed.
        pictures: The pictures to show; None if it failed, or if the places of the tokens are unknown.
        error: Why a field is None, or "".
    """

    model: str
    method: str
    before: Side | None = None
    after: Side | None = None
    pruning: Pruning | None = None
    pictures: Pictures | None = None
    error: str = ""
    certificate: vtprune.Certificate | None = None


@dataclass(frozen=True)
class Mean:
    """An automatic count for each picture.

    Attributes:
        share: The mean share of tokens over the pictures that the model's `Models` was calibrated with.
    """

    share: float


Budget = float | Mean | vtprune.Certificate


class Models:
    """Vision-language models, loaded on first use, each used by one request at a time.

    Args:
        places: `embedded`, local folders or names on the hub. Folders are called by their last part.
        max_new_tokens: Length limit of answers.
        repeats: Timed runs.
        examples: Pictures that automatic counts are calibrated with.
    """

    def __init__(
        self,
        places: Sequence[str],
        max_new_tokens: int = 32,
        repeats: int = 3,
        examples: Sequence[Image.Image] = (),
    ) -> None:
        self._places: dict[str, str] = {}
        for place in dict.fromkeys(places):
            short = Path(place).name if Path(place).is_dir() else place
            self._places[place if short in self._places else short] = place
        self.names = list(self._places)
        self.max_new_tokens, self.repeats, self.examples = max_new_tokens, repeats, examples
        self._autos: dict[tuple[str, float], vtprune.Auto] = {}
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._locks = {name: threading.Lock() for name in self.names}

    def ask(
        self,
        name: str,
        image: Image.Image,
        question: str,
        budget: Budget,
        methods: Sequence[str],
        tower: float | None = None,
    ) -> list[Answer]:
        """Answers a question about a picture with several methods, or with that of a certificate.

        `tower` is the share of the patches that the later blocks of the vision tower see; None for all.

        Failures, such as a certificate of another model, are answers with an error.
        """
        certificate = budget if isinstance(budget, vtprune.Certificate) else None
        methods = methods if certificate is None else [certificate.method]
        with self._locks[name]:
            try:
                model, processor = self._get(name)
                inputs = loading.inputs(model, processor, image, question, self.max_new_tokens)
                ratio = self._auto(name, budget.share) if isinstance(budget, Mean) else budget
            except Exception as error:
                return [self._failed(name, method, error) for method in methods]
            answers = [self._one(name, model, processor, image, inputs, ratio, method, tower) for method in methods]
            return [replace(answer, certificate=certificate) for answer in answers]

    def _get(self, name: str) -> tuple[Any, Any]:
        if name not in self._loaded:
            self._loaded[name] = loading.model_and_processor(self._places[name])
        return self._loaded[name]

    def _auto(self, name: str, share: float) -> vtprune.Auto:
        """The automatic ratio that keeps a mean share of the examples' tokens."""
        if (name, share) not in self._autos:
            model, processor = self._get(name)
            prompts = [loading.inputs(model, processor, image, "what is in the picture?") for image in self.examples]
            found, _ = calibrate(model, prompts, share, min(0.02, share), max(0.5, share))
            self._autos[name, share] = found
        return self._autos[name, share]

    def _one(
        self,
        name: str,
        model: Any,
        processor: Any,
        image: Image.Image,
        inputs: Any,
        ratio: Any,
        method: str,
        tower: float | None,
    ) -> Answer:
        # A certificate brings the options of its method along.
        chosen = {} if isinstance(ratio, vtprune.Certificate) else {"method": method}
        try:
            with vtprune.patch(model, ratio=ratio, tower=tower, **chosen) as patch:
                before, after = timing.measure_side_by_side(
                    model, processor, inputs, patch, max_new_tokens=self.max_new_tokens, repeats=self.repeats
                )
                with explain.recording():
                    model.generate(**inputs, max_new_tokens=1, do_sample=False)
                if patch.last is None:
                    return Answer(name, method, error="The prompt held no visual token.")
                try:
                    # Now, as long as the pixels are there that the model was given.
                    return Answer(name, method, before, after, patch.last, patch.last.show(image))
                except vtprune.VTPruneError as error:
                    return Answer(name, method, before, after, patch.last, error=one_line(error))
        except Exception as error:
            return self._failed(name, method, error)

    @staticmethod
    def _failed(name: str, method: str, error: Exception) -> Answer:
        if isinstance(error, vtprune.VTPruneError):
            return Answer(name, method, error=one_line(error))
        _log.exception("%s with %s failed", name, method)  # details are for the log, not for the visitor
        return Answer(name, method, error=f"It failed with {type(error).__name__}; the server's log tells more.")
