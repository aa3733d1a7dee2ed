# SPDX-License-Identifier: Apache-2.0
"""Pruning methods, and the classes that a method of your own is built from."""

from ..core.method import Choice, Method, ScoreMethod, Stage, Tap
from ..core.registry import for_pictures, get, names, register, resolve
from ..core.tokens import AttentionInputs, Prompt, Tokens
from .cdpruner import CDPruner
from .dart import DART
from .debiased import Debiased
from .divprune import DivPrune
from .dycoke import DyCoke
from .evs import EVS
from .fastv import FastV
from .fastvid import FastVID
from .flashvid import FlashVID
from .holitom import HoliTom
from .iwp import IWP
from .pixels import Pixels
from .pooling import Pooling
from .prumerge import PruMerge
from .pyramiddrop import PyramidDrop
from .random_subset import Random
from .resprune import ResPrune
from .scope import Scope
from .sink_aware import SinkAware
from .sparsevlm import SparseVLM
from .transprune import TransPrune
from .uniform import Uniform
from .vcast import VCast
from .vflowopt import VFlowOpt
from .vidcom2 import VidCom2
from .visionzip import VisionZip
from .vispruner import VisPruner
from .zoo_prune import ZOOPrune

__all__ = [
    "DyCoke",
    "EVS",
    "FastVID",
    "FlashVID",
    "HoliTom",
    "VCast",
    "VidCom2",
    "CDPruner",
    "DART",
    "Debiased",
    "DivPrune",
    "FastV",
    "IWP",
    "Pixels",
    "Pooling",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "ResPrune",
    "Scope",
    "SinkAware",
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
    "for_pictures",
    "get",
    "names",
    "register",
    "resolve",
]
