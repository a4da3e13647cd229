"""The keys of a suite file: what each means, what it takes, and its JSON Schema."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pytest_kld.gate.limits import LIMITS, MATRIX_LIMITS
from pytest_kld.gate.speed_limits import SPEED_LIMITS, SpeedLimit
from pytest_kld.settings.options import OPTIONS, Option
from pytest_kld.subjects.subject import EnginePath

_TAG = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]*")
_RESERVED_TAGS = {
    *("and", "or", "not", "None", "True", "False", "kld", "parametrize", "usefixtures", "filterwarnings"),
    *("skip", "skipif", "xfail", "tryfirst", "trylast"),
}
"""Words that mean something else to pytest's `-m`, or are markers of their own."""
_TEXT = {"type": "string", "minLength": 1}
_SCALAR = {"type": ["string", "number"]}
_WORDS = {"anyOf": [_TEXT, {"type": "array", "items": {"type": "string"}}]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a table.

    Attributes:
        name: the key.
        help: one sentence.
        schema: the JSON Schema of its value.
        check: raises ValueError if a value is not valid; the message says what is.
        required: whether the table must have it.

    """

    name: str
    help: str
    schema: Mapping[str, Any]
    check: Callable[[Any], object]
    required: bool = False


class InnerError(ValueError):
    """A value is wrong because of something inside it.

    Attributes:
        where: the keys that lead there.

    """

    def __init__(self, where: tuple[str | int, ...], message: str) -> None:
        """Record the place."""
        super().__init__(message)
        self.where = where


def _table_schema(keys: Mapping[str, Key]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [key.name for key in keys.values() if key.required],
        "properties": {key.name: {"description": key.help, **key.schema} for key in keys.values()},
    }


def text(value: Any) -> str:
    """Return a value that is a text."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a text, got {shown(value)}")
    return value


def words(value: Any) -> tuple[str, ...]:
    """Return flags, given as one text, which is split as a shell splits it, or as a list of words."""
    if isinstance(value, str):
        return tuple(shlex.split(value))
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise ValueError(f"expected flags, as one text or as a list of texts, got {shown(value)}")


def arguments(value: Any) -> tuple[str, ...] | dict[str, Any]:
    """Return the flags of a server, or keyword arguments of `from_pretrained`."""
    if isinstance(value, dict):
        return value
    return words(value)


def variables(value: Any) -> dict[str, str]:
    """Return environment variables. Numbers are written as in the file."""
    if not isinstance(value, dict):
        raise ValueError(f'expected a table such as {{ NAME = "value" }}, got {shown(value)}')
    for name in value:
        if not name.isidentifier():
            raise InnerError((name,), f"{name!r} is not the name of an environment variable")
    return {name: scalar(one) for name, one in value.items()}


def scalar(value: Any) -> str:
    """Return a text or a number as an option takes it, that is, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected a text or a number, got {shown(value)}")
    return value if isinstance(value, str) else repr(value)


def tags(value: Any) -> tuple[str, ...]:
    """Return words that become pytest's markers."""
    if not isinstance(value, list):
        raise ValueError(f"expected a list of words, got {shown(value)}")
    for tag in value:
        if not isinstance(tag, str) or not _TAG.fullmatch(tag) or tag in _RESERVED_TAGS:
            raise ValueError(
                f"expected words that can be pytest markers (letters, digits and _ . + -, beginning with a letter; "
                f"not {', '.join(sorted(_RESERVED_TAGS))}), got {shown(tag)}"
            )
    return tuple(dict.fromkeys(value))


def engine_path(value: Any) -> str:
    """Return the path through the engine."""
    if value not in get_args(EnginePath):
        raise ValueError(f"expected one of {', '.join(get_args(EnginePath))}, got {shown(value)}")
    return str(value)


def engine(value: Any) -> str:
    """Return an engine's name."""
    return str(_option("engine").parse(text(value), Path()))


def shown(value: Any) -> str:
    """Return a value as a message quotes it."""
    quoted = repr(value)
    return quoted if len(quoted) < 80 else f"{quoted[:77]}..."


def _option(name: str) -> Option:
    return next(option for option in OPTIONS if option.name == name)


