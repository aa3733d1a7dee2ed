# SPDX-License-Identifier: Apache-2.0
"""Video: one budget over all frames, which the method divides among them.

Two ways, and what can be shown of each without a download:

* Frames as several pictures, the way to show a clip to a model without a video input. The embedded model is such a
  model (a LLaVA), and trained, so its answer means something. It was trained on single pictures.
* A model with a video input. None is inside the package, so this one is built here, tiny and with RANDOM weights: the
  counts are those of a real run, an answer would mean nothing.
"""

from __future__ import annotations

import torch
from PIL import Image, ImageChops

import vtprune
from vtprune import refvlm

FRAMES = 5


def clip() -> tuple[list[Image.Image], refvlm.scenes.Question]:
    """A camera that pans over a scene, and a question about it."""
    scene = refvlm.scenes.scene(7)
    question = next(question for question in scene.questions if question.kind == "digit")
    return [ImageChops.offset(scene.image, 6 * number, 0) for number in range(FRAMES)], question


def frames_as_pictures() -> None:
    model, processor = refvlm.load()
    frames, question = clip()
    text = " , ".join(["<image>"] * FRAMES) + f" {question.text} answer:"
    inputs = processor(images=frames, text=text, return_tensors="pt")
    with vtprune.patch(model, ratio=0.1) as patch:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    before, after = patch.last.tokens
    print(f"frames as pictures: {question.text} {answer} (right: {question.answer})")
    print(f"  {before} -> {after} visual tokens, per frame {_per(patch.last, patch.last.places.image)}")


def video_input() -> None:
    model = random_video_model()
    frames, _ = clip()
    size = model.config.vision_config.image_size
    pictures = [torch.tensor(list(frame.resize((size, size)).tobytes())).view(size, size, 3) for frame in frames]
    video = (torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)[None]  # [1, FRAMES, 3, size, size]
    placeholders = [model.config.video_token_id] * (FRAMES * 36 + 1)  # 12 x 12 patches a frame, pooled to 6 x 6
    inputs = {"input_ids": torch.tensor([[1, *placeholders, 20, 21, 22]]), "pixel_values_videos": video}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with vtprune.patch(model, ratio=0.1, method="divprune") as patch:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    before, after = patch.last.tokens
    print(f"video input (random weights): {before} -> {after}, per frame {_per(patch.last, patch.last.places.frame)}")


def random_video_model() -> torch.nn.Module:
    """A LLaVA-OneVision with two small layers. Yours: `from_pretrained`, and a processor that reads the file."""
    from transformers import AutoModelForImageTextToText, LlavaOnevisionConfig

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 48, "patch_size": 4, "vision_use_head": False}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"model_type": "qwen2", "vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    ids = {"image_token_id": 3, "video_token_id": 4}
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, vision_feature_layer=-1, **ids)
    return AutoModelForImageTextToText.from_config(config).eval()


def _per(last: vtprune.Pruning, group: torch.Tensor) -> list[int]:
    """Kept tokens of each frame."""
    frames = group[last.kept_flat[-1]]
    return torch.bincount(frames[frames >= 0], minlength=FRAMES).tolist()  # a separator belongs to no frame


if __name__ == "__main__":
    frames_as_pictures()
    video_input()
