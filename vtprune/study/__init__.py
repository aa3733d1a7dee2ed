# SPDX-License-Identifier: Apache-2.0
"""Quality and cost of pruning, measured on your own prompts without labels."""
