# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of pruning on a model: `vtprune bench`."""
