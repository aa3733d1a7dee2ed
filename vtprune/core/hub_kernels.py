# SPDX-License-Identifier: Apache-2.0
"""Takes the tensor operations from a Kernel Hub repository in place of those that were installed with vtprune.

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


def use(place: str) -> ModuleType:
    """Loads the operations from `place` and makes them the package `vtprune_kernels` of this process.

    Args:
        place: A folder, or `OWNER/NAME@VERSION`.

    Raises:
        InputError: The package `kernels` is missing, there is no build for this machine, or the operations of another
            place are in use already.
    """
    if _PACKAGE in sys.modules:
        raise InputError(f"{VARIABLE}={place}: {_PACKAGE} was imported before vtprune; import vtprune first")
    try:
        kernels: Any = importlib.import_module("kernels")  # by name: this project has a folder called so
    except ImportError as error:
        raise InputError(f"{VARIABLE}={place} needs the package kernels: pip install kernels ({error})") from error
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)@(\d+)", place)
    folder = Path(place).expanduser()
    if not folder.is_dir() and not on_hub:
        raise InputError(f"{VARIABLE}={place} is no folder; expected one, or OWNER/NAME@VERSION")
    try:
        if folder.is_dir():
            found = kernels.get_local_kernel(folder)
        else:
            assert on_hub is not None
            found = kernels.get_kernel(on_hub[1], version=int(on_hub[2]), trust_remote_code=[on_hub[1]])
    except Exception as error:  # whatever is wrong with the repository
        raise InputError(f"{VARIABLE}={place} cannot be loaded: {one_line(error)}") from error
    sys.modules[_PACKAGE] = found
    return found
