# SPDX-License-Identifier: Apache-2.0
"""One module per method: `check(data)` compares the library with the arrays of a golden file."""
