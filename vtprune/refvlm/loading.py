# SPDX-License-Identifier: Apache-2.0
"""Loads any model, built-in or the user's own, and makes prompts for it, with one-line errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

from ..errors import InputError, one_line

EMBEDDED = "embedded"
# Names of the models inside the package, and what `refvlm.load` calls them.
EMBEDDED_MODELS = {EMBEDDED: "llava", f"{EMBEDDED}-qwen2_5_vl": "qwen2_5_vl"}
# Share of a model's parameters that may be missing from its files: new heads and tied weights, not a whole model.
MAX_MISSING = 0.5
# Limits of configurations. The largest open models have 126 layers, a width of 18,432 and 262,144 words.
MAX_SIZES = {
    "num_hidden_layers": 1_024,
    "depth": 1_024,
    "hidden_size": 131_072,
    "intermediate_size": 1_048_576,
    "vocab_size": 16_777_216,
    "max_position_embeddings": 1_073_741_824,
    "image_size": 16_384,
}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_log = logging.getLogger("vtprune")


def model_and_processor(name: str, device: str = "auto", dtype: str = "auto", **options: Any) -> tuple[Any, Any]:
    """Loads an image-text-to-text model in eval mode with its processor. Code that comes with a model is never run.

    Args:
        name: `embedded` or `embedded-qwen2_5_vl` for a model inside the package, a local folder (read offline), or a
            name on the hub.
        device: A torch device, or `auto` for the accelerator if there is one; not used with a `device_map`.
        dtype: A torch dtype by name, or `auto` for the one that the weights are stored in.
        options: For `from_pretrained`, such as `device_map`.

    Returns:
        tuple: The model and its processor.

    Raises:
        InputError: The folder is missing or incomplete, the model takes no pictures, its weights are not safetensors,
            or something in it cannot be read.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = None if options.get("device_map") else device_of(device)
    kind: str | torch.dtype = "auto" if dtype == "auto" else dtype_of(dtype)
    if name in EMBEDDED_MODELS:
        from .. import refvlm

        known: Any = None if kind == "auto" else kind
        model, processor = refvlm.load(known, EMBEDDED_MODELS[name], **options)
        return model if place is None else model.to(place), processor
    local = config(name)[1]
    if local:
        refuse_pickles(name)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=kind,
            local_files_only=local,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        processor = AutoProcessor.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # broken model files raise any type of error; the user gets one line
        raise InputError(f"cannot load the model {name}: {_reason(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise InputError(
            f"{name} gives a {type(processor).__name__}, which has no image processor; expected "
            "preprocessor_config.json or processor_config.json of a processor that is part of transformers"
        )
    _check_picture_size(name, processor.image_processor)
    _check_weights(name, model, info["missing_keys"])
    return model.eval() if place is None else model.eval().to(place), processor


def _reason(error: Exception) -> str:
    """One line of an error of transformers; the one about shapes refers to a report that is switched off."""
    if "ignore_mismatched_sizes" in str(error):
        return "weights in its files have other shapes than its configuration says"
    return one_line(error)


def _check_weights(name: str, model: Any, missing: Any) -> None:
    """Raises if most of a model's weights are missing in its files, and warns if some are."""
    if not missing:
        return
    some, total = ", ".join(sorted(missing)[:3]), sum(p.numel() for p in model.parameters())
    parameters = dict(model.named_parameters())
    absent = sum(parameters[key].numel() for key in missing if key in parameters)
    if absent > MAX_MISSING * total:
        raise InputError(
            f"the weights in {name} are not of this model: {absent / total:.0%} of its parameters are missing "
            f"({some} ...) and would be random; expected the files that save_pretrained wrote"
        )
    _log.warning("%d weights of %s are missing and random (%s ...)", len(missing), name, some)


def _check_sizes(found: Any, name: str) -> None:
    """Raises for absurd sizes in a configuration, which would take hours to build."""
    for part in (found, *(getattr(found, key, None) for key in getattr(found, "sub_configs", ()) or ())):
        for attribute, most in MAX_SIZES.items():
            value = getattr(part, attribute, None)
            if isinstance(value, int) and value > most:
                raise InputError(f"the config of {name} has {attribute}={value:,}; at most {most:,} is accepted")


def _check_picture_size(name: str, image_processor: Any) -> None:
    """Raises if pictures would be made absurdly large, which takes all memory."""
    for size in (getattr(image_processor, "size", None), getattr(image_processor, "crop_size", None)):
        sides = [getattr(size, side, None) for side in ("height", "width")]
        largest = max((side for side in sides if isinstance(side, int)), default=0)
        if largest > MAX_SIZES["image_size"]:
            raise InputError(
                f"the image processor of {name} makes pictures of {largest:,} pixels a side; at most "
                f"{MAX_SIZES['image_size']:,} are accepted"
            )


def refuse_pickles(name: str) -> None:
    """Checks the weight files of a local model folder before they are read.

    Raises:
        InputError: The weights are pickles, which can run code when loaded.
    """
    folder = Path(name).expanduser()
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"the weights in {folder} are pickles ({', '.join(pickles[:3])}), which can run code when they are read; "
            "expected .safetensors: if you trust the files, load them with transformers and write them anew with "
            "save_pretrained"
        )


def is_local(name: str, others: Iterable[str] = ()) -> bool:
    """Whether a model is local, by its name and folder alone.

    Args:
        name: As for `model_and_processor`.
        others: Names that the caller knows besides, for the message.

    Raises:
        InputError: It is neither a model folder nor a possible name on the hub.
    """
    if name in EMBEDDED_MODELS:
        return True
    folder = Path(name).expanduser()
    if not folder.exists() and not _HUB_NAME.fullmatch(name):
        known = ", ".join((*EMBEDDED_MODELS, *others))
        raise InputError(
            f"no folder {name}: expected a local model folder, a name on the hub such as owner/model, or one of {known}"
        )
    if not name:
        raise InputError("the name of the model is empty; expected a local model folder, or a name on the hub")
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{name} holds no config.json; expected a folder that save_pretrained has written")
    return folder.exists()


