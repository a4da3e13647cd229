"""Make an environment with the real SGLang for a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import requests
from cpu_environment import ServerEnvironment, install_hook, virtual_environment

if TYPE_CHECKING:
    from served import Served

HERE = Path(__file__).parent
RELEASE = "0.5.23"
FLAGS = (
    *("--device", "cpu", "--dtype", "bfloat16", "--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-overlap-schedule", "--disable-cuda-graph", "--skip-server-warmup", "--sleep-on-idle"),
    *("--max-total-tokens", "8192", "--max-running-requests", "8"),
)
"""Flags that SGLang needs on a CPU."""


@dataclass(frozen=True, kw_only=True)
class SGLangEnvironment(ServerEnvironment):
    """An SGLang installation; see `ServerEnvironment`."""

    engine: str = "sglang"
    launch: tuple[str, ...] = ("-m", "sglang.launch_server")
    flags: tuple[str, ...] = FLAGS

    def with_overlap(self) -> Self:
        """Return a copy with the overlap scheduler, as in production: the next step is prepared during a pass."""
        return replace(self, flags=tuple(flag for flag in self.flags if flag != "--disable-overlap-schedule"))


def disables_overlap(served: Served) -> bool:
    """Tell whether a running server prepares the next step only after a pass; some releases decide that themselves."""
    told = requests.get(f"{served.handle.url}/get_server_info", timeout=60).json()
    return bool(told["disable_overlap_schedule"])


def sglang_environment(hook: Path) -> SGLangEnvironment:
    """Return the environment, and make what is missing.

    Args:
        hook: an empty directory; pytest-kld is installed into it, as it is in this checkout.

    """
    python = virtual_environment(f"sglang-{RELEASE}", HERE / f"requirements-{RELEASE}.txt")
    install_hook(python, hook)
    return SGLangEnvironment(python=python, variables=variables(hook, HERE / "stubs"))


def variables(*paths: Path) -> dict[str, str]:
    """Return the environment variables that SGLang needs on a CPU, with these directories on PYTHONPATH."""
    cores = os.cpu_count() or 1
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "SGLANG_CPU_OMP_THREADS_BIND": f"0-{cores - 1}" if cores > 1 else "0",
        "OMP_NUM_THREADS": str(cores),
        "HF_HUB_OFFLINE": "1",
    }
