# SPDX-License-Identifier: Apache-2.0
"""SparseVLM and SparseVLM+: text tokens that see the image rate it, and what is dropped is recycled."""

from .method import SparseVLM

__all__ = ["SparseVLM"]
