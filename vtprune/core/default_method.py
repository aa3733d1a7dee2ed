# SPDX-License-Identifier: Apache-2.0
"""Which method prunes where none is named; imports nothing, so that `vtprune --help` is quick."""

NAME = "resprune"  # docs/choosing.md shows the measurements behind it
