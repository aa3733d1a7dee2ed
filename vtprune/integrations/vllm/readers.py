# SPDX-License-Identifier: Apache-2.0
"""Inputs of methods besides the features, read from vLLM's own modules or its Transformers back end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ...core.method import Tap
from ...methods import Method
from ...models import anatomy
from ...models.anatomy import Anatomy
from ...vision.attention import LAYER, LayerCall, vision_layers
from . import probes
from .settings import ServingError, reads_tower


class Reader:
    """Reads nothing, for methods that need only the features."""

    @contextmanager
    def watch(self) -> Iterator[dict[str, list]]:
        """Records the calls of modules inside the context, by name."""
        yield {}

    def extra(self, seen: dict[str, list]) -> dict[str, Any]:
        """Further fields of `Tokens`, from the records of a call."""
        return {}


class VisionReader(Reader):
    """Records the projector's calls, and those of the vision layer before it.

    Args:
        model: A vLLM model.
        method: Method whose taps are set.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.anatomy = parts(model)
        self.taps = list(method.taps(self.anatomy))
        # vLLM's own towers end with the layer whose output is projected.
        layer = None if is_transformers(model) else vision_layers(self.anatomy)[-1]
        self.taps = [_with_probe(tap, layer) if tap.name == LAYER else tap for tap in self.taps]

    @contextmanager
    def watch(self) -> Iterator[dict[str, list]]:
        seen: dict[str, list] = {tap.name: [] for tap in self.taps}

        with ExitStack() as stack:
            for tap in self.taps:
                stack.enter_context(_listening(tap, seen[tap.name]))
            yield seen

    def extra(self, seen: dict[str, list]) -> dict[str, Any]:
        return {"recorded": seen, "anatomy": self.anatomy}


@contextmanager
def _listening(tap: Tap, seen: list) -> Iterator[None]:
    """Records the calls of a module, without hooks, which vLLM bypasses in modules that it may compile."""
    module, forward = tap.module, tap.module.forward

    def listen(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(tap.record(args, kwargs, output))
        return output

    own = "forward" in module.__dict__
    object.__setattr__(module, "forward", listen)
    try:
        yield
    finally:
        if own:
            object.__setattr__(module, "forward", forward)
        else:
            object.__delattr__(module, "forward")


def _with_probe(tap: Tap, own: nn.Module | None) -> Tap:
    """A tap on a vision layer whose records include the probe for its attention."""
    layer, probe = (tap.module, probes.transformers_layer) if own is None else (own, probes.vision)
    return Tap(LAYER, layer, lambda args, kwargs, output: LayerCall(layer, args, kwargs, output, probe))


class DecoderReader(Reader):
    """Reads keys and values of the visual tokens in the decoder's first layer.

    Args:
        model: A vLLM model.
        mrope: Whether the model has position ids on several axes (M-RoPE).
    """

    def __init__(self, model: nn.Module, mrope: bool) -> None:
        found = parts(model)
        read = probes.transformers_keys if is_transformers(model) else probes.own_keys
        self.read = read(found.decoder, found.layers[0], mrope)

    def extra(self, seen: dict[str, list]) -> dict[str, Any]:
        return {"reader": self.read}


def make(model: nn.Module, mrope: bool, method: Method) -> Reader:
    """Creates the reader that a method needs on a model with or without M-RoPE.

    Raises:
        ServingError: The model lacks the modules to read.
    """
    try:
        if method.name == "iwp":
            return DecoderReader(model, mrope)
        if reads_tower(method):
            return VisionReader(model, method)
    except (ServingError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ServingError(f"vtprune: {method.name} on {type(model).__name__}: {reason}; use divprune") from error
    return Reader()


def is_transformers(model: nn.Module) -> bool:
    """Whether the model's modules are those of transformers (vLLM's Transformers back end)."""
    from transformers import PreTrainedModel

    return isinstance(getattr(model, "model", None), PreTrainedModel)


def parts(model: Any) -> Anatomy:
    """Decoder, vision tower and projector of a vLLM model: found by structure, or as its own classes name them.

    Raises:
        ServingError: The class names none.
    """
    if is_transformers(model):
        return anatomy.find(model.model)
    if not hasattr(model, "get_mm_mapping"):
        raise ServingError(f"{type(model).__name__} does not tell its parts (get_mm_mapping)")
    names = model.get_mm_mapping()
    found = {
        part: model.get_submodule(getattr(names, part)[0].rstrip(".")) if getattr(names, part) else None
        for part in ("language_model", "tower_model", "connector")
    }
    decoder, tower = found["language_model"], found["tower_model"]
    if decoder is None or tower is None:
        raise ServingError(f"{type(model).__name__} names no language model or no vision tower")
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    layers = max(lists, key=len) if lists else nn.ModuleList()
    return Anatomy(model, model, decoder, layers, tower, found["connector"], {})
