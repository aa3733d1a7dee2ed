# SPDX-License-Identifier: Apache-2.0
"""SparseVLM and SparseVLM+: visually relevant text tokens rate the image; dropped tokens are recycled."""

from .method import SparseVLM

__all__ = ["SparseVLM"]
