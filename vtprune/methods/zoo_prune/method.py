# SPDX-License-Identifier: Apache-2.0
"""ZOO-Prune: diverse tokens to which the projector is most sensitive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vtprune_kernels import weighted_farthest_point

from ...core.log import warn_once
from ...core.method import Choice, Method, Stage, Tap
from ...core.options import AboveZero, Positive, Seed
from ...core.ragged import from_order, group_extreme
from ...core.registry import register
from ...core.tokens import Tokens
from ...errors import MethodError
from ...vision.crops import by_crop
from ...vision.tower import Vision, over_patches, projector_tap
from .sensitivity import ClosedForms, TwoLinears, difference_sensitivity, jvp_sensitivity, unit_directions

if TYPE_CHECKING:
    from ...models.anatomy import Anatomy

Estimator = Literal["auto", "exact", "jvp", "difference"]


def scaled(sensitivity: Tensor, offsets: Tensor) -> Tensor:
    """Min-max scaling to `[0, 1)` inside each group; ones where all values are equal but for rounding."""
    low, high = group_extreme(sensitivity, offsets, "amin"), group_extreme(sensitivity, offsets, "amax")
    # Central differences of a linear projector, which is equally sensitive everywhere, are equal to about 1e-5.
    return torch.where(high - low > 1e-4 * high, (sensitivity - low) / (high - low + 1e-8), 1.0)


def select(
    features: Tensor,
    sensitivity: Tensor,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Picks by `scaled sensitivity * distance to the nearest pick`; `[S, max(budgets)]` rows, padded with -1."""
    return weighted_farthest_point(features, scaled(sensitivity, offsets), offsets, budgets, max_budget, max_length)


@register("zoo_prune")
@dataclass
class ZOOPrune(Method):
    """Keeps tokens by the projector's sensitivity times the diversity of its output, crop by crop, before the decoder.

    Paper: ZOO-Prune, arXiv 2509.24837 (CVPR 2026), method section. Reads the features before the projector and the
    visual embeddings. Sensitivity of token `i`: `S_i = mean_j |M(x_i + h u_j) - M(x_i - h u_j)| / 2h` over `m` unit
    directions. Inside each crop `S` is scaled to [0, 1]; the first pick is the most sensitive token, then
    `argmax_i S_i * min_{j picked} (1 - cos_ij)`. Where several patches are merged into a token, `x_i` is all of them.

    Differences from the release: differences are taken in float32, unless `half` (in half precision they measure
    rounding: rank correlation 0.6 with float16, -0.95 with bfloat16; derivatives are not affected); directions come
    from a seeded generator, the same for every image, so that a batch equals its samples; crops share the exact budget
    evenly, and an unpadded crop that is too small passes the rest on; newline tokens are not candidates and are dropped
    (there an indexing error drops them and keeps as many unrelated tokens), unless `keep_newlines`; LLaVA-NeXT uses the
    projector itself, not a rank-128 approximation.

    Attributes:
        estimator: "exact" is the closed form of the root mean square over all directions, for projectors that are
            linear - activation - linear, also behind a norm (patch mergers); "jvp" the mean over the drawn directions
            by forward-mode differentiation; "difference" the released central differences; "auto" the first of these
            that the projector supports.
        directions: Number of directions `m`.
        step: `h` of "difference".
        seed: Seed of the generator.
        keep_newlines: Keep newline tokens, within the budget, as long as they fit into half of it.
        half: Compute "difference" in the dtype of the model, as released.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ..., as the release does; by default they keep their
            position ids. Not for models with position ids on several axes (M-RoPE).
    """

    estimator: Estimator = "auto"
    directions: Positive = 64
    step: AboveZero = 0.01
    seed: Seed = 0
    keep_newlines: bool = False
    half: bool = False
    positions: Literal["original", "compact"] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._closed_forms = ClosedForms()

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0, 0.1112),)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        projector = anatomy.projector
        if self.estimator == "exact" and projector is not None and TwoLinears.of(projector) is None:
            raise _no_closed_form(projector)
        return (projector_tap(anatomy, self.name),)

    def choose(self, tokens: Tokens) -> Choice:
        vision = Vision(tokens, self.name)
        sensitivity = vision.to_tokens(self.sensitivity(vision))
        crops = by_crop(tokens, vision.crop, keep_newlines=self.keep_newlines)
        rows = crops.rows
        inside = sensitivity.nan_to_num(0.0)[rows]
        order = select(tokens.hidden[rows], inside, crops.offsets, crops.budgets, crops.max_budget, crops.max_length)
        keep = from_order(torch.where(order >= 0, rows[order], -1), len(tokens))
        return Choice(keep, scores=sensitivity)

    def sensitivity(self, vision: Vision) -> Tensor:
        """`[R]` float32 sensitivity of every output row of the projector."""
        # Forward-mode differentiation is disabled in inference mode; tensors created in it must be cloned outside.
        with torch.inference_mode(False), torch.no_grad():
            return torch.cat([self._of_call(vision, number) for number in range(len(vision.calls))])

    def _of_call(self, vision: Vision, number: int) -> Tensor:
        x, y, packed = vision.calls[number]
        x, merged = x.clone(), vision.patches(number).flatten(0, 1)
        if self.estimator in ("auto", "exact"):
            exact = self._closed_forms(vision.anatomy.projector, merged.clone().float(), y.flatten(0, 1))
            if exact is not None:
                return exact
        if self.estimator == "exact":
            raise _no_closed_form(vision.anatomy.projector)
        patches, rows = x.shape[1], y.shape[1]
        k = patches // rows
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same draws for every device
        draws = torch.randn(self.directions, k * x.shape[2], generator=generator, dtype=torch.float32)
        shifts = [over_patches(u.reshape(k, -1), patches, rows, packed) for u in unit_directions(draws).to(x)]

        def project(z: Tensor) -> Tensor:
            return vision.run_projector(number, z)

        if self.estimator != "difference":
            try:
                slopes = jvp_sensitivity(project, x, shifts).flatten()
                # Linear layers of serving engines for CPUs have derivatives of 0; on GPUs the host does not wait.
                if slopes.device.type != "cpu" or slopes.any():
                    return slopes
                if self.estimator == "jvp":
                    raise MethodError("the projector's forward-mode derivatives are 0; use estimator='difference'")
            except (NotImplementedError, RuntimeError):
                if self.estimator == "jvp":
                    raise
            warn_once(f"{self.name}: the projector has no forward-mode derivative; central differences are used")
        if not self.half:
            x, shifts = x.float(), [u.float() for u in shifts]
        return difference_sensitivity(project, x, shifts, self.step).flatten().float()


def _no_closed_form(projector: object) -> MethodError:
    return MethodError(
        f"estimator='exact' needs a projector of the form (norm -) linear - activation - linear, which "
        f"{type(projector).__name__} is not; use estimator='jvp'"
    )
