"""What a running server says of itself."""

from __future__ import annotations

from typing import Any

import requests

from pytest_kld.engines.served.kind import headers
from pytest_kld.errors import ServerError

_VOLATILE = (
    "internal_states",
    "random_seed",
    "port",
    "host",
    "nccl_port",
    "dist_init_addr",
    "node_rank",
    "status",
    "log_",
    "key",
    "token",
    "password",
    "max_",
    "metrics",
    "watchdog",
    "served_model_name",
    "tokenizer",
    "crash_dump",
    "time",
    "command",
)
"""Parts of names in `/server_info` that are secret, change from one start to the next, or move no logit."""


def server_description(url: str, api_key: str | None) -> dict[str, Any]:
    """Return what determines the bits of a running server's captures: its version and arguments.

    Raises:
        ServerError: it does not answer.

    """
    try:
        answer = requests.get(f"{url.rstrip('/')}/get_server_info", headers=headers(api_key), timeout=60)
        answer.raise_for_status()
        told: dict[str, Any] = answer.json()
    except (requests.RequestException, ValueError) as error:
        raise ServerError(
            f"the server {url} does not answer: {error}. See --kld-ref-url, --kld-candidate-url and, if it wants a "
            "key, --kld-api-key-env."
        ) from error
    version = told.pop("version", None)
    arguments = {
        name: value
        for name, value in told.items()
        if isinstance(value, str | int | float | bool | list)
        and not any(part in name for part in _VOLATILE)
        and not (api_key and api_key in str(value))
    }
    return {"versions": {"sglang": version}, "arguments": arguments}
