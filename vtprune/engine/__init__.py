# SPDX-License-Identifier: Apache-2.0
"""The engine: hooks into a model, lets the method select tokens, and removes the others from the decoder's layers."""
