# SPDX-License-Identifier: Apache-2.0
"""The second reference model: a stock Qwen2.5-VL, with dynamic resolution, windows, a patch merger and M-RoPE.

It shares words, prompts and decoder widths with the first one, and its training starts from the decoder of that one.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    The stock `Qwen2_5_VLProcessor` cannot be constructed without torchvision, which its video half wants. Where the
    tokenizer has `<vision_start>` and `<vision_end>`, they are written around every picture and clip, so that two of
    them can stand side by side. Where it has `<video>`, clips are taken, too.

    Args:
        image_processor: a `Qwen2VLImageProcessor`.
        tokenizer: with the word `<image>`.
        chat_template: Jinja text.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        words = tokenizer.get_vocab()
        self.video_token_id = words.get(self.video_token)
        self.marks = ("<vision_start>", "<vision_end>") if "<vision_start>" in words else ("", "")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Pixel values, their grids, token ids and token types of one prompt or several.

        Args:
            images: pictures in the order of the `<image>` words, or None.
            text: a prompt or a list of prompts.
            videos: clips in the order of the `<video>` words, each a list of an even number of frames, or None.
            return_tensors: "pt".
            kwargs: for the tokenizer, such as `padding`.

        Raises:
            ValueError: if pictures and `<image>` words, or clips and `<video>` words, are not equally many, or a clip
                has an odd number of frames.
        """
        seen: dict[str, Any] = {}
        if images is not None:
            seen |= self.image_processor(images=images, return_tensors=return_tensors)
        if videos is not None:
            seen |= self._clips([videos] if videos and not isinstance(videos[0], list | tuple) else videos)
        prompts = [text] if isinstance(text, str) else list(text)
        for token, name, kind in ((self.image_token, "image", "pictures"), (self.video_token, "video", "clips")):
            grids = seen.get(f"{name}_grid_thw")
            counts = [] if grids is None else (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
            prompts = self._expanded(prompts, token, counts, kind)
        for name in ("return_dict", "add_special_tokens"):  # what chat templates pass on
            kwargs.pop(name, None)
        encoded = self.tokenizer(prompts, return_tensors=return_tensors, **kwargs)
        types = (encoded["input_ids"] == self.image_token_id).int()
        if self.video_token_id is not None:
            types += 2 * (encoded["input_ids"] == self.video_token_id).int()
        return BatchFeature({**encoded, "mm_token_type_ids": types, **seen})

    def _expanded(self, prompts: list[str], token: str, counts: list[int], kind: str) -> list[str]:
        """The prompts with every `token` as often as its picture or clip has visual tokens, between the marks."""
        wanted = sum(prompt.count(token) for prompt in prompts)
        if wanted != len(counts):
            raise ValueError(f"{wanted} {token} in the text, but {len(counts)} {kind}")
        left = iter(counts)
        start, end = self.marks
        parts = [prompt.split(token) for prompt in prompts]
        return [head + "".join(start + token * next(left) + end + part for part in rest) for head, *rest in parts]

    def _clips(self, clips: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Pixel values and grids of clips: every two frames become one layer of patches."""
        pixels, grids = [], []
        for clip in clips:
            if len(clip) < 2 or len(clip) % 2:
                raise ValueError(f"a clip has {len(clip)} frames; expected an even number of them, at least 2")
            frames = self.image_processor(images=list(clip), return_tensors="pt")
            _, rows, columns = frames["image_grid_thw"][0].tolist()
            # A picture is two equal frames there: [frames, patches, color, 2, pixels] -> a frame and the one after it.
            single = frames["pixel_values"].view(len(clip), rows * columns, 3, 2, -1)[:, :, :, 0]
            pixels.append(torch.stack((single[::2], single[1::2]), dim=3).flatten(2).flatten(0, 1))
            grids.append([len(clip) // 2, rows, columns])
        return {
            "pixel_values_videos": torch.cat(pixels),
            "video_grid_thw": torch.tensor(grids),
            "second_per_grid_ts": torch.ones(len(grids)),
        }


def processor(
    tokenizer: PreTrainedTokenizerFast, pixels: tuple[int, int] = (MIN_PIXELS, MAX_PIXELS)
) -> PictureProcessor:
    """The processor of the model.

    Args:
        tokenizer: that of the first model, or one with more words.
        pixels: smaller pictures are enlarged to the first number of pixels, larger ones reduced to the second.
    """
    from transformers import Qwen2VLImageProcessorPil

    from . import CHAT_TEMPLATE

    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        temporal_patch_size=2,
        merge_size=MERGE_SIZE,
        size={"shortest_edge": pixels[0], "longest_edge": pixels[1]},
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
