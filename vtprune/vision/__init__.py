# SPDX-License-Identifier: Apache-2.0
"""What methods read from the vision tower: received attention, projector inputs, the crops of a picture."""
