# SPDX-License-Identifier: Apache-2.0
"""Video: one budget over all frames, which the method divides among them.

Two ways, both with the trained models inside the package:

* Frames as several pictures, the way to show a clip to a model without a video input, such as the LLaVA.
* A video input: `pixel_values_videos`, as the Qwen2.5-VL takes it. Two frames make one time step, and a token of it
  is a patch through both.

Both models were trained on single pictures and have never seen anything move. A still clip is a picture to them, only
longer; of a clip that moves they tell less well what they see, pruned or not. Models trained on videos do not differ in
how they are pruned.

    python examples/04_video.py --method divprune --ratio 0.05 --pan 0
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image, ImageChops

import vtprune
from vtprune import refvlm

FRAMES = 4


def clip(seed: int, pan: int) -> tuple[list[Image.Image], refvlm.scenes.Question]:
    """A camera that moves `pan` pixels a frame over a scene, and a question about it."""
    scene = refvlm.scenes.scene(seed)
    question = next((question for question in scene.questions if question.kind == "digit"), scene.questions[0])
    return [ImageChops.offset(scene.image, pan * number, 0) for number in range(FRAMES)], question


def as_pictures(processor, frames: list[Image.Image], question: str) -> dict[str, torch.Tensor]:
    """The frames one after the other, each in its own place of the prompt."""
    text = " , ".join(["<image>"] * len(frames)) + f" {question} answer:"
    return processor(images=frames, text=text, return_tensors="pt")


def as_video(model, processor, frames: list[Image.Image], question: str) -> dict[str, torch.Tensor]:
    """What the processor of a large Qwen2.5-VL makes of a video file; ours has no video half (no torchvision)."""
    pictures = processor.image_processor(images=frames, return_tensors="pt")
    vision = model.config.vision_config
    steps, (_, rows, columns) = len(frames) // vision.temporal_patch_size, pictures["image_grid_thw"][0].tolist()
    # A picture is prepared as a time step of two equal frames: one of them is taken from either picture of a pair.
    shape = (steps, 2, rows * columns, vision.in_channels, vision.temporal_patch_size, -1)
    pixels = pictures["pixel_values"].view(shape)  # [T, 2, h w, 3, 2, p p]
    pairs = torch.stack([pixels[:, 0, :, :, 0], pixels[:, 1, :, :, 1]], dim=3)  # [T, h w, 3, 2, p p]
    tokens = steps * rows * columns // vision.spatial_merge_size**2
    words = processor.tokenizer(f" {question} answer:", return_tensors="pt")["input_ids"]
    ids = torch.cat([torch.full((1, tokens), model.config.video_token_id), words], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == model.config.video_token_id).int(),  # 1 would be a picture
        "pixel_values_videos": pairs.flatten(2).flatten(0, 1),  # [T h w, 3 x 2 x p x p]
        "video_grid_thw": torch.tensor([[steps, rows, columns]]),
    }


def answer(model, processor, inputs: dict[str, torch.Tensor]) -> str:
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Prunes a clip: as several pictures, and as a video.")
    parser.add_argument("--method", default="iwp")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--pan", type=int, default=6, help="pixels that the camera moves from frame to frame")
    parser.add_argument("--scene", type=int, default=7)
    args = parser.parse_args()
    frames, question = clip(args.scene, args.pan)

    for way, name in (("frames as pictures", "llava"), ("video input", "qwen2_5_vl")):
        model, processor = refvlm.load(name=name)
        if name == "llava":
            inputs = as_pictures(processor, frames, question.text)
        else:
            inputs = as_video(model, processor, frames, question.text)
        whole = answer(model, processor, inputs)
        with vtprune.patch(model, ratio=args.ratio, method=args.method) as patch:
            pruned = answer(model, processor, inputs)
        before, after = patch.last.tokens
        places = patch.last.places.image if name == "llava" else patch.last.places.frame
        kept = torch.bincount(places[patch.last.kept_flat[-1]], minlength=int(places.max()) + 1).tolist()
        print(f"{way}: {question.text} unpruned: {whole}, pruned: {pruned}, right: {question.answer}")
        print(f"  {before} -> {after} visual tokens, per {'frame' if name == 'llava' else 'two frames'} {kept}")


if __name__ == "__main__":
    main()
