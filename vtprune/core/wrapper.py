# SPDX-License-Identifier: Apache-2.0
"""`Wrapper`, a method that changes what another method scores and cuts where that method cuts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .method import Group, Method, Stage, Tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


class Wrapper(Method):
    """A method around a `host`, with the host's schedule, budget groups, recorded layers and positions.

    Attributes:
        host: The method that is wrapped.
    """

    host: Method

    @property
    def positions(self) -> str:
        """How the host treats positions."""
        return getattr(self.host, "positions", "original")

    @property
    def question_aware(self) -> bool:  # type: ignore[override]
        """Whether what the host keeps depends on the prompt's text."""
        return self.host.question_aware

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Whether states that the host merges pass gradients on."""
        return self.host.differentiable

    @property
    def group(self) -> Group:  # type: ignore[override]
        return self.host.group

    def schedule(self, num_layers: int) -> Iterable[Stage]:  # type: ignore[override]
        return self.host.schedule(num_layers)

    def required_layer_inputs(self, num_layers: int) -> Iterable[int]:
        return self.host.required_layer_inputs(num_layers)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return self.host.taps(anatomy)
