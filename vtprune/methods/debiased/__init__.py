# SPDX-License-Identifier: Apache-2.0
"""Attention debiasing: the scores of another method, without its preference for late tokens and for padding."""

from .method import Debiased

__all__ = ["Debiased"]
