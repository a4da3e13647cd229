"""Runs the compiled reduction as the Triton code of a GPU, interpreted on the CPU; prints what it gives as JSON.

`torch.compile` is made to write Triton code for tensors on a CPU. Triton runs it with numpy. A stand-in for the driver
tells the code generator that it writes for an H100.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
import triton.language
from torch._inductor import config
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.interpreter import TensorHandle

from pytest_kld.kernel.divergence import divergence
from pytest_kld.kernel.reduction import compiled_reduction

calls = 0


class H100:
    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def nearbyint(x: triton.language.tensor) -> triton.language.tensor:
    """Round to the nearest integer, ties to even, as CUDA's function does, which the interpreter lacks."""
    global calls
    calls += 1
    return triton.language.tensor(TensorHandle(np.rint(x.handle.data), x.handle.dtype), x.type)


def main() -> None:
    config.cpu_backend = "triton"
    driver.set_active(H100())
    triton_helpers.libdevice.nearbyint = nearbyint
    case = torch.load(sys.argv[1], weights_only=True)
    found = divergence(case["reference"], case["candidate"], case["labels"], reduction=compiled_reduction())
    json.dump({"kl": found.kl.tolist(), "calls": calls}, sys.stdout)


if __name__ == "__main__":
    main()
