# SPDX-License-Identifier: Apache-2.0
"""The built-in Qwen2.5-VL before training: vocabulary, config, initialization and growth of the decoder.

Vision side and six decoder layers are initialized from the earlier model (`qwen.py`); the decoder's MLPs are pruned to
their most important neurons. The decoder grows to its full depth later: a new layer starts as the identity, because its
output projections are zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vtprune.refvlm import pages
from vtprune.refvlm.qwen import CELL, PictureProcessor

from .. import model as first
from .. import qwen

WINDOW = 96  # pixels: windows of 8 x 8 visual tokens
HIDDEN, NEURONS = 192, 240
SEED_LAYERS, LAYERS = 6, 20
# Layers of the grown decoder that come from the seed; the others are new. The first layers keep their numbers, so that
# the layers that relate question and picture are early ones, as in the seed.
KEPT = (0, 1, 2, 4, 8, 13)
SPECIAL = ("<video>", "<vision_start>", "<vision_end>")
MORE = (
    *pages.WORDS, *pages.ORDER,
    "line", "lines", "say", "says", "word", "page", "came", "after", "before", "go", "goes", "become", "becomes",
    "start", "changes", "moves", "images", "which", "has", "last",
    "six", "seven", "eight", "nine",
)  # fmt: skip
VOCABULARY = dict(first.VOCABULARY)
for _word in (*SPECIAL, *MORE):
    VOCABULARY.setdefault(_word, len(VOCABULARY))


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the first model with additional words; ids of the first model's words are unchanged."""
    return first.tokenizer(VOCABULARY, SPECIAL, 4096)


def processor() -> PictureProcessor:
    """The processor; it keeps the size of pictures of 16 to 1,300 visual tokens, rounded to multiples of 12 pixels."""
    return qwen.processor(tokenizer(), pixels=(16 * CELL**2, 1300 * CELL**2))


def config(layers: int) -> Qwen2_5_VLConfig:
    """Config with `layers` decoder layers and one vision block with full attention."""
    vision = {
        "window_size": WINDOW,
        "fullatt_block_indexes": [1],
        "out_hidden_size": HIDDEN,
        "tokens_per_second": 1,
    }
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
    }
    marks = {f"{name}_token_id": VOCABULARY[f"<{name}>"] for name in ("video", "vision_start", "vision_end")}
    return qwen.narrow_config(VOCABULARY, vision, text, **marks)


def build(layers: int, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config(layers))
    qwen.set_generation(model, VOCABULARY)
    return model


@torch.no_grad()
def from_seed(seed: Any, importance: list[Tensor]) -> Qwen2_5_VLForConditionalGeneration:
    """The model with the six decoder layers of `seed`, their MLPs pruned to `NEURONS`, and its vision side, in which
    only one block has full attention.

    Args:
        seed: the earlier built-in model with six layers.
        importance: for every layer `[neurons]`, importance of each neuron (see `importance`).
    """
    model = build(SEED_LAYERS)
    model.model.visual.load_state_dict(seed.model.visual.state_dict())
    mine, theirs = model.model.language_model, seed.model.language_model
    words = theirs.embed_tokens.weight
    known = len(first.VOCABULARY)
    nn.init.normal_(mine.embed_tokens.weight, std=HIDDEN**-0.5)
    mine.embed_tokens.weight[:known] = words[:known]
    state = {name: value for name, value in theirs.state_dict().items() if "embed_tokens" not in name}
    for layer, scores in enumerate(importance):
        best = scores.topk(NEURONS).indices.sort().values
        for part in ("gate_proj", "up_proj"):
            state[f"layers.{layer}.mlp.{part}.weight"] = state[f"layers.{layer}.mlp.{part}.weight"][best]
        state[f"layers.{layer}.mlp.down_proj.weight"] = state[f"layers.{layer}.mlp.down_proj.weight"][:, best]
    missing, unexpected = mine.load_state_dict(state, strict=False)
    if unexpected or missing != ["embed_tokens.weight"]:
        raise RuntimeError(f"the seed does not fit: missing {missing}, unexpected {unexpected}")
    return model


@torch.no_grad()
def grown(small: Qwen2_5_VLForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """A model of `LAYERS` decoder layers that computes the same: those of `small` at `KEPT`, the others identities."""
    model = build(LAYERS, seed=1)
    mine, theirs = model.model.language_model, small.model.language_model
    model.model.visual.load_state_dict(small.model.visual.state_dict())
    mine.embed_tokens.load_state_dict(theirs.embed_tokens.state_dict())
    mine.norm.load_state_dict(theirs.norm.state_dict())
    for number, layer in enumerate(mine.layers):
        if number in KEPT:
            layer.load_state_dict(theirs.layers[KEPT.index(number)].state_dict())
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


@torch.no_grad()
def importance(model: Any, samples: list[tuple[Any, str]], processor: Any) -> list[Tensor]:
    """For every decoder layer `[neurons]`: a neuron's mean absolute activation times the norm of its output weights."""
    layers = model.model.language_model.layers
    totals = [torch.zeros(layer.mlp.down_proj.in_features) for layer in layers]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, total=total: total.add_(args[0].abs().mean(dim=(0, 1)))
        )
        for layer, total in zip(layers, totals, strict=True)
    ]
    for image, text in samples:
        model(**processor(images=image, text=text, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return [total * layer.mlp.down_proj.weight.norm(dim=0) for total, layer in zip(totals, layers, strict=True)]
