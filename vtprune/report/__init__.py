# SPDX-License-Identifier: Apache-2.0
"""The record of one prefill: kept tokens, costs, and overlays on the images."""
