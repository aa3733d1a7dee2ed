# SPDX-License-Identifier: Apache-2.0
"""Two small trained models that ship with the package, of a few million parameters: a stock LLaVA and a Qwen2.5-VL.

    model, processor = vtprune.refvlm.load()
    picture = vtprune.refvlm.scenes.scene(7).image
    inputs = processor(images=picture, text=vtprune.refvlm.prompt("how many stars are there?"), return_tensors="pt")
    processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

The LLaVA answers questions about the scenes of `vtprune.refvlm.scenes` and about easy-VQA; the Qwen2.5-VL,
`load(name="qwen2_5_vl")`, also about crowds, pages, pairs of pictures and clips. Pruning methods can be tried on
them in seconds, offline, on a CPU.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from . import clips, crowds, easy_vqa, pages, scenes

__all__ = [
    "CHAT_TEMPLATE",
    "IMAGE_SIZE",
    "MODELS",
    "PATCH_SIZE",
    "VISUAL_TOKENS",
    "WEIGHTS",
    "clips",
    "crowds",
    "easy_vqa",
    "load",
    "pages",
    "prompt",
    "scenes",
    "weights_sha256",
]

IMAGE_SIZE = 144
PATCH_SIZE = 12
VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
WEIGHTS = Path(__file__).parent / "weights"
MODELS = {"llava": WEIGHTS, "qwen2_5_vl": Path(__file__).parent / "weights_qwen2_5_vl"}

# The picture comes first and the instruction after it, which is what instruction-guided pruning relies on.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% else %}"
    " answer: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} answer:{% endif %}"
)


def prompt(question: str) -> str:
    """Prompt for a question, as in training: the model continues it with the answer."""
    return f"<image> {question} answer:"


def load(
    dtype: torch.dtype | None = None, name: str = "llava", **options: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads a trained model in eval mode and its processor from the files inside the package.

    Args:
        dtype: Dtype of the weights in memory, by default float32 (the file holds float16).
        name: "llava" (144 visual tokens, one row of positions) or "qwen2_5_vl" (dynamic resolution, M-RoPE).
        options: Passed to `from_pretrained`, such as `attn_implementation`.

    Returns:
        tuple[PreTrainedModel, ProcessorMixin]: The model, on the CPU, and its processor.

    Raises:
        InputError: There is no model of this name, or a name is in the place of the dtype.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if isinstance(dtype, str) and dtype in MODELS:
        raise InputError(f"dtype is {dtype!r}, the name of a built-in model; expected load(name={dtype!r})")
    if name not in MODELS:
        raise InputError(f"no built-in model {name!r}; expected one of {', '.join(MODELS)}")
    folder = MODELS[name]
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype or torch.float32, local_files_only=True, use_safetensors=True, **options
    )
    if name == "llava":
        return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
    from .qwen import PictureProcessor

    return model.eval(), PictureProcessor.from_pretrained(folder, local_files_only=True)


def weights_sha256(name: str) -> str:
    """SHA-256 of the weights of a built-in model, which results are stored with."""
    return hashlib.sha256((MODELS[name] / "model.safetensors").read_bytes()).hexdigest()


def __getattr__(name: str) -> Any:
    if name in ("scenes", "crowds", "pages", "clips", "easy_vqa"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
