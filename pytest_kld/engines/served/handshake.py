"""The handshake as this side reads it: what the hook of a server, which may be anybody's, says of that server."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_kld import __version__
from pytest_kld.errors import ServerError
from pytest_kld.hook.protocol import ORIGIN, PROTOCOL

_MOST_BYTES = 16 << 20
_MOST = 1 << 40
_MOST_RANKS = 1 << 16
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def read_handshake(path: Path, url: str) -> dict[str, Any]:
    """Read a handshake.

    Args:
        path: the file.
        url: the server's address, for messages.

    Raises:
        ServerError: it cannot be read, another version of pytest-kld wrote it, or a field is missing or has another
            type.

    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        told = json.loads(text) if len(text) <= _MOST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise ServerError(f"the handshake of the server {url} cannot be read: {error!r}") from error
    if not isinstance(told, dict):
        raise ServerError(f"the handshake of the server {url} is not an object, or it is too large")
    if told.get("protocol") != PROTOCOL or told.get("pytest_kld") != __version__:
        raise ServerError(
            f"the server {url} has the hook of pytest-kld {_brief(told.get('pytest_kld'))} (protocol "
            f"{_brief(told.get('protocol'))}), and this is {__version__} (protocol {PROTOCOL}): install the same "
            "version on both sides."
        )
    _require(_FIELDS, told, "", url)
    _require(_HEAD, told["head"], "head.", url)
    if told["routing"] is not None:
        _require(_ROUTING, told["routing"], "routing.", url)
    return told


def _require(fields: dict[str, Callable[[Any], bool]], told: dict[str, Any], where: str, url: str) -> None:
    for name, fits in fields.items():
        if name not in told:
            raise ServerError(f"the handshake of the server {url} lacks {where}{name}")
        if not fits(told[name]):
            raise ServerError(
                f"the handshake of the server {url} has {where}{name} = {_brief(told[name])}, which this version of "
                "its hook does not write"
            )


def _brief(value: Any) -> str:
    text = ascii(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text.strip("'")[:80]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MOST and math.isfinite(value)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_HEAD = {"plain": lambda value: isinstance(value, bool), "scale": _number, "softcap": _or_null(_number)}
_ROUTING = {
    "layers": lambda value: isinstance(value, list) and all(map(_whole(0, _MOST), value)),
    "experts": _whole(1, _MOST),
    "per_token": _or_null(_whole(1, _MOST)),
    "unobserved": _or_null(_text),
}
_FIELDS = {
    **dict.fromkeys(("engine", "version", "device", "model_class", "torch", ORIGIN), _text),
    **dict.fromkeys(("vocab_size", "hidden_size"), _whole(1, _MOST)),
    **dict.fromkeys(("arguments", "environment", "head"), _object),
    **dict.fromkeys(("quantization", "refusal"), _or_null(_text)),
    "model_names": _texts,
    "dtype": lambda value: value in _DTYPES,
    "head_ranks": _whole(1, _MOST_RANKS),
    "routing": _or_null(_object),
}
