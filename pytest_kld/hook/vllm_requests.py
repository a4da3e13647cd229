"""vLLM's names for requests, and what ours carry. Both sides import this module: standard library only."""

from __future__ import annotations

import re

from pytest_kld.hook.protocol import parse_request_id, request_id

TOGETHER = "pytest_kld_together"
"""The name of the extra argument of a request to decode: how many sequences its group has."""
_INTERNAL_ID = re.compile(r"cmpl-(.+?)-(\d+)(?:-[0-9a-f]{8})?")
"""The worker's name for a request of /v1/completions: the client's id, the prompt's number, and something random,
which may be digits only."""


def split_name(name: str) -> tuple[str, int] | None:
    """Return what the worker's name for a request is made of: its client's id, and the number of its prompt."""
    match = _INTERNAL_ID.fullmatch(name)
    return None if match is None else (match[1], int(match[2]))


def external_id(name: str) -> str:
    """Return our id of a request; for another's, the id that its client gave it.

    The prompts of one request to decode have consecutive windows, and its id names the first.
    """
    parts = split_name(name)
    if parts is None:
        return name
    known = parse_request_id(parts[0])
    return parts[0] if known is None else request_id(known[0], known[1] + parts[1])
