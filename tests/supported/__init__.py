# SPDX-License-Identifier: Apache-2.0
"""What else users do with a model (compile, quantise, offload, copy, ...), tried on patched ones: `docs/support.md`."""
