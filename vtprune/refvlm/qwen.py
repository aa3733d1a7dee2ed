# SPDX-License-Identifier: Apache-2.0
"""The second reference model: a stock Qwen2.5-VL, with dynamic resolution, windows, a patch merger and M-RoPE.

It shares words, prompts and decoder widths with the first one, and its training starts from the decoder of that one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BatchFeature,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

PATCH_SIZE = 6
MERGE_SIZE = 2
CELL = PATCH_SIZE * MERGE_SIZE  # pixels of one visual token in each direction
WINDOW = 48  # pixels: windows of 4 x 4 visual tokens
# Pictures outside are enlarged or reduced, without changing their shape: about 81 to 144 visual tokens.
MIN_PIXELS, MAX_PIXELS = 108 * 108, 144 * 144


class PictureProcessor(ProcessorMixin):
    """Qwen's own image processor and a tokenizer; `<image>` in a text becomes as many tokens as its picture has.

    The stock `Qwen2_5_VLProcessor` cannot be constructed without torchvision, which its video half wants.

    Args:
        image_processor: a `Qwen2VLImageProcessor`.
        tokenizer: with the word `<image>`.
        chat_template: Jinja text.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        """Pixel values, their grids, token ids and token types of one prompt or several.

        Args:
            images: pictures in the order of the `<image>` words, or None.
            text: a prompt or a list of prompts.
            return_tensors: "pt".
            kwargs: for the tokenizer, such as `padding`.

        Raises:
            ValueError: if pictures and `<image>` words are not equally many.
        """
        pictures: Any = {}
        counts: list[int] = []
        if images is not None:
            pictures = self.image_processor(images=images, return_tensors=return_tensors)
            counts = (pictures["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        prompts = [text] if isinstance(text, str) else list(text)
        wanted = sum(prompt.count(self.image_token) for prompt in prompts)
        if wanted != len(counts):
            raise ValueError(f"{wanted} {self.image_token} in the text, but {len(counts)} pictures")
        left = iter(counts)
        parts = [prompt.split(self.image_token) for prompt in prompts]
        prompts = [head + "".join(self.image_token * next(left) + part for part in rest) for head, *rest in parts]
        for name in ("return_dict", "add_special_tokens"):  # what chat templates pass on
            kwargs.pop(name, None)
        encoded = self.tokenizer(prompts, return_tensors=return_tensors, **kwargs)
        types = (encoded["input_ids"] == self.image_token_id).int()
        return BatchFeature({**encoded, "mm_token_type_ids": types, **pictures})


def processor(tokenizer: PreTrainedTokenizerFast) -> PictureProcessor:
    """The processor of the model, with `tokenizer` of the first one."""
    from transformers import Qwen2VLImageProcessorPil

    from . import CHAT_TEMPLATE

    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        temporal_patch_size=2,
        merge_size=MERGE_SIZE,
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return PictureProcessor(images, tokenizer, CHAT_TEMPLATE)


def config(vocabulary: dict[str, int]) -> Qwen2_5_VLConfig:
    """4 vision blocks, two of them with windows; 6 decoder layers with 6 query and 2 key-value heads."""
    ids = {f"{name}_token_id": vocabulary[f"<{name}>"] for name in ("pad", "bos", "eos")}
    size = len(vocabulary)
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        "window_size": WINDOW,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 192,
    }
    text = {
        "vocab_size": size + 3,  # no word is left for the tokens that only videos and other prompts have
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        **ids,
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocabulary["<image>"],
        video_token_id=size,
        vision_start_token_id=size + 1,
        vision_end_token_id=size + 2,
        tie_word_embeddings=True,
        **ids,
    )


def build(seed: int, vocabulary: dict[str, int], first: Any) -> Qwen2_5_VLForConditionalGeneration:
    """The model with an untrained vision side and the word vectors and decoder layers of the first model, `first`.

    The two decoders differ in how positions turn queries and keys, and in the biases, which start at zero here.
    """
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config(vocabulary))
    decoder: Any = model.model.language_model
    learned = dict(first.model.language_model.state_dict())
    words = learned.pop("embed_tokens.weight")
    with torch.no_grad():
        decoder.embed_tokens.weight.zero_()[: len(words)] = words
    missing, unexpected = decoder.load_state_dict(learned, strict=False)
    if unexpected or any(not name.endswith(".bias") and "embed_tokens" not in name for name in missing):
        raise RuntimeError(f"the first model's decoder does not fit: missing {missing}, unexpected {unexpected}")
    model.generation_config.max_new_tokens = 64
    model.generation_config.do_sample = False
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", vocabulary[f"<{name}>"])
    return model
