# SPDX-License-Identifier: Apache-2.0
"""Finds the parts of a vision-language model by structure, not by class name.

In order:

* the decoder: the module that owns the input embeddings and a list of layers;
* the vision tower: the outermost sub-model outside the decoder that takes images, or, failing that, that holds the
  convolution (or linear layer) over pixels;
* the composite: the smallest module that holds both, and hence sees `input_ids` and calls the decoder;
* the projector: the module between the two whose output has the decoder's width;
* the placeholder ids: the token ids of the config that stand for visual features in a prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from . import unsupported

_IMAGE_IDS = (
    "image_token_id",
    "image_token_index",
    "img_context_token_id",
    "image_pad_token_id",
    "media_placeholder_token_id",
    "image_patch_id",
    "im_patch_id",
)
# Parts beside the projector whose output has the decoder's width: of sound, and of pictures that the model makes.
_OF_OTHERS = re.compile("audio|sound|speech|generation", re.IGNORECASE)
_VIDEO_IDS = ("video_token_id", "video_token_index", "video_pad_token_id", "video_patch_id")


@dataclass(eq=False)
class Anatomy:
    """The parts of a model that pruning uses.

    Attributes:
        model: The model inside any wrapper (PEFT, `torch.compile`, data parallel).
        composite: The module that takes `input_ids` and pixels and calls the decoder.
        decoder: The language model without its head.
        layers: The decoder's layers, in order.
        vision_tower: The image encoder.
        projector: The module from vision width to decoder width, or None if none was found.
        placeholders: Token id by kind ("image", "video").
        names: Dotted name in `model` by part, for printing.
    """

    model: nn.Module
    composite: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    vision_tower: nn.Module
    projector: nn.Module | None
    placeholders: dict[str, int]
    names: dict[str, str] = field(default_factory=dict)

    @cached_property
    def mixes_columns(self) -> bool:
        """Whether some layers mix positions other than by attention, with a convolution or a recurrent state."""
        parts = (m for layer in self.layers for m in layer.modules())
        return any(
            isinstance(m, nn.Conv1d) or re.search("mamba|deltanet|shortconv", type(m).__name__.lower()) for m in parts
        )

    @cached_property
    def layers_both_ways(self) -> frozenset[int]:
        """Numbers of the layers that attend to later columns too where they are given no mask (encoders)."""
        return frozenset(
            number
            for number, layer in enumerate(self.layers)
            if any(getattr(module, "is_causal", None) is False for module in layer.modules())
        )

    @cached_property
    def has_own_head(self) -> bool:
        """Whether `model` has a head over the decoder that is not a language model's, such as a classifier's."""
        words = getattr(self.model, "get_output_embeddings", lambda: None)
        return self.model is not self.composite and words() is None

    @cached_property
    def padding_id(self) -> int | None:
        """Token id by which classifiers find the last token of a row, whatever the attention mask says: it is the last
        one with another id. None where no head does so."""
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text, "pad_token_id", None) if self.has_own_head else None

    @cached_property
    def labels_next(self) -> bool:
        """Whether the loss compares a column with the label of the next one, as language models do; classifiers of
        tokens and encoders that fill in words compare it with its own."""
        generates = getattr(self.model, "can_generate", lambda: True)()
        return generates or not (self.has_own_head or self.layers_both_ways)

    @cached_property
    def reads_first(self) -> bool:
        """Whether the model's head reads the first column of a row."""
        return self.has_own_head and getattr(self.model.config, "classifier_pooling", None) == "cls"

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def width(self) -> int | None:
        """Width of a token's state in the decoder, None if the decoder's config does not tell it."""
        return getattr(getattr(self.decoder, "config", None), "hidden_size", None)

    @property
    def config(self) -> Any:
        """Config of the composite, which describes image sizes and layouts."""
        return self.composite.config

    @property
    def embeddings(self) -> nn.Module:
        """The module that turns token ids into states."""
        return self.model.get_input_embeddings()

    def is_placeholder(self, ids: Tensor) -> Tensor:
        """Which of the token ids stand for visual features: bool, in the shape of `ids`."""
        return torch.isin(ids, torch.tensor(list(self.placeholders.values()), device=ids.device))

    def __str__(self) -> str:
        rows = [("model", type(self.model).__name__)]
        for part in ("composite", "decoder", "vision_tower", "projector"):
            module = getattr(self, part)
            text = "none found" if module is None else f"{self.names.get(part) or '(root)'}: {type(module).__name__}"
            rows.append((part, text))
        rows.insert(4, ("layers", f"{self.num_layers} x {type(self.layers[0]).__name__}"))
        rows.append(("placeholders", ", ".join(f"{kind} = {i}" for kind, i in self.placeholders.items())))
        return "\n".join(f"{name:<13} {text}" for name, text in rows)


