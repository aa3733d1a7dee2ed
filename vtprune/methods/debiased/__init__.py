# SPDX-License-Identifier: Apache-2.0
"""Debiased: removes from the scores of another method their bias toward late tokens and padding."""

from .method import Debiased

__all__ = ["Debiased"]
