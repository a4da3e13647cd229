"""A `nvidia-smi` on PATH that reports GPUs that do not exist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def put_on_path(directory: Path, monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    """Make the machine appear to have GPUs with these UUIDs, in PCI bus order."""
    program = directory / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text("#!/bin/sh\n" + "".join(f"echo {uuid}\n" for uuid in uuids))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