def option_texts(option: Option, value: Any) -> bool | str | list[str]:
    """Return an option's value as the command line would give it."""
    if option.flag:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {shown(value)}")
        return value
    if option.repeatable and isinstance(value, list):
        return [scalar(one) for one in value]
    return [scalar(value)] if option.repeatable else scalar(value)


def _option_key(option: Option) -> Key:
    schema: dict[str, Any] = {"type": "boolean"} if option.flag else dict(_SCALAR)
    if option.repeatable:
        schema = {"anyOf": [schema, {"type": "array", "items": _SCALAR, "minItems": 1}]}
    return Key(name=option.name, help=option.help, schema=schema, check=lambda value: option_texts(option, value))


_MODEL = (
    Key(
        name="model",
        help="The model: a directory (relative to this file), a hub id with optional @REVISION, or a capture.",
        schema=_TEXT,
        check=text,
        required=True,
    ),
    Key(
        name="engine",
        help="The engine that runs it. Default: the engine of the protocol, and of the command line.",
        schema=_TEXT,
        check=engine,
    ),
    Key(
        name="args",
        help="Flags of its server, as one text or as a list; for the engine transformers a table of keyword arguments "
        "of from_pretrained.",
        schema={"anyOf": [*_WORDS["anyOf"], {"type": "object"}]},
        check=arguments,
    ),
    Key(
        name="env",
        help="Environment variables of its server.",
        schema={"type": "object", "additionalProperties": _SCALAR},
        check=variables,
    ),
    Key(name="url", help="A running server with the hook, used instead of booting one.", schema=_TEXT, check=text),
)
REFERENCE_KEYS = {key.name: key for key in _MODEL}
PROTOCOL_KEYS = {option.name: _option_key(option) for option in OPTIONS if option.in_suite}
LIMIT_KEYS = {
    name: Key(
        name=name,
        help=f"{'Highest' if limit.upper else 'Lowest'} {limit.label} that passes.",
        schema={"type": "number", "minimum": 0},
        check=limit.parse,
    )
    for name, limit in {**LIMITS, **MATRIX_LIMITS}.items()
}


def limits(value: Any) -> dict[str, float]:
    """Return bounds by limit."""
    return _table(LIMIT_KEYS, value)


def _speed_bound(limit: SpeedLimit, value: Any) -> str:
    """Return bounds on speed as an option takes them."""
    written = scalar(value)
    limit.parse(written)
    return written


SPEED_KEYS = {
    "args": Key(
        name="args",
        help="Further flags of the server that is put under load, as one text or as a list.",
        schema=_WORDS,
        check=lambda value: shlex.join(words(value)),
    ),
    **{
        name: Key(
            name=name,
            help=f"{'Highest' if limit.upper else 'Lowest'} {limit.label}: a number, or CONCURRENCY:BOUND,…",
            schema=_SCALAR,
            check=partial(_speed_bound, limit),
        )
        for name, limit in SPEED_LIMITS.items()
    },
}


def speed(value: Any) -> dict[str, str]:
    """Return what holds for the speed of a candidate, see `Subject.speed`."""
    return _table(SPEED_KEYS, value)


def _table(keys: Mapping[str, Key], value: Any) -> dict[str, Any]:
    """Check a table that stands inside another; the messages name its keys."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a table, got {shown(value)}")
    read = {}
    for name, one in value.items():
        if name not in keys:
            raise InnerError((name,), f"unknown key {name!r}; valid are {', '.join(keys)}")
        try:
            read[name] = keys[name].check(one)
        except ValueError as error:
            raise _inside(name, error) from None
    return read


def _inside(name: str | int, error: ValueError) -> InnerError:
    return InnerError((name, *getattr(error, "where", ())), str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisValue:
    """One value of an axis.

    Attributes:
        value: the value of the flag or keyword argument that the axis names; None if `args` or `env` say what it is.
        args: flags, or keyword arguments of `from_pretrained`.
        env: environment variables.

    """

    value: Any = None
    args: tuple[str, ...] | dict[str, Any] = ()
    env: Mapping[str, str] = field(default_factory=dict)


_AXIS_VALUE = {
    "args": next(key for key in _MODEL if key.name == "args"),
    "env": next(key for key in _MODEL if key.name == "env"),
}


def axes(value: Any) -> dict[str, dict[str, AxisValue]]:
    """Return the values of each axis by their names."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a table of axes, got {shown(value)}")
    read = {}
    for name, one in value.items():
        try:
            read[name] = _axis(name, one)
        except ValueError as error:
            raise _inside(name, error) from None
    return read


