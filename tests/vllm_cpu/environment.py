"""Make an environment with the real vLLM for a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cpu_environment import ServerEnvironment, install_hook, virtual_environment

HERE = Path(__file__).parent
RELEASE = "0.32.0"
FLAGS = ("--dtype", "float32", "--enforce-eager")
"""Flags that make vLLM small enough for a CPU, and quick to start."""


@dataclass(frozen=True, kw_only=True)
class VLLMEnvironment(ServerEnvironment):
    """A vLLM installation; see `ServerEnvironment`."""

    engine: str = "vllm"
    launch: tuple[str, ...] = ("-m", "vllm.entrypoints.openai.api_server")
    flags: tuple[str, ...] = FLAGS


def vllm_environment(hook: Path) -> VLLMEnvironment:
    """Return the environment, and make what is missing.

    Args:
        hook: an empty directory; pytest-kld is installed into it, as it is in this checkout.

    """
    python = virtual_environment(f"vllm-{RELEASE}", HERE / f"requirements-{RELEASE}.txt")
    install_hook(python, hook)
    return VLLMEnvironment(python=python, variables=variables(hook))


def variables(*paths: Path) -> dict[str, str]:
    """Return the environment variables that vLLM needs on a CPU, with these directories on PYTHONPATH."""
    cores = os.cpu_count() or 1
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}" if cores > 1 else "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
