# SPDX-License-Identifier: Apache-2.0
"""lmms-eval with pruned models: `lmms-eval --model vtprune --model_args pretrained=...,method=iwp,ratio=0.1`.

Tasks that score given answers (multiple choice, log-likelihood) run with `--force_simple`.

lmms-eval finds `manifest` through its entry-point group `lmms_eval.models` when it starts, and imports the model only
when it is asked for.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval is told about the model: its name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    home = "vtprune.integrations.lmms_eval.model"
    return ModelManifest("vtprune", simple_class_path=f"{home}.VTPruneSimple", chat_class_path=f"{home}.VTPrune")
