# SPDX-License-Identifier: Apache-2.0
"""The record of one prefill: what was kept, what it saved, and the picture under it."""
