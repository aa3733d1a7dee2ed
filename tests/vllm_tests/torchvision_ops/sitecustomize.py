# SPDX-License-Identifier: Apache-2.0
"""Lets torchvision be imported beside a CPU build of PyTorch, for which there is no torchvision.

With this folder on PYTHONPATH, a torchvision of the same release installed with `--no-deps` serves: its transforms are
Python, its compiled operators (boxes, which no model here uses) do not load, and two of them must at least have a name.
"""

import sys


class _BeforeTorchvision:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(_BeforeTorchvision)  # type: ignore[arg-type]
            import torch

            _BeforeTorchvision.library = library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[attr-defined]
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision)  # type: ignore[arg-type]
