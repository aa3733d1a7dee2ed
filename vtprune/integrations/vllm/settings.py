# SPDX-License-Identifier: Apache-2.0
"""What stands under `"vtprune"` in vLLM's `additional_config`: methods, a budget per image or clip, options."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__, methods, towers
from ...core import budget, default_method
from ...core.certificate import Certificate
from ...core.clips import ClipMethod
from ...core.options import fits, option_names, shorten
from ...core.pixel_auto import PixelAuto
from ...core.registry import make
from ...errors import BudgetError, CertificateError, InputError, MethodError, VTPruneError, one_line
from ...methods import Method
from ...towers import TowerMethod

logger = logging.getLogger("vllm.vtprune")
KEY = "vtprune"
# Methods that choose between projector and decoder, knowing the image or the clip alone.
QUESTION_FREE = ("divprune", "iwp", "pooling", "random", "resprune", "scope", "uniform", "visionzip", "zoo_prune")
CLIP_METHODS = ("dycoke", "evs", "vcast", "vidcom2")  # as `video_method`
_TOWER_READERS = ("scope", "visionzip", "zoo_prune")  # scope with alpha=0 is coverage alone
_FIELDS = ("method", "ratio", "keep", "options", "video_method", "video_options", "certificate", "tower")
# `Attention` reads queries and keys of a block, which vLLM's classes do not hand out.
TOWER_METHODS = ("Change", "Pixels", "Random", "Similar", "Uniform")
# What methods must be before the decoder, of which resprune by itself cuts deep ones before layer 1.
_FIXED: dict[str, dict[str, Any]] = {"iwp": {"layer": 0, "query": "none"}, "resprune": {"layer": 0}}
# What serves iwp best there, see `IWP.query`.
_DEFAULTS: dict[str, dict[str, Any]] = {"iwp": {"rope_in_duplication": False}}


def reads_tower(method: Method) -> bool:
    """Whether a method reads inside the vision encoder, besides the features that come out of it."""
    return method.name in _TOWER_READERS and getattr(method, "alpha", None) != 0


def are_features(pixels: Any) -> bool:
    """Whether a request has features in place of the pixels of an image or clip (`enable_mm_embeds`)."""
    return isinstance(pixels, Mapping) or (getattr(pixels, "ndim", 3) == 2 and not hasattr(pixels, "convert"))


class ServingError(VTPruneError):
    """A configuration or a model that cannot be served pruned; no ValueError, which pydantic would wrap."""


@functools.lru_cache(maxsize=256)
def _say_once(line: str) -> None:
    logger.warning(line)


@dataclass(frozen=True)
class Settings:
    """A checked configuration.

    Attributes:
        method: For images; cuts before the decoder only.
        video_method: For clips.
        budget: `ratio` or `keep`, per image or clip.
        auto: Chooses the ratio of each image or clip by its pixels; None for the same ratio for all.
        certificate: Where the ratio comes from, if it is certified.
        tower: Cuts inside the vision tower; None for the whole one.
        fingerprint: Differs wherever chosen tokens may differ: part of the identity of cached images.
    """

    method: Method
    video_method: Method
    budget: budget.Budget
    auto: PixelAuto | None
    certificate: Certificate | None
    tower: TowerMethod | None
    fingerprint: str

    def method_for(self, modality: str, sizes: Sequence[int], count: int) -> Method:
        """The method for an image or a clip.

        A clip of which `video_method` cannot keep so few tokens (EVS keeps its first frame whole), or that is a single
        frame, is pruned by `method`.

        Args:
            modality: `image` or `video`.
            sizes: Tokens of each frame.
            count: How many tokens stay.
        """
        if modality != "video" or not isinstance(self.video_method, ClipMethod):
            return self.video_method if modality == "video" else self.method
        try:
            self.video_method.check(sizes, count)
        except MethodError as error:
            reason = str(error).split(";")[0]  # what follows is said to callers of vtprune.patch
            _say_once(f"vtprune: {self.method.name} in place of {self.video_method.name} for a clip: {reason}")
            return self.method
        return self.video_method

    def share_of(self, pixels: Any) -> float | None:
        """The ratio of an image or clip by its pixels; None where it is the same for all."""
        if self.auto is None:
            return None
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # a clip comes with its facts
        return self.auto.mean if are_features(pixels) else self.auto.ratio(pixels)

    def check_item(self, pixels: Any) -> None:
        """Refuses a request's features in place of pixels, if the method reads the vision encoder, which then rests.

        Raises:
            InputError: One line for the client.
        """
        if are_features(pixels) and reads_tower(self.method):
            raise InputError(
                f"vtprune: {self.method.name} reads the vision encoder, and the request has features in place of "
                "pixels; send pixels, or serve with a method that needs none, such as divprune"
            )

    def counts(self, runs: Sequence[int], share: float | None = None) -> list[int]:
        """How many tokens of each unbroken run of an image's placeholders stay; the image's budget is exact.

        Args:
            runs: Lengths of the runs (one, or one for every tile).
            share: Its own ratio; None for that of all.
        """
        total = sum(runs)
        if total == 0:
            return [0] * len(runs)
        share = self.budget.share if share is None else share
        wanted = self.budget.keep if share is None else max(1, round(share * total))
        return budget.split_keep(wanted or 1, runs)

    def __str__(self) -> str:
        clips = "" if self.video_method == self.method else f" ({self.video_method.name} for clips)"
        cut = f", vision tower cut by {self.tower}" if self.tower else ""
        return f"{self.method.name}{clips}, {self.auto or self.budget} of every image and clip{cut}"


def parse(config: Any) -> Settings:
    """Checks a configuration.

    Args:
        config: The object under `"vtprune"`: `method` (default `resprune`), `options` of the method, `video_method`
            (default `method`) with `video_options`, and one of `ratio` and `keep`; `ratio` is a share, `"auto"`, or an
            object with fields of `PixelAuto`. Or `certificate` alone: a file written by `vtprune certify`, or its
            content. `tower`: a share of the patches, or an object with the name of a tower `method` and its options.

    Raises:
        ServingError: One line that says what is wrong and what was expected.
    """
    if not isinstance(config, Mapping):
        raise ServingError(
            f"vtprune: the configuration is {shorten(config)}; expected an object with {', '.join(_FIELDS)}"
        )
    unknown = [name for name in config if name not in _FIELDS]
    if "mean_ratio" in unknown:
        raise ServingError("vtprune: mean_ratio: vLLM cuts before the decoder, where it equals ratio; give ratio")
    if unknown:
        raise ServingError(f"vtprune: unknown field {', '.join(map(shorten, unknown))}; expected {', '.join(_FIELDS)}")
    for field in ("options", "video_options"):
        if not isinstance(config.get(field, {}), Mapping):
            raise ServingError(
                f"vtprune: {field} is {shorten(config[field])}; expected an object with options of the method"
            )
    try:
        return _parse(config)
    except (BudgetError, CertificateError, MethodError) as error:
        raise ServingError(
            f"vtprune: {one_line(error, 600)}".replace("ratio, keep and mean_ratio", "ratio and keep")
        ) from None


def refuse_elsewhere(extra: Mapping[Any, Any]) -> None:
    """Refuses settings that would be ignored: under a misspelled `"vtprune"`, or at the top level.

    Args:
        extra: vLLM's `additional_config`, which has no `"vtprune"`.

    Raises:
        ServingError: One line with what was found and where it belongs.
    """
    for name in extra:
        word = "".join(filter(str.isalnum, str(name).lower()))
        if difflib.get_close_matches(word, [KEY], cutoff=0.85):
            raise ServingError(
                f"vtprune: additional_config has {shorten(name)}; expected {KEY!r}; rename it, or remove it"
            )
    try:
        parse(extra)
    except ServingError:
        return  # these are another plug-in's
    raise ServingError(
        f"vtprune: additional_config has {', '.join(map(shorten, extra))} at its top level; expected them inside "
        f"{KEY!r}: {shorten({KEY: dict(extra)})}"
    )


def _parse(config: Mapping[str, Any]) -> Settings:
    certificate = None
    ratio, name, options = config.get("ratio"), config.get("method", default_method.NAME), config.get("options", {})
    if ratio is None and "keep" not in config and config.get("tower") is not None:
        ratio = 1.0  # a cut of the tower alone, as in `vtprune.patch`
    if "certificate" in config:
        certificate = _certificate(config)
        ratio, name, options = certificate.ratio, certificate.method, certificate.options or {}
    automatic = (
        PixelAuto.of({} if ratio == "auto" else ratio) if ratio == "auto" or isinstance(ratio, Mapping) else None
    )
    allowed = budget.Budget(ratio=ratio if automatic is None else automatic.mean, keep=config.get("keep"))
    method = _method(name, options, QUESTION_FREE)
    if certificate is not None:
        certificate.check_method(method)
    clips = method
    if "video_method" in config:
        clips = _method(config["video_method"], config.get("video_options", {}), QUESTION_FREE + CLIP_METHODS)
    elif "video_options" in config:
        raise MethodError("there are video_options and no video_method; expected both, or neither")
    tower = tower_of(config.get("tower"))
    facts = [repr(method), repr(clips), allowed.share, allowed.keep, repr(automatic), repr(tower)]
    mark = hashlib.sha256(json.dumps([__version__, *facts]).encode()).hexdigest()[:16]
    return Settings(method, clips, allowed, automatic, certificate, tower, mark)


def _certificate(config: Mapping[str, Any]) -> Certificate:
    """The certificate that a configuration names.

    Raises:
        CertificateError: It is none, or for an automatic ratio by features, or something else stands beside it.
    """
    others = [name for name in config if name != "certificate"]
    if others:
        raise CertificateError(f"a certificate holds for its own method and ratio; found {', '.join(others)} beside it")
    given = config["certificate"]
    if not isinstance(given, str | Path | Mapping):
        raise CertificateError(f"certificate is {shorten(given)}; expected the path of a file or its content")
    certificate = Certificate.read(given) if isinstance(given, Mapping) else Certificate.load(given)
    if certificate.auto is not None:
        raise CertificateError(
            "the certificate is for an automatic ratio by features, and vLLM needs the count before the model runs; "
            "certify ratios"
        )
    return certificate


def tower_of(given: Any) -> TowerMethod | None:
    """The tower method that a configuration names: None, a share, or an object with `method` and its options.

    Raises:
        MethodError, BudgetError: There is no such method, or an option cannot be used.
    """
    if given is None:
        return None
    if fits(given, float):
        return towers.resolve(given)
    if not isinstance(given, Mapping):
        raise MethodError(
            f"tower is {shorten(given)}; expected a share of the patches such as 0.35, or an object such as "
            '{"method": "Similar", "keep": 0.35}'
        )
    options = dict(given)
    name = options.pop("method", "Similar")  # the method of a share, see `towers.resolve`
    if name not in TOWER_METHODS:
        raise MethodError(f"tower method {shorten(name)}; in vLLM there are {', '.join(TOWER_METHODS)}")
    cls = getattr(towers, str(name))
    try:
        method = cls(**options)
    except TypeError as error:
        raise MethodError(
            f"tower method {name} cannot be made with {shorten(options)}: {one_line(error)}; it has {option_names(cls)}"
        ) from None
    if method.keep is None:
        raise MethodError(f"tower method {name} without keep leaves the count to the picture; in vLLM give keep")
    return method


def portable(config: Any) -> Any:
    """The configuration with the certificate's content in place of its file, which other machines may lack."""
    settings = parse(config)
    if settings.certificate is None:
        return config
    return {**config, "certificate": dataclasses.asdict(settings.certificate)}


def _method(name: Any, options: Mapping[str, Any], known: Sequence[str]) -> Method:
    methods.get(name, known)  # raises for an unknown name
    if name in CLIP_METHODS and name not in known:
        raise MethodError(f"method {name} is made for clips; name it as video_method, beside a method for images")
    if name not in known:
        raise MethodError(f"method {name} is not available in vLLM; there are {', '.join(known)}")
    fixed = _FIXED.get(str(name), {})
    for option, value in fixed.items():
        if options.get(option, value) != value:
            raise MethodError(
                f"{name}: in vLLM {option} is {value!r}, found {shorten(options[option])}; give {option}={value!r}, or "
                f"certify --method {name}:{','.join(f'{key}={fixed[key]}' for key in fixed)}"
            )
    method = make(str(name), {**fixed, **_DEFAULTS.get(str(name), {}), **options})
    layers = [stage.layer for stage in method.schedule(1)]
    if layers != [0]:
        raise MethodError(
            f"{name} with {shorten(dict(options))} cuts before layers {layers}; vLLM allows a cut before layer 0 only"
        )
    return method
