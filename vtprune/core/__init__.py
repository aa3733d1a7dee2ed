# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is, and the ragged tensor operations that methods share. Tensors only: no model, no engine."""