def find(model: nn.Module) -> Anatomy:
    """Finds the parts of `model`.

    Args:
        model: A transformers vision-language model, or one wrapped by PEFT, `torch.compile` or data parallelism.

    Raises:
        UnsupportedModelError: A part is missing, or the structure is not supported; the message says what was expected.
    """
    inner = unwrap(model)
    if not hasattr(inner, "config") or not hasattr(inner, "get_input_embeddings"):
        raise UnsupportedModelError(
            f"{type(inner).__name__} is not a transformers model: expected a PreTrainedModel with a config and input "
            "embeddings"
        )
    try:
        inner.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        held = {name: type(part).__name__ for name, part in _held_models(inner).items() if _generates(part)}
        found = "".join(f"; it holds one ({kind}): patch model.{name} instead" for name, kind in held.items())
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no input embeddings: expected a vision-language model that generates text "
            f"from a prompt with visual tokens{found}"
        ) from None
    paths = {module: name for name, module in inner.named_modules()}
    unsupported.refuse_encoder_decoder(inner)
    decoder, layers = _find_decoder(inner, paths)
    unsupported.refuse_cross_attention(inner, decoder)
    unsupported.refuse_own_generate(inner)
    unsupported.refuse_block_states(inner, layers)
    unsupported.refuse_shared_selection(inner, layers)
    unsupported.refuse_relative_attention(inner, layers)
    tower = _find_vision_tower(inner, decoder, layers, paths)
    composite = _common_ancestor(inner, paths[decoder], paths[tower])
    unsupported.refuse_second_decoder(inner, composite)
    placeholders = _find_placeholders(inner, composite)
    projector = _find_projector(composite, decoder, tower)
    parts = {"composite": composite, "decoder": decoder, "vision_tower": tower, "projector": projector}
    names = {part: paths[module] for part, module in parts.items() if module is not None}
    return Anatomy(inner, composite, decoder, layers, tower, projector, placeholders, names)


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the transformers model inside wrappers: PEFT, `torch.compile`, data parallelism, FSDP.

    Other modules that hold a transformers model, such as training engines, value heads and sentence-transformers, are
    wrappers too.

    Raises:
        UnsupportedModelError: It is no module, or holds several transformers models; the message names them.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}; expected a torch.nn.Module from transformers")
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif "_fsdp_wrapped_module" in model._modules:
            model = cast(nn.Module, model._fsdp_wrapped_module)
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif not _is_model(model):
            held = _held_models(model)
            if not held:
                return model
            if len(held) > 1:
                raise UnsupportedModelError(
                    f"{type(model).__name__} holds several transformers models "
                    f"({', '.join(f'{name}: {type(inner).__name__}' for name, inner in held.items())}); pass the one "
                    "that takes images"
                )
            model = next(iter(held.values()))
        else:
            return model


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a transformers model: it has a config, and its class has `get_input_embeddings`."""
    return hasattr(module, "config") and hasattr(type(module), "get_input_embeddings")


def _held_models(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models inside a module, by name; only those that take images, if any do."""
    found: dict[str, nn.Module] = {}
    for name, inner in module.named_modules():
        if inner is not module and _is_model(inner) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = inner
    with_vision = {name: inner for name, inner in found.items() if any(map(_takes_images, inner.modules()))}
    return with_vision or found


def _generates(module: nn.Module) -> bool:
    """Whether a module is a model that generates text."""
    return bool(getattr(module, "can_generate", lambda: False)())


def _layer_list(module: nn.Module) -> nn.ModuleList | None:
    """The `ModuleList` among a module's children: the one called `layers`, or else the longest; None without any."""
    lists = [
        (name, child) for name, child in module.named_children() if isinstance(child, nn.ModuleList) and len(child)
    ]
    if not lists:
        return None
    return max(lists, key=lambda item: (item[0] == "layers", len(item[1])))[1]


def _find_decoder(model: nn.Module, paths: dict[nn.Module, str]) -> tuple[nn.Module, nn.ModuleList]:
    candidates = []
    embeddings = model.get_input_embeddings()
    if embeddings in paths:
        path = paths[embeddings]
        while path:
            path = path.rpartition(".")[0]
            candidates.append(model.get_submodule(path))
    named = model.get_decoder() if hasattr(model, "get_decoder") else None
    if named is not None:
        candidates.append(named)
    for candidate in candidates:
        layers = _layer_list(candidate)
        if layers is not None:
            return candidate, layers
        for child in candidate.children() if candidate is not model else ():
            layers = _layer_list(child)
            if layers is not None:
                return child, layers
    raise UnsupportedModelError(
        f"no decoder found in {type(model).__name__}: expected a module that owns the input embeddings and a "
        "ModuleList of layers (looked at the owner of get_input_embeddings() and at get_decoder())"
    )


