"""Which device to run and compare on."""

import torch

from pytest_kld.errors import KLDError


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


def release_memory(device: torch.device) -> None:
    """Return to the system what torch's allocator keeps of a device, so that another process can use it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
