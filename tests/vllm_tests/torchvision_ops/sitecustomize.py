# SPDX-License-Identifier: Apache-2.0
"""Makes torchvision importable with a CPU build of PyTorch that has no matching torchvision.

Needs this folder on PYTHONPATH and a torchvision of the same release installed with `--no-deps`. Its transforms are
Python; its compiled operators (for boxes, unused here) do not load, but two of them must be registered by name.
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
