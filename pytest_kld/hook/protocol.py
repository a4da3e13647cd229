"""What the two sides of a capture agree on: request ids and files in a directory that both see.

    DIRECTORY/RUN/request.json                    pytest-kld: what is wanted; written before the first request
    DIRECTORY/RUN/handshake.json                  hook: who answers; written at the first request
    DIRECTORY/RUN/head-RANK.safetensors           hook: each rank's part of the head, if it is wanted
    DIRECTORY/RUN/WINDOW.START.safetensors        hook: rows of a window from position START on
    DIRECTORY/RUN/error-RANK.txt                  hook: what went wrong; the run is lost
    DIRECTORY/install-error-PID.txt               hook: it could not be put in

A run is one series of requests. Its name is random, so servers, sessions and machines may share a directory. A file
appears under its name when it is complete. Standard library only: this is imported on both sides.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CAPTURE_DIR_VARIABLE = "PYTEST_KLD_CAPTURE_DIR"
"""The one environment variable: the directory. Without it the hook does nothing."""
PROTOCOL = 2
"""Version of the ids and files below. The handshake carries it; both sides must have the same."""

REQUEST_FILE = "request.json"
HANDSHAKE_FILE = "handshake.json"
_RID = re.compile(r"pytest-kld:([0-9a-f]{32}):(\d+)")


def new_run() -> str:
    """Return the name of a new run."""
    return uuid.uuid4().hex


def request_id(run: str, window: int) -> str:
    """Return the request id of a window."""
    return f"pytest-kld:{run}:{window}"


def parse_request_id(rid: object) -> tuple[str, int] | None:
    """Return run and window of a request id, or None if it is not ours."""
    match = _RID.fullmatch(rid) if isinstance(rid, str) else None
    return (match[1], int(match[2])) if match else None


def head_file(rank: int) -> str:
    """Return the name of a rank's part of the head."""
    return f"head-{rank}.safetensors"


def piece_file(window: int, start: int) -> str:
    """Return the name of the rows of a window from a position on."""
    return f"{window}.{start}.safetensors"


def error_file(rank: int) -> str:
    """Return the name of a rank's error report."""
    return f"error-{rank}.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRequest:
    """What is wanted of every window of a run.

    Attributes:
        hidden: the last hidden states of all positions, and logits only at `rows`; else all logits.
        rows: positions whose logits are wanted with the hidden states.
        head: each rank's part of the head.

    """

    hidden: bool
    rows: tuple[int, ...] = ()
    head: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CaptureRequest:
        """Read what `to_json` gave."""
        return cls(**{**data, "rows": tuple(data["rows"])})


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file under another name first, so that nobody reads half of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(contents)
    temporary.replace(path)


def write_json_whole(path: Path, value: Any) -> None:
    """Write JSON under another name first."""
    write_whole(path, json.dumps(value, indent=2, sort_keys=True).encode())


def report_install_error(directory: str, text: str) -> None:
    """Leave a report of a hook that could not be put in; where that fails too, nobody answers and that is noticed."""
    try:
        write_whole(Path(directory) / f"install-error-{os.getpid()}.txt", text.encode())
    except OSError:
        return
