# SPDX-License-Identifier: Apache-2.0
"""Hashes of a model's configuration, weights and inputs, by which results are tied to what they were measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

_SAMPLED = 1024  # values of each parameter


def config_hash(config: object) -> str:
    """Hash of a transformers config, without what differs between machines and versions of transformers."""
    data = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    return hashlib.sha256(json.dumps(_stable(data), sort_keys=True, default=str).encode()).hexdigest()[:16]


# Versions of transformers differ in which parts of a config have token numbers; weights do not depend on them.
_VOLATILE = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def _stable(data: object) -> object:
    if isinstance(data, dict):
        return {str(k): _stable(v) for k, v in data.items() if k not in _VOLATILE and not str(k).startswith("_")}
    return [_stable(v) for v in data] if isinstance(data, (list, tuple)) else data


def files_hash(folder: str | Path) -> str | None:
    """Hash of the weights in a folder: names, sizes and up to 1,024 evenly spaced pieces of each safetensors file.

    Other weights, another dtype and another split into files change it. None if there is no such file.
    """
    # Only regular files: opening a pipe waits until somebody writes to it.
    found, files = hashlib.sha256(), sorted(path for path in Path(folder).glob("*.safetensors") if path.is_file())
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(64, size // _SAMPLED)):
                file.seek(start)
                found.update(file.read(64))
    return found.hexdigest()[:16] if files else None


def inputs_hash(batches: Iterable[Mapping[str, object]]) -> str:
    """Hash of the arguments of a model's calls: names, shapes, dtypes and all values."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor):
                found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                found.update(f"{name} {value!r}".encode())
    return found.hexdigest()[:16]


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """Hash of a model's parameters: names, shapes, dtypes and up to 1,024 evenly spaced values of each.

    Other weights, another dtype, quantization and adapters change the hash. A change of a few values may not.

    Args:
        model: The model, patched or not.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            step = max(1, flat.numel() // _SAMPLED)
            found.update(flat[::step][:_SAMPLED].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]
