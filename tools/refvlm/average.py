# SPDX-License-Identifier: Apache-2.0
"""Averages weights of one training run: `python -m tools.refvlm.average OUT FOLDER:SHARE FOLDER:SHARE ...`.

The mean of weights of one run is often better than each of them (model soups, https://arxiv.org/abs/2203.05482): a
small share of the weights before a phase regains what the phase made worse, and keeps most of what it taught.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def average(folders: Sequence[Path], shares: Sequence[float], out: Path) -> None:
    """Writes the weighted mean of the weights in `folders`, as float16, and the other files of the last folder.

    Args:
        folders: Folders of one architecture, as `save_pretrained` writes them.
        shares: Share of each; they sum to 1.
        out: The folder to write.

    Raises:
        ValueError: The shares do not sum to 1, or the folders hold different tensors.
    """
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ValueError(f"found shares {list(shares)}; expected numbers that sum to 1")
    mean: dict[str, torch.Tensor] = {}
    for folder, share in zip(folders, shares, strict=True):
        weights = load_file(folder / WEIGHTS)
        if mean and {name: value.shape for name, value in weights.items()} != {
            name: value.shape for name, value in mean.items()
        }:
            raise ValueError(f"{folder} holds other tensors than {folders[0]}; expected weights of one architecture")
        for name, value in weights.items():
            mean[name] = mean.get(name, 0) + share * value.double()
    shutil.copytree(folders[-1], out, dirs_exist_ok=True)
    save_file({name: value.half() for name, value in mean.items()}, out / WEIGHTS, metadata={"format": "pt"})


def part(text: str) -> tuple[Path, float]:
    """Reads FOLDER:SHARE."""
    folder, _, share = text.rpartition(":")
    return Path(folder), float(share)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", type=part, nargs="+", metavar="FOLDER:SHARE")
    args = parser.parse_args(argv)
    average([folder for folder, _ in args.parts], [share for _, share in args.parts], args.out)


if __name__ == "__main__":
    main()
