"""The protocol between the two sides of a capture: request ids, and files in a directory that both see.

    DIRECTORY/RUN/request.json                    pytest-kld: what to capture; written before the first request
    DIRECTORY/RUN/handshake.json                  hook: the server's description; written at the first request, again
                                                  by a server that was restarted meanwhile
    DIRECTORY/RUN/head-RANK.safetensors           hook: each rank's part of the head, if requested
    DIRECTORY/RUN/tokens-WINDOW.json              pytest-kld: a window's token ids, of which those after the prompt are
                                                  forced; written before its request, if the run decodes
    DIRECTORY/RUN/WINDOW.START.safetensors        hook: rows of a window, starting at position START
    DIRECTORY/RUN/error-RANK.txt                  hook: what went wrong; the run has failed
    DIRECTORY/install-error-PID.txt               hook: why it could not be installed

A run is one series of requests. Its name is random, so servers, sessions and machines may share a directory. A file
appears under its name once it is complete. Handshake, heads and rows carry the origin of the process that wrote them,
so that rows of a server that was restarted are not taken for those of the one before. Standard library only: both sides
import this module.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

CAPTURE_DIR_VARIABLE = "PYTEST_KLD_CAPTURE_DIR"
"""The environment variable that names the directory, the only one. Without it the hook does nothing."""
PROTOCOL = 4
"""Version of the ids and files below. The handshake carries it; both sides must have the same version."""

REQUEST_FILE = "request.json"
HANDSHAKE_FILE = "handshake.json"
ORIGIN = "origin"
"""The name under which handshakes, and the headers of tensor files, carry the writing process's `origin`."""
_RID = re.compile(r"pytest-kld:([0-9a-f]{32}):(\d+)")


@cache
def _origin(pid: int) -> str:
    return f"{pid}-{uuid.uuid4().hex}"


def origin() -> str:
    """Return a name that this process has, and no other before or after it. A fork has its own."""
    return _origin(os.getpid())


def new_run() -> str:
    """Return the name of a new run."""
    return uuid.uuid4().hex


def request_id(run: str, window: int) -> str:
    """Return the request id of a window."""
    return f"pytest-kld:{run}:{window}"


def parse_request_id(rid: object) -> tuple[str, int] | None:
    """Return the run and the window of a request id, or None if it is not ours."""
    match = _RID.fullmatch(rid) if isinstance(rid, str) else None
    return (match[1], int(match[2])) if match else None


def head_file(rank: int) -> str:
    """Return the file name for a rank's part of the head."""
    return f"head-{rank}.safetensors"


def piece_file(window: int, start: int) -> str:
    """Return the file name for the rows of a window that start at a position."""
    return f"{window}.{start}.safetensors"


def tokens_file(window: int) -> str:
    """Return the file name for a window's token ids, in a run that decodes."""
    return f"tokens-{window}.json"


def error_file(rank: int) -> str:
    """Return the file name for a rank's error report."""
    return f"error-{rank}.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRequest:
    """What to capture from every window of a run.

    Attributes:
        hidden: whether to capture the last hidden states of all positions and logits only at `rows`; otherwise all
            logits.
        rows: positions whose logits are captured with the hidden states.
        head: whether to capture each rank's part of the head.
        prompt_size: if the run decodes, the number of tokens that each request prefills; what follows is captured.

    """

    hidden: bool
    rows: tuple[int, ...] = ()
    head: bool = False
    prompt_size: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CaptureRequest:
        """Read what `to_json` returned."""
        return cls(**{**data, "rows": tuple(data["rows"])})


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file under a temporary name first, so that nobody reads half of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(contents)
    temporary.replace(path)


def write_json_whole(path: Path, value: Any) -> None:
    """Write JSON under a temporary name first."""
    write_whole(path, json.dumps(value, indent=2, sort_keys=True).encode())


def report_error(run: Path, rank: int, text: str) -> None:
    """Report that a run has failed. If its directory is gone, nobody is waiting for it."""
    try:
        write_whole(run / error_file(rank), text.encode())
    except OSError:
        return


def report_install_error(directory: str, text: str) -> None:
    """Report a hook that could not be installed. If that fails too, the other side notices the missing handshake."""
    try:
        write_whole(Path(directory) / f"install-error-{os.getpid()}.txt", text.encode())
    except OSError:
        return
