# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton source for a GPU that need not be there, and prints the resources of each kernel.

    python tests/kernel_tests/compile_for_gpu.py [cuda:90 | cuda:80 | hip:gfx942] [float16 | bfloat16 | float32]

Every launch of an operation is turned into a compilation: nothing runs. The value of a tensor may not be read
meanwhile, nor one be made from numbers of the host, for on a GPU that would wait for the device. The last line says how
many kernels were compiled.
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

TILE_LIMIT = 99 * 1024  # shared memory of a block on the smallest of the usual GPUs
STACK_LIMIT = 512  # bytes that a thread may spill from its registers; thousands are tiles that are too large


class NoDevice:
    """Stands in for a driver: names the target, and can launch nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def registers(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of one thread, by NVIDIA's disassembler, which comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"REG:(\d+) STACK:(\d+)", text)[-1]
    return int(used[0]), int(used[1])


def forbidden(reader: str):
    def read(*_: object, **__: object):
        raise RuntimeError(f"{reader} waits for the device")

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
            assert use.get("stack", 0) <= STACK_LIMIT, f"{key[:2]} spills {use['stack']} bytes a thread"

    JITFunction.run = compile_only
    calls = list(launches(getattr(torch, dtype)))
    numbers = ("__bool__", "__int__", "__float__", "__index__")
    for reader in ("item", "tolist", "numpy", "nonzero", "new_tensor", *numbers):
        setattr(torch.Tensor, reader, forbidden(f"Tensor.{reader}"))
    torch.tensor = forbidden("torch.tensor")
    for name, call in calls:
        try:
            call()
        except Exception as error:
            raise SystemExit(f"{name}: {error}") from error
    print(f"{len(found)} kernels compiled for {target}, {dtype}")


if __name__ == "__main__":
    main(*sys.argv[1:])
