# SPDX-License-Identifier: Apache-2.0
"""Quality and cost of pruning measured on prompts of your own, without labels."""
