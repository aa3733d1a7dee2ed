# SPDX-License-Identifier: Apache-2.0
"""Video: one budget over all frames, which the method divides among them.

Two ways, both with the trained models inside the package:

* Frames as several pictures, the way to show a clip to a model without a video input, such as the LLaVA.
* A video input: `pixel_values_videos`, as the Qwen2.5-VL takes it. Two frames make one time step, and a token of it
  is a patch through both. Here a method for clips may prune (`--video-method vcast`), which shares the budget over the
  frames by what happens in them; `--strip clip.png` draws which frames it went to.

The LLaVA was trained on single pictures and has never seen anything move: a still clip is a picture to it, only longer;
of a clip that moves it tells less well what it sees, pruned or not. The Qwen2.5-VL was trained on drawn clips too, in
which objects move and the camera rests.

    python examples/04_video.py --method divprune --ratio 0.05 --pan 0
    python examples/04_video.py --video-method vcast --frames 16 --ratio 0.25 --strip clip.png
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image, ImageChops

import vtprune
from vtprune import refvlm
from vtprune.refvlm import clip_inputs

FRAMES = 4


def clip(seed: int, pan: int, frames: int = FRAMES) -> tuple[list[Image.Image], refvlm.scenes.Question]:
    """A camera that moves `pan` pixels a frame over a scene, and a question about it."""
    scene = refvlm.scenes.scene(seed)
    question = next((question for question in scene.questions if question.kind == "digit"), scene.questions[0])
    return [ImageChops.offset(scene.small, pan * number, 0) for number in range(frames)], question


def as_pictures(processor, frames: list[Image.Image], question: str) -> dict[str, torch.Tensor]:
    """The frames one after the other, each in its own place of the prompt."""
    text = " , ".join(["<image>"] * len(frames)) + f" {question} answer:"
    return processor(images=frames, text=text, return_tensors="pt")


def answer(model, processor, inputs: dict[str, torch.Tensor]) -> str:
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Prunes a clip: as several pictures, and as a video.")
    parser.add_argument("--method", default="resprune")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--pan", type=int, default=3, help="pixels that the camera moves from frame to frame")
    parser.add_argument("--scene", type=int, default=7)
    parser.add_argument("--frames", type=int, default=FRAMES, help="an even number")
    parser.add_argument("--video-method", help="the method for the video input, by default that of --method")
    parser.add_argument("--strip", help="picture file for the frames of the video input under their budget")
    args = parser.parse_args()
    frames, question = clip(args.scene, args.pan, args.frames)

    for kind, name in (("frames as pictures", "llava"), ("video input", "qwen2_5_vl")):
        model, processor = refvlm.load(name=name)
        if name == "llava":
            inputs = as_pictures(processor, frames, question.text)
        else:
            inputs = clip_inputs.inputs(model, processor, frames, f" {question.text} answer:")
        whole = answer(model, processor, inputs)
        for_clips = args.video_method if name == "qwen2_5_vl" else None
        with vtprune.patch(model, ratio=args.ratio, method=args.method, video_method=for_clips) as patch:
            pruned = answer(model, processor, inputs)
        if args.strip and name == "qwen2_5_vl":
            patch.last.save(args.strip, videos=[frames])
        before, after = patch.last.tokens
        places = patch.last.places.image if name == "llava" else patch.last.places.frame
        kept = torch.bincount(places[patch.last.kept_flat[-1]], minlength=int(places.max()) + 1).tolist()
        print(f"{kind}: {question.text} unpruned: {whole}, pruned: {pruned}, right: {question.answer}")
        print(f"  {before} -> {after} visual tokens, per {'frame' if name == 'llava' else 'two frames'} {kept}")


if __name__ == "__main__":
    main()
