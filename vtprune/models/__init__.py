# SPDX-License-Identifier: Apache-2.0
"""What vtprune knows of a transformers model: its parts, its visual tokens, its attention inputs. Changes nothing."""