def _axis(name: str, value: Any) -> dict[str, AxisValue]:
    if isinstance(value, list) and value and all(isinstance(one, str | int | float) for one in value):
        found = {str(one).lower() if isinstance(one, bool) else str(one): AxisValue(value=one) for one in value}
        if len(found) < len(value):
            raise ValueError(f"a value is given twice in {shown(value)}")
        return found
    if isinstance(value, dict) and value:
        return {label: _labelled(label, one) for label, one in value.items()}
    raise ValueError(
        f"expected a list of values of the flag or argument {name!r}, or a table such as "
        f'{{ label = "--flag value" }}, got {shown(value)}'
    )


def _labelled(label: str, value: Any) -> AxisValue:
    try:
        if isinstance(value, dict):
            return AxisValue(**_table(_AXIS_VALUE, value))
        return AxisValue(args=words(value))
    except ValueError as error:
        raise _inside(label, error) from None


def exclusions(value: Any) -> list[dict[str, str]]:
    """Return combinations of values of axes."""
    if not isinstance(value, list) or not all(isinstance(one, dict) and one for one in value):
        raise ValueError(f'expected a list of tables such as {{ axis = "value" }}, got {shown(value)}')
    return [
        {name: str(one).lower() if isinstance(one, bool) else scalar(one) for name, one in combination.items()}
        for combination in value
    ]


_AXIS_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": {"type": ["string", "number", "boolean"]}, "minItems": 1},
        {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                "anyOf": [
                    *_WORDS["anyOf"],
                    {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {name: dict(key.schema) for name, key in _AXIS_VALUE.items()},
                    },
                ]
            },
        },
    ]
}
CANDIDATE_KEYS = {
    key.name: key
    for key in (
        Key(
            name="name",
            help="Its name in tests and reports. Default: the model as it is written here.",
            schema=_TEXT,
            check=text,
        ),
        *_MODEL,
        Key(
            name="axes",
            help="What is varied: by axis, a list of values of the flag (or keyword argument) that the axis is named "
            "after, or a table of labels with their flags. Each combination is a Subject.",
            schema={"type": "object", "additionalProperties": _AXIS_SCHEMA},
            check=axes,
        ),
        Key(
            name="exclude",
            help="Combinations to leave out: tables of axes with a value.",
            schema={
                "type": "array",
                "items": {
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": {"type": ["string", "number", "boolean"]},
                },
            },
            check=exclusions,
        ),
        Key(
            name="path",
            help="The path through the engine that is measured.",
            schema={"enum": list(get_args(EnginePath))},
            check=engine_path,
        ),
        Key(
            name="limits",
            help="Its own limits, which win over all others.",
            schema=_table_schema(LIMIT_KEYS),
            check=limits,
        ),
        Key(
            name="speed",
            help="What holds for its speed: further flags of the server under load, and limits.",
            schema=_table_schema(SPEED_KEYS),
            check=speed,
        ),
        Key(
            name="tags",
            help="Words that become pytest markers: -m TAG selects it.",
            schema={"type": "array", "items": {"type": "string", "pattern": f"^{_TAG.pattern}$"}},
            check=tags,
        ),
        Key(name="skip", help="Why it is not measured.", schema=_TEXT, check=text),
        Key(name="xfail", help="Why it is expected to exceed its limits.", schema=_TEXT, check=text),
    )
}


def suite_schema() -> dict[str, Any]:
    """Return the JSON Schema of suite files, for editors; `suite.schema.json` is a copy of it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A suite file of pytest-kld (*.kld.toml)",
        "type": "object",
        "additionalProperties": False,
        "required": ["candidate"],
        "properties": {
            "reference": {"description": "What the candidates are compared with.", **_table_schema(REFERENCE_KEYS)},
            "protocol": {"description": "Options for this suite.", **_table_schema(PROTOCOL_KEYS)},
            "limits": {"description": "Limits for all candidates.", **_table_schema(LIMIT_KEYS)},
            "candidate": {
                "description": "What is gated: a table [[candidate]] for each.",
                "type": "array",
                "minItems": 1,
                "items": _table_schema(CANDIDATE_KEYS),
            },
        },
    }
