"""The command that starts the scripted server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pytest_kld.servers.server import ServerCommand, free_port

SCRIPT = Path(__file__).parent / "scripted_server.py"


def command(behaviour: str, tmp_path: Path, *, startup_timeout: float = 30, grace: float = 2) -> ServerCommand:
    port = free_port()
    return ServerCommand(
        argv=[sys.executable, str(SCRIPT), behaviour, str(port)],
        environment={**os.environ, "PIDS": str(tmp_path / "pids")},
        url=f"http://127.0.0.1:{port}",
        health="/health",
        log=tmp_path / "logs" / "server.log",
        startup_timeout=startup_timeout,
        grace=grace,
        hint=lambda log: "buy a larger GPU" if "out of memory" in log else None,
    )
