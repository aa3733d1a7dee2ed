# SPDX-License-Identifier: Apache-2.0
"""Loads the tensor operations from a Kernel Hub repository instead of those installed with vtprune.

The environment variable `VTPRUNE_KERNELS` names it: a folder that holds `build/`, or `OWNER/NAME@VERSION` on the hub.
It is read when vtprune is imported. Naming a repository means trusting its code.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError, one_line

VARIABLE = "VTPRUNE_KERNELS"
_PACKAGE = "vtprune_kernels"


def use(source: str) -> ModuleType:
    """Loads the operations from `source` as the package `vtprune_kernels` of this process.

    Args:
        source: A folder, or `OWNER/NAME@VERSION`.

    Raises:
        InputError: The package `kernels` is missing, there is no build for this machine, or `vtprune_kernels` was
            imported before.
    """
    if _PACKAGE in sys.modules:
        raise InputError(f"{VARIABLE}={source}: {_PACKAGE} was imported before vtprune; import vtprune first")
    try:
        kernels: Any = importlib.import_module("kernels")  # by name: this repository has a folder of the same name
    except ImportError as error:
        raise InputError(f"{VARIABLE}={source} needs the package kernels: pip install kernels ({error})") from error
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)@(\d+)", source)
    folder = Path(source).expanduser()
    if not folder.is_dir() and not on_hub:
        raise InputError(f"{VARIABLE}={source} is no folder; expected one, or OWNER/NAME@VERSION")
    try:
        if folder.is_dir():
            found = kernels.get_local_kernel(folder)
        else:
            assert on_hub is not None
            found = kernels.get_kernel(on_hub[1], version=int(on_hub[2]), trust_remote_code=[on_hub[1]])
    except Exception as error:  # the repository's code may raise anything
        raise InputError(f"{VARIABLE}={source} cannot be loaded: {one_line(error)}") from error
    sys.modules[_PACKAGE] = found
    return found
