# SPDX-License-Identifier: Apache-2.0
"""ZOO-Prune: tokens to which the projector is sensitive, and which differ from each other."""

from .method import ZOOPrune

__all__ = ["ZOOPrune"]
