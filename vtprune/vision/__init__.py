# SPDX-License-Identifier: Apache-2.0
"""Vision-side inputs of methods: attention in the vision tower, inputs of the projector, crops of an image."""
