"""The device to run and compare on."""

from pathlib import Path

import torch

from pytest_kld.errors import KLDError

_CPU_INFO = Path("/proc/cpuinfo")
_PRODUCTS = ("amx", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "bf16", "i8mm", "sve")
"""Instruction sets that a matrix product may use in addition to those that torch itself was compiled for."""


def pick_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into an available device.

    Raises:
        KLDError: a CUDA device is requested but not available.

    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise KLDError(f"--kld-device={name}: torch sees {torch.cuda.device_count()} CUDA devices; give cpu or auto")
    return device


def describe_device(device: torch.device) -> str:
    """Return the properties of a device that determine a product's bits: a GPU's name, a CPU's instruction sets.

    In bfloat16 a CPU's instruction sets matter: the logits of a tiny model with a sharp head differed by up to 0.4, and
    the mean KL by 0.002 nats. The number of threads is not included: with 1, 2 and 5 threads the logits were equal bit
    by bit, in float32 and in bfloat16 (torch 2.13).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    sets = []
    if _CPU_INFO.is_file():
        words = set(_CPU_INFO.read_text(encoding="utf-8", errors="replace").split())
        sets = sorted(word for word in words if word.startswith(_PRODUCTS))
    return " ".join([device.type, torch.backends.cpu.get_cpu_capability(), *sets])


def release_memory(device: torch.device) -> None:
    """Return the device memory that torch's allocator caches to the system, so that another process can use it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
