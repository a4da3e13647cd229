"""What a running server says of itself."""

from __future__ import annotations

from typing import Any

import requests

from pytest_kld.engines.served.kind import headers
from pytest_kld.errors import ServerError


def ask(url: str, path: str, api_key: str | None) -> dict[str, Any]:
    """Return a server's answer, which is a JSON object.

    Raises:
        ServerError: the server does not answer.

    """
    try:
        answer = requests.get(f"{url.rstrip('/')}{path}", headers=headers(api_key), timeout=60)
        answer.raise_for_status()
        told: dict[str, Any] = answer.json()
    except (requests.RequestException, ValueError) as error:
        raise ServerError(
            f"the server {url} does not answer: {error}. See --kld-ref-url, --kld-candidate-url, --kld-engine and, if "
            "it requires a key, --kld-api-key-env."
        ) from error
    return told
