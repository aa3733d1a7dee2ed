# SPDX-License-Identifier: Apache-2.0
"""Trains the projector and LoRA of `benchmarks.real.picture_vlm`."""
