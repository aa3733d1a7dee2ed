# SPDX-License-Identifier: Apache-2.0
"""Other features (compile, quantize, offload, copy, ...) tried on patched models; makes `docs/support.md`."""
