"""A `nvidia-smi` on PATH that tells of GPUs that are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def put_on_path(directory: Path, monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    """Let the machine have GPUs with these UUIDs, in the order of the PCI bus."""
    program = directory / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text("#!/bin/sh\n" + "".join(f"echo {uuid}\n" for uuid in uuids))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
