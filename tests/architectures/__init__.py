# SPDX-License-Identifier: Apache-2.0
"""Every vision-language architecture of the installed transformers, built small, pruned and checked."""
