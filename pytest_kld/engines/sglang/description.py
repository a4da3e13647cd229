"""A running server's description of itself."""

from __future__ import annotations

import hashlib
from typing import Any

from pytest_kld.engines.served.description import ask

_LEFT_OUT = {
    "api_key": "a secret",
    "admin_api_key": "a secret",
    "ssl_keyfile_password": "a secret",
    "host": "an address",
    "port": "an address",
    "nccl_port": "an address",
    "dist_init_addr": "an address",
    "node_rank": "which node answers",
    "launch_command": "the flags, with address and secrets; the other fields hold the values that SGLang derived",
    "internal_states": "momentary counters and memory",
    "status": "momentary state",
    "startup_time": "how long it took to start",
    "max_total_num_tokens": "the cache's capacity, derived from the free memory at start-up",
    "max_req_input_len": "the same, for one request",
    "random_seed": "SGLang draws it at each start; a prefill samples nothing that is kept",
    "log_level": "what is printed",
    "log_level_http": "what is printed",
    "log_requests": "what is printed",
    "log_requests_level": "what is printed",
    "watchdog_timeout": "when a server that hangs is killed",
    "dist_timeout": "when a collective that hangs is aborted",
    "download_dir": "where the weights are stored",
}
"""Fields of `/get_server_info` that move no logit, each with the reason; every other field is part of the key."""


def server_description(url: str, api_key: str | None) -> dict[str, Any]:
    """Return what determines the bits of a running server's captures: its version and arguments.

    Raises:
        ServerError: the server does not answer.

    """
    told = ask(url, "/get_server_info", api_key)
    version = told.pop("version", None)
    arguments = {name: _without(api_key, value) for name, value in sorted(told.items()) if name not in _LEFT_OUT}
    return {"versions": {"sglang": version}, "arguments": arguments}


def _without(api_key: str | None, value: Any) -> Any:
    """Return a value with a digest in place of each text that holds the key."""
    if isinstance(value, list):
        return [_without(api_key, item) for item in value]
    if isinstance(value, dict):
        return {name: _without(api_key, item) for name, item in value.items()}
    if api_key and isinstance(value, str) and api_key in value:
        return f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
    return value
