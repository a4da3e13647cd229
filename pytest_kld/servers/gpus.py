"""What `nvidia-smi` reports about this machine's GPUs. Standard library only: SGLang's side uses it too."""

from __future__ import annotations

import shutil
import subprocess


def query_gpus(field: str) -> tuple[str, ...]:
    """Return a field (`uuid`, `name`) of each GPU in the order of their indices; empty if there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    answer = subprocess.run(  # noqa: S603
        [program, f"--query-gpu={field}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip()) if answer.returncode == 0 else ()