def config(name: str) -> tuple[Any, bool]:
    """The configuration of an image-text-to-text model, and whether it comes from a local folder.

    Raises:
        InputError: See `model_and_processor`.
    """
    if name in EMBEDDED_MODELS:
        from transformers import AutoConfig

        from .. import refvlm

        return AutoConfig.from_pretrained(refvlm.MODELS[EMBEDDED_MODELS[name]], local_files_only=True), True
    local = is_local(name)
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        found = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        where = "in this folder" if local else "as a folder here or on the hub"
        raise InputError(f"cannot find the model {name} {where}: {one_line(error)}") from error
    if type(found) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(
            f"{name} is a {found.model_type} model, which takes no pictures with its text; expected a vision-language "
            "model (image-text-to-text)"
        )
    _check_sizes(found, name)
    return found, local


def skeleton(name: str) -> Any:
    """The model without weights, on the meta device, to inspect its parts."""
    import torch
    from transformers import AutoModelForImageTextToText

    found, _ = config(name)
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(found, trust_remote_code=False).eval()
    except Exception as error:  # a broken configuration raises any type of error
        raise InputError(f"cannot build the model {name}: {one_line(error)}") from error


def prompt(processor: Any, image: Image, question: str) -> Any:
    """Model inputs for one picture and one question.

    The chat template of the processor is used where there is one; else the prompt is the image placeholder and the
    question on a line of its own.

    Raises:
        InputError: The processor refuses them.
    """
    try:
        if getattr(processor, "chat_template", None):
            return _chat(processor, {"type": "image", "image": image}, question)
        return processor(images=image, text=plain_text(processor, 1, question), return_tensors="pt")
    except Exception as error:  # processors raise any type of error
        raise InputError(f"{type(processor).__name__} cannot make a prompt of this: {one_line(error)}") from error


def _chat(processor: Any, shown: dict[str, Any], question: str) -> Any:
    """Model inputs by the processor's chat template."""
    return processor.apply_chat_template(
        [{"role": "user", "content": [shown, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def plain_text(processor: Any, pictures: int, question: str) -> str:
    """Prompt without a chat template: placeholders of pictures, and the question on a line of its own."""
    mark = getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None) or ""
    return f"{mark * pictures}\n{question}".lstrip("\n")


def inputs(model: Any, processor: Any, image: Image, question: str, new_tokens: int = 0) -> dict[str, Any]:
    """`prompt` on the model's device, pixels in its dtype.

    Args:
        model, processor: From `model_and_processor`.
        image: A picture.
        question: A question.
        new_tokens: Number of tokens to generate.

    Raises:
        InputError: The processor rejects them, or the model has too few positions for prompt and answer.
    """
    made = prompt(processor, image, question).to(model.device)
    length = made["input_ids"].shape[1]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and length + new_tokens > most:
        answer = f" and {new_tokens:,} of the answer" if new_tokens else ""
        raise InputError(
            f"the prompt has {length:,} tokens{answer}, and the model {most:,} positions; expected a shorter question"
            + (" or fewer new tokens" if new_tokens else "")
        )
    return in_dtype(model, made)


def in_dtype(model: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """Model inputs with pixels in the model's dtype."""
    floats = {name for name, value in made.items() if hasattr(value, "is_floating_point") and value.is_floating_point()}
    return {name: value.to(model.dtype) if name in floats else value for name, value in made.items()}


def clip_prompt(model: Any, processor: Any, frames: Sequence[Image], question: str) -> dict[str, torch.Tensor]:
    """Model inputs for one clip and one question, on the model's device.

    Processors with a video half make them by their chat template; for those of a Qwen2.5-VL without one (torchvision is
    not needed then) the clip stands before the question.

    Raises:
        InputError: The processor cannot take clips, or refuses this one.
    """
    from . import clip_inputs

    try:
        if getattr(processor, "video_processor", None) is not None:
            made = _chat(processor, {"type": "video", "video": list(frames)}, question)
        elif hasattr(model.config, "video_token_id") and hasattr(model.config.vision_config, "temporal_patch_size"):
            sizes = sorted({frame.size for frame in frames})
            if len(sizes) > 1 or len(frames) % model.config.vision_config.temporal_patch_size:
                raise InputError(f"{len(frames)} frames of sizes {sizes}")
            made = clip_inputs.inputs(model, processor, frames, f" {question} answer:")
        else:
            raise InputError(f"{type(model).__name__} takes no clips")
    except Exception as error:  # processors raise any type of error
        raise InputError(
            f"{type(processor).__name__} cannot make a prompt of this clip: {one_line(error)}; expected an even number "
            "of frames of one size, and a model that takes clips"
        ) from error
    return in_dtype(model, {name: value.to(model.device) for name, value in made.items()})


def dtype_of(name: str) -> torch.dtype:
    """A floating-point dtype that a model can compute in, by its name.

    Raises:
        InputError: There is none of this name.
    """
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise InputError(f"unknown dtype {name!r}; expected auto, float32, bfloat16 or float16")
    return found


def device_of(name: str) -> torch.device:
    """A device by its name; `auto` is the accelerator if there is one.

    Raises:
        InputError: It cannot be used.
    """
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device, dtype=torch.float32).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"cannot use the device {name!r}: {one_line(error)}") from error
    return device
