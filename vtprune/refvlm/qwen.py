# SPDX-License-Identifier: Apache-2.0
"""The processor of the second built-in model, a stock Qwen2.5-VL: pictures of any size, several of them, and clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from ..errors import InputError

PATCH_SIZE = 6
MERGE_SIZE = 2
CELL = PATCH_SIZE * MERGE_SIZE  # pixels of one visual token in each direction


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
            raise InputError(
                f"found {wanted} {token} in the text and {len(counts)} {kind}; expected one {token} for each"
            )
        left = iter(counts)
        start, end = self.marks
        parts = [prompt.split(token) for prompt in prompts]
        return [head + "".join(start + token * next(left) + end + part for part in rest) for head, *rest in parts]

    def _clips(self, clips: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Pixel values and grids of clips: every two frames become one layer of patches."""
        pixels, grids = [], []
        for clip in clips:
            if len(clip) < 2 or len(clip) % 2:
                raise InputError(f"a clip has {len(clip)} frames; expected an even number of them, at least 2")
            frames = self.image_processor(images=list(clip), return_tensors="pt")
            _, rows, columns = frames["image_grid_thw"][0].tolist()
            # A picture is two equal frames there: [frames, patches, color, 2, pixels] -> a frame and the one after it.
            single = frames["pixel_values"].view(len(clip), rows * columns, 3, 2, -1)[:, :, :, 0]
            pixels.append(torch.stack((single[::2], single[1::2]), dim=3).flatten(2).flatten(0, 1))
            grids.append([len(clip) // 2, rows, columns])
        return {
            "pixel_values_videos": torch.cat(pixels),
            "video_grid_thw": torch.tensor(grids),
            "second_per_grid_ts": torch.ones(len(grids), dtype=torch.float32),
        }
