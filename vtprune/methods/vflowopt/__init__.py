# SPDX-License-Identifier: Apache-2.0
"""VFlowOpt: an importance map from the vision encoder drives a first cut with recycling and two cuts in the decoder."""

from .method import VFlowOpt

__all__ = ["VFlowOpt"]
