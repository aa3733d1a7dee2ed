# SPDX-License-Identifier: Apache-2.0
"""IWP: token pruning as implicit weight pruning, in the dual form of attention."""

from .method import IWP

__all__ = ["IWP"]
