# SPDX-License-Identifier: Apache-2.0
"""What else users do with a model (compile, quantize, offload, copy, ...), tried on patched ones: `docs/support.md`."""
