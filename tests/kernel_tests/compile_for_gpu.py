# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for a GPU that need not be present, and prints the resources of each.

    python tests/kernel_tests/compile_for_gpu.py [cuda:90 | cuda:80 | hip:gfx942] [float16 | bfloat16 | float32]

Every kernel launch is replaced by a compilation. Reading a tensor's value or creating a tensor from host data raises,
because on a GPU it would synchronize with the device. The last line is the number of compiled kernels.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernel_tests.gpu_cases import launches
from vtprune_kernels import _ragged

TILE_LIMIT = 99 * 1024  # bytes of shared memory per block on the smallest common GPUs
STACK_LIMIT = 512  # spilled bytes per thread; thousands indicate tiles that are too large


class NoDevice:
    """Replacement of Triton's driver that reports the target and cannot launch kernels."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def registers(binary: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, from the disassembler that Triton includes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"REG:(\d+) STACK:(\d+)", text)[-1]
    return int(used[0]), int(used[1])


def forbidden(reader: str):
    def read(*_: object, **__: object):
        raise RuntimeError(f"{reader} synchronizes with the device")

    return read


def main(target: str = "cuda:90", dtype: str = "float16") -> None:
    backend, _, arch = target.partition(":")
    gpu = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    triton.runtime.driver.set_active(NoDevice(gpu))
    launch, found = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        key = (self.__module__.split(".")[1], self.__name__, kernel.hash)
        if key not in found:
            found[key] = kernel
            use = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
            if backend == "cuda":
                use["registers"], use["stack"] = registers(kernel.asm["cubin"])
            print(*key[:2], *(f"{name}={value}" for name, value in use.items()), flush=True)
            assert use["shared"] <= TILE_LIMIT, f"{key[:2]} needs {use['shared']} bytes of shared memory"
            assert use.get("stack", 0) <= STACK_LIMIT, f"{key[:2]} spills {use['stack']} bytes per thread"

    JITFunction.run = compile_only
    calls = list(launches(getattr(torch, dtype)))
    numbers = ("__bool__", "__int__", "__float__", "__index__")
    for reader in ("item", "tolist", "numpy", "nonzero", "new_tensor", *numbers):
        setattr(torch.Tensor, reader, forbidden(f"Tensor.{reader}"))
    torch.tensor = forbidden("torch.tensor")
    _ragged.on_host = lambda x: False  # the tensors stand for tensors of the target
    for name, call in calls:
        try:
            call()
        except Exception as error:
            raise SystemExit(f"{name}: {error}") from error
    print(f"{len(found)} kernels compiled for {target}, {dtype}")


if __name__ == "__main__":
    main(*sys.argv[1:])
