# SPDX-License-Identifier: Apache-2.0
"""The engine: attaches to a model, asks the method what stays, and cuts the decoder's columns."""
