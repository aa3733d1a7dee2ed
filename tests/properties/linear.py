# SPDX-License-Identifier: Apache-2.0
"""Peak memory of prefills of a tiny decoder by number of visual tokens; it must grow linearly, not quadratically.

Counts the bytes of all live tensors that operations return, without the temporary memory inside operations.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from families import IMAGE, TEXT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vtprune

SIDE, PATCH = 128, 4
PER_IMAGE = (SIDE // PATCH) ** 2  # 1,024 tokens
LAYERS, KEEP = 2, 64


class Peak(TorchDispatchMode):
    """Dispatch mode that measures the peak bytes of live tensors allocated under it."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def model() -> torch.nn.Module:
    """A LLaVA with two decoder layers and 1,024 tokens per picture."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = TEXT | {"num_hidden_layers": LAYERS, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": 16,
    }
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **text, "max_position_embeddings": 40_000},
        image_token_id=IMAGE,
        image_seq_length=PER_IMAGE,
    )
    return LlavaForConditionalGeneration(config).eval()


def prompt(images: int) -> dict[str, torch.Tensor]:
    """Inputs of a prompt with `images` pictures and a question."""
    row = [1, 11, *[IMAGE] * (PER_IMAGE * images), 12, 13, 14, 15]
    pixels = torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.tensor([row]), "pixel_values": pixels}


@torch.no_grad()
def peak(model: torch.nn.Module, tokens: int, method: Any) -> int:
    """Peak bytes of a prefill with `tokens` visual tokens, 64 of them kept by `method` (None: unpruned)."""
    inputs = prompt(tokens // PER_IMAGE)
    if method is None:
        with Peak() as seen:
            model(**inputs, logits_to_keep=1)
        return seen.most
    with vtprune.patch(model, keep=KEEP, method=method) as patch:
        with Peak() as seen:
            model(**inputs, logits_to_keep=1)
        assert patch.last is not None
        assert len(patch.last.visual[0]) == tokens and len(patch.last.kept[0]) == KEEP
    return seen.most


def growth(sizes: tuple[int, ...], methods: list[Any]) -> dict[str, list[int]]:
    """Peak bytes by method name at each number of tokens; "unpruned" is the unpatched model."""
    small = model()
    return {str(m or "unpruned"): [peak(small, n, m) for n in sizes] for m in (None, *methods)}
