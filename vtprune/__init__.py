# SPDX-License-Identifier: Apache-2.0
"""Training-free visual token pruning for vision-language models.

```python
patch = vtprune.patch(model, ratio=0.1)  # keep 10 % of the visual tokens
model.generate(**inputs)
print(patch.last.report())
```
"""

import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from .errors import BudgetError, CertificateError, MethodError, NothingPrunedError, UnsupportedModelError, VTPruneError

if _TYPE_CHECKING:
    from . import methods, towers
    from .core.certificate import Certificate
    from .core.energy import Auto
    from .engine.patching import Patch, inspect, patch, unpatch
    from .models.anatomy import Anatomy
    from .report.pruning import Pruning
    from .study.certify import certify

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "Auto",
    "BudgetError",
    "Certificate",
    "CertificateError",
    "MethodError",
    "NothingPrunedError",
    "Patch",
    "Pruning",
    "UnsupportedModelError",
    "VTPruneError",
    "certify",
    "inspect",
    "methods",
    "patch",
    "towers",
    "unpatch",
]

# Public names by module, imported on first use (PEP 562): importing PyTorch takes more than a second.
_MODULES = {
    "Anatomy": ".models.anatomy",
    "Auto": ".core.energy",
    "Certificate": ".study.certify",  # above the methods, which a certificate names
    "Patch": ".engine.patching",
    "Pruning": ".report.pruning",
    "certify": ".study.certify",
    "inspect": ".engine.patching",
    "patch": ".engine.patching",
    "unpatch": ".engine.patching",
}
_PACKAGES = ("bench", "core", "engine", "methods", "models", "refvlm", "report", "study", "towers", "vision")


def __getattr__(name: str) -> _Any:
    import importlib

    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if _os.environ.get("VTPRUNE_KERNELS"):
    from .core.hub_kernels import use as _use

    _use(_os.environ["VTPRUNE_KERNELS"])
