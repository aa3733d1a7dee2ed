# SPDX-License-Identifier: Apache-2.0
"""Training of the built-in Qwen2.5-VL; `python -m tools.refvlm.qwen2_5_vl.train`."""
