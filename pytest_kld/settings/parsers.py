"""How the texts of options and ini keys become values.

Each parser takes the text and the directory that relative paths start from, and raises ValueError, whose message says
what is valid.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_kld.gate import speed_limits
from pytest_kld.gate.limits import Limit
from pytest_kld.gate.number import decimal_number, shown, whole_number
from pytest_kld.gate.speed_limits import Bounds, SpeedLimit

if TYPE_CHECKING:  # imported when parsing: sessions without such options do not pay for them
    from pytest_kld.gate.regression import Allowance
    from pytest_kld.gate.result import Shard
    from pytest_kld.subjects.model import ModelSpec

MOST_WINDOWS = 10_000_000
LONGEST_WINDOW = 10_000_000
"""In tokens: as long as the longest contexts that models are made for."""
MOST_SEQUENCES = 10_000
LONGEST_STRIDE = 1_000_000_000
"""In tokens: at this stride, the start of the last of `MOST_WINDOWS` windows still fits in 64 bits."""
MOST_SHARDS = 100_000
LONGEST_WAIT = 1_000_000
"""In seconds: eleven days."""
_GREATEST_CONFIDENCE = 0.999999
_GREATEST_SIZE = 1e18
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(kB|MB|GB|TB)")
_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*")
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def path_of(text: str, base: Path) -> Path:
    """Return an absolute path that safetensors can open."""
    return _in_utf8((base / Path(text).expanduser()).resolve())


def _in_utf8(path: Path) -> Path:
    """Reject a path that safetensors could not open, before anything is measured."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} is not UTF-8, and safetensors cannot open files there; rename it") from None
    return path


def model(text: str, base: Path) -> ModelSpec:
    """Return the model that a text names: a directory, a hub id or a capture."""
    from pytest_kld.subjects.model import ModelSpec

    named = ModelSpec.parse(text, base)
    if named.path is not None:
        _in_utf8(named.path)
    return named


def report_file(text: str, base: Path) -> Path:
    """Reject now what could not be written after the measurement. A link to a regular file is followed."""
    from pytest_kld.files import TEMPORARY_SUFFIX_BYTES

    named = base / Path(text).expanduser()
    path = named.resolve()
    if named.exists() and not named.is_file():  # checked before resolving: /dev/stdout may lead to no path at all
        raise ValueError(f"expected a file that can be written, got {text!r} ({path}), which is not a regular file")
    above = next(parent for parent in path.parents if parent.exists())
    too_long = len(os.fsencode(path.name)) > os.pathconf(above, "PC_NAME_MAX") - TEMPORARY_SUFFIX_BYTES
    if too_long or not path.name or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"expected a file that can be written, got {text!r} ({path})")
    return path


def dataset(text: str, base: Path) -> str:
    """Keep names; make a file named in an ini file relative to the directory in which pytest was called."""
    if not Path(text).suffix:
        return text
    from pytest_kld.text.corpus import CORPUS_FILES

    if Path(text).suffix not in CORPUS_FILES or Path(text).expanduser().is_absolute():
        return text
    return os.path.relpath(base / text)


def choice(*choices: str) -> Callable[[str, Path], str]:
    """Return a parser that takes one of these words."""

    def parse(text: str, _: Path) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}")
        return text

    return parse


def whole(least: int, greatest: int) -> Callable[[str, Path], int]:
    """Return a parser of whole numbers in a range."""

    def parse(text: str, _: Path) -> int:
        number = whole_number(text)
        if number is None or number < least:
            raise ValueError(f"expected a whole number of at least {least}, got {shown(text)}")
        if number > greatest:
            raise ValueError(f"expected a whole number of at most {greatest:,}, got {shown(text)}")
        return number

    return parse


def _window_count(text: str, base: Path) -> int | None:
    try:
        return None if text == "max" else whole(1, MOST_WINDOWS)(text, base)
    except ValueError as error:
        raise ValueError(f"{error} (or `max` for as many as the text yields, or `auto`)") from None


