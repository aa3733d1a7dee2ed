# SPDX-License-Identifier: Apache-2.0
"""The contract of a pruning method, budgets, and the ragged tensor operations that methods share."""