def _takes_images(module: nn.Module) -> bool:
    modalities = getattr(module, "input_modalities", ())
    modalities = (modalities,) if isinstance(modalities, str) else tuple(modalities or ())
    return "pixel" in str(getattr(module, "main_input_name", "")) or bool({"image", "video"} & set(modalities))


def _find_vision_tower(
    model: nn.Module, decoder: nn.Module, layers: nn.ModuleList, paths: dict[nn.Module, str]
) -> nn.Module:
    in_decoder, in_layers, decoder_path = set(decoder.modules()), set(layers.modules()), paths[decoder]
    candidates = [
        (name, module)
        for module, name in paths.items()
        if module not in in_layers and name and not (decoder_path + ".").startswith(name + ".")
    ]
    outside = [(name, module) for name, module in candidates if module not in in_decoder]
    # Early-fusion models keep the encoder inside the decoder, beside its layers: searched last.
    for _, module in (*outside, *candidates):
        # Sub-models are PreTrainedModels with a config of their own; the first in module order is the outermost.
        if hasattr(module, "config") and hasattr(module, "post_init") and _takes_images(module):
            return module
    for name, module in outside:
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.in_channels == 3:
            return model.get_submodule(_outermost_outside(name, decoder_path))
    for name, module in outside:
        # A patch embedding may be a single linear layer, which only its name gives away.
        if re.search("vis|image", name.rpartition(".")[2]):
            return module
    reason = (
        "this model embeds patches inside its decoder; models with a vision tower of their own work"
        if _takes_images(model)
        else "a text-only model has no visual tokens to prune"
    )
    raise UnsupportedModelError(
        f"no vision tower found in {type(model).__name__}: expected a sub-model outside the decoder "
        f"({paths[decoder] or 'root'}: {type(decoder).__name__}) that takes pixels; {reason}"
    )


def _outermost_outside(name: str, decoder_path: str) -> str:
    """Path of the outermost ancestor of `name` that does not contain the decoder."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        prefix = ".".join(parts[:length])
        if not (decoder_path + ".").startswith(prefix + "."):
            return prefix
    return name


def _common_ancestor(model: nn.Module, first: str, second: str) -> nn.Module:
    names = zip(first.split("."), second.split("."), strict=False)
    return model.get_submodule(".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], names)))


def _ids_in(configs: list[Any]) -> dict[str, int]:
    """Placeholder ids by kind, of each kind the one in the first config that has one."""
    found: dict[str, int] = {}
    for kind, candidates in (("image", _IMAGE_IDS), ("video", _VIDEO_IDS)):
        for config in configs:
            value = next((v for n in candidates if isinstance(v := getattr(config, n, None), int)), None)
            if value is not None:
                found.setdefault(kind, value)
    return found


def _find_placeholders(model: nn.Module, composite: nn.Module) -> dict[str, int]:
    configs = [getattr(composite, "config", None), model.config]
    # Phi-4 has the id in the config of its tower.
    found = _ids_in(configs) or _ids_in([getattr(config, "vision_config", None) for config in configs])
    if not found:
        raise UnsupportedModelError(
            f"no placeholder token ids found in the config of {type(model).__name__}: expected one of "
            f"{', '.join(_IMAGE_IDS[:3] + _VIDEO_IDS[:1])} ..., the ids that stand for visual features in input_ids; "
            "models that prepend images without placeholder tokens are not supported"
        )
    return found


def _ends_in(module: nn.Module, width: int) -> bool:
    # Serving engines replace nn.Linear by classes with `output_size`.
    widths = [w for m in module.modules() if (w := getattr(m, "out_features", getattr(m, "output_size", None)))]
    if not widths:  # Gemma 3 has a bare matrix
        widths = [weight.shape[-1] for weight in module.parameters(recurse=False) if weight.dim() == 2]
    return width in widths[-2:]


def _find_projector(composite: nn.Module, decoder: nn.Module, tower: nn.Module) -> nn.Module | None:
    config: Any = getattr(decoder, "config", None)
    width = getattr(config, "hidden_size", -1)
    related = set(decoder.modules()) | set(tower.modules())
    parts = [m for name, m in composite.named_children() if not _OF_OTHERS.search(name)]
    own = [m for m in parts if m not in related and not set(m.modules()) & related]
    candidates = [m for m in own if _ends_in(m, width)]
    if not candidates:
        # In Qwen models the merger is the last part of the tower.
        candidates = [
            m for name, m in tower.named_children() if not isinstance(m, nn.ModuleList) and _ends_in(m, width)
        ]
    return candidates[-1] if candidates else None
