# SPDX-License-Identifier: Apache-2.0
"""ZOO-Prune: diverse tokens to which the projector is most sensitive."""

from .method import ZOOPrune

__all__ = ["ZOOPrune"]
