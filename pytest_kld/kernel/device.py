"""Which device to run and compare on."""

from pathlib import Path

import torch

from pytest_kld.errors import KLDError

_CPU_INFO = Path("/proc/cpuinfo")
_PRODUCTS = ("amx", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "bf16", "i8mm", "sve")
"""Instruction sets that a matrix product may use beside what torch itself was compiled for."""


def pick_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device that is there.

    Raises:
        KLDError: CUDA is asked for and not there.

    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise KLDError(f"--kld-device={name}: torch sees {torch.cuda.device_count()} CUDA devices; give cpu or auto")
    return device


def describe_device(device: torch.device) -> str:
    """Return what of a device determines the bits of a product: a GPU's name, a CPU's instruction sets.

    In bfloat16 a CPU's instruction sets matter: the logits of a tiny model with a sharp head differed by up to 0.4, and
    the mean KL by 0.002 nats. The number of threads is no part of it: with 1, 2 and 5 threads the logits were equal,
    bit by bit, in float32 and in bfloat16 (torch 2.13).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    sets = []
    if _CPU_INFO.is_file():
        words = set(_CPU_INFO.read_text(encoding="utf-8", errors="replace").split())
        sets = sorted(word for word in words if word.startswith(_PRODUCTS))
    return " ".join([device.type, torch.backends.cpu.get_cpu_capability(), *sets])


def release_memory(device: torch.device) -> None:
    """Return to the system what torch's allocator keeps of a device, so that another process can use it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
