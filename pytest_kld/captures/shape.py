"""The shape of a capture's manifest: the required type and range of each field.

A digest detects damage; it does not tell who wrote the manifest. So a manifest, which may come from elsewhere or may
have been edited, is checked against this shape before it is used. It may have further fields, which nothing reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

Check = Callable[[Any, str], None]
"""Raises ValueError with the field's name and what was expected."""

_SHA256 = re.compile("[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_GREATEST = 1e30
_MOST = 2**62


def check_manifest(
    manifest: Mapping[str, Any], *, head_file: str, experts_file: str, window_file: Callable[[str, int], str]
) -> None:
    """Check a manifest of the current schema against its shape.

    Args:
        manifest: the contents of `capture.json`, without its own digest.
        head_file: the name of the head's file.
        experts_file: the name of the file with the tokens of each expert.
        window_file: returns the name of a window's file, by store and index.

    Raises:
        ValueError: a field is wrong; the message names it and what was expected.

    """
    _MANIFEST(manifest, "")
    store, names, files = manifest["store"], manifest["window_files"], manifest["files"]
    for index, name in enumerate(names):
        if name != (expected := window_file(store, index)):
            raise ValueError(f"window_files[{index}]: expected {expected!r}, got {_brief(name)}")
    routing = manifest["routing"]
    routed = routing is not None and routing["unobserved"] is None
    for name in (*names, *([head_file] if store == "hidden" else []), *([experts_file] if routed else [])):
        if name not in files:
            raise ValueError(f"files: {name!r} is missing")
    for name in files:
        if not all(_NAME.fullmatch(part) for part in name.split("/")) or PurePosixPath(name).is_absolute():
            raise ValueError(f"files: {_brief(name)} is not the name of a file in the capture's directory")
    if (manifest["transforms"] is None) == (store == "hidden"):
        raise ValueError(f"transforms: {'required' if store == 'hidden' else 'not allowed'} with the store {store}")
    if (decoding := manifest["protocol"].get("decoding")) is not None:
        _DECODING(decoding, "protocol.decoding")
        size = manifest["protocol"]["window_size"]
        _expect(decoding["prompt_size"] < size, "protocol.decoding.prompt_size", f"less than {size}", decoding)
    for field, wanted, got in (
        ("protocol.windows", len(names), manifest["protocol"]["windows"]),
        ("vocab_size", manifest["facts"]["vocab_size"], manifest["vocab_size"]),
    ):
        if got != wanted:
            raise ValueError(f"{field}: expected {wanted}, got {got}")


def _expect(condition: bool, where: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{where or 'the manifest'}: expected {expected}, got {_brief(value)}")


def _brief(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > _MOST:
        return "a very large number"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _text(value: Any, where: str) -> None:
    _expect(isinstance(value, str), where, "a string", value)


def _digest(value: Any, where: str) -> None:
    _expect(isinstance(value, str) and _SHA256.fullmatch(value) is not None, where, "a SHA-256", value)


def _mapping(value: Any, where: str) -> None:
    _expect(isinstance(value, dict), where, "an object", value)


def _whole(least: int) -> Check:
    def check(value: Any, where: str) -> None:
        good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST
        _expect(good, where, f"a whole number of at least {least}", value)

    return check


def _number(*, positive: bool = False) -> Check:
    def check(value: Any, where: str) -> None:
        good = isinstance(value, int | float) and not isinstance(value, bool) and -_GREATEST <= value <= _GREATEST
        _expect(good and (value > 0 or not positive), where, "a number" + " above 0" * positive, value)

    return check


def _one_of(*words: str) -> Check:
    return lambda value, where: _expect(value in words, where, f"one of {', '.join(words)}", value)


def _or_null(check: Check) -> Check:
    def checked(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return checked


def _list(check: Check, *, empty: bool = False) -> Check:
    def checked(value: Any, where: str) -> None:
        expected = "a list" + " that is not empty" * (not empty)
        _expect(isinstance(value, list) and (empty or len(value) > 0), where, expected, value)
        for index, item in enumerate(value):
            check(item, f"{where}[{index}]")

    return checked


def _values(check: Check) -> Check:
    def checked(value: Any, where: str) -> None:
        _mapping(value, where)
        for name, item in value.items():
            check(item, f"{where}[{name!a}]")

    return checked


def _fields(**checks: Check) -> Check:
    def checked(value: Any, where: str) -> None:
        _mapping(value, where)
        for name, check in checks.items():
            field = f"{where}.{name}".lstrip(".")
            if name not in value:
                raise ValueError(f"{field}: is missing")
            check(value[name], field)

    return checked


_DECODING = _fields(prompt_size=_whole(1), concurrency=_whole(1))
_MANIFEST = _fields(
    pytest_kld=_text,
    key=_mapping,
    model=_text,
    facts=_fields(
        model_class=_text,
        vocab_size=_whole(1),
        hidden_size=_or_null(_whole(1)),
        context_length=_or_null(_whole(1)),
        dtype=_text,
        quantization=_or_null(_text),
    ),
    protocol=_fields(
        dataset=_text,
        datasets=_list(_fields(dataset=_text, text_sha256=_text, windows=_whole(1))),
        text_sha256=_text,
        tokenizer=_text,
        windows=_whole(1),
        window_size=_whole(2),
        stride=_whole(1),
        bos=_or_null(_whole(0)),
        token_ids_sha256=_digest,
    ),
    store=_one_of("hidden", "logits", "logprobs"),
    store_reason=_text,
    vocab_size=_whole(1),
    transforms=_or_null(_fields(scale=_number(positive=True), softcap=_or_null(_number(positive=True)))),
    routing=_or_null(_fields(layers=_list(_whole(0), empty=True), experts=_whole(1), unobserved=_or_null(_text))),
    checks=_or_null(_fields(rows=_whole(0), worst=_number(), mean_kl_nats=_number())),
    window_files=_list(_text),
    files=_values(_fields(bytes=_whole(0), sha256=_digest)),
)
