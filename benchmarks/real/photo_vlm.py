# SPDX-License-Identifier: Apache-2.0
"""A stock LLaVA of real parts: a DINOv2 tower, SmolLM2, and a projector that is fitted, not trained.

The projector is a ridge regression from the tower's tokens to the word vector of each patch's color. So visual tokens
are as large as words and mean something, but the model was never taught to answer questions about pictures: it serves
to see what methods keep of photographs, not whether answers are right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from . import parts, text_vlm

PATCH = 14  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLORS = {
    "black": (15, 15, 15), "white": (240, 240, 240), "gray": (128, 128, 128), "red": (190, 40, 40),
    "green": (60, 130, 60), "blue": (50, 80, 180), "yellow": (220, 200, 60), "brown": (110, 70, 40),
    "orange": (220, 130, 50), "pink": (230, 170, 170),
}  # fmt: skip
RIDGE = 10.0


def square(image: Image.Image, grid: int) -> Image.Image:
    """The middle square of a picture, `grid` patches wide and high."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((grid * PATCH,) * 2, Image.Resampling.BICUBIC)


def pixels(images: list[Image.Image]) -> Tensor:
    """Pictures of equal size as the tower wants them, float32 `[B, 3, H, W]`."""
    array = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
    return torch.from_numpy((array - np.float32(MEAN)) / np.float32(STD)).permute(0, 3, 1, 2).contiguous()


def color_words(image: Image.Image, grid: int) -> list[str]:
    """The name of every patch's mean color, row by row."""
    mean = np.asarray(image, dtype=np.float32).reshape(grid, PATCH, grid, PATCH, 3).mean((1, 3)).reshape(-1, 1, 3)
    names, values = list(COLORS), np.float32(list(COLORS.values()))
    return [names[index] for index in ((mean - values) ** 2).sum(-1).argmin(-1)]


@torch.no_grad()
def projector(tower: Any, words: nn.Embedding, images: list[Image.Image], grid: int) -> nn.Linear:
    """The ridge regression from what `tower` sees of `images` to the word vectors of the patches' colors."""
    tokenizer = parts.tokenizer()
    seen = torch.cat([tower(pixels([image])).last_hidden_state[0, 1:] for image in images]).double()
    ids = [tokenizer(f" {word}")["input_ids"][0] for image in images for word in color_words(image, grid)]
    wanted = words(torch.tensor(ids)).double()
    middle, goal = seen.mean(0), wanted.mean(0)
    centered = seen - middle
    gram = centered.T @ centered + RIDGE * torch.eye(seen.shape[1], dtype=torch.double)
    weight = torch.linalg.solve(gram, centered.T @ (wanted - goal)).T
    linear = nn.Linear(seen.shape[1], wanted.shape[1])
    linear.weight.copy_(weight)
    linear.bias.copy_(goal - weight @ middle)
    return linear


def load(images: list[Image.Image], grid: int, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """The model in eval mode, its projector fitted on `images`, each `grid` patches wide and high."""
    tower, decoder = parts.tower(), parts.decoder(torch.float32)
    linear = projector(tower, decoder.model.embed_tokens, images, grid)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_id=parts.tokenizer().convert_tokens_to_ids(text_vlm.PLACEHOLDER),
        image_seq_length=grid * grid,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
    model.model.vision_tower, model.model.multi_modal_projector = tower, linear
    model.generation_config = decoder.generation_config
    return model.to(dtype).eval()


def inputs(images: list[Image.Image], grid: int, question: str) -> dict[str, Tensor]:
    """Arguments of `forward` and `generate`: the same question about every picture."""
    tokenizer = parts.tokenizer()
    place = tokenizer.convert_tokens_to_ids(text_vlm.PLACEHOLDER)
    head = tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    tail = tokenizer(f"\n{question}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    row = [*head, *[place] * (grid * grid), *tail]
    ids = torch.tensor([row] * len(images))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(images)}
