# SPDX-License-Identifier: Apache-2.0
"""Inspection of transformers models, without changing them: parts, visual tokens, attention inputs."""
