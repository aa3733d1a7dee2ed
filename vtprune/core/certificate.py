# SPDX-License-Identifier: Apache-2.0
"""Certificate of a ratio for one model and one method."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CertificateError
from ..models.identity import config_hash, files_hash, weights_hash
from .energy import Auto
from .files import MAX_RESULTS, FileError, check_schema, read_json, write_text
from .method import Method
from .options import from_json
from .registry import get, make


@dataclass(frozen=True)
class Certificate:
    """Result of `vtprune certify`: with probability `confidence`, the share of changed answers is at most `risk`.

    It holds for greedy answers of one model, in one dtype, to pictures and questions like those it was made with.

    Attributes:
        ratio: The smallest certified ratio; 1.0 if no smaller one could be certified.
        auto: `energy`, `min` and `max` of the certified automatic ratio; None for a fixed ratio.
        method: Registered name of the method.
        options: Its options; None if they cannot be written as JSON.
        method_repr: `repr` of the method, with all its options.
        model: Class name of the model.
        config_hash, weights_hash: See `models.identity`.
        risk, confidence: The requested bounds.
        pictures: Number of pictures; several questions about one count as one observation, their mean.
        questions: Number of questions.
        changed: Mean over pictures of the share of changed answers at the certified ratio.
        tried: Every candidate in order: `candidate`, `changed` and `p_value`.
        about: Versions, length limit of the answers, dtype, attention, and a hash of the files that the model was read
            from (`files_hash`), where they are in a folder.
    """

    ratio: float
    method: str
    method_repr: str
    model: str
    config_hash: str
    weights_hash: str
    risk: float
    confidence: float
    pictures: int
    questions: int
    changed: float
    auto: dict[str, float] | None = None
    options: dict[str, Any] | None = None
    tried: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, method: Method, budget: float | Auto, **numbers: Any) -> Certificate:
        """Builds the certificate of a budget for a model and a method."""
        automatic = dataclasses.asdict(budget) if isinstance(budget, Auto) else None
        return cls(
            ratio=budget.max if isinstance(budget, Auto) else budget,
            auto=automatic,
            method=method.name,
            options=_options(method),
            method_repr=repr(method),
            model=type(model).__name__,
            config_hash=config_hash(model.config),
            weights_hash=weights_hash(model),
            **numbers,
        )

    def __str__(self) -> str:
        what = f"ratio {self.ratio:g}" if self.auto is None else str(self.budget)
        return (
            f"{what} with {self.method} changes at most {self.risk:.3g} of the answers, with confidence "
            f"{self.confidence:g} ({self.pictures} pictures)"
        )

    @property
    def budget(self) -> float | Auto:
        """Value for `ratio` of `vtprune.patch`."""
        return self.ratio if self.auto is None else Auto(**self.auto)

    def make_method(self) -> Method:
        """Builds the method that the certificate is for.

        Raises:
            CertificateError: Its options are not in the certificate.
        """
        if self.options is None:
            raise CertificateError(
                f"the certificate is for {self.method_repr}, whose options cannot be stored as JSON; pass the method "
                "itself"
            )
        return make(self.method, from_json(self.options))

    def check_method(self, method: Method) -> None:
        """Raises `CertificateError` unless the method and its options are those of the certificate."""
        if repr(method) != self.method_repr:
            raise CertificateError(
                f"the certificate is for the method {self.method_repr}; found {method!r}; certify "
                "this method, or pass the certificate's"
            )

    def check_config(self, config: object) -> None:
        """Raises `CertificateError` unless the configuration is that of the certificate's model."""
        found = config_hash(config)
        if found != self.config_hash:
            here = importlib.metadata.version("transformers")
            made_with = self.about.get("versions")
            there = str(made_with.get("transformers", here))[:20] if isinstance(made_with, Mapping) else here
            versions = "" if there == here else f", or transformers {here} describes it otherwise than {there} did"
            raise CertificateError(
                f"the certificate is for a {self.model} of another configuration (hash {self.config_hash}, found "
                f"{found}){versions}; certify this model"
            )

    def check_files(self, folder: str | Path) -> None:
        """Raises `CertificateError` unless a folder's weights are those that the certificate's model was read from.

        A certificate made with weights that are no longer in a folder says nothing of files; then nothing is checked.
        """
        known, found = self.about.get("files_hash"), files_hash(folder)
        if known is not None and found != known:
            raise CertificateError(
                f"the certificate is for a {self.model} with other weights (hash of the files {known}, found {found}); "
                "certify this model"
            )

    def check_model(self, model: nn.Module) -> None:
        """Raises `CertificateError` unless the model, its weights and its dtype are those of the certificate."""
        if type(model).__name__ != self.model:
            raise CertificateError(
                f"the certificate is for a {self.model}; found a {type(model).__name__}; certify this model"
            )
        self.check_config(model.config)
        found = weights_hash(model)
        if found != self.weights_hash:
            raise CertificateError(
                f"the certificate is for a {self.model} with other weights or another dtype (hash "
                f"{self.weights_hash}, found {found}); certify this model"
            )

    def save(self, path: str | Path) -> None:
        """Writes the certificate as JSON."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Certificate:
        """Reads the content of a file written by `save`.

        Raises:
            CertificateError: It has other content.
        """
        try:
            check_schema(data, _schema(cls))
        except FileError as error:
            raise CertificateError(f"this is no certificate written by vtprune certify: {error}") from error
        return cls(**data)

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Reads a file written by `save`.

        Raises:
            CertificateError: The file is missing or has other content.
        """
        try:
            return cls(**read_json(path, _schema(cls), MAX_RESULTS))
        except FileError as error:
            raise CertificateError(f"{path} is no certificate written by vtprune certify: {error}") from error


def _schema(cls: type[Certificate]) -> dict[str, Any]:
    """JSON Schema of a certificate's file."""
    share: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
    properties: dict[str, Any] = {f.name: {"type": "string"} for f in dataclasses.fields(cls) if f.type == "str"}
    properties |= dict.fromkeys(("risk", "confidence"), {**share, "exclusiveMinimum": 0, "exclusiveMaximum": 1})
    properties |= dict.fromkeys(("pictures", "questions"), {"type": "integer", "minimum": 1, "maximum": 10**9})
    automatic = {"required": ["energy", "min", "max"], "additionalProperties": share, "maxProperties": 3}
    properties |= {
        "changed": share,
        "ratio": {**share, "exclusiveMinimum": 0},
        "auto": {"type": ["object", "null"], **automatic},
        "options": {"type": ["object", "null"]},
        "tried": {"type": "array", "items": {"type": "object"}},
        "about": {"type": "object"},
    }
    needed = [f.name for f in dataclasses.fields(cls) if f.name not in ("auto", "options", "tried", "about")]
    return {"type": "object", "required": needed, "properties": properties, "additionalProperties": False}


def _options(method: Method) -> dict[str, Any] | None:
    """Options of a method as JSON values; None if one cannot be stored, or changes when it is read back."""
    if not dataclasses.is_dataclass(method):
        return None
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    try:
        back = json.loads(json.dumps(options))
        return back if repr(get(method.name)(**from_json(back))) == repr(method) else None
    except (TypeError, ValueError):
        return None
