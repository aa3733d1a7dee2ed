# SPDX-License-Identifier: Apache-2.0
"""Cuts inside the vision tower: the later blocks run on a subset of the patches.

```python
vtprune.patch(model, ratio=0.1, tower=0.35)  # 35 % of the patches go through the tower's later blocks
vtprune.patch(model, ratio=0.1, tower=vtprune.towers.Change(keep=0.35, block=7))
vtprune.patch(model, ratio=0.1, tower=vtprune.towers.Pixels(tolerance=0.0))  # how many stay depends on the picture
```

A custom method is a subclass of `TowerMethod` with one function from states `[N, D]` to scores:

```python
@dataclass
class Norm(vtprune.towers.TowerMethod):
    def score(self, patches): return patches.states.norm(dim=-1)  # [N], higher stays
```
"""

from ..core.options import fits, shorten
from ..errors import MethodError
from .attention import Attention
from .baselines import Random, Uniform
from .change import Change
from .method import Patches, Rebuild, TowerChoice, TowerMethod
from .pixels import Pixels
from .similar import Similar

__all__ = [
    "Attention",
    "Change",
    "Patches",
    "Pixels",
    "Random",
    "Rebuild",
    "Similar",
    "TowerChoice",
    "TowerMethod",
    "Uniform",
    "resolve",
]


def resolve(tower: float | TowerMethod | type[TowerMethod]) -> TowerMethod:
    """Turns the `tower` that a user passes into a method: a share of the patches becomes `Similar(keep=share)`.

    docs/towers.md has the measurement behind that choice, and when another one is better.

    Raises:
        MethodError: It is neither a share nor a method.
        BudgetError: The share is out of range.
    """
    if isinstance(tower, TowerMethod):
        return tower
    if isinstance(tower, type) and issubclass(tower, TowerMethod):
        return tower()
    if fits(tower, float):
        return Similar(keep=float(tower))
    raise MethodError(
        f"tower is {shorten(tower)}; expected a share of the patches such as 0.35, or a method such as "
        "vtprune.towers.Similar(keep=0.35)"
    )
