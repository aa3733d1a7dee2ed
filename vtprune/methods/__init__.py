# SPDX-License-Identifier: Apache-2.0
"""Pruning methods, and the classes that a method of your own is built from."""

from ..core.method import Choice, Method, ScoreMethod, Stage, Tap
from ..core.registry import get, names, register, resolve
from ..core.tokens import AttentionInputs, Prompt, Tokens
from .cdpruner import CDPruner
from .dart import DART
from .debiased import Debiased
from .divprune import DivPrune
from .fastv import FastV
from .iwp import IWP
from .pooling import Pooling
from .prumerge import PruMerge
from .pyramiddrop import PyramidDrop
from .random_subset import Random
from .resprune import ResPrune
from .scope import Scope
from .sparsevlm import SparseVLM
from .transprune import TransPrune
from .uniform import Uniform
from .vflowopt import VFlowOpt
from .visionzip import VisionZip
from .vispruner import VisPruner
from .zoo_prune import ZOOPrune

__all__ = [
    "CDPruner",
    "DART",
    "Debiased",
    "DivPrune",
    "FastV",
    "IWP",
    "Pooling",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "ResPrune",
    "Scope",
    "SparseVLM",
    "TransPrune",
    "Uniform",
    "VFlowOpt",
    "VisPruner",
    "VisionZip",
    "ZOOPrune",
    "AttentionInputs",
    "Choice",
    "Method",
    "Prompt",
    "ScoreMethod",
    "Stage",
    "Tap",
    "Tokens",
    "get",
    "names",
    "register",
    "resolve",
]
