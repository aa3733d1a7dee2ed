# SPDX-License-Identifier: Apache-2.0
"""VFlowOpt: cuts by an importance map of the vision encoder, once before the decoder and twice inside."""

from .method import VFlowOpt

__all__ = ["VFlowOpt"]
