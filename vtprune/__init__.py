# SPDX-License-Identifier: Apache-2.0
"""Training-free visual token pruning for vision-language models.

```python
patch = vtprune.patch(model, ratio=0.1)  # keep 10 % of the visual tokens
model.generate(**inputs)
print(patch.last.report())
```
"""

from . import methods
from .core.certificate import Certificate
from .core.energy import Auto
from .engine.patching import Patch, inspect, patch, unpatch
from .errors import BudgetError, CertificateError, MethodError, NothingPrunedError, UnsupportedModelError, VTPruneError
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
    "unpatch",
]
