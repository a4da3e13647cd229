"""Stands in for the interpreter that runs SGLang: `python scripted_sglang.py -m sglang.launch_server …`.

With `-m pytest_kld.hook` it reports what a good installation reports. As a launcher it writes its environment and its
flags into the capture directory, then answers /health on its port until it is ended.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path

from scripted_server import Handler

from pytest_kld import __version__
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.engines.sglang.arguments import RULES
from pytest_kld.engines.sglang.kind import KIND
from pytest_kld.hook.protocol import CAPTURE_DIR_VARIABLE, PROTOCOL
from pytest_kld.progress import Silent

GOOD = {
    "protocol": PROTOCOL,
    "pytest_kld": __version__,
    "versions": {"sglang": "0.5.23"},
    "devices": ["NVIDIA H100"],
    "options": None,
    "hooked": True,
    "why_not": None,
}
STARTED = "started.json"
COMMAND = (sys.executable, str(Path(__file__)), *KIND.launch)


def make_pool(directory: Path, command: tuple[str, ...] = COMMAND) -> ServerPool:
    """Return a pool that starts this server."""
    return ServerPool(
        kind=KIND,
        command=command,
        capture_dir=directory / "spool",
        log_dir=directory / "logs",
        startup_timeout=60,
        settings=Settings(),
        progress=Silent(),
    )


def started(pool: ServerPool) -> dict[str, dict[str, str]]:
    """Return the environment and flags of the server that was started last."""
    told: dict[str, dict[str, str]] = json.loads((pool.capture_dir / STARTED).read_text())
    return told


def main() -> None:
    if sys.argv[1:] == ["-m", "pytest_kld.hook", KIND.seams]:
        print(json.dumps(GOOD))
        return
    given = {name: " ".join(values) for name, values in RULES.split(sys.argv[3:])}
    told = {"environment": dict(os.environ), "flags": given}
    (Path(os.environ[CAPTURE_DIR_VARIABLE]) / STARTED).write_text(json.dumps(told))
    ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