def window_plan(text: str, base: Path) -> tuple[int | None, bool]:
    """Return the maximum number of windows, and whether to stop earlier if fewer decide every limit."""
    word, _, most = text.partition(":")
    if word != "auto":
        return _window_count(text, base), False
    return _window_count(most or "100", base), True


def confidence(text: str, _: Path) -> float:
    """Return the level of a confidence interval."""
    number = decimal_number(text)
    if number is None or not 0.5 <= number <= _GREATEST_CONFIDENCE:
        raise ValueError(
            f"expected a number of at least 0.5 and at most {_GREATEST_CONFIDENCE}, e.g. 0.95, got {shown(text)}"
        )
    return number


def size(text: str, _: Path) -> int:
    """Return a number of bytes."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a size such as 500GB or 1.5TB, got {shown(text)}")
    number = float(match[1]) * _UNITS[match[2]]
    if number > _GREATEST_SIZE:
        raise ValueError(f"expected a size of at most 1000000TB, got {shown(text)}")
    return round(number)


def device(text: str, _: Path) -> str:
    """Return the name of a device of torch."""
    if text not in ("auto", "cpu", "cuda") and not re.fullmatch("cuda:[0-9]{1,3}", text):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {shown(text)}")
    return text


def command(engine: str) -> Callable[[str, Path], tuple[str, ...]]:
    """Return a parser of the command that starts an engine's server."""

    def parse(text: str, _: Path) -> tuple[str, ...]:
        from pytest_kld.engines.registry import served_kind
        from pytest_kld.engines.served.flags import parse_command

        return parse_command(text, served_kind(engine).launch, engine)

    return parse


def server_flags(text: str, _: Path) -> tuple[str, ...]:
    """Return the words of a server's flags; they are checked once the engine is known."""
    return tuple(shlex.split(text))


def variable(text: str, _: Path) -> tuple[str, str]:
    """Return the name and the value of an environment variable."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def url(text: str, _: Path) -> str:
    """Return a URL without a slash at its end."""
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"expected http://HOST:PORT, got {text!r}")
    return text.rstrip("/")


def shard(text: str, _: Path) -> Shard:
    """Return which shard of how many."""
    from pytest_kld.gate.result import Shard

    number, of = (whole_number(part) for part in (*text.split("/", 1), "")[:2])
    if number is None or of is None or not 1 <= number <= of <= MOST_SHARDS:
        raise ValueError(f"expected K/N, the K-th of N shards, with K from 1 to N, e.g. 2/5; got {text!r}")
    return Shard(number, of)


def cache_url(text: str, _: Path) -> str:
    """Return the URL of a shared cache, which fsspec's backends can open here."""
    protocol, separator, rest = text.partition("://")
    if not separator or not rest or not _PROTOCOL.fullmatch(protocol):
        raise ValueError(f"expected a URL such as s3://BUCKET/FOLDER or file:///shared/kld, got {text!r}")
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(f"{protocol}:// needs a package that is not installed here: {error}") from None
    except ValueError:
        raise ValueError(f"fsspec has no backend for {text!r}; try s3, gs, hf, https or file") from None
    return text.rstrip("/")


def baselines(text: str, base: Path) -> Path:
    """Return a directory of baselines, which must exist."""
    path = (base / Path(text).expanduser()).resolve()
    if not path.is_dir():
        raise ValueError(f"there is no directory {path}; `pytest-kld baseline promote` creates it")
    return path


def allowance(text: str, _: Path) -> Allowance:
    """Return how far a figure may fall behind its baseline."""
    from pytest_kld.gate.regression import Allowance

    return Allowance.parse(text)


def bound(limit: Limit) -> Callable[[str, Path], float]:
    """Return the parser of a bound."""
    return lambda text, _: limit.parse(text)


def words(text: str, _: Path) -> tuple[str, ...]:
    """Return the words of a command line."""
    return tuple(shlex.split(text))


def concurrencies(text: str, _: Path) -> tuple[int, ...]:
    """Return numbers of concurrent requests."""
    return speed_limits.concurrencies(text)


def speed_bounds(limit: SpeedLimit) -> Callable[[str, Path], Bounds]:
    """Return the parser of bounds on speed."""
    return lambda text, _: limit.parse(text)
